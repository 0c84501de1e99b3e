r"""What block-sparse plus low-rank matrices share: ``A = scatter(B) + U V^T``.

The matrix is cut into a grid of ``k1 x k2`` blocks of ``p x q`` entries, ``p = ceil(m / k1)`` and
``q = ceil(n / k2)``. Some blocks are kept and hold numbers of their own, ``B (kept, p, q)``; the
low-rank part ``U (m, r)``, ``V (n, r)`` is added everywhere. Where the grid does not divide the
matrix, the last blocks are padded with zeros: the padding exists in ``B`` (and is counted), but no
input reaches it and no output shows it.

A gain ``(1 - g) B + g U V^T``, as Pixelfly is usually written, describes the same matrices as
``B + U V^T``, since each term can absorb its factor; none is stored.

Letters: ``m n`` rows and columns, ``k1 k2`` block rows and block columns, ``p q`` rows and columns
of a block, ``r`` rank, ``T`` tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.errors import StructureError
from blastnn.structures.base import (
    Factors,
    Structure,
    normal_factors,
    require_positive_int,
)
from blastnn.structures.grid import pad_last


@dataclass(frozen=True)
class SparsePlusLowRank(Structure):
    """A block-sparse matrix plus one of rank at most ``rank``; a subclass says which blocks."""

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("rank", self.rank)

    @property
    @abstractmethod
    def block_shape(self) -> tuple[int, int]:
        """``(p, q)``, the rows and columns of one block, padding included."""

    @property
    @abstractmethod
    def num_kept(self) -> int:
        """How many blocks the sparse part has."""

    @abstractmethod
    def block_places(self, factors: Factors) -> Tensor:
        """``(num_kept,)`` int64: the row-major index of each kept block in ``block_counts``."""

    @abstractmethod
    def sparse_share(self) -> float:
        """The expected share of the matrix entries that kept blocks cover under ``init``."""

    @property
    def block_counts(self) -> tuple[int, int]:
        """``(k1, k2)``: the block rows and block columns that reach into the matrix."""
        p, q = self.block_shape
        return -(-self.out_features // p), -(-self.in_features // q)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``B (kept, p, q)``, ``U (m, r)``, ``V (n, r)``."""
        return {
            "B": (self.num_kept, *self.block_shape),
            "U": (self.out_features, self.rank),
            "V": (self.in_features, self.rank),
        }

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """Gathered input blocks times ``B``, added up per block row; plus ``(x V) U^T``."""
        self.check_input(x)
        tokens = x.reshape(-1, self.in_features)
        y = self._sparse_product(tokens, factors["B"], self.block_places(factors))
        y = y + (tokens @ factors["V"]) @ factors["U"].mT
        return y.reshape(*x.shape[:-1], self.out_features)

    def _sparse_product(self, tokens: Tensor, B: Tensor, places: Tensor) -> Tensor:
        """``(T, n)`` to ``(T, m)``; every shape follows from the spec, none from the data."""
        (k1, k2), (p, q) = self.block_counts, self.block_shape
        count = tokens.shape[0]
        columns = pad_last(tokens, k2 * q).view(count, k2, q)
        gathered = columns.index_select(1, places % k2).transpose(0, 1)  # (kept, T, q)
        products = torch.bmm(gathered, B.mT)  # (kept, T, p)
        rows = products.new_zeros(k1, count, p).index_add(0, places // k2, products)
        return rows.transpose(0, 1).reshape(count, k1 * p)[:, : self.out_features]

    def to_dense(self, factors: Factors) -> Tensor:
        """The kept blocks in their places, padding cut off, plus ``U V^T``."""
        B = factors["B"]
        (k1, k2), (p, q) = self.block_counts, self.block_shape
        blocks = B.new_zeros(k1 * k2, p, q).index_add(0, self.block_places(factors), B)
        sparse = blocks.view(k1, k2, p, q).transpose(1, 2).reshape(k1 * p, k2 * q)
        return sparse[: self.out_features, : self.in_features] + factors["U"] @ factors["V"].mT

    def scaled(self, factors: Factors, exponent: float) -> dict[str, Tensor]:
        """``B`` takes the whole exponent, ``U`` and ``V`` half of it each."""
        exponents = {"B": exponent, "U": exponent // 2, "V": exponent - exponent // 2}
        return {
            name: factor * 2.0 ** exponents[name] if name in exponents else factor
            for name, factor in factors.items()
        }

    def split(self, matrix: Tensor) -> Tensor:
        """``(m, n)`` cut into all its blocks, zero-padded: ``(k1 k2, p, q)``, row-major."""
        (k1, k2), (p, q) = self.block_counts, self.block_shape
        missing = (0, k2 * q - self.in_features, 0, k1 * p - self.out_features)
        return pad(matrix, missing).view(k1, p, k2, q).transpose(1, 2).reshape(k1 * k2, p, q)

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Normal factors; the sparse and the low-rank part each bring half of the variance 1/n.

        The kept blocks cover a share ``s`` of the entries, so theirs have variance ``1 / (2 n s)``.
        """
        stds = {
            "B": (2.0 * self.in_features * self.sparse_share()) ** -0.5,
            "U": (2.0 * self.in_features * self.rank) ** -0.25,
            "V": (2.0 * self.in_features * self.rank) ** -0.25,
        }
        return normal_factors(self, stds, seed, dtype, device)


def check_share(share: float) -> None:
    """Raise StructureError unless the sparse part's share of a budget is between 0 and 1."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise StructureError(
            f"share, the sparse part's share of the budget, must lie between 0 and 1, but is "
            f"{share!r}"
        )


def rank_beside(sizes: tuple[int, int], params: int, taken: int, step: int) -> int:
    """The largest multiple of ``step`` whose low rank fits beside ``taken`` numbers in blocks.

    Raises:
        StructureError: not even rank ``step`` fits.
    """
    smallest = taken + step * sum(sizes)
    if params < smallest:
        raise StructureError(
            f"blocks plus low rank {sizes[0]} x {sizes[1]}: {params} parameters are fewer than "
            f"{taken} in blocks and rank {step} take together ({smallest}); give a larger budget "
            "or a finer grid"
        )
    return (int(params) - taken) // sum(sizes) // step * step
