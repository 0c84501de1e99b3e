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
    joint_low_rank,
    prepare,
    shifted_target,
    solver_options,
)
from blastnn.linear import StructuredLinear
from blastnn.models.linears import dense_weight
from blastnn.structures import LowRank, Structure, cast_factors

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
    """Layers that are to be fitted together: those that share a factor, or one alone.

    Args:
        olds: dense layers that read the same input; the first owns what they share.
        plans: of each.
        moments: of their input; None fits without data.
        outputs: for each, what weights its outputs; not used where a factor is shared.
        kept: for each, the channels that stay; None where its solver chooses.
        options: ``damping``, ``solver``, ``sweeps``, ``seed`` and ``quantize`` are used.
        dtype: to which the float32 factors are rounded.

    Raises:
        FactorizationError: a weight that cannot be worked with.
    """
    if len(plans) == 1:
        return [fit_layer(olds[0], plans[0], moments, outputs[0], options, dtype, kept[0])]
    if options.quantization is not None:
        raise FactorizationError("layers that share a factor are not quantised; leave that out")
    spec, weights = plans[0].spec, [dense_weight(old).float() for old in olds]
    assert isinstance(spec, LowRank)
    aim = _aim(plans[0].name, torch.cat(weights), moments, options, shifted=True)
    targets = aim.target.split([weight.shape[0] for weight in weights])
    joint = joint_low_rank(targets, spec.rank, aim.second)
    fitted: list[Fitted] = []
    for old, plan, target, factors in zip(olds, plans, targets, joint.factors, strict=True):
        assert plan.spec is not None
        layer = _layer(old, plan, cast_factors(cast_factors(factors, dtype), torch.float32))
        problem = prepare(target, aim.second)
        error = problem.relative_error(layer.to_dense().double() / problem.scale)
        if fitted:
            layer.share(fitted[0][0])
        status = {"solver": "joint_low_rank", "solver_status": "optimal: SVD of the stack"}
        fields = {"relative_error": error, "tokens": aim.tokens, "notes": list(aim.notes)}
        fitted.append((layer, {**fields, **status}))
    return fitted


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
    second, cross = moments.damped(options.damping)
    if cross is not None and shifted:
        weight = shifted_target(weight, second, cross, moments.drift, options.drift).float()
    return _Aim(weight, second, (), moments.tokens)


def _layer(old: nn.Module, plan: LayerPlan, factors: dict[str, Tensor]) -> StructuredLinear:
    """A structured layer with the bias of a dense one; not trainable."""
    assert plan.spec is not None
    bias = getattr(old, "bias", None)
    layer = StructuredLinear.from_factors(
        plan.spec, factors, None if bias is None else bias.detach().clone()
    )
    return layer.requires_grad_(False)


def fit_layer(
    old: nn.Module,
    plan: LayerPlan,
    moments: Moments | None,
    outputs: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    kept: Tensor | None = None,
) -> Fitted:
    """A structured layer, float32 but rounded to ``dtype``, and the fields of its record.

    ``outputs`` weights the errors of its outputs (``output_weight.py``); None counts all alike.
    Given the channels that are ``kept``, their numbers stay as they are.
    """
    assert plan.spec is not None
    solver = choose_solver(plan.spec, options.solver)
    data_free = not SOLVERS[solver].USES_SECOND_MOMENT
    aim = _aim(plan.name, dense_weight(old).float(), moments, options, shifted=not data_free)
    extra: dict[str, Any] = {}
    if "sweeps" in solver_options(solver):
        extra = {"sweeps": options.sweeps}
    if kept is not None:
        extra = {"kept": kept, "refit": False}
    seen = None if data_free else aim.second
    weight = _output_weight(outputs, plan.spec)
    # Weighted factors are rounded after the weight is undone.
    wanted, exact = (aim.target, dtype) if weight is None else (weight.apply(aim.target), None)
    result = factorize(wanted, plan.spec, seen, solver, options.seed, exact, **extra)
    factors = result.factors
    if weight is not None:
        factors = cast_factors(weight.undo(factors), dtype)
    layer = _layer(old, plan, cast_factors(factors, torch.float32))
    error, before = result.relative_error, None
    remeasured = weight is not None or (data_free and aim.second is not None)
    if options.quantization is not None or remeasured:
        problem = prepare(aim.target, aim.second)
        dense = layer.to_dense().double() / problem.scale
        error = problem.relative_error(dense) if remeasured else error
    if options.quantization is not None:
        layer, before = layer.quantized(options.quantization, aim.second), error
        error = problem.relative_error(layer.to_dense().double() / problem.scale)
    return layer.requires_grad_(False), {
        "relative_error": error,
        "error_before_quantization": before,
        "weighted_outputs": weight is not None,
        "tokens": None if seen is None else aim.tokens,
        "solver": result.solver,
        "solver_status": result.status,
        "notes": [*aim.notes, *result.notes],
    }


def _output_weight(outputs: Tensor | None, spec: Structure) -> OutputWeight | None:
    """What weights a layer's outputs; None where nothing is known or the spec takes none."""
    if outputs is None or spec.row_blocks() is None or not bool(outputs.any()):
        return None
    return OutputWeight(outputs, spec)
