r"""Block-diagonal: ``b`` blocks along the diagonal, each full or of low rank, zero elsewhere.

Layout: full blocks ``B (b, p, q)``, or ``U (b, p, r)`` and ``V (b, q, r)`` with ``p = ceil(m / b)``
and ``q = ceil(n / b)``, zero-padded where that does not divide (see ``grid.py``). Parameters and
multiplications per token: ``b p q``, about ``m n / b``, or ``r b (p + q)``, about ``r (m + n)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import (
    Factors,
    Structure,
    normal_factors,
    rank_for_budget,
    require_budget,
    require_positive_int,
)
from blastnn.structures.grid import block_pair, check_blocks_fit, pad_last
from blastnn.structures.registry import register


@register
@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """``blocks`` diagonal blocks: full where ``rank`` is None, else of that rank.

    Attributes:
        blocks: how many; a pair ``(b, b)`` is taken for ``b``.
        rank: of each block; None for full blocks.
        fixed_blocks: ``blocks`` was asked for, so ``larger`` never changes it.

    Raises:
        StructureError: more blocks than rows or columns, or unequal numbers of row and column
            blocks, which have no diagonal.
    """

    blocks: int
    rank: int | None = None
    fixed_blocks: bool = False
    name: ClassVar[str] = "blockdiag"
    example_options = ({}, {"blocks": 1}, {"blocks": 3}, {"blocks": (4, 4)}, {"blocks": 7})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", _one_number(self.blocks))
        check_blocks_fit((self.blocks, self.blocks), self.out_features, self.in_features)
        if self.rank is not None:
            require_positive_int("rank", self.rank)
        if not isinstance(self.fixed_blocks, bool):
            raise StructureError(f"fixed_blocks must be true or false, not {self.fixed_blocks!r}")

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(p, q)``, the rows and columns of one block, padding included."""
        return -(-self.out_features // self.blocks), -(-self.in_features // self.blocks)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``B (b, p, q)``; or ``U (b, p, r)``, ``V (b, q, r)``."""
        (p, q), b, r = self.block_shape, self.blocks, self.rank
        return {"B": (b, p, q)} if r is None else {"U": (b, p, r), "V": (b, q, r)}

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """``y_i = B_i x_i``, or ``y_i = U_i (V_i^T x_i)``: one batched product, or two."""
        self.check_input(x)
        b, q = self.blocks, self.block_shape[1]
        tokens = x.reshape(-1, self.in_features)
        columns = pad_last(tokens, b * q).view(-1, b, q).transpose(0, 1)  # (b, T, q)
        if self.rank is None:
            y = torch.bmm(columns, factors["B"].mT)
        else:
            y = torch.bmm(torch.bmm(columns, factors["V"]), factors["U"].mT)
        y = y.transpose(0, 1).reshape(tokens.shape[0], b * self.block_shape[0])
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def to_dense(self, factors: Factors) -> Tensor:
        """The blocks in their places; padding cut off."""
        full = self.rank is None
        blocks = factors["B"] if full else factors["U"] @ factors["V"].mT  # (b, p, q)
        (p, q), b = self.block_shape, self.blocks
        placed = torch.diag_embed(blocks.permute(1, 2, 0)).permute(2, 0, 3, 1)  # (b, p, b, q)
        return placed.reshape(b * p, b * q)[: self.out_features, : self.in_features]

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Normal factors; the mean square of the whole matrix, zeros included, is ``1/n``.

        An output then has the variance that a dense layer's has, although it reads few inputs.
        """
        variance = self.out_features / self._entries()
        std = variance**0.5 if self.rank is None else (variance / self.rank) ** 0.25
        return normal_factors(self, std, seed, dtype, device)

    def _entries(self) -> int:
        """How many entries of the matrix lie in a block."""
        p, q = self.block_shape
        starts = range(self.blocks)
        rows = [max(min(p, self.out_features - i * p), 0) for i in starts]
        columns = [max(min(q, self.in_features - i * q), 0) for i in starts]
        return sum(a * b for a, b in zip(rows, columns, strict=True))

    @classmethod
    def for_budget(
        cls,
        out_features: int,
        in_features: int,
        params: int,
        *,
        step: int = 1,
        blocks: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> Self:
        """The fewest full blocks that fit; or ``blocks``, full if they fit, else of low rank.

        ``step`` is of the rank, and only counts where blocks have low rank.
        """
        require_budget(params, step)
        if blocks is not None:
            full = cls(out_features, in_features, blocks, fixed_blocks=True, **options)  # type: ignore[arg-type]
            return full if full.num_params <= params else full._of_low_rank(params, step)
        for count in range(1, min(out_features, in_features) + 1):
            spec = cls(out_features, in_features, count, **options)
            if spec.num_params <= params:
                return spec
        raise StructureError(
            f"block-diagonal {out_features} x {in_features}: {params} parameters are fewer than "
            "any number of full blocks takes; give a larger budget, or blocks=..., which allows "
            "blocks of low rank"
        )

    def _of_low_rank(self, params: int, step: int) -> Self:
        one = replace(self, rank=1)
        label = f"block-diagonal {self.out_features} x {self.in_features} in {self.blocks} blocks"
        return replace(self, rank=rank_for_budget(label, params, one.num_params, step))

    def larger(self, step: int = 1) -> Self | None:
        """A larger rank while that takes fewer numbers than full blocks, then full blocks.

        From full blocks: fewer of them, the least that takes more numbers, unless the block count
        was asked for. (Padding makes the size fall and rise with the count: 5 blocks of a 6 x 6
        matrix take 20 numbers, 4 take 16, 3 take 12.)
        """
        full = replace(self, rank=None)
        if self.rank is not None:
            grown = replace(self, rank=self.rank + step)
            passed = self.num_params >= full.num_params
            return grown if passed or grown.num_params < full.num_params else full
        if self.fixed_blocks:
            return None
        fewer = [replace(self, blocks=count) for count in range(1, self.blocks)]
        more = [spec for spec in fewer if spec.num_params > self.num_params]
        return min(more, key=lambda spec: spec.num_params, default=None)


def _one_number(blocks: int | tuple[int, int]) -> int:
    """``b`` or the pair ``(b, b)`` as ``b``."""
    rows, columns = block_pair(blocks)
    if rows != columns:
        raise StructureError(
            f"a block-diagonal matrix has as many row blocks as column blocks, but blocks is "
            f"{(rows, columns)}; give one number"
        )
    return rows
