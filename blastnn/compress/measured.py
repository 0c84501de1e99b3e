"""What a job measures before it starts: how much its layers matter, once and for all.

From that follow the plan, whose budget is shared out anew, the weights of the layers' outputs, and
those of what leaves the blocks, for a refinement. All lie in the job's own folder, so that a
stopped job goes on with the same ones, or where other jobs find them, too, if they would measure
the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blastnn.compress.allocate import allocate
from blastnn.compress.job import Job
from blastnn.compress.journal import Journal, fingerprint
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.compress.plan_file import plan_from_file
from blastnn.compress.sensitivity import SensitivityPass, block_file, is_measured, outputs_file
from blastnn.files import write_json
from blastnn.models.tensors import read_tensors
from blastnn.structures import Channels

PLAN = "plan.json"
MEASUREMENT = "measured"
# Of a job's identity, what its measurement depends on besides what is measured.
ENVIRONMENT = ("model", "blastnn", "torch", "transformers", "threads")


def why_unmeasured(job: Job) -> str | None:
    """Why a job measures nothing beforehand; None if it does."""
    if job.windows is None:
        return "there is no calibration text to measure with"
    if job.options.keep >= 1.0:
        return "there is nothing to remove"
    return None


def why_not_allocated(job: Job) -> str | None:
    """Why a job's budget is not shared out by measurement; None if it is."""
    if job.plan_given:
        return "a plan file was given"
    if job.options.allocation == "uniform":
        return "uniform was asked for"
    return why_unmeasured(job)


def why_not_weighted(job: Job) -> str | None:
    """Why the outputs of a job's layers all count alike; None if they do not."""
    return "equal was asked for" if job.options.outputs == "equal" else why_unmeasured(job)


def refines(job: Job) -> bool:
    """Whether blocks are refined: asked for, and something is removed."""
    return job.options.refine > 0 and why_unmeasured(job) is None


@dataclass(frozen=True)
class Settled:
    """The ``plan`` to follow, and what was measured on the way to it, in ``folder`` if at all."""

    plan: Plan
    folder: Path

    def outputs(self, index: int) -> dict[str, Tensor]:
        """Blocks on the diagonal of ``G`` of one block's layers, as far as they were gathered."""
        path = outputs_file(self.folder, index)
        return read_tensors(path) if path.is_file() else {}

    def block_weight(self, index: int) -> Tensor | None:
        """``G (h, h)`` of what leaves one block; None where it was not gathered."""
        path = block_file(self.folder, index)
        return read_tensors(path)["G"] if path.is_file() else None


def settle(job: Job, journal: Journal) -> Settled:
    """The plan to follow; measures and allocates unless that was done in an earlier sitting."""
    allocated, refined = why_not_allocated(job) is None, refines(job)
    if not allocated and not refined and why_not_weighted(job) is not None:
        return Settled(job.plan, journal.folder / MEASUREMENT)
    path, measurement = journal.folder / PLAN, _pass_of(job, journal)
    if not path.is_file():
        spectra = measurement.run()
        plan = allocate(job.plan, spectra, job.options) if allocated else job.plan
        journal.seconds["measure"] = measurement.seconds
        journal.save()
        write_json(path, plan.to_json())
    elif not journal.weights_done:
        measurement.run()  # at once, but where it was shared and has gone since
    return Settled(plan_from_file(job.plan, path, job.walker.head), measurement.folder)


def forget(folder: Path) -> None:
    """Give the disk back what was measured in a folder; the plan stays.

    At once or not at all for whoever looks: half of a measurement would pass for a whole one.
    """
    gone = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def to_measure_with(options: Options, windows: int) -> list[int]:
    """Which of so many windows of calibration text to measure with: spread evenly over them."""
    count = min(options.gradient_windows, windows)
    return [index * windows // count for index in range(count)]


def measured_windows(job: Job) -> Tensor:
    """The windows to measure with ``(windows, window)``."""
    assert job.windows is not None
    ids = job.windows.ids
    return ids[to_measure_with(job.options, len(ids))]


def row_blocks(layer: LayerPlan, options: Options) -> int | None:
    """Into how many blocks of rows a layer's ``G`` is cut; None where it is not wanted."""
    if layer.spec is None or options.outputs != "weighted":
        return None
    if isinstance(layer.spec, Channels):
        return 1 if options.coupled and layer.spec.axis == "columns" else None
    return layer.spec.row_blocks()


def _pass_of(job: Job, journal: Journal) -> SensitivityPass:
    ids, options, folder = measured_windows(job), job.options, _folder(job, journal)
    plans = [job.plan.of_block(index) for index in range(len(job.walker.blocks))]
    if not is_measured(folder) and not journal.weights_done:
        job.progress.say(
            f"measuring how much each layer matters, on {ids.shape[0]} windows of {ids.shape[1]} "
            "tokens"
        )
    return SensitivityPass(
        walker=job.walker,
        ids=ids,
        layers=[_layers(of, options) for of in plans],
        folder=folder,
        seed=job.options.seed,
        blocks=refines(job),
        step=job.progress.measured,
    )


def _layers(plans: Sequence[LayerPlan], options: Options) -> dict[str, int | None]:
    """Of one block: what to measure, and in how many blocks of rows."""
    return {layer.name: row_blocks(layer, options) for layer in plans if layer.spec}


def _folder(job: Job, journal: Journal) -> Path:
    """Where what a job measures lies; one for all jobs that would measure the same, if shared."""
    if job.measurements is None:
        return journal.folder / MEASUREMENT
    plans = [job.plan.of_block(index) for index in range(len(job.walker.blocks))]
    decides = {
        **{key: journal.identity[key] for key in ENVIRONMENT},
        "ids": measured_windows(job).tolist(),
        "layers": [_layers(of, job.options) for of in plans],
        "seed": job.options.seed,
        "blocks": refines(job),
    }
    return job.measurements / fingerprint(decides)[:16]
