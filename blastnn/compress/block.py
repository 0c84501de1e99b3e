"""One block of a model: gather, factorise, replace, group of layers by group of layers.

The order inside a block is the order in which its layers run, so that each layer is fitted on the
inputs it will really see: those of the compressed model, the layers before it already replaced.
With ``inputs="dense"`` every layer is fitted by itself, and one pass of the dense block is enough.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blastnn.compress.moments import (
    InputGroup,
    Moments,
    MomentSum,
    find_groups,
    layer_inputs,
    pass_through,
    run_calls,
)
from blastnn.compress.options import Options
from blastnn.compress.output_weight import OutputWeight
from blastnn.compress.plan import LayerPlan
from blastnn.errors import FactorizationError
from blastnn.factorize import (
    SOLVERS,
    choose_solver,
    factorize,
    prepare,
    shifted_target,
    solver_options,
)
from blastnn.linear import StructuredLinear
from blastnn.models.linears import dense_weight
from blastnn.models.walk import Call
from blastnn.structures import cast_factors

UNREACHED = "the calibration text never reached it"


@dataclass
class Streams:
    """Hidden states ``(windows, window, hidden)`` in the dense and in the compressed model.

    While both are equal, ``compressed`` is the same list as ``dense``; so it stays where layers are
    fitted on dense inputs, and the compressed model's are not asked for.
    """

    dense: list[Tensor]
    compressed: list[Tensor]

    @property
    def equal(self) -> bool:
        """Whether there is one stream, that of the dense model."""
        return self.compressed is self.dense

    def part(self) -> None:
        """Let the two move apart from here on; the tensors so far stay shared."""
        if self.equal:
            self.compressed = list(self.dense)


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one linear layer; a row of the report."""

    name: str
    status: str
    reason: str | None = None
    relative_error: float | None = None
    error_before_quantization: float | None = None
    weighted_outputs: bool = False
    seconds: float | None = None
    solver: str | None = None
    solver_status: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BlockOutcome:
    """A compressed block, a record for each of its linear layers, and where the time went."""

    module: nn.Module
    records: list[LayerRecord]
    factorise_seconds: float
    forward_seconds: float


OnLayer = Callable[[LayerPlan, LayerRecord], None]


class BlockCompressor:
    """Compresses one block after the other with the same options."""

    def __init__(self, options: Options, dtype: torch.dtype, on_layer: OnLayer) -> None:
        self.options, self.dtype, self.on_layer = options, dtype, on_layer

    @torch.no_grad()
    def run(
        self,
        dense: nn.Module,
        calls: Sequence[Call],
        plans: Sequence[LayerPlan],
        streams: Streams | None,
        outputs: Mapping[str, Tensor],
    ) -> BlockOutcome:
        """Compress a block whose weights are in memory and move the streams past it.

        Args:
            dense: the block; it is not changed.
            calls: how the model calls it.
            plans: of all linear layers in it, named ``kind`` below the block.
            streams: what enters the block; moved on in place. None fits without data.
            outputs: by kind, the moments that weight the outputs of layers (``output_weight.py``);
                those of all others count alike.

        Raises:
            FactorizationError: names the layer.
        """
        start = time.perf_counter()
        block = copy.deepcopy(dense)
        by_kind = {plan.kind: plan for plan in plans}
        wanted = [plan.kind for plan in plans if plan.spec is not None]
        records = {p.kind: LayerRecord(p.name, "kept", p.reason) for p in plans if p.spec is None}
        groups = self._groups(dense, calls, wanted, streams)
        independent = streams is not None and self.options.inputs == "dense"
        ahead: dict[InputGroup, Moments] = {}
        if streams is not None and independent:
            ahead = pass_through(dense, calls, streams.dense, groups, self.options.moment)
        solving = 0.0
        for group in groups:
            # A block called once has its dense output for nothing while its last group is read.
            advance = group is groups[-1] and len(calls) == 1
            moments = (
                ahead[group]
                if independent
                else self._moments(dense, block, calls, group, streams, advance)
            )
            for kind in group.layers:
                records[kind] = self._replace(block, by_kind[kind], moments, outputs.get(kind))
                solving += records[kind].seconds or 0.0
                self.on_layer(by_kind[kind], records[kind])
        for kind in wanted:
            if kind not in records:
                records[kind] = LayerRecord(by_kind[kind].name, "kept", UNREACHED)
                self.on_layer(by_kind[kind], records[kind])
        if streams is not None and not independent:
            moved = bool(groups) and len(calls) == 1
            self._advance(dense, block, calls, streams, dense_moved=moved)
        forward = time.perf_counter() - start - solving
        return BlockOutcome(block, [records[p.kind] for p in plans], solving, forward)

    def _groups(
        self, dense: nn.Module, calls: Sequence[Call], wanted: list[str], streams: Streams | None
    ) -> list[InputGroup]:
        if streams is None:
            return [InputGroup((kind,), 0) for kind in wanted]
        return find_groups(dense, calls, streams.dense[0], wanted)

    def _moments(
        self,
        dense: nn.Module,
        block: nn.Module,
        calls: Sequence[Call],
        group: InputGroup,
        streams: Streams | None,
        advance: bool,
    ) -> Moments | None:
        """Moments of a group's inputs; of the dense ones alone where a block is called again.

        A block that is called several times feeds itself: what it will see depends on its own,
        not yet known, factors. With ``advance`` the dense stream is moved past the block as well.
        """
        if streams is None:
            return None
        total = MomentSum(self.options.moment)
        same = len(calls) > 1 or (streams.equal and self._untouched(block))
        if advance:
            streams.part()
        for index, (original, current) in enumerate(
            zip(streams.dense, streams.compressed, strict=True)
        ):
            x, output = layer_inputs(dense, calls, original, group, to_end=advance)
            if output is not None:
                streams.dense[index] = output
            total.add(*((x,) if same else (layer_inputs(block, calls, current, group)[0], x)))
        return total.finish(group.layers[0])

    @staticmethod
    def _untouched(block: nn.Module) -> bool:
        return not any(isinstance(module, StructuredLinear) for module in block.modules())

    def _replace(
        self, block: nn.Module, plan: LayerPlan, moments: Moments | None, outputs: Tensor | None
    ) -> LayerRecord:
        """Fit one layer and put the structured layer in its place."""
        start = time.perf_counter()
        old = block.get_submodule(plan.kind)
        try:
            layer, fields = fit_layer(old, plan, moments, outputs, self.options, self.dtype)
        except FactorizationError as error:
            raise FactorizationError(f"layer {plan.name}: {error}") from error
        owner, _, leaf = plan.kind.rpartition(".")
        setattr(block.get_submodule(owner), leaf, layer)
        return LayerRecord(plan.name, "compressed", seconds=time.perf_counter() - start, **fields)

    @staticmethod
    def _advance(
        dense: nn.Module,
        block: nn.Module,
        calls: Sequence[Call],
        streams: Streams,
        dense_moved: bool,
    ) -> None:
        """Move both streams past the block; the dense one unless ``dense_moved`` says it is."""
        if not BlockCompressor._untouched(block):
            streams.part()
        for index, hidden in enumerate(streams.dense):
            if not streams.equal:
                current = streams.compressed[index]
                streams.compressed[index] = run_calls(block, calls, current)
            if not dense_moved:
                streams.dense[index] = run_calls(dense, calls, hidden)


def fit_layer(
    old: nn.Module,
    plan: LayerPlan,
    moments: Moments | None,
    outputs: Tensor | None,
    options: Options,
    dtype: torch.dtype,
) -> tuple[StructuredLinear, dict[str, Any]]:
    """A structured layer, float32 but rounded to ``dtype``, and the fields of its record.

    ``outputs`` weights the errors of its outputs (``output_weight.py``); None counts all alike.
    """
    assert plan.spec is not None
    target, second = dense_weight(old).float(), None
    solver = choose_solver(plan.spec, options.solver)
    data_free = not SOLVERS[solver].USES_SECOND_MOMENT
    notes = []
    if moments is not None and not bool(moments.second.any()):
        moments = None
        notes.append("its inputs are zero on the whole calibration text: fitted without data")
    if moments is not None:
        second, cross = moments.damped(options.damping)
        if cross is not None and not data_free:
            target = shifted_target(target, second, cross).float()
    extra = {"sweeps": options.sweeps} if "sweeps" in solver_options(solver) else {}
    seen = None if data_free else second
    weighted = outputs is not None and plan.spec.row_blocks() is not None and bool(outputs.any())
    if weighted:
        assert outputs is not None
        weight = OutputWeight(outputs, plan.spec)
        wanted = weight.apply(target)
        result = factorize(wanted, plan.spec, seen, solver, options.seed, torch.float32, **extra)
        factors = cast_factors(weight.undo(result.factors), dtype)
    else:
        result = factorize(target, plan.spec, seen, solver, options.seed, dtype, **extra)
        factors = result.factors
    factors = cast_factors(factors, torch.float32)
    bias = getattr(old, "bias", None)
    layer = StructuredLinear.from_factors(
        plan.spec, factors, None if bias is None else bias.detach().clone()
    )
    error, before = result.relative_error, None
    remeasured = weighted or (data_free and second is not None)
    if options.quantization is not None or remeasured:
        problem = prepare(target, second)
        dense = layer.to_dense().double() / problem.scale
        error = problem.relative_error(dense) if remeasured else error
    if options.quantization is not None:
        layer, before = layer.quantized(options.quantization, second), error
        error = problem.relative_error(layer.to_dense().double() / problem.scale)
    return layer.requires_grad_(False), {
        "relative_error": error,
        "error_before_quantization": before,
        "weighted_outputs": weighted,
        "solver": result.solver,
        "solver_status": result.status,
        "notes": [*notes, *result.notes],
    }
