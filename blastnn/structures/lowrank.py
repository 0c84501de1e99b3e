"""Low rank: ``A = U V^T``, ``U (m, r)`` and ``V (n, r)``; ``r (m + n)`` parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import (
    Factors,
    Structure,
    normal_factors,
    rank_for_budget,
    require_positive_int,
)
from blastnn.structures.registry import register


@register
@dataclass(frozen=True)
class LowRank(Structure):
    """A matrix of rank at most ``rank``: ``U (m, r)`` times ``V (n, r)`` transposed."""

    rank: int
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("rank", self.rank)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``U (m, r)``, ``V (n, r)``."""
        return {"U": (self.out_features, self.rank), "V": (self.in_features, self.rank)}

    def row_blocks(self) -> int:
        """One: the rows of ``U`` are the matrix's."""
        return 1

    def large_factors(self) -> tuple[str, ...]:
        """``V``, ``U``."""
        return ("V", "U")

    def gram(self, name: str, factors: Factors, second_moment: Tensor | None) -> Tensor:
        """``U^T U`` for ``V``; for ``U``, with ``C`` the moment, ``V^T C V``."""
        U, V = factors["U"].float(), factors["V"].float()
        if name == "V":
            return U.mT @ U
        return V.mT @ V if second_moment is None else V.mT @ second_moment.float() @ V

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """``(x V) U^T``."""
        self.check_input(x)
        return (x @ factors["V"]) @ factors["U"].mT

    def to_dense(self, factors: Factors) -> Tensor:
        """``U V^T``."""
        return factors["U"] @ factors["V"].mT

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """``U, V ~ N(0, 1 / sqrt(n r))`` in variance, so that the product has variance 1/n."""
        std = (1.0 / (self.in_features * self.rank)) ** 0.25
        return normal_factors(self, std, seed, dtype, device)

    @classmethod
    def for_budget(
        cls, out_features: int, in_features: int, params: int, *, step: int = 1, **options: Any
    ) -> Self:
        """``rank = params // (m + n)``; takes no further options."""
        if options:
            raise StructureError(f"low rank takes no option {sorted(options)[0]!r}")
        label = f"low rank {out_features} x {in_features}"
        return cls(
            out_features,
            in_features,
            rank=rank_for_budget(label, params, out_features + in_features, step),
        )
