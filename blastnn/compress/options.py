"""What the user may choose about a compression, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from blastnn.dtypes import dtype_named
from blastnn.errors import PlanError
from blastnn.quantization import Quantization, quantization_named
from blastnn.structures import structure_named
from blastnn.structures.base import LARGEST_SEED, is_seed

PARTS = ("targets", "model")
INPUTS = ("compressed", "dense")
MOMENTS = ("full", "diagonal")
ALLOCATIONS = ("measured", "uniform")
OUTPUTS = ("weighted", "equal")
JOINED = ("lowrank", "blast")  # structures with a right factor that several layers can share


@dataclass(frozen=True)
class Options:
    """All choices that change the compressed weights.

    Attributes:
        keep: share of the parameters to keep, in (0, 1].
        of: whose parameters ``keep`` counts: of the ``targets`` or of the whole ``model``.
        structure: registered name of the structure.
        blocks: block counts ``(b1, b2)``, for structures that have blocks; None is the structure's
            own default.
        targets: patterns (``fnmatch``) over layer names or kinds; empty means every linear layer
            inside the blocks.
        solver: registered name of the solver, or ``auto``.
        sweeps: iterations of the solver, where it iterates.
        inputs: whose inputs the layers are fitted on: those of the ``compressed`` model, so that
            each layer repairs what those before it got wrong, or of the ``dense`` model, so that
            every layer is fitted by itself.
        moment: what a fit knows of the inputs: their ``full`` second moment, or its ``diagonal``,
            as if features were uncorrelated (reported errors are then weighted so too).
        tokens, window: how much calibration text, and the length of a sequence.
        damping: added to the second moments' diagonals, relative to their mean.
        dtype: of the written tensors; None keeps the source's.
        quantize: ``int8`` or ``int4`` stores the large factors in few bits; None does not.
        seed: of the solver, of the labels drawn to measure with, and of the refinement's order.
        drift: where a layer's output is added to a stream, the share of what that has drifted off
            that the layer repairs besides its own error, in [0, 1] (``residual.py``). Of no effect
            where layers are fitted by themselves (``inputs`` dense, no calibration), where all that
            is known is a ``diagonal`` moment, and in blocks that are called more than once.
        refine: how often the calibration text passes through every finished block to refine its
            factors together (``refine.py``); 0 leaves them as they were fitted.
        allocation: how the budget is shared out among the layers: ``measured`` by what each one's
            directions matter to the model's output (``sensitivity.py``, ``allocate.py``), or
            ``uniform``, the same share of every layer.
        outputs: whether the error of a layer's outputs is ``weighted`` by the gradients that the
            model's output has there (``output_weight.py``) or all count ``equal``.
        gradient_windows: how many windows of the calibration text to measure these with, and what
            ``refine`` weights errors by.
        coupled: whether attention heads and MLP channels are pruned whole (``pruning.py``).
        joint: whether layers that read the same input share their right factor (``sharing.py``);
            with the structures of ``JOINED``.
        refit: whether targeted layers that stay dense get weights that repair what those before
            them got wrong (``refit.py``); with ``inputs`` ``compressed`` and ``moment`` ``full``.
        strict: whether a layer of which the calibration text tells nothing is refused; otherwise it
            stays dense (never reached) or is fitted without data (only zeros), and the report says
            so.
        allow_slower: whether to compress layers also where the product is expected to be slower
            than the dense one (``blastnn.kernels.worth``); otherwise such a layer gets fewer blocks
            or stays dense.
    """

    keep: float = 0.8
    of: str = "targets"
    structure: str = "blast"
    blocks: tuple[int, int] | None = None
    targets: tuple[str, ...] = ()
    solver: str = "auto"
    sweeps: int = 20
    inputs: str = "compressed"
    moment: str = "full"
    tokens: int = 32768
    window: int = 1024
    damping: float = 5e-2
    dtype: str | None = None
    quantize: str | None = None
    seed: int = 0
    drift: float = 0.5
    refine: int = 0
    allocation: str = "measured"
    outputs: str = "weighted"
    gradient_windows: int = 8
    coupled: bool = False
    joint: bool = False
    refit: bool = True
    strict: bool = True
    allow_slower: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        self._check_combinations()

    def _check_numbers(self) -> None:
        """Every number within its range."""
        for name in ("keep", "drift", "damping"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise PlanError(f"{name} must be a number, but is {value!r}")
        if not 0.0 < self.keep <= 1.0:
            raise PlanError(f"keep must be in (0, 1], the share to keep, but is {self.keep}")
        if not 0.0 <= self.drift <= 1.0:
            raise PlanError(f"drift must be in [0, 1], the share to repair, but is {self.drift}")
        if not 0.0 <= self.damping < math.inf:
            raise PlanError(
                f"damping must be at least 0, relative to the mean diagonal, but is {self.damping}"
            )
        if not is_seed(self.seed):
            raise PlanError(f"seed must be from 0 to {LARGEST_SEED}, but is {self.seed!r}")
        smallest = {"sweeps": 1, "tokens": 1, "window": 1, "gradient_windows": 1, "refine": 0}
        for name, least in smallest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise PlanError(f"{name} must be a whole number, but is {value!r}")
            if value < least:
                raise PlanError(f"{name} must be at least {least}, but is {getattr(self, name)}")

    def _check_names(self) -> None:
        """Every name among those that are known."""
        for name, known in (
            ("of", PARTS),
            ("inputs", INPUTS),
            ("moment", MOMENTS),
            ("allocation", ALLOCATIONS),
            ("outputs", OUTPUTS),
        ):
            if getattr(self, name) not in known:
                raise PlanError(f"{name} must be one of {known}, but is {getattr(self, name)!r}")
        if self.dtype is not None:
            dtype_named(self.dtype)
        if self.quantize is not None:
            quantization_named(self.quantize)
        structure = structure_named(self.structure)
        if self.blocks is not None and "blocks" not in structure.__dataclass_fields__:
            raise PlanError(f"a {self.structure} has no blocks to count; leave the blocks out")

    def _check_combinations(self) -> None:
        """No two choices that exclude each other."""
        if self.joint:
            self._require("joint", {"structure": JOINED, "quantize": None, "coupled": False})
        if self.coupled:
            self._require("coupled", {"structure": ("channels",), "inputs": "dense"})
        if self.refine and self.inputs == "dense":
            raise PlanError(
                "refine repairs a block on the inputs of the compressed model, so it does not go "
                "with inputs dense; leave one out (--refine 0)"
            )
        if self.refine and self.quantize is not None:
            raise PlanError(
                "refine trains factors, and whole numbers cannot be trained: compress with refine, "
                "then use `blastnn quantize` on the result, or leave one out (--refine 0)"
            )

    def _require(self, what: str, others: dict[str, Any]) -> None:
        """Refuse choices that do not go with a way of compressing several layers together."""
        for name, known in {**others, "allocation": "uniform", "allow_slower": True}.items():
            fitting = known if isinstance(known, tuple) else (known,)
            if getattr(self, name) not in fitting:
                raise PlanError(
                    f"{what} goes with {name} {' or '.join(map(str, fitting))} alone, but {name} "
                    f"is {getattr(self, name)}"
                )

    @property
    def quantization(self) -> Quantization | None:
        """What ``quantize`` stands for."""
        return None if self.quantize is None else quantization_named(self.quantize)

    @classmethod
    def from_preset(cls, preset: str, **chosen: Any) -> Self:
        """The named preset with the given choices on top; None means not chosen.

        ``joint`` and ``coupled`` bring the choices with them that they go with (``IMPLIED``), where
        these are not made.

        A preset's block counts are meant for its own structure: with another one chosen, they are
        left to that structure.

        Raises:
            PlanError: no such preset.
        """
        if preset not in PRESETS:
            raise PlanError(f"unknown preset {preset!r}; choose from {sorted(PRESETS)}")
        check_names(chosen)
        given = {key: value for key, value in chosen.items() if value is not None}
        for name, others in IMPLIED.items():
            given = {**others, **given} if given.get(name) else given
        options = cls(**PRESETS[preset])
        if given.get("structure", options.structure) != options.structure:
            options = replace(options, blocks=None)
        return replace(options, **given)

    def to_json(self) -> dict[str, Any]:
        """The options as plain values."""
        values = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def check_names(choices: Mapping[str, Any]) -> None:
    """Refuse names that are no option.

    Raises:
        PlanError: names one, and all there are.
    """
    known = [field.name for field in fields(Options)]
    if unknown := sorted(set(choices) - set(known)):
        raise PlanError(f"there is no option {unknown[0]!r}; there are {', '.join(known)}")


# What goes with layers compressed together, and with nothing else.
IMPLIED: dict[str, dict[str, Any]] = {
    "joint": {"allocation": "uniform", "allow_slower": True},
    "coupled": {
        "structure": "channels",
        "inputs": "dense",
        "allocation": "uniform",
        "allow_slower": True,
    },
}

# Tokens of each text that a job scores at its end where the user does not say: what is to be fast
# must not spend half of its time on being judged.
SCORED_TOKENS = {"fast": 4096, "default": 16384, "best": 16384}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"blocks": (8, 8), "sweeps": 20, "tokens": 12288, "gradient_windows": 4},
    "default": {"blocks": (8, 8), "sweeps": 60},
    "best": {
        "blocks": (8, 8),
        "sweeps": 160,
        "tokens": 65536,
        "gradient_windows": 16,
    },
}
