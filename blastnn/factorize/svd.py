"""Truncated SVD, plain or whitened: the optimal low-rank answer in closed form."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from blastnn.arithmetic import DRAWN
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.whiten import halves
from blastnn.structures import LowRank, Structure

STRUCTURES = (LowRank,)
USES_SECOND_MOMENT = True
WHY = "is optimal, in closed form"

# Up to this smaller side a full decomposition takes a few milliseconds.
SMALL = 128


def whitened_svd(problem: Problem, rank: int) -> tuple[Tensor, Tensor, float]:
    r"""``A ~ P Q^T`` of rank ``rank``: the SVD of ``A L`` truncated, times ``L^-1``.

    Returns:
        ``P (m, rank)`` and ``Q (n, rank)``, each carrying half of the singular values, float64, and
        the squared error ``|| (A - P Q^T) L ||^2``. Ranks beyond ``min(m, n)`` are zero columns.
    """
    left, values, right = torch.linalg.svd(_whitened(problem), full_matrices=False)
    P, Q = halves(left, values, right, rank)
    return P, _coloured(Q, problem.root), float(values[rank:].square().sum())


def _whitened(problem: Problem) -> Tensor:
    """``A L``."""
    return problem.weight if problem.root is None else problem.weight @ problem.root


def _coloured(Q: Tensor, root: Tensor | None) -> Tensor:
    """``L^-T Q``: the right factor for ``A`` from that for ``A L``."""
    if root is None:
        return Q
    return torch.linalg.solve_triangular(root.mT, Q.to(root), upper=True).to(Q)


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
    weight = _whitened(problem).to(problem.compute_dtype)
    width = min(rank + oversampling, *weight.shape)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(weight.shape[1], width, generator=generator, **DRAWN).to(weight)
    basis = torch.linalg.qr(weight @ probe).Q
    for _ in range(passes):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
    P, Q = halves(basis @ left, values, right, rank)
    return P, _coloured(Q, problem.root)


def solve(problem: Problem, spec: Structure, seed: int) -> Solution:
    """The best matrix of rank ``spec.rank`` under the problem's second moment; ``seed`` unused."""
    start = time.perf_counter()
    assert isinstance(spec, LowRank)
    P, Q, squared = whitened_svd(problem, spec.rank)
    error = (squared / problem.energy) ** 0.5
    status = "optimal: truncated SVD"
    return Solution({"U": P, "V": Q}, [(time.perf_counter() - start, error)], status)
