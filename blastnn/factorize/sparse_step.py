"""The sparse half-step of the ``sparse`` solver: scores of blocks, and their least squares.

Letters: ``m n`` rows and columns, ``i j`` block row and block column, ``p q`` a block's shape,
``K`` the columns that the kept blocks of one block row cover.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from blastnn.structures.sparse_plus_low_rank import SparsePlusLowRank


@dataclass(frozen=True)
class Mask:
    """Kept blocks: a spec with a row-major grid and the places ``(kept,)`` in it."""

    spec: SparsePlusLowRank
    places: Tensor

    def dense(self) -> Tensor:
        """``(m, n)`` bool, true where an entry belongs to a kept block."""
        (k1, k2), (p, q) = self.spec.block_counts, self.spec.block_shape
        kept = torch.zeros(k1 * k2, dtype=torch.bool, device=self.places.device)
        kept[self.places] = True
        entries = kept.view(k1, k2).repeat_interleave(p, 0).repeat_interleave(q, 1)
        return entries[: self.spec.out_features, : self.spec.in_features]

    def block_rows(self) -> list[tuple[slice, Tensor]]:
        """For each block row with kept blocks: its rows, and ``K`` as column indices."""
        dense, p = self.dense(), self.spec.block_shape[0]
        rows = [slice(first, first + p) for first in range(0, self.spec.out_features, p)]
        pairs = [(part, dense[part.start].nonzero()[:, 0]) for part in rows]
        return [(part, columns) for part, columns in pairs if columns.numel()]


@dataclass(frozen=True)
class BlockRegression:
    """The least-squares fit of a matrix by the kept blocks; normal matrices factorised once."""

    mask: Mask
    moment: Tensor | None
    block_rows: list[tuple[slice, Tensor, Tensor]]

    @classmethod
    def build(cls, mask: Mask, moment: Tensor | None) -> Self:
        """``moment`` is ``C (n, n)``, positive definite, or None for the identity."""
        if moment is None:
            return cls(mask, None, [])
        rows = [
            (part, columns, torch.linalg.cholesky(moment[columns][:, columns]))
            for part, columns in mask.block_rows()
        ]
        return cls(mask, moment, rows)

    def fit(self, residual: Tensor) -> Tensor:
        """The ``(m, n)`` matrix, zero outside the blocks, nearest to ``residual (m, n)``."""
        if self.moment is None:
            return residual * self.mask.dense()
        fitted = torch.zeros_like(residual)
        weighted = residual @ self.moment
        for part, columns, factor in self.block_rows:
            solution = torch.cholesky_solve(weighted[part][:, columns].T, factor).T
            fitted[part] = fitted[part].index_copy(1, columns, solution)
        return fitted


def scores(residual: Tensor, spec: SparsePlusLowRank, moment: Tensor | None) -> Tensor:
    """What fitting each block alone would lower ``|| residual L ||^2`` by: ``(k1 k2,)``."""
    if moment is None:
        return spec.split(residual).square().sum((1, 2))
    weighted, q = residual @ moment, spec.block_shape[1]
    gains = torch.zeros_like(weighted)
    for first in range(0, spec.in_features, q):
        part = slice(first, first + q)
        factor = torch.linalg.cholesky(moment[part, part])
        whitened = torch.linalg.solve_triangular(factor, weighted[:, part].T, upper=False)
        gains[:, part] = whitened.T.square()
    return spec.split(gains).sum((1, 2))
