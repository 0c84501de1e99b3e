"""Block sparse plus low rank with a free mask: which blocks are kept is stored with the factors.

Factors ``B (kept, p, q)``, ``U (m, r)``, ``V (n, r)`` and the index factor ``places (kept,)``;
``kept p q + r (m + n)`` parameters and as many multiplications per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, permutation, require_budget, require_positive_int
from blastnn.structures.registry import register
from blastnn.structures.sparse_plus_low_rank import (
    SparsePlusLowRank,
    check_share,
    rank_beside,
)

# Block rows and block columns where none are asked for, fewer in a matrix with fewer rows.
DEFAULT_GRID = 16
# The stream of the generator that draws the places; 0 to 2 draw the factors.
PLACES_STREAM = 3


@register
@dataclass(frozen=True)
class SparseLowRank(SparsePlusLowRank):
    """``kept`` blocks of a ``grid`` anywhere in the matrix, plus rank ``rank``.

    A grid that would leave whole blocks outside the matrix is stored without them, which is the
    same cut: 9 rows in 7 blocks of 2 are 5 block rows.
    """

    grid: tuple[int, int]
    kept: int
    name: ClassVar[str] = "sparse_lowrank"
    example_options = ({}, {"grid": (3, 2)}, {"grid": (5, 7), "share": 0.25}, {"grid": (1, 4)})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("kept", self.kept)
        sizes = (self.out_features, self.in_features)
        object.__setattr__(self, "grid", _checked_grid(self.grid, sizes))
        object.__setattr__(self, "grid", self.block_counts)
        blocks = self.grid[0] * self.grid[1]
        if self.kept > blocks:
            raise StructureError(
                f"kept must be at most the {blocks} blocks of a {self.grid[0]} x {self.grid[1]} "
                f"grid, but is {self.kept}"
            )

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(p, q) = (ceil(m / k1), ceil(n / k2))``."""
        return -(-self.out_features // self.grid[0]), -(-self.in_features // self.grid[1])

    @property
    def num_kept(self) -> int:
        """``kept``."""
        return self.kept

    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        """``places (kept,)``: row-major block indices, distinct."""
        return {"places": (self.kept,)}

    def block_places(self, factors: Factors) -> Tensor:
        """The index factor."""
        return factors["places"]

    def sparse_share(self) -> float:
        """Every block is as likely to be kept as any other: ``kept / (k1 k2)``."""
        return self.kept / (self.grid[0] * self.grid[1])

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """As every sparse plus low-rank matrix, with distinct places drawn from the seed."""
        factors = super().init(seed=seed, dtype=dtype, device=device)
        drawn = permutation(self.grid[0] * self.grid[1], seed, PLACES_STREAM)
        return {**factors, "places": drawn[: self.kept].sort().values.to(device)}

    @classmethod
    def for_budget(
        cls,
        out_features: int,
        in_features: int,
        params: int,
        *,
        step: int = 1,
        grid: int | tuple[int, int] | None = None,
        share: float = 0.5,
        **options: Any,
    ) -> Self:
        """``share`` of the budget in blocks, at least one; the largest rank that fits beside them.

        Fewer blocks are kept where the smallest rank would not fit otherwise. Without ``grid`` it
        is 16 x 16, or as many blocks as there are rows or columns.

        Raises:
            StructureError: one block and rank ``step`` do not fit; a bad grid or share.
        """
        require_budget(params, step)
        check_share(share)
        if grid is None:
            grid = (min(DEFAULT_GRID, out_features), min(DEFAULT_GRID, in_features))
        sizes = (out_features, in_features)
        one = cls(*sizes, rank=1, grid=_checked_grid(grid, sizes), kept=1, **options)
        size = one.block_shape[0] * one.block_shape[1]
        affordable = (int(params) - step * sum(sizes)) // size
        kept = max(1, min(one.grid[0] * one.grid[1], int(share * params) // size, affordable))
        rank = rank_beside(sizes, params, kept * size, step)
        return cls(*sizes, rank=rank, grid=one.grid, kept=kept, **options)


def _checked_grid(
    grid: int | tuple[int, int] | list[int], sizes: tuple[int, int]
) -> tuple[int, int]:
    """``k`` or ``(k1, k2)`` as a pair of block counts, each at most the matrix's size."""
    pair = (grid, grid) if isinstance(grid, int) else grid
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise StructureError(f"grid must be one number or a pair (k1, k2), but is {grid!r}")
    for count, size in zip(pair, sizes, strict=True):
        require_positive_int("grid", count)
        if count > size:
            raise StructureError(
                f"a grid of {pair[0]} x {pair[1]} blocks does not fit a {sizes[0]} x {sizes[1]} "
                f"matrix; give at most {size} where it has {count}"
            )
    return pair[0], pair[1]
