"""Pixelfly (Dao et al. 2022, arXiv 2112.00029): flat block butterfly plus low rank.

On a ``k x k`` grid, block ``(i, j)`` is kept iff ``i = j`` or ``i xor j`` is one of the first
``bands`` powers of two, 1, 2, 4, ...: the blocks that a product of butterfly factors touches when
it is expanded to first order. A rectangular matrix is cut into the same ``k x k`` grid with
rectangular blocks ``ceil(m / k) x ceil(n / k)``, so the diagonal is stretched along the longer
side. Blocks that fall outside the matrix, as most block rows do where ``k > m``, are left out.

The spec alone says which blocks are kept, so there is no index factor. ``kept p q + r (m + n)``
parameters and as many multiplications per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, require_budget, require_positive_int
from blastnn.structures.registry import register
from blastnn.structures.sparse_plus_low_rank import (
    SparsePlusLowRank,
    check_share,
    rank_beside,
)

# Blocks along each side where no grid is asked for; less for a matrix with fewer rows and columns.
DEFAULT_GRID = 16


@register
@dataclass(frozen=True)
class Pixelfly(SparsePlusLowRank):
    """Block butterfly on a ``grid x grid`` grid with ``bands`` off-diagonals, plus rank ``rank``.

    ``bands = 0`` keeps the diagonal blocks alone. A grid that is no power of two is a corner of
    the next one that is.
    """

    grid: int
    bands: int
    name: ClassVar[str] = "pixelfly"
    example_options = ({}, {"grid": 4}, {"grid": 5, "bands": 2}, {"grid": 7, "bands": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grid", _side(self.grid))
        longest, most = max(self.out_features, self.in_features), _most_bands(self.grid)
        if self.grid > longest:
            raise StructureError(
                f"a {self.grid} x {self.grid} grid does not fit a {self.out_features} x "
                f"{self.in_features} matrix; give at most {longest}"
            )
        if isinstance(self.bands, bool) or not isinstance(self.bands, int) or self.bands < 0:
            raise StructureError(f"bands must be a whole number, 0 or more, but is {self.bands!r}")
        if self.bands > most:
            raise StructureError(
                f"a {self.grid} x {self.grid} grid has {most} bands, but {self.bands} were asked "
                "for; give fewer bands or a finer grid"
            )

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(p, q) = (ceil(m / k), ceil(n / k))``."""
        return -(-self.out_features // self.grid), -(-self.in_features // self.grid)

    @cached_property
    def pattern(self) -> tuple[tuple[int, int], ...]:
        """The kept blocks ``(i, j)``, row by row."""
        distances = {0, *(2**t for t in range(self.bands))}
        k1, k2 = self.block_counts
        return tuple((i, j) for i in range(k1) for j in range(k2) if i ^ j in distances)

    @property
    def num_kept(self) -> int:
        """The blocks of the butterfly pattern that reach into the matrix."""
        return len(self.pattern)

    def block_places(self, factors: Factors) -> Tensor:
        """The pattern as row-major indices, on the device of the factors."""
        k2 = self.block_counts[1]
        places = [i * k2 + j for i, j in self.pattern]
        return torch.tensor(places, dtype=torch.int64, device=factors["B"].device)

    def sparse_share(self) -> float:
        """Counted exactly: the entries of the kept blocks, padding excluded, over ``m n``."""
        (p, q), m, n = self.block_shape, self.out_features, self.in_features
        entries = (min(p, m - i * p) * min(q, n - j * q) for i, j in self.pattern)
        return sum(entries) / (m * n)

    @classmethod
    def for_budget(
        cls,
        out_features: int,
        in_features: int,
        params: int,
        *,
        step: int = 1,
        grid: int | tuple[int, int] | None = None,
        bands: int | None = None,
        share: float = 0.5,
        **options: Any,
    ) -> Self:
        """The largest rank that fits beside the butterfly.

        Without ``bands``, as many as take at most ``share`` of the budget, and none where the
        diagonal alone takes more. Without ``grid``, 16 or the largest power of two that is at most
        the longer side of the matrix.

        Raises:
            StructureError: the butterfly and rank ``step`` do not fit; a bad grid, bands or share.
        """
        require_budget(params, step)
        check_share(share)
        longest = max(out_features, in_features)
        side = min(DEFAULT_GRID, 2 ** (longest.bit_length() - 1)) if grid is None else _side(grid)
        sizes = (out_features, in_features)
        one = cls(*sizes, rank=1, grid=side, bands=bands or 0, **options)
        if bands is None:
            one = one._with_most_bands(share * params)
        rank = rank_beside(sizes, params, one._num_in_blocks, step)
        return replace(one, rank=rank)

    @property
    def _num_in_blocks(self) -> int:
        p, q = self.block_shape
        return self.num_kept * p * q

    def _with_most_bands(self, budget: float) -> Self:
        """The same with the most bands whose blocks hold at most ``budget`` numbers, or none."""
        wider = [replace(self, bands=bands) for bands in range(_most_bands(self.grid) + 1)]
        fitting = [spec for spec in wider if spec._num_in_blocks <= budget]
        return fitting[-1] if fitting else wider[0]


def _most_bands(grid: int) -> int:
    """How many powers of two are below ``grid``: distances that two of its blocks can have."""
    return (grid - 1).bit_length()


def _side(grid: int | tuple[int, int] | list[int]) -> int:
    """``k``, or a pair ``(k, k)`` of equal numbers."""
    if isinstance(grid, (tuple, list)):
        if len(grid) != 2 or grid[0] != grid[1]:
            raise StructureError(f"a butterfly's grid is square, k or (k, k), but is {grid!r}")
        grid = grid[0]
    require_positive_int("grid", grid)
    return grid
