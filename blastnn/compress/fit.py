"""One layer fitted, or several that share a factor: weights and moments in, layers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blastnn.compress.moments import Moments, refuse
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
from blastnn.structures import Factors, Structure, cast_factors
from blastnn.structures.stack import stacked, unstacked

NO_INPUT = "its inputs are zero on the whole calibration text"
Fitted = tuple[StructuredLinear, dict[str, Any]]  # a layer, and the fields of its record


def fit_layers(
    olds: Sequence[nn.Module],
    plans: Sequence[LayerPlan],
    moments: Moments | None,
    outputs: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    options: Options,
    dtype: torch.dtype,
) -> list[Fitted]:
    """Layers that are to be fitted together: one alone, or as a stack those that share a factor.

    Args:
        olds: dense layers that read the same input; the first owns what they share.
        plans: of each.
        moments: of their input; None fits without data.
        outputs: for each, what weights the errors of its outputs (``output_weight.py``); None
            counts all alike, in the whole stack.
        kept: for each, the channels that stay as they are; None where its solver chooses.
        options: ``damping``, ``solver``, ``sweeps``, ``seed`` and ``quantize`` are used.
        dtype: to which the float32 factors are rounded.

    Returns:
        For each a structured layer, float32 but rounded to ``dtype``, and fields of its record.

    Raises:
        FactorizationError: a weight that cannot be worked with, or a stack to be quantised.
        StructureError: structures that cannot share a factor.
    """
    fit = _fit(olds, plans, moments, outputs, kept[0], options, dtype)
    fitted: list[Fitted] = []
    for old, plan, target, part in zip(olds, plans, fit.targets, fit.parts, strict=True):
        layer = _layer(old, plan, cast_factors(cast_factors(part, dtype), torch.float32))
        layer, errors = _finished(layer, target, fit.second, fit.error, options)
        if fitted:
            layer.share(fitted[0][0])
        fitted.append((layer.requires_grad_(False), {**errors, **fit.fields}))
    return fitted


@dataclass(frozen=True)
class _Fit:
    """Factors of each layer in ``parts``, what they are to reproduce, and how they were found.

    ``second`` is the moment by which errors count, ``error`` that of a single layer as it will be
    written, None where it has to be measured, and ``fields`` are those of every layer's record.
    """

    parts: Sequence[Factors]
    targets: Sequence[Tensor]
    second: Tensor | None
    error: float | None
    fields: dict[str, Any]


def _fit(
    olds: Sequence[nn.Module],
    plans: Sequence[LayerPlan],
    moments: Moments | None,
    outputs: Sequence[Tensor | None],
    kept: Tensor | None,
    options: Options,
    dtype: torch.dtype,
) -> _Fit:
    """The arguments are those of ``fit_layers``; ``kept`` is that of the first layer."""
    specs = [plan.spec for plan in plans if plan.spec is not None]
    if len(specs) > 1 and options.quantization is not None:
        raise FactorizationError("layers that share a factor are not quantised; leave that out")
    whole = stacked(specs) if len(specs) > 1 else specs[0]
    solver = choose_solver(whole, options.solver)
    data_free = not SOLVERS[solver].USES_SECOND_MOMENT
    weight = torch.cat([dense_weight(old).float() for old in olds])
    aim = _aim(plans[0].name, weight, moments, options, shifted=not data_free)
    targets = aim.target.split([spec.out_features for spec in specs])
    weights = _output_weights(outputs, specs)
    wanted = aim.target
    if weights:
        wanted = torch.cat([w.apply(target) for w, target in zip(weights, targets, strict=True)])
    seen = None if data_free else aim.second
    # Weighted factors are rounded after the weight is undone.
    rounded = None if weights else dtype
    extra = _extra(solver, kept, options)
    result = factorize(wanted, whole, seen, solver, options.seed, rounded, **extra)
    parts = unstacked(specs, result.factors) if len(specs) > 1 else [result.factors]
    if weights:
        parts = [weight.undo(part) for weight, part in zip(weights, parts, strict=True)]
    fields = {
        "weighted_outputs": bool(weights),
        "tokens": None if seen is None else aim.tokens,
        "solver": result.solver,
        "solver_status": result.status,
        "notes": [*aim.notes, *result.notes],
    }
    remeasured = len(specs) > 1 or bool(weights) or (data_free and aim.second is not None)
    error = None if remeasured else result.relative_error
    return _Fit(parts, targets, aim.second, error, fields)


def _extra(solver: str, kept: Tensor | None, options: Options) -> dict[str, Any]:
    """What this solver is told besides the problem."""
    if kept is not None:
        return {"kept": kept, "refit": False}
    return {"sweeps": options.sweeps} if "sweeps" in solver_options(solver) else {}


def fit_layer(
    old: nn.Module,
    plan: LayerPlan,
    moments: Moments | None,
    outputs: Tensor | None,
    options: Options,
    dtype: torch.dtype,
) -> Fitted:
    """One layer alone, as ``fit_layers`` does it."""
    return fit_layers([old], [plan], moments, [outputs], [None], options, dtype)[0]


def _finished(
    layer: StructuredLinear,
    target: Tensor,
    second: Tensor | None,
    known: float | None,
    options: Options,
) -> tuple[StructuredLinear, dict[str, float | None]]:
    """The layer, quantised if that was asked for, and its errors; ``known`` before that or not."""
    if known is not None and options.quantization is None:
        return layer, {"relative_error": known, "error_before_quantization": None}
    problem = prepare(target, second)

    def error_of(layer: StructuredLinear) -> float:
        return problem.relative_error(layer.to_dense().double() / problem.scale)

    before = error_of(layer) if known is None else known
    if options.quantization is None:
        return layer, {"relative_error": before, "error_before_quantization": None}
    layer = layer.quantized(options.quantization, second)
    return layer, {"relative_error": error_of(layer), "error_before_quantization": before}


@dataclass(frozen=True)
class _Aim:
    """What a fit is to reproduce: ``target (m, n)``, under ``second (n, n)`` if that is known.

    ``tokens`` is how many ``second`` is the mean of.
    """

    target: Tensor
    second: Tensor | None
    notes: tuple[str, ...]
    tokens: int | None = None


def _aim(
    layer: str, weight: Tensor, moments: Moments | None, options: Options, shifted: bool
) -> _Aim:
    """With ``shifted`` the target repairs what the layers before got wrong."""
    if moments is None:
        return _Aim(weight, None, ())
    if not bool(moments.second.any()):
        if options.strict:
            refuse([layer], NO_INPUT, "fit it without data")
        return _Aim(weight, None, (f"{NO_INPUT}: fitted without data",))
    second, missing = moments.damped(options.damping), moments.shortfall_of(weight)
    if missing is not None and shifted:
        weight = shifted_target(weight, second, missing).float()
    return _Aim(weight, second, (), moments.tokens)


def _layer(old: nn.Module, plan: LayerPlan, factors: dict[str, Tensor]) -> StructuredLinear:
    """A structured layer with the bias of a dense one; not trainable."""
    assert plan.spec is not None
    bias = getattr(old, "bias", None)
    layer = StructuredLinear.from_factors(
        plan.spec, factors, None if bias is None else bias.detach().clone()
    )
    return layer.requires_grad_(False)


def _output_weights(
    outputs: Sequence[Tensor | None], specs: Sequence[Structure]
) -> list[OutputWeight]:
    """What weights the outputs of each layer; nothing where that is not known of all."""
    if any(o is None or s.row_blocks() is None for o, s in zip(outputs, specs, strict=True)):
        return []
    given = [each for each in outputs if each is not None and bool(each.any())]
    if len(given) < len(specs):
        return []
    return [OutputWeight(each, spec) for each, spec in zip(given, specs, strict=True)]
