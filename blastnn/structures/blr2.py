r"""BLR^2 (Ashcraft, Buttari and Mary 2021): ``A_ij = U_i S_ij V_j^T`` with full couplings.

Bases shared along block rows and columns as in BLAST, but every coupling ``S_ij`` is a full
``r x r`` matrix, of which BLAST keeps the diagonal. Layout: ``U (b1, p, r)``, ``S (b1, b2, r, r)``,
``V (b2, q, r)``, zero-padded where ``b1, b2`` do not divide (see ``grid.py``).
Parameters and multiplications per token: ``r (b1 p + b2 q) + b1 b2 r^2``.

Letters: ``i`` block row, ``j`` block column, ``r s`` rank, ``T`` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, normal_factors, require_budget
from blastnn.structures.blast import FEW_TOKENS
from blastnn.structures.grid import BlockGrid, block_pair, pad_last
from blastnn.structures.registry import register


@register
@dataclass(frozen=True)
class BLR2(BlockGrid):
    """A ``b1 x b2`` block matrix with shared bases of ``rank`` columns and full couplings."""

    name: ClassVar[str] = "blr2"

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``U (b1, p, r)``, ``S (b1, b2, r, r)``, ``V (b2, q, r)``."""
        (b1, b2), (p, q), r = self.blocks, self.block_shape, self.rank
        return {"U": (b1, p, r), "S": (b1, b2, r, r), "V": (b2, q, r)}

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """``z_j = V_j^T x_j``, ``w_i = sum_j S_ij z_j``, ``y_i = U_i w_i``."""
        self.check_input(x)
        tokens = x.reshape(-1, self.in_features)
        b2, q = self.blocks[1], self.block_shape[1]
        columns = pad_last(tokens, b2 * q).view(-1, b2, q).transpose(0, 1)  # (b2, T, q)
        z = torch.bmm(columns, factors["V"])
        couple = _few_tokens if tokens.shape[0] <= FEW_TOKENS else _many_tokens
        y = torch.bmm(couple(z, factors["S"]), factors["U"].mT)  # (b1, T, p)
        joined = y.transpose(0, 1).reshape(tokens.shape[0], self.padded_shape[0])
        return joined[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def to_dense(self, factors: Factors) -> Tensor:
        """Every block ``U_i S_ij V_j^T`` in its place; padding cut off."""
        left = factors["U"][:, None] @ factors["S"]  # (b1, b2, p, r)
        blocks = (left @ factors["V"].mT).transpose(1, 2)  # (b1, p, b2, q)
        dense = blocks.reshape(self.padded_shape)
        return dense[: self.out_features, : self.in_features]

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Normal factors: couplings of variance ``1/r``, bases with ``r std^4 = 1/n``."""
        std = (1.0 / (self.in_features * self.rank)) ** 0.25
        stds = {"U": std, "S": self.rank**-0.5, "V": std}
        return normal_factors(self, stds, seed, dtype, device)

    @classmethod
    def for_budget(
        cls,
        out_features: int,
        in_features: int,
        params: int,
        *,
        step: int = 1,
        blocks: int | tuple[int, int] = 4,
        **options: Any,
    ) -> Self:
        """The largest ``r`` with ``r (b1 p + b2 q) + b1 b2 r^2 <= params``, on ``blocks``."""
        require_budget(params, step)
        smallest = cls(out_features, in_features, step, block_pair(blocks), **options)
        couplings = math.prod(smallest.blocks)
        linear = sum(smallest.padded_shape)
        root = math.isqrt(linear**2 + 4 * couplings * max(int(params), 0))
        rank = (root - linear) // (2 * couplings) // step * step
        if rank < step:
            raise StructureError(
                f"blr2 {out_features} x {in_features} in {smallest.blocks} blocks: {params} "
                f"parameters are fewer than rank {step} takes ({smallest.num_params}); give a "
                "larger budget or fewer blocks"
            )
        return cls(out_features, in_features, rank, smallest.blocks, **options)


def _few_tokens(z: Tensor, S: Tensor) -> Tensor:
    """All couplings at once, the input repeated for each: no copy of ``S``.

    ``(b2, T, r)`` to ``(b1, T, r)``.
    """
    repeated = z.expand(S.shape[0], *z.shape).flatten(0, 1)  # (b1 b2, T, r)
    return torch.bmm(repeated, S.flatten(0, 1).mT).unflatten(0, S.shape[:2]).sum(1)


def _many_tokens(z: Tensor, S: Tensor) -> Tensor:
    """One product with the couplings as a ``(b1 r, b2 r)`` matrix.

    ``(b2, T, r)`` to ``(b1, T, r)``.
    """
    b1, b2, r, _ = S.shape
    joined = S.transpose(1, 2).reshape(b1 * r, b2 * r)
    w = z.transpose(0, 1).reshape(-1, b2 * r) @ joined.T  # (T, b1 r)
    return w.unflatten(1, (b1, r)).transpose(0, 1)
