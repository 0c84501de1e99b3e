"""What solvers that sweep over exact steps share: the error, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.structures import Structure

SWEEPS = 20
# A sweep that lowers the error by less than this share of it is the last.
TOLERANCE = 1e-4


def sweep_until_settled(
    problem: Problem,
    spec: Structure,
    factors: dict[str, Tensor],
    sweep: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    sweeps: int,
    start: float,
) -> Solution:
    """Sweep from ``factors`` until the error no longer falls; what is returned is the best seen.

    Args:
        problem: what is minimised.
        spec: of the factors.
        factors: where to start; the first pair of the history.
        sweep: new factors from old ones, without changing those.
        sweeps: how many at most.
        start: ``time.perf_counter()`` when the solver began.
    """
    history = [(time.perf_counter() - start, problem.objective_error(spec.to_dense(factors)))]
    for _ in range(sweeps):
        candidate, before = sweep(factors), history[-1][1]
        error = problem.objective_error(spec.to_dense(candidate))
        if error <= before:
            factors = candidate
            history.append((time.perf_counter() - start, error))
        if not error < before * (1.0 - TOLERANCE):
            return Solution(factors, history, "converged: the error no longer falls")
    return Solution(factors, history, f"ran its {sweeps} sweeps")
