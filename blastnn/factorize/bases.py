r"""BLR^2, ``A_ij = U_i S_ij V_j^T``, by shared bases and exact steps.

``minimise || (A - A^) L ||``, ``C = L L^T`` (``C = I`` without data), ``Y = A C``. In turn:

- columns, one ``j`` after the other: with orthonormal ``U_i``, all ``S_ij V_j^T`` of block column
  ``j`` together are a matrix ``Z_j (b1 r, q)`` of rank ``r``, and the best one is the whitened
  truncated SVD of the projected residual: ``Z_j`` nearest to ``G_j C_jj^-1`` in the metric
  ``C_jj``, with ``G_ij = U_i^T (Y_ij - sum_{k != j} A^_ik C_kj)``;
- rows, all ``i`` at once: with ``H_i = [S_i1 V_1^T, ..., S_ib2 V_b2^T]``,
  ``U_i (H_i C H_i^T) = A_i C H_i^T``, then ``U_i = Q R`` with ``R`` moved into ``S_i1, ...``.

Each is the exact minimum over what it changes, so the error never rises. The start: ``U_i`` from
the leading left singular vectors of block row ``i`` of ``A L``, then the columns as if all other
block columns were exact.

Letters: ``i`` block row, ``j k`` block columns, ``p q w`` rows and columns of blocks, ``r s`` rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.factorize.blocks import split_blocks, split_moment
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.sweeping import SWEEPS, sweep_until_settled
from blastnn.factorize.whiten import nearest_low_rank
from blastnn.structures import BLR2, Structure

STRUCTURES = (BLR2,)
USES_SECOND_MOMENT = True
WHY = "solves for bases and couplings exactly in turn, so that the error never rises"

# Directions of H_i C H_i^T weaker than this, relative to the strongest, carry rounding alone.
RANK_TOLERANCE = 1e-13


def solve(problem: Problem, spec: Structure, seed: int, sweeps: int = SWEEPS) -> Solution:
    """Alternate rows and columns until the error no longer falls; ``seed`` is unused."""
    start = time.perf_counter()
    assert isinstance(spec, BLR2)
    bases = _Bases.build(problem, spec)
    return sweep_until_settled(problem, spec, bases.start(), bases.sweep, sweeps, start)


@dataclass(frozen=True)
class _Bases:
    """The problem in blocks, float64: ``A`` and ``Y`` as ``(b1, b2, p, q)``.

    ``moment`` is ``C (k, j, q, w)`` and ``factor`` the ``L_jj (j, q, q)``; None without data.
    """

    rank: int
    weight: Tensor
    target: Tensor
    moment: Tensor | None
    factor: Tensor | None

    @classmethod
    def build(cls, problem: Problem, spec: BLR2) -> Self:
        """Cut the weight and the moment into blocks."""
        weight = split_blocks(problem.weight, spec)
        if problem.moment is None:
            return cls(spec.rank, weight, weight, None, None)
        target = split_blocks(problem.weight @ problem.moment, spec)
        moment = split_moment(problem.moment, spec)
        factor = torch.linalg.cholesky(moment.diagonal().permute(2, 0, 1))
        return cls(spec.rank, weight, target, moment, factor)

    def start(self) -> dict[str, Tensor]:
        """The leading eigenvectors of ``A_i C A_i^T``, and columns that ignore each other."""
        gram = torch.einsum("ijpq,ijuq->ipu", self.target, self.weight)
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :, : self.rank]
        U = pad(vectors, (0, self.rank - vectors.shape[2]))
        own = self.weight if self.factor is None else self.weight @ self.factor @ self.factor.mT
        columns = [self._column(U, own[:, j], j) for j in range(own.shape[1])]
        S = torch.stack([couplings for couplings, _ in columns], 1)
        return {"U": U, "S": S, "V": torch.stack([V for _, V in columns])}

    def _column(self, U: Tensor, products: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """``S_:j (b1, r, r)`` and ``V_j (q, r)`` for the products ``T_j C_jj (b1, p, q)``."""
        factor = None if self.factor is None else self.factor[j]
        P, V = nearest_low_rank((U.mT @ products).flatten(0, 1), factor, self.rank)
        return P.view(U.shape[0], self.rank, self.rank), V

    def sweep(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows, then every block column."""
        U, S = self._rows(factors["S"], factors["V"])
        V = factors["V"].clone()
        for j in range(V.shape[0]):
            others = self._others(S, V, j)
            products = self.target[:, j] - U @ others
            S[:, j], V[j] = self._column(U, products, j)
        return {"U": U, "S": S, "V": V}

    def _others(self, S: Tensor, V: Tensor, j: int) -> Tensor:
        """``sum_{k != j} S_ik V_k^T C_kj``, ``(b1, r, q)``."""
        if self.moment is None:
            return torch.zeros_like(S[:, 0, :, :1])
        moved = V.mT @ self.moment[:, j]  # (k, r, q)
        moved[j] = 0.0
        return torch.einsum("ikrs,ksq->irq", S, moved)

    def _rows(self, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """``U_i`` with orthonormal columns, and ``S`` with the rest of it."""
        R = torch.einsum("ijps,ijrs->ipr", self.target @ V, S)  # A_i C H_i^T
        G = torch.einsum("ijrs,ijts->irt", self._coupled(S, V), S)  # H_i C H_i^T
        inverse = torch.linalg.pinv(G, hermitian=True, rtol=RANK_TOLERANCE)
        Q, triangle = torch.linalg.qr(R @ inverse)
        missing = self.rank - Q.shape[2]
        U, mixing = pad(Q, (0, missing)), pad(triangle, (0, 0, 0, missing))
        return U, mixing[:, None] @ S

    def _coupled(self, S: Tensor, V: Tensor) -> Tensor:
        """``sum_k S_ik M_kj`` with ``M_kj = V_k^T C_kj V_j``, ``(b1, b2, r, r)``."""
        if self.moment is None:
            return S @ (V.mT @ V)
        M = torch.einsum("kqr,kjqw,jws->kjrs", V, self.moment, V)
        return torch.einsum("iktr,kjrs->ijts", S, M)
