"""The errors a user can meet: each says what was given, what was expected and what to do."""


class BlastnnError(ValueError):
    """Base of every error blastnn raises on purpose; the command line prints it in one line."""


class StructureError(BlastnnError):
    """A structure's dimensions, rank, blocks or factors do not fit together."""


class FactorizationError(BlastnnError):
    """A weight or second moment no solver can work with, or a solver that does not apply."""


class DtypeError(BlastnnError):
    """A dtype that does not exist, or that what was asked for does not take."""


class CheckpointError(BlastnnError):
    """A file of a model folder is missing, unreadable, refused, or contradicts another."""


class ModelError(BlastnnError):
    """A model that cannot be found, built or walked."""


class CalibrationError(BlastnnError):
    """Calibration or evaluation text that cannot be used as given."""


class PlanError(BlastnnError):
    """A budget, target pattern or plan file that cannot be carried out."""


class ResumeError(BlastnnError):
    """An output folder that cannot be written to, or an earlier run that cannot be continued."""


class MeasurementError(BlastnnError):
    """A measurement whose check failed, so that its figures would mean nothing."""


class ExportError(BlastnnError):
    """A model that another runtime cannot take, or a file that it cannot be written to."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
