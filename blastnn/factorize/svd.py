"""Truncated SVD, plain or whitened: the optimal low-rank answer in closed form."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.structures import LowRank, Structure

STRUCTURES = (LowRank,)
USES_SECOND_MOMENT = True


def whitened_svd(problem: Problem, rank: int) -> tuple[Tensor, Tensor, float]:
    r"""``A ~ P Q^T`` of rank ``rank``: the SVD of ``A L`` truncated, times ``L^-1``.

    Returns:
        ``P (m, rank)`` and ``Q (n, rank)``, each carrying half of the singular values, float64, and
        the squared error ``|| (A - P Q^T) L ||^2``. Ranks beyond ``min(m, n)`` are zero columns.
    """
    weight, factor = problem.weight, None
    if problem.moment is not None:
        factor = torch.linalg.cholesky(problem.moment)
        weight = weight @ factor
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = min(rank, values.numel())
    roots = values[:kept].sqrt()
    P, Q = left[:, :kept] * roots, right[:kept].T * roots
    if factor is not None:
        Q = torch.linalg.solve_triangular(factor.T, Q, upper=True)
    missing = rank - kept
    if missing:
        P = torch.nn.functional.pad(P, (0, missing))
        Q = torch.nn.functional.pad(Q, (0, missing))
    return P, Q, float(values[kept:].square().sum())


def solve(problem: Problem, spec: Structure, seed: int) -> Solution:
    """The best matrix of rank ``spec.rank`` under the problem's second moment; ``seed`` unused."""
    start = time.perf_counter()
    assert isinstance(spec, LowRank)
    P, Q, squared = whitened_svd(problem, spec.rank)
    error = (squared / problem.energy) ** 0.5
    status = "optimal: truncated SVD"
    return Solution({"U": P, "V": Q}, [(time.perf_counter() - start, error)], status)
