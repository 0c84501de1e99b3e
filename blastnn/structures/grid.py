"""What the structures on a grid of ``b1 x b2`` equal blocks have in common: the cutting.

``p = ceil(m / b1)`` rows and ``q = ceil(n / b2)`` columns to a block. A dimension that its block
count does not divide is padded with zeros: the last rows of the last blocks exist in the factors
(and are counted), but no input reaches them and no output shows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn.functional import pad

from blastnn.errors import StructureError
from blastnn.structures.base import Structure, rank_for_budget, require_positive_int


@dataclass(frozen=True)
class BlockGrid(Structure):
    """A structure of one rank on a grid of ``blocks = (b1, b2)``; one number means ``b1 = b2``.

    Raises:
        StructureError: more blocks than rows or columns, or no whole numbers of at least 1.
    """

    rank: int
    blocks: tuple[int, int]
    example_options = (
        {"blocks": (1, 1)},
        {"blocks": (2, 2)},
        {"blocks": (3, 2)},
        {"blocks": (2, 5)},
        {"blocks": (5, 7)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("rank", self.rank)
        object.__setattr__(self, "blocks", block_pair(self.blocks))
        check_blocks_fit(self.blocks, self.out_features, self.in_features)

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(p, q)``, the rows and columns of one block, padding included."""
        (b1, b2) = self.blocks
        return -(-self.out_features // b1), -(-self.in_features // b2)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """``(b1 p, b2 q)``: the matrix shape rounded up to whole blocks."""
        (b1, b2), (p, q) = self.blocks, self.block_shape
        return b1 * p, b2 * q

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
        """The largest rank that fits, with ``blocks`` (one number stands for ``b1 = b2``)."""
        one = cls(out_features, in_features, rank=1, blocks=block_pair(blocks), **options)
        b1, b2 = one.blocks
        label = f"{cls.name} {out_features} x {in_features} in {b1} x {b2} blocks"
        rank = rank_for_budget(label, params, one.num_params, step)
        return cls(out_features, in_features, rank=rank, blocks=one.blocks, **options)


def block_pair(blocks: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """``b`` or ``(b1, b2)`` as a checked pair."""
    pair = (blocks, blocks) if isinstance(blocks, int) else blocks
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise StructureError(f"blocks must be one number or a pair (b1, b2), but is {blocks!r}")
    for value in pair:
        require_positive_int("blocks", value)
    return pair[0], pair[1]


def check_blocks_fit(blocks: tuple[int, int], out_features: int, in_features: int) -> None:
    """Raise StructureError where there are more blocks than rows or columns."""
    for given, size, word in zip(
        blocks, (out_features, in_features), ("row", "column"), strict=True
    ):
        if given > size:
            raise StructureError(
                f"{given} {word} blocks do not fit a {out_features} x {in_features} "
                f"matrix with {size} {word}s; give at most {size}"
            )


def pad_last(x: Tensor, size: int) -> Tensor:
    """Zeros appended to the last dimension up to ``size``; no copy where nothing is missing."""
    return x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1]))
