"""One block of a model: gather, factorise, replace, group of layers by group of layers.

The order inside a block is the order in which its layers run, so that each layer is fitted on the
inputs it will really see: those of the compressed model, the layers before it already replaced.
With ``inputs="dense"`` every layer is fitted by itself, and one pass of the dense block is enough.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from blastnn.compress.fit import fit_layers
from blastnn.compress.moments import (
    InputGroup,
    Moments,
    MomentSum,
    find_groups,
    layer_inputs,
    pass_through,
    refuse,
    run_calls,
)
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan
from blastnn.compress.pruning import choose_kept
from blastnn.compress.refine import BlockError, Refined, refine
from blastnn.compress.residual import find_sums
from blastnn.errors import FactorizationError
from blastnn.linear import StructuredLinear
from blastnn.models.walk import Call

UNREACHED = "the calibration text never reached it"
KEEP = "keep it dense"  # what happens to it, unless that is refused


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
    """What happened to one linear layer; a row of the report.

    ``tokens`` is how many it was fitted to; None where it was not fitted to data.
    """

    name: str
    status: str
    reason: str | None = None
    relative_error: float | None = None
    error_before_quantization: float | None = None
    weighted_outputs: bool = False
    tokens: int | None = None
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
    refined: Refined | None = None
    refine_seconds: float = 0.0


class BlockProgress:
    """What is told while blocks are compressed; the base class is silent."""

    def layer(self, plan: LayerPlan, record: LayerRecord) -> None:
        """A layer is done."""

    def refining(self, block: str, done: int, total: int) -> None:
        """The refinement of a block has taken one more of its steps."""

    def refined(self, block: str, outcome: Refined) -> None:
        """The refinement of a block has ended."""


class BlockCompressor:
    """Compresses one block after the other with the same options."""

    def __init__(self, options: Options, dtype: torch.dtype, progress: BlockProgress) -> None:
        self.options, self.dtype, self.progress = options, dtype, progress

    @torch.no_grad()
    def run(
        self,
        dense: nn.Module,
        calls: Sequence[Call],
        plans: Sequence[LayerPlan],
        streams: Streams | None,
        outputs: Mapping[str, Tensor],
        leaving: Tensor | None = None,
    ) -> BlockOutcome:
        """Compress a block whose weights are in memory and move the streams past it.

        Args:
            dense: the block; it is not changed.
            calls: how the model calls it.
            plans: of all linear layers in it, named ``kind`` below the block.
            streams: what enters the block; moved on in place. None fits without data.
            outputs: by kind, the moments that weight the outputs of layers (``output_weight.py``);
                those of all others count alike.
            leaving: ``G`` of what leaves the block; given, all its factors are refined together.

        Raises:
            FactorizationError: names the layer.
            CalibrationError: the calibration text tells nothing of a layer, or its inputs are not
                finite.
        """
        start = time.perf_counter()
        block = copy.deepcopy(dense)
        by_kind = {plan.kind: plan for plan in plans}
        prefix = plans[0].name.removesuffix(plans[0].kind) if plans else ""
        wanted = [plan.kind for plan in plans if plan.spec is not None]
        records = {p.kind: LayerRecord(p.name, "kept", p.reason) for p in plans if p.spec is None}
        groups = self._groups(dense, calls, wanted, streams)
        reached = {kind for group in groups for kind in group.layers}
        unreached = [by_kind[kind] for kind in wanted if kind not in reached]
        if unreached and self.options.strict:
            refuse([plan.name for plan in unreached], UNREACHED, KEEP)
        sums = self._sums(dense, calls, groups, streams)
        independent = streams is not None and self.options.inputs == "dense"
        ahead: dict[InputGroup, Moments] = {}
        if streams is not None and independent:
            moment = self.options.moment
            ahead = pass_through(dense, calls, streams.dense, groups, moment, prefix)
        kept: dict[str, Tensor] = {}
        if self.options.coupled:
            known = {kind: moments for group, moments in ahead.items() for kind in group.layers}
            kept = choose_kept(dense, plans, known, outputs)
        solving = 0.0
        for group in groups:
            # A block called once has its dense output for nothing while its last group is read.
            advance = group is groups[-1] and len(calls) == 1
            moments = (
                ahead[group]
                if independent
                else self._moments(dense, block, calls, group, sums, streams, prefix, advance)
            )
            for bundle in _bundles([by_kind[kind] for kind in group.layers]):
                for plan, record in self._replace(block, bundle, moments, outputs, kept):
                    records[plan.kind] = record
                    solving += record.seconds or 0.0
                    self.progress.layer(plan, record)
        for plan in unreached:
            records[plan.kind] = LayerRecord(plan.name, "kept", UNREACHED)
            self.progress.layer(plan, records[plan.kind])
        refined, refining = None, 0.0
        if streams is not None and not independent:
            if not (groups and len(calls) == 1):
                self._advance_dense(dense, block, calls, streams)
            began = time.perf_counter()
            if leaving is not None:
                refined = self._refine(block, calls, streams, leaving, prefix)
            refining = time.perf_counter() - began
            if not streams.equal:
                for index, current in enumerate(streams.compressed):
                    streams.compressed[index] = run_calls(block, calls, current)
        forward = time.perf_counter() - start - solving - refining
        done = [records[p.kind] for p in plans]
        return BlockOutcome(block, done, solving, forward, refined, refining)

    def _groups(
        self, dense: nn.Module, calls: Sequence[Call], wanted: list[str], streams: Streams | None
    ) -> list[InputGroup]:
        if streams is None:
            return [InputGroup(tuple(wanted), 0)] if wanted else []
        return find_groups(dense, calls, streams.dense[0], wanted)

    def _sums(
        self,
        dense: nn.Module,
        calls: Sequence[Call],
        groups: Sequence[InputGroup],
        streams: Streams | None,
    ) -> dict[str, str]:
        """Where outputs of layers that have their input for themselves are added to a stream."""
        single = [group.layers[0] for group in groups if len(group.layers) == 1]
        options = self.options
        known = options.inputs == "compressed" and options.moment == "full"
        if streams is None or not known or not options.drift:
            return {}
        return find_sums(dense, calls, streams.dense[0], single)

    def _moments(
        self,
        dense: nn.Module,
        block: nn.Module,
        calls: Sequence[Call],
        group: InputGroup,
        sums: Mapping[str, str],
        streams: Streams | None,
        prefix: str,
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
            place = None if same else sums.get(group.layers[0])
            seen = layer_inputs(dense, calls, original, group, advance, place)
            if advance and seen.output is not None:
                streams.dense[index] = seen.output
            if same:
                total.add(seen.x)
                continue
            now = layer_inputs(block, calls, current, group, sum_at=place)
            drifted = None
            if seen.total is not None and now.total is not None:
                drifted = seen.total - now.total
            total.add(now.x, seen.x, drifted)
        return total.finish(prefix + group.layers[0])

    @staticmethod
    def _untouched(block: nn.Module) -> bool:
        return not any(isinstance(module, StructuredLinear) for module in block.modules())

    def _replace(
        self,
        block: nn.Module,
        bundle: Sequence[LayerPlan],
        moments: Moments | None,
        outputs: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
    ) -> list[tuple[LayerPlan, LayerRecord]]:
        """Fit layers that go together and put the structured layers in their places."""
        start = time.perf_counter()
        olds = [block.get_submodule(plan.kind) for plan in bundle]
        try:
            weights, stay = ([of.get(plan.kind) for plan in bundle] for of in (outputs, kept))
            fitted = fit_layers(olds, bundle, moments, weights, stay, self.options, self.dtype)
        except FactorizationError as error:
            raise FactorizationError(f"layer {bundle[0].name}: {error}") from error
        seconds = (time.perf_counter() - start) / len(bundle)
        records = []
        for plan, (layer, fields) in zip(bundle, fitted, strict=True):
            owner, _, leaf = plan.kind.rpartition(".")
            setattr(block.get_submodule(owner), leaf, layer)
            record = LayerRecord(plan.name, "compressed", seconds=seconds, **fields)
            records.append((plan, record))
        return records

    def _refine(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        streams: Streams,
        leaving: Tensor,
        prefix: str,
    ) -> Refined | None:
        """All factors of a block together, the dense stream already behind it."""
        error = BlockError(calls, streams.compressed, streams.dense, leaving)
        name = prefix.removesuffix(".")
        options, told = self.options, partial(self.progress.refining, name)
        refined = refine(block, error, options.refine, options.seed, self.dtype, told)
        if refined is not None:
            self.progress.refined(name, refined)
        return refined

    @staticmethod
    def _advance_dense(
        dense: nn.Module, block: nn.Module, calls: Sequence[Call], streams: Streams
    ) -> None:
        """Move the dense stream past the block."""
        if not BlockCompressor._untouched(block):
            streams.part()
        for index, hidden in enumerate(streams.dense):
            streams.dense[index] = run_calls(dense, calls, hidden)


def _bundles(plans: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers that read one input, those together that share a factor, its owner first.

    Raises:
        FactorizationError: the owner of a shared factor reads another input.
    """
    bundles: dict[str, list[LayerPlan]] = {}
    for plan in sorted(plans, key=lambda plan: plan.shared is not None):
        bundles.setdefault(plan.shared or plan.name, []).append(plan)
    for owner, bundle in bundles.items():
        if bundle[0].name != owner:
            raise FactorizationError(
                f"layer {bundle[0].name} cannot share a factor with {owner}, which reads another "
                "input"
            )
    return list(bundles.values())
