"""Which layer becomes what, and how large: decided on the meta device, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from blastnn.checkpoint import StoredLayer, check_owners
from blastnn.compress.options import Options
from blastnn.errors import PlanError, StructureError
from blastnn.files import read_json
from blastnn.kernels import predicted_speedup
from blastnn.models.linears import LinearInfo, find_linears
from blastnn.quantization import Quantization, stored_bytes
from blastnn.structures import Structure, structure_named

FORMAT = "blastnn-plan/1"
OUTSIDE = "outside the blocks; name it in targets to compress it"
UNTARGETED = "not among the targets"
ALLOCATED = "stays dense: its share of the budget is best spent whole"
WHOLE = "stays dense: pruning takes its share from other layers"
SLOWER = "would be slower than dense"  # how the reason of a layer begins that is not worth it
IN_BUDGET = (ALLOCATED, WHOLE)  # why a layer stays dense whose parameters count towards keep


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer: compressed into ``spec``, or kept dense for ``reason``.

    ``shared`` is the name of the layer, in the same block, whose right factor it uses.
    """

    name: str
    kind: str
    block: int | None
    out_features: int
    in_features: int
    spec: Structure | None
    reason: str | None
    shared: str | None = None

    @property
    def dense_params(self) -> int:
        """Parameters of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def planned_params(self) -> int:
        """Parameters of what it becomes; a shared factor counts where it is stored."""
        return self.dense_params if self.spec is None else self.stored.num_params

    @property
    def given_up(self) -> bool:
        """Whether it is a target, but any structure would be slower."""
        return self.reason is not None and self.reason.startswith(SLOWER)

    @property
    def stays_dense(self) -> bool:
        """Whether it is a target and stays dense all the same."""
        return self.reason in IN_BUDGET or self.given_up

    @property
    def stored(self) -> StoredLayer:
        """What is stored of a layer that is compressed."""
        assert self.spec is not None
        return StoredLayer(self.spec, shared=self.shared)

    def num_bytes(self, quantization: Quantization | None, dtype: torch.dtype) -> int:
        """Bytes of what it becomes, scales included."""
        if self.spec is None or self.shared is not None:
            return self.planned_params * dtype.itemsize
        return stored_bytes(self.spec, quantization, dtype)


@dataclass(frozen=True)
class Plan:
    """All linear layers of a model and the parameters around them."""

    layers: tuple[LayerPlan, ...]
    model_params: int
    keep: float
    of: str

    @property
    def compressed(self) -> tuple[LayerPlan, ...]:
        """The layers that will be compressed."""
        return tuple(layer for layer in self.layers if layer.spec is not None)

    @property
    def targets(self) -> tuple[LayerPlan, ...]:
        """The layers that share the budget: the compressed ones, and those that it keeps dense."""
        return tuple(la for la in self.layers if la.spec is not None or la.reason in IN_BUDGET)

    @property
    def given_up(self) -> tuple[LayerPlan, ...]:
        """Targeted layers that stay dense because any structure would be slower."""
        return tuple(layer for layer in self.layers if layer.given_up)

    @property
    def target_params(self) -> tuple[int, int]:
        """Parameters of the targeted layers' matrices, before and after."""
        before = sum(layer.dense_params for layer in self.targets)
        return before, sum(layer.planned_params for layer in self.targets)

    def of_block(self, index: int) -> list[LayerPlan]:
        """The layers of one block."""
        return [layer for layer in self.layers if layer.block == index]

    def keeping(self, reasons: dict[str, str]) -> Self:
        """The plan with some layers kept dense after all, each for its reason."""
        layers = (
            replace(layer, spec=None, reason=reasons[layer.name])
            if layer.name in reasons
            else layer
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def to_json(self) -> dict[str, Any]:
        """The plan as the file that ``compress --plan`` takes."""
        return {
            "format": FORMAT,
            "keep": self.keep,
            "of": self.of,
            "layers": {
                layer.name: {"keep": layer.reason} if layer.spec is None else layer.stored.to_json()
                for layer in self.layers
            },
        }


def count_params(model: nn.Module, tied: Iterable[str]) -> int:
    """Parameters of a model, weights tied by name (or one tensor under two names) counted once."""
    skipped = set(tied)
    return sum(value.numel() for name, value in model.named_parameters() if name not in skipped)


def make_plan(
    model: nn.Module, blocks: list[str], options: Options, head: str | None, tied: Iterable[str]
) -> Plan:
    """The uniform plan: every targeted layer keeps the same share of its parameters.

    Args:
        model: with its parameters on the meta device or real.
        blocks: the names of its blocks; ``[""]`` makes the whole model one block.
        options: ``keep``, ``of``, ``structure``, ``blocks`` and ``targets`` are used.
        head: the name of the output layer, which may be targeted although it is in no block.
        tied: names of parameters that only repeat another one.

    Raises:
        PlanError: a pattern that matches nothing, or a budget that cannot be met.
        StructureError: a structure that does not fit a layer.
    """
    linears = find_linears(model)
    reasons = {info.name: _reason(info, blocks, options.targets, head) for info in linears}
    _check_patterns(model, linears, blocks, options.targets)
    chosen = [info for info in linears if reasons[info.name] is None]
    if not chosen:
        raise PlanError("the model has no linear layer that could be compressed")
    total = count_params(model, tied)
    while True:
        targeted = sum(info.num_params for info in linears if reasons[info.name] is None)
        share = _share_of_targets(options, total, targeted)
        layers = [_layer(info, blocks, reasons[info.name], options, share) for info in linears]
        dropped = [layer for layer in layers if reasons[layer.name] != layer.reason]
        if options.of == "targets" or share >= 1.0 or not dropped:
            return Plan(tuple(layers), total, options.keep, options.of)
        # The rest must remove what these would have: the share changes, and may drop more.
        reasons |= {layer.name: layer.reason for layer in dropped}


def find_targets(
    model: nn.Module, blocks: list[str], patterns: tuple[str, ...], head: str | None
) -> list[LinearInfo]:
    """The layers that a plan compresses unless one is not worth it; arguments as ``make_plan``'s.

    Raises:
        PlanError: a pattern that matches nothing.
    """
    linears = find_linears(model)
    _check_patterns(model, linears, blocks, patterns)
    return [info for info in linears if _reason(info, blocks, patterns, head) is None]


def _layer(
    info: LinearInfo, blocks: list[str], reason: str | None, options: Options, share: float
) -> LayerPlan:
    spec = None
    if reason is None and share >= 1.0:
        reason = "keep is 1: nothing to remove"
    if reason is None:
        spec, reason = worthwhile_spec(info, options, int(share * info.num_params))
    block, kind = _place(info.name, blocks)
    return LayerPlan(info.name, kind, block, info.out_features, info.in_features, spec, reason)


def worthwhile_spec(
    layer: LinearInfo | LayerPlan, options: Options, params: int, step: int = 1
) -> tuple[Structure | None, str | None]:
    """A spec of at most ``params`` parameters that is no slower than dense, with fewer blocks if
    need be and its rank a multiple of ``step``; or why there is none.

    Raises:
        PlanError: the budget is less than the smallest rank takes.
    """
    first = spec = _spec(layer, options, params, options.blocks, step)
    while not options.allow_slower:
        speedup = predicted_speedup(spec)
        if speedup is None or speedup >= 1.0:
            break
        blocks = tuple(max(1, count // 2) for count in getattr(spec, "blocks", (1, 1)))
        if blocks == getattr(spec, "blocks", (1, 1)):
            best = predicted_speedup(first) or 0.0
            return None, f"{SLOWER} as {first.name}: {best:.2f} times its speed"
        spec = _spec(layer, options, params, blocks, step)
    return spec, None


def _spec(
    layer: LinearInfo | LayerPlan,
    options: Options,
    params: int,
    blocks: tuple[int, ...] | None,
    step: int,
) -> Structure:
    structure = structure_named(options.structure)
    extra: dict[str, Any] = {} if step == 1 else {"step": step}
    if blocks is not None:
        extra["blocks"] = blocks
    try:
        return structure.for_budget(layer.out_features, layer.in_features, params, **extra)
    except ValueError as error:
        raise PlanError(f"layer {layer.name}: {error}") from error


def _share_of_targets(options: Options, total: int, targeted: int) -> float:
    """``keep`` as a share of the targets' parameters."""
    if options.of == "targets":
        return options.keep
    share = 1.0 - (1.0 - options.keep) * total / targeted
    if share <= 0.0:
        least = 1.0 - targeted / total
        raise PlanError(
            f"keep {options.keep} of the model cannot be met: the layers that stay dense are "
            f"{least:.1%} of it; ask for more, or target more layers"
        )
    return share


def _reason(
    info: LinearInfo, blocks: list[str], patterns: tuple[str, ...], head: str | None
) -> str | None:
    """Why a layer stays dense, or None."""
    if info.obstacle is not None:
        return info.obstacle
    block, kind = _place(info.name, blocks)
    if not patterns:
        return OUTSIDE if block is None else None
    if not any(_matches(info.name, kind, pattern) for pattern in patterns):
        return UNTARGETED
    if block is None and info.name != head:
        return "targeted, but only layers inside the blocks and the output layer can be compressed"
    return None


def _check_patterns(
    model: nn.Module, linears: list[LinearInfo], blocks: list[str], patterns: tuple[str, ...]
) -> None:
    for pattern in patterns:
        if any(_matches(i.name, _place(i.name, blocks)[1], pattern) for i in linears):
            continue
        embedding = _matching_embedding(model, pattern)
        if embedding is not None:
            raise PlanError(
                f"the target pattern {pattern!r} matches the embedding {embedding}, which is "
                "looked up and never multiplied: only linear layers can be compressed"
            )
        kinds = sorted({_place(info.name, blocks)[1] for info in linears})
        raise PlanError(
            f"the target pattern {pattern!r} matches no linear layer; kinds here: "
            f"{', '.join(kinds[:20])}"
        )


def _matching_embedding(model: nn.Module, pattern: str) -> str | None:
    """The name of an embedding that the pattern means, by its full name or its last part."""
    names = (name for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    return next((n for n in names if _matches(n, n.rpartition(".")[2], pattern)), None)


def _matches(name: str, kind: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(kind, pattern)


def _place(name: str, blocks: list[str]) -> tuple[int | None, str]:
    """The index of the block that a layer is in, and its name there, which is its kind."""
    for index, block in enumerate(blocks):
        if not block or name.startswith(f"{block}."):
            return index, name.removeprefix(f"{block}.") if block else name
    return None, name


def plan_from_file(plan: Plan, path: Path, head: str | None = None) -> Plan:
    """The model's layers with the specs of a plan file instead of the uniform ones.

    Args:
        plan: of the model that is to be compressed.
        path: a file written from ``Plan.to_json``.
        head: the name of the output layer, the only one outside the blocks that may have a spec.

    Raises:
        PlanError: another format, or layers or shapes that are not this model's.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise PlanError(f"{path} is not a plan file ({FORMAT})")
    entries = values.get("layers")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise PlanError(f"{path}: 'layers' must be an object with an object for every layer")
    unknown = sorted(set(entries) ^ {layer.name for layer in plan.layers})
    if unknown:
        raise PlanError(f"{path} was made for another model: layers differ, e.g. {unknown[0]}")
    layers = tuple(_planned(layer, entries[layer.name], path, head) for layer in plan.layers)
    try:
        check_owners({layer.name: layer.stored for layer in layers if layer.spec is not None})
    except StructureError as error:
        raise PlanError(f"{path}: {error}") from error
    return replace(plan, layers=layers, keep=float(values["keep"]), of=str(values["of"]))


def _planned(layer: LayerPlan, entry: dict[str, Any], path: Path, head: str | None) -> LayerPlan:
    if set(entry) == {"keep"}:
        if not isinstance(entry["keep"], str):
            raise PlanError(f"{path}: layer {layer.name} is kept for no reason given in words")
        return replace(layer, spec=None, reason=entry["keep"])
    fixed = layer.reason not in (None, OUTSIDE, UNTARGETED)
    if fixed or (layer.block is None and layer.name != head):
        reason = layer.reason if fixed else "it is neither in a block nor the output layer"
        raise PlanError(f"{path}: layer {layer.name} cannot be compressed: {reason}")
    stored = StoredLayer.from_json(entry)
    spec = stored.spec
    if (spec.out_features, spec.in_features) != (layer.out_features, layer.in_features):
        raise PlanError(f"{path}: {spec} does not fit layer {layer.name}")
    return replace(layer, spec=spec, reason=None, shared=stored.shared)
