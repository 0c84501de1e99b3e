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

# Up to this smaller side a full decomposition takes a few milliseconds.
SMALL = 128


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


def approximate_low_rank(
    problem: Problem, rank: int, seed: int, oversampling: int = 8, passes: int = 1
) -> tuple[Tensor, Tensor]:
    """``P (m, rank)``, ``Q (n, rank)`` near those of ``whitened_svd``, many times cheaper.

    Those themselves where the matrix is so small that they cost nothing. Else randomised range
    finding with ``passes`` power iterations (Halko, Martinsson and Tropp 2011, Algorithms 4.4 and
    5.1) in the compute dtype, about a tenth above the optimal error on real weights: a start for
    solvers that iterate.
    """
    if min(problem.weight.shape) <= SMALL:
        exact = whitened_svd(problem, rank)
        return exact[0], exact[1]
    weight, factor = problem.weight, None
    if problem.moment is not None:
        factor = torch.linalg.cholesky(problem.moment)
        weight = weight @ factor
    weight = weight.to(problem.compute_dtype)
    width = min(rank + oversampling, *weight.shape)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(weight.shape[1], width, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ probe).Q
    for _ in range(passes):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
    roots = values[:rank].sqrt()
    P, Q = basis @ left[:, :rank] * roots, right[:rank].mT * roots
    if factor is not None:
        Q = torch.linalg.solve_triangular(factor.mT, Q.double(), upper=True).to(Q)
    return P, Q


def solve(problem: Problem, spec: Structure, seed: int) -> Solution:
    """The best matrix of rank ``spec.rank`` under the problem's second moment; ``seed`` unused."""
    start = time.perf_counter()
    assert isinstance(spec, LowRank)
    P, Q, squared = whitened_svd(problem, spec.rank)
    error = (squared / problem.energy) ** 0.5
    status = "optimal: truncated SVD"
    return Solution({"U": P, "V": Q}, [(time.perf_counter() - start, error)], status)
