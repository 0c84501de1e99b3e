"""Sums of two structures: each part in turn is fitted to what the other leaves.

Every fit is the part's own automatic solver on the residual, with the same second moment; a fit
that does not lower the error is dropped, so the error never rises. Where both parts have closed
forms (low rank, block-diagonal) this is exact block coordinate descent. Which part goes first
decides where it ends: the first round is run both ways, and the better one goes on.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.structures import Structure, Sum, cast_factors

STRUCTURES = (Sum,)
USES_SECOND_MOMENT = True
WHY = "gives each part to a solver of its own in turn, and drops what does not lower the error"

ROUNDS = 10
# A round that lowers the error by less than this share of it is the last.
TOLERANCE = 1e-3


def solve(problem: Problem, spec: Structure, seed: int, rounds: int = ROUNDS) -> Solution:
    """At most ``rounds`` fits of both parts; ``seed`` is handed to the parts' solvers."""
    start = time.perf_counter()
    assert isinstance(spec, Sum)
    orders = [_Alternation(problem, spec, seed, start) for _ in range(2)]
    if not rounds:
        zero = orders[0]
        history = [(time.perf_counter() - start, zero.error)]
        return Solution(spec.join(*zero.factors), history, "ran its 0 rounds")
    for order, first in zip(orders, (0, 1), strict=True):
        order.round(first)
    best = min(orders, key=lambda order: order.error)
    first = orders.index(best)
    status = f"ran its {rounds} rounds"
    for _ in range(1, rounds):
        before = best.error
        best.round(first)
        if not best.error < before * (1.0 - TOLERANCE):
            status = "converged: the error no longer falls"
            break
    factors = spec.join(*best.factors)
    status = f"{status}; the {('first', 'second')[first]} part went first"
    return Solution(factors, best.history, status, best.notes)


class _Alternation:
    """The parts so far, zero at first, and the error of their sum."""

    def __init__(self, problem: Problem, spec: Sum, seed: int, start: float) -> None:
        self.problem, self.spec, self.seed, self.start = problem, spec, seed, start
        like = problem.weight
        self.factors = [part.zeros(dtype=like.dtype, device=like.device) for part in spec.parts]
        self.dense = [torch.zeros_like(like) for _ in spec.parts]
        self.error = 1.0
        self.history: list[tuple[float, float]] = []
        self.notes: list[str] = []

    def round(self, first: int) -> None:
        """Fit part ``first``, then the other."""
        for index in (first, 1 - first):
            self._fit(index)
            self.history.append((time.perf_counter() - self.start, self.error))

    def _fit(self, index: int) -> None:
        """Part ``index`` anew, kept where the error does not rise."""
        part, other = self.spec.parts[index], self.dense[1 - index]
        solution = _solve_part(self.problem, self.problem.weight - other, part, self.seed)
        if solution is None:
            return
        dense = part.to_dense(solution.factors)
        error = self.problem.objective_error(dense + other)
        if error <= self.error:
            self.factors[index], self.dense[index], self.error = solution.factors, dense, error
            self.notes += [note for note in solution.notes if note not in self.notes]


def _solve_part(problem: Problem, residual: Tensor, part: Structure, seed: int) -> Solution | None:
    """The part's own solver on a residual, float64 factors; None where nothing is left to fit.

    The residual is brought to the scale that solvers expect, by a power of two.
    """
    # Not at the top: the registry lists this module.
    from blastnn.factorize import SOLVERS, choose_solver

    rms = float(residual.square().mean().sqrt())
    if rms == 0.0:
        return None
    exponent = math.floor(math.log2(rms))
    rest = replace(problem, weight=residual * 2.0**-exponent)
    if rest.energy <= 0.0:
        return None
    name = choose_solver(part, weighted=problem.moment is not None)
    solution: Solution = SOLVERS[name].solve(rest, part, seed)
    factors = part.scaled(cast_factors(solution.factors, residual.dtype), exponent)
    return replace(solution, factors=factors)
