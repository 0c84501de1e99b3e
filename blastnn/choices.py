"""The command-line options that become ``Options``, each declared once for all commands.

typer reads a command's parameters and knows no groups. A command therefore takes one parameter
named ``choices``, a dataclass below, and ``unpacked`` shows typer its fields instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from blastnn.compress.options import (
    ALLOCATIONS,
    INPUTS,
    MOMENTS,
    OUTPUTS,
    PRESETS,
    Options,
)
from blastnn.dtypes import DTYPES
from blastnn.errors import PlanError
from blastnn.evaluate.bench_options import BenchOptions
from blastnn.factorize import SOLVERS
from blastnn.quantization import QUANTIZATIONS
from blastnn.structures import STRUCTURES

Share = Annotated[float | None, typer.Option(help="share of the parameters to keep, in (0, 1]")]
Whose = Annotated[
    str | None, typer.Option(help="what keep counts: targets (linear layers) or model")
]
StructureName = Annotated[str | None, typer.Option(help=f"one of {', '.join(sorted(STRUCTURES))}")]
Blocks = Annotated[
    str | None,
    typer.Option(
        help="block counts, b or b1xb2, of structures that have blocks; default: for blast the "
        "preset's (8), else the structure's own (4)"
    ),
]
Targets = Annotated[list[str] | None, typer.Option(help="pattern of layer names; repeatable")]
Preset = Annotated[str, typer.Option(help=f"one of {', '.join(sorted(PRESETS))}")]
Solver = Annotated[str | None, typer.Option(help=f"auto, {', '.join(sorted(SOLVERS))}")]
Sweeps = Annotated[int | None, typer.Option(help="iterations of the solver")]
Inputs = Annotated[
    str | None, typer.Option(help=f"whose inputs layers are fitted on: {' or '.join(INPUTS)}")
]
Moment = Annotated[
    str | None, typer.Option(help=f"of the inputs, what a fit knows: {' or '.join(MOMENTS)}")
]
CalibrationTokens = Annotated[
    int | None, typer.Option("--calibration-tokens", help="tokens to calibrate with")
]
Window = Annotated[int | None, typer.Option(help="tokens in a sequence")]
Damping = Annotated[float | None, typer.Option(help="of the second moments")]
Dtype = Annotated[str | None, typer.Option(help=f"of the written tensors: {', '.join(DTYPES)}")]
Quantize = Annotated[
    str | None,
    typer.Option(help=f"store the large factors in few bits: {', '.join(sorted(QUANTIZATIONS))}"),
]
Seed = Annotated[int | None, typer.Option(help="of the solver")]
Allocation = Annotated[
    str | None,
    typer.Option(help=f"how the budget is shared out among the layers: {' or '.join(ALLOCATIONS)}"),
]
Outputs = Annotated[
    str | None,
    typer.Option(help=f"how errors of a layer's outputs count: {' or '.join(OUTPUTS)}"),
]
Drift = Annotated[
    float | None,
    typer.Option(help="share of the stream's drift that layers repair, 0 to 1"),
]
Refine = Annotated[
    int | None,
    typer.Option(help="passes of the calibration text to refine the factors of a block together"),
]
GradientWindows = Annotated[
    int | None, typer.Option(help="windows of calibration text to measure with")
]
Joint = Annotated[
    bool | None,
    typer.Option(
        "--joint",
        help="share the right factor of layers that read the same input; goes with the same share "
        "for every layer, and with layers that become slower",
    ),
]
Coupled = Annotated[
    bool | None,
    typer.Option(
        "--coupled", help="prune attention heads and MLP channels whole (--structure channels)"
    ),
]
Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit",
        help="let layers that stay dense repair what the layers before them got wrong",
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict/--no-strict", help="refuse layers of which the calibration text tells nothing"
    ),
]
AllowSlower = Annotated[
    bool | None,
    typer.Option(
        "--allow-slower", help="compress layers even where that makes them slower than dense"
    ),
]
Batches = Annotated[list[int] | None, typer.Option("--batch", help="sequences at once; repeatable")]
Prompts = Annotated[list[int] | None, typer.Option("--prompt", help="its tokens; repeatable")]
NewTokens = Annotated[int, typer.Option(help="decoding steps in a run")]
Rounds = Annotated[int, typer.Option(help="counted runs of each model")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="compile the step")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]


DECIDED_BY_PLAN = ("keep", "structure", "joint", "coupled", "of", "blocks", "targets", "allocation")


@dataclass(frozen=True)
class _BudgetChoices:
    keep: Share = None
    structure: StructureName = None
    joint: Joint = None
    coupled: Coupled = None


@dataclass(frozen=True)
class _TargetChoices:
    of: Whose = None
    blocks: Blocks = None
    targets: Targets = None
    preset: Preset = "default"
    allow_slower: AllowSlower = None

    def options(self) -> Options:
        """The options that were chosen.

        Raises:
            BlastnnError: says which choice is wrong.
        """
        parsed = {"blocks": parse_blocks(self.blocks), "targets": tuple(self.targets or ()) or None}
        return Options.from_preset(**(vars(self) | parsed))


@dataclass(frozen=True)
class _FitChoices:
    sweeps: Sweeps = None
    tokens: CalibrationTokens = None
    window: Window = None
    damping: Damping = None
    dtype: Dtype = None
    quantize: Quantize = None
    seed: Seed = None
    gradient_windows: GradientWindows = None
    strict: Strict = None


@dataclass(frozen=True)
class PlanChoices(_TargetChoices, _BudgetChoices):
    """What decides a plan: a preset, and the fields of ``Options`` that replace its values."""

    def refuse_beside_plan(self) -> None:
        """Refuse what a plan file decides already.

        Raises:
            PlanError: names the option.
        """
        for name in DECIDED_BY_PLAN:
            if getattr(self, name, None):
                raise PlanError(
                    f"the plan file decides what becomes of each layer; leave --{name} out, or "
                    "make a plan with it (blastnn plan)"
                )


@dataclass(frozen=True)
class JobChoices(_FitChoices, PlanChoices):
    """What decides the bytes of a compressed model, its calibration text aside."""

    solver: Solver = None
    inputs: Inputs = None
    moment: Moment = None
    drift: Drift = None
    refit: Refit = None
    refine: Refine = None
    allocation: Allocation = None
    outputs: Outputs = None


@dataclass(frozen=True)
class SweepChoices(_FitChoices, _TargetChoices):
    """What all cells of a sweep have in common: not what its methods and shares decide."""


@dataclass(frozen=True)
class BenchChoices:
    """What ``blastnn bench`` measures."""

    batches: Batches = None
    prompts: Prompts = None
    new_tokens: NewTokens = BenchOptions.new_tokens
    rounds: Rounds = BenchOptions.rounds
    compiled: Compile = BenchOptions.compiled
    device: Device = BenchOptions.device

    def options(self) -> BenchOptions:
        """The options that were chosen.

        Raises:
            BlastnnError: says which choice is wrong.
        """
        given = {
            "batches": tuple(self.batches or BenchOptions.batches),
            "prompts": tuple(self.prompts or BenchOptions.prompts),
        }
        return BenchOptions(**(vars(self) | given))


def unpacked(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its parameter ``choices`` as parameters in its place."""
    signature = inspect.signature(command, eval_str=True)
    group = signature.parameters["choices"].annotation
    fields = inspect.signature(group, eval_str=True).parameters

    @wraps(command)
    def flat(**given: Any) -> None:
        choices = group(**{name: given.pop(name) for name in fields})
        command(choices=choices, **given)

    shown: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        shown += fields.values() if name == "choices" else [parameter]
    flat.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return flat


def parse_blocks(text: str | None) -> tuple[int, int] | None:
    """``"4"`` or ``"4x8"`` (or ``"4,8"``) as a pair; PlanError otherwise."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise PlanError(f"--blocks takes one number or two like 4x8, but was given {text!r}")
    numbers = [int(part) for part in parts]
    return numbers[0], numbers[-1]
