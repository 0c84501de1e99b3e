"""Dense matrix (and the statistics of its inputs) in, factors out.

A solver is a module with ``STRUCTURES``, the spec types it fits; ``USES_SECOND_MOMENT``; ``WHY``,
what is to be said for it, in words that follow its name; and
``solve(problem, spec, seed, **options) -> Solution``; ``solve_many(problems, ...)`` if it can work
on several at once. A new one is one file here and one line in ``SOLVERS``, whose order is the whole
of what ``solver="auto"`` knows: the first that fits.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from blastnn.arithmetic import plain_arithmetic
from blastnn.errors import FactorizationError
from blastnn.factorize.joint import JointResult, joint_low_rank
from blastnn.factorize.problem import FLOATS, Problem, prepare, shifted_target
from blastnn.factorize.result import FactorizationResult, Solution
from blastnn.structures import STRUCTURES, Structure, cast_factors
from blastnn.structures.base import LARGEST_SEED, is_seed

SOLVERS: dict[str, ModuleType] = {
    name: import_module(f"{__name__}.{name}")
    for name in (
        "als",
        "precgd",
        "gd",
        "svd",
        "projection",
        "channels",
        "bases",
        "alternate",
        "sparse",
        "masks",
        "fit",
    )
}


# Options of solvers that count something.
COUNTS = {"sweeps", "steps", "rounds"}


def automatic_table() -> dict[str, str]:
    """Which solver ``"auto"`` means for each registered structure: the first one that fits it."""
    return {name: fitting_solvers(structure)[0] for name, structure in STRUCTURES.items()}


def fitting_solvers(structure: type[Structure]) -> list[str]:
    """In order of preference; never empty: ``fit``, the last solver, takes every structure."""
    return [key for key, m in SOLVERS.items() if issubclass(structure, m.STRUCTURES)]


def choose_solver(spec: Structure, solver: str = "auto", *, weighted: bool = False) -> str:
    """The name of the solver that ``factorize`` would run.

    Raises:
        FactorizationError: unknown, not made for this structure, or data-free while ``weighted``.
    """
    if solver == "auto":
        solver = fitting_solvers(type(spec))[0]
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise FactorizationError(f"unknown solver {solver!r}; choose from auto, {sorted(SOLVERS)}")
    module = SOLVERS[solver]
    fitting = sorted(fitting_solvers(type(spec)))
    if solver not in fitting:
        raise FactorizationError(f"solver {solver!r} does not fit a {spec.name}; use {fitting}")
    if weighted and not module.USES_SECOND_MOMENT:
        raise FactorizationError(
            f"solver {solver!r} is data-free and would ignore the second moment; pass none, or use "
            "solver='auto'"
        )
    return solver


def explain_solver(structure: Structure | type[Structure]) -> str:
    """What ``solver="auto"`` runs for a structure, what it passes over, and why."""
    kind = structure if isinstance(structure, type) else type(structure)
    chosen, *others = fitting_solvers(kind)
    moment = "uses" if SOLVERS[chosen].USES_SECOND_MOMENT else "cannot use"
    rest = "; ".join(f"{other} {SOLVERS[other].WHY}" for other in others)
    first = f"{chosen} {SOLVERS[chosen].WHY}; it {moment} data"
    return f"{first}. Passed over: {rest}" if rest else first


def factorize(
    weight: Tensor,
    spec: Structure,
    second_moment: Tensor | None = None,
    solver: str = "auto",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> FactorizationResult:
    """Factorise a dense ``(out_features, in_features)`` weight into the structure of ``spec``.

    Args:
        weight: floating point; float64 is solved in float64, everything else in float32.
        spec: the structure and its rank.
        second_moment: ``C = E[x x^T]`` of the layer's inputs, ``(in_features, in_features)``; the
            error is then ``|| (A - A^) C^(1/2) ||`` instead of the Frobenius norm.
        solver: a name from ``SOLVERS`` or ``"auto"``; ``automatic_table()`` tells what that means.
        dtype: of the returned factors; the weight's where None.
        seed: for every random choice of the solver; the same seed gives the same bits.
        options: of the solver, e.g. ``sweeps`` of ``als`` or ``steps`` of ``precgd``.

    Raises:
        FactorizationError: inputs that cannot be worked with; it names them.
    """
    return factorize_many([weight], spec, [second_moment], solver, seed, dtype, **options)[0]


@plain_arithmetic()
def factorize_many(
    weights: Sequence[Tensor],
    spec: Structure,
    second_moments: Sequence[Tensor | None] | Tensor | None = None,
    solver: str = "auto",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> list[FactorizationResult]:
    """Factorise several weights of one shape, in one batched solve where the solver can.

    Args:
        weights: a sequence of matrices, or one tensor ``(k, out_features, in_features)``.
        second_moments: one for each weight, or one ``(in_features, in_features)`` for all.
        spec, solver, seed, dtype, options: as for ``factorize``.

    Returns:
        A result for each weight; in a batch ``seconds`` and the history's clock are the batch's.

    Raises:
        FactorizationError: inputs that cannot be worked with, or lists of different lengths.
    """
    start = time.perf_counter()
    _check_kinds(weights, spec, dtype)
    _check_seed(seed)
    moments = _one_each(second_moments, len(weights))
    given = any(moment is not None for moment in moments)
    name = choose_solver(spec, solver, weighted=given)
    _check_options(name, options)
    for weight in weights:
        _check_shape(weight, spec)
    problems = [prepare(w, moment) for w, moment in zip(weights, moments, strict=True)]
    solutions = _solve_all(problems, spec, seed, name, options)
    return [
        _result(problem, spec, solution, dtype or weight.dtype, name, start)
        for problem, solution, weight in zip(problems, solutions, weights, strict=True)
    ]


def _one_each(
    moments: Sequence[Tensor | None] | Tensor | None, count: int
) -> Sequence[Tensor | None]:
    if moments is None or (isinstance(moments, Tensor) and moments.ndim == 2):
        return [moments] * count
    if not isinstance(moments, Tensor | Sequence):
        raise FactorizationError(
            f"second_moments must be tensors, one for each weight or one for all, not {moments!r}"
        )
    if len(moments) != count:
        raise FactorizationError(
            f"give a second moment for each of the {count} weights, or one for all of them, "
            f"instead of {len(moments)}"
        )
    return list(moments)


def _check_kinds(weights: Sequence[Tensor], spec: Structure, dtype: torch.dtype | None) -> None:
    """Arguments of the wrong kind are named before anything else looks at them."""
    if not isinstance(spec, Structure):
        raise FactorizationError(f"spec must be a structure such as Blast(...), but is {spec!r}")
    if not isinstance(weights, Tensor | Sequence):
        raise FactorizationError(
            f"weights must be a sequence of matrices or one tensor of them, not {weights!r}"
        )
    for weight in weights:
        if not isinstance(weight, Tensor):
            raise FactorizationError(
                f"a weight must be a torch.Tensor, but one is a {type(weight).__name__}"
            )
    if dtype is not None and dtype not in FLOATS:
        raise FactorizationError(
            f"dtype must be a floating-point torch.dtype of 16, 32 or 64 bits, but is {dtype!r}"
        )


def _check_shape(weight: Tensor, spec: Structure) -> None:
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise FactorizationError(
            f"{spec} describes a {spec.out_features} x {spec.in_features} matrix, but the weight "
            f"has {tuple(weight.shape)}"
        )


def _solve_all(
    problems: list[Problem], spec: Structure, seed: int, solver: str, options: dict[str, Any]
) -> list[Solution]:
    """Solutions in order: zero weights at once, the others together if they are alike."""
    module = SOLVERS[solver]
    found = {
        index: _zero_solution(problem, spec)
        for index, problem in enumerate(problems)
        if problem.invisible
    }
    rest = {index: problem for index, problem in enumerate(problems) if index not in found}
    alike = {(p.compute_dtype, p.moment is None, p.weight.device) for p in rest.values()}
    if hasattr(module, "solve_many") and len(alike) == 1:
        together = module.solve_many(list(rest.values()), spec, seed, **options)
        found.update(zip(rest, together, strict=True))
    else:
        found.update((i, module.solve(p, spec, seed, **options)) for i, p in rest.items())
    return [found[index] for index in range(len(problems))]


def _result(
    problem: Problem,
    spec: Structure,
    solution: Solution,
    dtype: torch.dtype,
    solver: str,
    start: float,
) -> FactorizationResult:
    """The solution in the weight's scale and dtype, with the error of these very factors."""
    factors = _unscaled(solution.factors, spec, problem.scale, dtype)
    if not all(bool(torch.isfinite(factors[key]).all()) for key in spec.factor_shapes()):
        raise FactorizationError(f"the factors overflow {dtype}; pass dtype=torch.float64")
    dense = spec.to_dense(cast_factors(factors, torch.float64)) / problem.scale
    return FactorizationResult(
        factors=factors,
        relative_error=problem.relative_error(dense),
        history=solution.history,
        status=solution.status,
        seconds=time.perf_counter() - start,
        solver=solver,
        notes=solution.notes,
    )


def solver_options(solver: str) -> list[str]:
    """The names of the further options that a registered solver takes."""
    return list(inspect.signature(SOLVERS[solver].solve).parameters)[3:]


def _check_seed(seed: int) -> None:
    if not is_seed(seed):
        raise FactorizationError(
            f"seed must be a whole number from 0 to {LARGEST_SEED}, but is {seed!r}"
        )


def _check_options(solver: str, options: dict[str, Any]) -> None:
    known = solver_options(solver)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise FactorizationError(f"solver {solver!r} has no option {unknown[0]!r}; it has {known}")
    for name in COUNTS & set(options):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise FactorizationError(f"{name} must be a whole number of at least 0, not {value!r}")
    hints = get_type_hints(SOLVERS[solver].solve)
    for name, value in options.items():
        hint = hints.get(name, object)
        kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
        if not any(_is_a(value, kind) for kind in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise FactorizationError(
                f"{name} of solver {solver!r} must be {wanted}, but is {value!r}"
            )


def _is_a(value: object, kind: type) -> bool:
    """Whether an option is of a kind; a whole number is a float, truth is no number.

    Names are left to the solver, which tells all that it knows.
    """
    if kind is str:
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _zero_solution(problem: Problem, spec: Structure) -> Solution:
    """A weight that its inputs cannot tell from zero has exact zero factors."""
    zeros = spec.zeros(dtype=torch.float32, device=problem.weight.device)
    return Solution(zeros, [(0.0, 0.0)], "exact: the weight is zero on its inputs")


def _unscaled(
    factors: dict[str, Tensor], spec: Structure, scale: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Give the weight's scale, a power of two, back to the factors."""
    exact = spec.scaled(cast_factors(factors, torch.float64), round(math.log2(scale)))
    return {name: f.contiguous() for name, f in cast_factors(exact, dtype).items()}


__all__ = [
    "SOLVERS",
    "FactorizationResult",
    "JointResult",
    "Problem",
    "automatic_table",
    "choose_solver",
    "explain_solver",
    "factorize",
    "factorize_many",
    "fitting_solvers",
    "joint_low_rank",
    "prepare",
    "shifted_target",
    "solver_options",
]
