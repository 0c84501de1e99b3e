r"""Block low-rank: every block of a grid has its own low-rank factors, ``A_jk = U_jk V_jk^T``.

Layout: ``U (b1, b2, p, t)``, ``V (b1, b2, q, t)`` with ``p = ceil(m / b1)``, ``q = ceil(n / b2)``,
zero-padded where that does not divide (see ``grid.py``). Nothing is shared between blocks.
Parameters and multiplications per token: ``t b1 b2 (p + q)``, about ``t (b2 m + b1 n)``.

Monarch (Dao et al. 2022) is the same with strided output rows: row ``l b1 + j`` of the matrix is
row ``l`` of block row ``j``. With ``t = 1`` and ``b1 = b2 = sqrt(n)`` that is the product of two
block-diagonal matrices and permutations.

Letters: ``j`` block row, ``k`` block column, ``t`` rank of a block, ``T`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.structures.base import Factors, normal_factors
from blastnn.structures.blast import FEW_TOKENS
from blastnn.structures.grid import BlockGrid, pad_last
from blastnn.structures.registry import register


@register
@dataclass(frozen=True)
class BlockLowRank(BlockGrid):
    """A ``b1 x b2`` block matrix whose blocks are of rank at most ``rank`` each."""

    name: ClassVar[str] = "blr"

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``U (b1, b2, p, t)``, ``V (b1, b2, q, t)``."""
        (p, q), t = self.block_shape, self.rank
        return {"U": (*self.blocks, p, t), "V": (*self.blocks, q, t)}

    def join_rows(self, rows: Tensor) -> Tensor:
        """Block rows ``(b1, p, ...)`` as the matrix's rows ``(m, ...)``; padding cut off."""
        return rows.flatten(0, 1)[: self.out_features]

    def split_rows(self, matrix: Tensor) -> Tensor:
        """The inverse of ``join_rows`` for a matrix ``(m, c)``: ``(b1, p, c)``, zero-padded."""
        return self._padded_rows(matrix).view(self.blocks[0], -1, matrix.shape[1])

    def _padded_rows(self, matrix: Tensor) -> Tensor:
        missing = self.padded_shape[0] - matrix.shape[0]
        return pad(matrix, (0, 0, 0, missing)).contiguous()

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """``z_jk = V_jk^T x_k``, then ``y_j = sum_k U_jk z_jk``: two batched products."""
        self.check_input(x)
        tokens = x.reshape(-1, self.in_features)
        b2, q = self.blocks[1], self.block_shape[1]
        columns = pad_last(tokens, b2 * q).view(-1, b2, q)  # (T, b2, q)
        multiply = _few_tokens if columns.shape[0] <= FEW_TOKENS else _many_tokens
        y = multiply(columns, factors["U"], factors["V"])  # (b1, p, T)
        return self.join_rows(y).T.reshape(*x.shape[:-1], self.out_features)

    def to_dense(self, factors: Factors) -> Tensor:
        """Every block ``U_jk V_jk^T`` in its place; padding cut off."""
        blocks = (factors["U"] @ factors["V"].mT).transpose(1, 2)  # (b1, p, b2, q)
        return self.join_rows(blocks.flatten(2))[:, : self.in_features]

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Normal factors; an entry is a sum of ``t`` products, so ``t std^4 = 1/n``."""
        std = (1.0 / (self.in_features * self.rank)) ** 0.25
        return normal_factors(self, std, seed, dtype, device)


@register
@dataclass(frozen=True)
class Monarch(BlockLowRank):
    """Block low-rank whose row ``l b1 + j`` is row ``l`` of block row ``j``."""

    name: ClassVar[str] = "monarch"

    def join_rows(self, rows: Tensor) -> Tensor:
        """Block rows ``(b1, p, ...)`` interleaved to the rows ``(m, ...)``; padding cut off."""
        return rows.transpose(0, 1).flatten(0, 1)[: self.out_features]

    def split_rows(self, matrix: Tensor) -> Tensor:
        """The inverse of ``join_rows`` for a matrix ``(m, c)``: ``(b1, p, c)``, zero-padded."""
        rows = self._padded_rows(matrix).view(-1, self.blocks[0], matrix.shape[1])
        return rows.transpose(0, 1)


def _few_tokens(columns: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """All ``b1 b2`` blocks at once, the input repeated for each: no copy of the factors.

    ``(T, b2, q)`` to ``(b1, p, T)``. Tokens are rows inside: a batched product with one column is
    many times slower on a CPU.
    """
    repeated = columns.transpose(0, 1).expand(U.shape[0], -1, -1, -1)  # (b1, b2, T, q)
    z = torch.bmm(repeated.flatten(0, 1), V.flatten(0, 1))  # (b1 b2, T, t)
    return torch.bmm(z, U.flatten(0, 1).mT).unflatten(0, U.shape[:2]).sum(1).mT


def _many_tokens(columns: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """A product for each block column, one for each block row: copies the factors, once each.

    ``(T, b2, q)`` to ``(b1, p, T)``; nothing of size ``b1 n T`` or ``b2 m T`` is built.
    """
    b1, b2, p, t = U.shape
    by_column = V.permute(1, 2, 0, 3).reshape(b2, -1, b1 * t)
    z = torch.bmm(columns.transpose(0, 1), by_column).unflatten(2, (b1, t))  # (b2, T, b1, t)
    by_row = U.transpose(1, 2).reshape(b1, p, b2 * t)
    return torch.bmm(by_row, z.permute(2, 1, 0, 3).reshape(b1, -1, b2 * t).mT)
