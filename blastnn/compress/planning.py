"""The uniform plan of a model, decided on the meta device, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from blastnn.compress.options import Options
from blastnn.compress.plan import OUTSIDE, SLOWER, UNTARGETED, LayerPlan, Plan, count_params
from blastnn.errors import PlanError
from blastnn.factorize import choose_solver
from blastnn.kernels import predicted_speedup
from blastnn.models.linears import LinearInfo, find_linears
from blastnn.structures import Structure, structure_named


def make_plan(
    model: nn.Module,
    blocks: list[str],
    options: Options,
    head: str | None,
    tied: Iterable[str],
    obstacles: Mapping[str, str] | None = None,
) -> Plan:
    """The uniform plan: every targeted layer keeps the same share of its parameters.

    Args:
        model: with its parameters on the meta device or real.
        blocks: the names of its blocks; ``[""]`` makes the whole model one block.
        options: ``keep``, ``of``, ``structure``, ``blocks`` and ``targets`` are used.
        head: the name of the output layer, which may be targeted although it is in no block.
        tied: names of parameters that only repeat another one.
        obstacles: further layers that stay dense, by name, and why.

    Raises:
        PlanError: a pattern that matches nothing, or a budget that cannot be met.
        StructureError: a structure that does not fit a layer.
    """
    linears = find_linears(model)
    reasons = {info.name: _reason(info, blocks, options.targets, head) for info in linears}
    reasons |= {name: reasons[name] or why for name, why in (obstacles or {}).items()}
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


def check_fit(plan: Plan, solver: str) -> None:
    """Refuse a solver that is unknown, or does not fit the structure of a layer.

    Raises:
        FactorizationError: names the solvers that do.
    """
    for layer in plan.compressed:
        assert layer.spec is not None
        choose_solver(layer.spec, solver)


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
