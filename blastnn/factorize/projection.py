r"""Block low-rank, Monarch and block-diagonal matrices by projection: an SVD for each block.

Without data the blocks part and each has its own optimum: the truncated SVD (of the matrix with its
rows permuted, for Monarch), or the block itself where it is full. With a second moment
``C = L L^T`` the blocks of one block row work together, since ``C`` couples the block columns.
Given the others, block ``(i, j)`` is the answer of a low-rank problem in the metric ``C_jj``:

``G_ij = ((A - sum_{k != j} A^_ik) C)_j``, ``minimise || (G_ij C_jj^-1 - A^_ij) L_jj ||``,

a whitened truncated SVD, for all block rows at once. One sweep does so for every ``j`` in turn; no
step can increase the error. A block-diagonal matrix has one block to a row and needs one step.

Letters: ``i`` block row, ``j k`` block columns, ``p q`` rows and columns of a block, ``t`` rank.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from blastnn.factorize.blocks import padded_moment
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.sweeping import SWEEPS, sweep_until_settled
from blastnn.factorize.whiten import nearest_low_rank, truncated_svd
from blastnn.structures import BlockDiagonal, BlockLowRank, Monarch, Structure
from blastnn.structures.grid import pad_last

STRUCTURES = (BlockDiagonal, BlockLowRank, Monarch)
USES_SECOND_MOMENT = True
WHY = "gives each block its SVD, which is optimal, in turn where data couple the blocks"


def solve(problem: Problem, spec: Structure, seed: int, sweeps: int = SWEEPS) -> Solution:
    """Project onto ``spec``; ``sweeps`` counts where blocks are coupled; ``seed`` is unused."""
    start = time.perf_counter()
    if isinstance(spec, BlockDiagonal):
        factors, status = _diagonal(problem, spec), "optimal: every block by itself"
    else:
        assert isinstance(spec, BlockLowRank)
        if problem.moment is not None:
            coupled = _Coupled(problem.weight, problem.moment, spec)
            return sweep_until_settled(problem, spec, coupled.start(), coupled.sweep, sweeps, start)
        U, V = truncated_svd(_blocks(problem.weight, spec), spec.rank)
        factors, status = {"U": U, "V": V}, "optimal: truncated SVD of every block"
    error = problem.objective_error(spec.to_dense(factors))
    return Solution(factors, [(time.perf_counter() - start, error)], status)


def _diagonal(problem: Problem, spec: BlockDiagonal) -> dict[str, Tensor]:
    """Block ``i`` is ``(A C)_ii C_ii^-1``, or the nearest to it of the rank."""
    (p, q), b = spec.block_shape, spec.blocks
    target, factor = problem.weight, None
    if problem.moment is not None:
        target = target @ problem.moment
        moment = padded_moment(problem.moment, b * q).view(b, q, b, q)
        factor = torch.linalg.cholesky(_diagonal_blocks(moment))
    missing = (0, b * q - target.shape[1], 0, b * p - target.shape[0])
    products = _diagonal_blocks(torch.nn.functional.pad(target, missing).view(b, p, b, q))
    if spec.rank is not None:
        U, V = nearest_low_rank(products, factor, spec.rank)
        return {"U": U, "V": V}
    if factor is not None:
        products = torch.cholesky_solve(products.mT, factor).mT
    return {"B": products}


def _diagonal_blocks(blocks: Tensor) -> Tensor:
    """``(b, p, b, q)`` to ``(b, p, q)``."""
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _blocks(matrix: Tensor, spec: BlockLowRank) -> Tensor:
    """``(m, n)`` to ``(b1, b2, p, q)``, rows permuted where the structure does."""
    rows = spec.split_rows(pad_last(matrix, spec.padded_shape[1]))
    return rows.unflatten(2, (spec.blocks[1], -1)).transpose(1, 2)


class _Coupled:
    """Block low-rank with a second moment: rows in the structure's order, columns padded."""

    def __init__(self, weight: Tensor, moment: Tensor, spec: BlockLowRank) -> None:
        b2, q = spec.blocks[1], spec.block_shape[1]
        self.spec = spec
        self.weight = _blocks(weight, spec)  # (b1, b2, p, q)
        padded = padded_moment(moment, b2 * q)
        self.moment = padded.view(b2, q, b2, q).transpose(1, 2)  # (k, j, q, w)
        self.factor = torch.linalg.cholesky(self.moment.diagonal().permute(2, 0, 1))

    def start(self) -> dict[str, Tensor]:
        """Every block in its own metric, as if all others were exact: ``G_ij = A_ij C_jj``."""
        factor = self.factor.expand(self.weight.shape[0], -1, -1, -1)
        U, V = nearest_low_rank(self.weight @ factor @ factor.mT, factor, self.spec.rank)
        return {"U": U, "V": V}

    def sweep(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each block column in turn, given the others: exact steps."""
        U, V = factors["U"].clone(), factors["V"].clone()
        residual = self.weight - U @ V.mT  # (b1, b2, p, q)
        for j in range(self.spec.blocks[1]):
            residual[:, j] = self.weight[:, j]
            products = torch.einsum("ikpq,kqw->ipw", residual, self.moment[:, j])
            U[:, j], V[:, j] = nearest_low_rank(products, self.factor[j], self.spec.rank)
            residual[:, j] -= U[:, j] @ V[:, j].mT
        return {"U": U, "V": V}
