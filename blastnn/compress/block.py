"""One block of a model: gather, factorise, replace, group of layers by group of layers.

The order inside a block is the order in which its layers run, so that each layer is fitted on the
inputs it will really see: those of the compressed model, the layers before it already replaced.
With ``inputs="dense"`` every layer is fitted by itself, and one pass of the dense block is enough.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from blastnn.compress.fit import fit_layers
from blastnn.compress.looks import InputGroup
from blastnn.compress.moments import Moments, refuse
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan
from blastnn.compress.pruning import choose_kept
from blastnn.compress.refine import BlockError, Refined, refine
from blastnn.compress.refit import refit, to_refit
from blastnn.compress.streams import OpenBlock, Streams
from blastnn.errors import FactorizationError
from blastnn.models.walk import Call

UNREACHED = "the calibration text never reached it"
KEEP = "keep it dense"  # what happens to it, unless that is refused


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one linear layer; a row of the report.

    ``refitted`` is one that stays dense with a weight that repairs what came before (``refit.py``).
    ``tokens`` is how many it was fitted to; None where it was not fitted to data.
    """

    name: str
    status: str
    reason: str | None = None
    relative_error: float | None = None
    error_before_quantization: float | None = None
    weighted_outputs: bool = False
    refitted: bool = False
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
        prefix = plans[0].name.removesuffix(plans[0].kind) if plans else ""
        opened = OpenBlock(dense, calls, streams, prefix)
        # Where nothing has been replaced, and nothing is here, there is nothing to repair either.
        repairs = streams is not None and (not streams.equal or any(p.spec for p in plans))
        refits = to_refit(plans, self.options) if repairs else []
        wanted = [plan for plan in plans if plan.spec is not None or plan in refits]
        groups = opened.groups([plan.kind for plan in wanted])
        records = {p.kind: LayerRecord(p.name, "kept", p.reason) for p in plans if p.spec is None}
        unreached = self._unreached(plans, groups)
        solving = self._fit(opened, plans, groups, outputs, records)
        for plan in unreached:
            records[plan.kind] = LayerRecord(plan.name, "kept", UNREACHED)
            self.progress.layer(plan, records[plan.kind])
        refined, refining = None, 0.0
        if streams is not None and self.options.inputs == "compressed":
            began = time.perf_counter()
            if leaving is not None:
                refined = self._refine(opened, streams, leaving)
            refining = time.perf_counter() - began
            opened.advance_compressed()
        forward = time.perf_counter() - start - solving - refining
        done = [records[p.kind] for p in plans]
        return BlockOutcome(opened.block, done, solving, forward, refined, refining)

    def _unreached(
        self, plans: Sequence[LayerPlan], groups: Sequence[InputGroup]
    ) -> list[LayerPlan]:
        """Layers that are to be compressed and are in no group; refused where that is asked for."""
        reached = {kind for group in groups for kind in group.layers}
        found = [plan for plan in plans if plan.spec is not None and plan.kind not in reached]
        if found and self.options.strict:
            refuse([plan.name for plan in found], UNREACHED, KEEP)
        return found

    def _fit(
        self,
        opened: OpenBlock,
        plans: Sequence[LayerPlan],
        groups: Sequence[InputGroup],
        outputs: Mapping[str, Tensor],
        records: dict[str, LayerRecord],
    ) -> float:
        """Replace the layers of all groups and add their records; the seconds that solving took."""
        by_kind, solving = {plan.kind: plan for plan in plans}, 0.0
        known = self._moments(opened, groups)
        kept: dict[str, Tensor] = {}
        if self.options.coupled:  # which goes with inputs of the dense model alone
            known = list(known)
            seen = {kind: m for group, m in known if m is not None for kind in group.layers}
            kept = choose_kept(opened.dense, plans, seen, outputs)
        for group, moments in known:
            members = [by_kind[kind] for kind in group.layers]
            for plan in members:
                if plan.spec is None and moments is not None:
                    record = self._refit(opened.block, plan, moments, records[plan.kind])
                    records[plan.kind] = record
                    solving += record.seconds or 0.0
            for bundle in _bundles([plan for plan in members if plan.spec is not None]):
                for plan, record in self._replace(opened.block, bundle, moments, outputs, kept):
                    records[plan.kind] = record
                    solving += record.seconds or 0.0
                    self.progress.layer(plan, record)
        return solving

    def _moments(
        self, opened: OpenBlock, groups: Sequence[InputGroup]
    ) -> Iterable[tuple[InputGroup, Moments | None]]:
        """Each group with the moments of its inputs, once those before it have been replaced.

        The dense stream moves past the block.
        """
        if opened.streams is None:
            return [(group, None) for group in groups]
        if self.options.inputs == "compressed" and not opened.once and groups:
            opened.part_streams()
        if self.options.inputs == "dense" or not opened.once:
            return list(opened.dense_moments(groups, self.options.moment).items())
        return self._one_after_the_other(opened, groups)

    def _one_after_the_other(
        self, opened: OpenBlock, groups: Sequence[InputGroup]
    ) -> Iterator[tuple[InputGroup, Moments]]:
        options = self.options
        opened.watch_dense(groups, options.moment, options.drift)
        for group in groups:
            yield group, opened.moments(group)

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
        weights, stay = ([of.get(plan.kind) for plan in bundle] for of in (outputs, kept))
        with _naming(bundle[0]):
            fitted = fit_layers(olds, bundle, moments, weights, stay, self.options, self.dtype)
        seconds = (time.perf_counter() - start) / len(bundle)
        records = []
        for plan, (layer, fields) in zip(bundle, fitted, strict=True):
            owner, _, leaf = plan.kind.rpartition(".")
            setattr(block.get_submodule(owner), leaf, layer)
            record = LayerRecord(plan.name, "compressed", seconds=seconds, **fields)
            records.append((plan, record))
        return records

    def _refit(
        self, block: nn.Module, plan: LayerPlan, moments: Moments, record: LayerRecord
    ) -> LayerRecord:
        """Let a layer that stays dense repair what it can; its record, which says so."""
        start = time.perf_counter()
        with _naming(plan):
            done = refit(block.get_submodule(plan.kind), moments, self.dtype)
        if not done:
            return record
        seconds = time.perf_counter() - start
        return replace(record, refitted=True, tokens=moments.tokens, seconds=seconds)

    def _refine(self, opened: OpenBlock, streams: Streams, leaving: Tensor) -> Refined | None:
        """All factors of a block together, the dense stream already behind it."""
        error = BlockError(opened.calls, streams.compressed, streams.dense, leaving)
        opened.forget()
        name = opened.prefix.removesuffix(".")
        options, told = self.options, partial(self.progress.refining, name)
        refined = refine(opened.block, error, options.refine, options.seed, self.dtype, told)
        if refined is not None:
            self.progress.refined(name, refined)
        return refined


@contextmanager
def _naming(plan: LayerPlan) -> Iterator[None]:
    """Errors of a fit name the layer."""
    try:
        yield
    except FactorizationError as error:
        raise FactorizationError(f"layer {plan.name}: {error}") from error


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
