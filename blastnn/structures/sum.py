"""The sum of two structured matrices, e.g. low rank plus block-diagonal (paper, Section 2).

The factors are those of the parts, named ``first_U``, ``second_B`` and so on. Parameters and
multiplications per token are the sums of the parts'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, Structure, require_budget
from blastnn.structures.block_diagonal import BlockDiagonal
from blastnn.structures.lowrank import LowRank
from blastnn.structures.registry import register

PREFIXES = ("first_", "second_")
Value = TypeVar("Value")


@register
@dataclass(frozen=True)
class Sum(Structure):
    """Two structures of the same shape, added.

    Attributes:
        parts: the two specs, themselves sums if wanted.

    Raises:
        StructureError: not two specs, or specs of another shape.
    """

    parts: tuple[Structure, Structure]
    name: ClassVar[str] = "sum"
    example_options = (
        # Two block-diagonal matrices are the one example that needs no more than m + n numbers.
        {"kinds": (BlockDiagonal, BlockDiagonal)},
        {},
        {"share": 0.8},
        {"kinds": (LowRank, LowRank), "share": 0.3},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.parts, (tuple, list)) or len(self.parts) != 2:
            raise StructureError(f"parts must be two specs, but is {self.parts!r}")
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, Structure):
                raise StructureError(f"each part must be a spec, but one is {part!r}")
            shape = (part.out_features, part.in_features)
            if shape != (self.out_features, self.in_features):
                raise StructureError(
                    f"the parts of a {self.out_features} x {self.in_features} sum must have that "
                    f"shape, but one is {shape[0]} x {shape[1]}: {part}"
                )

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parts' factors, each name with ``first_`` or ``second_`` before it."""
        return _joined(*(part.factor_shapes() for part in self.parts))

    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parts' index factors, named alike."""
        return _joined(*(part.index_shapes() for part in self.parts))

    def step_factors(self) -> frozenset[str]:
        """The parts' own, named alike."""
        pairs = zip(PREFIXES, self.parts, strict=True)
        return frozenset(word + name for word, part in pairs for name in part.step_factors())

    def large_factors(self) -> tuple[str, ...]:
        """The parts' own, named alike."""
        pairs = zip(PREFIXES, self.parts, strict=True)
        return tuple(word + name for word, part in pairs for name in part.large_factors())

    def split(self, factors: Factors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The factors of the first part and of the second, under the parts' own names."""
        first, second = (
            {key.removeprefix(word): f for key, f in factors.items() if key.startswith(word)}
            for word in PREFIXES
        )
        return first, second

    def join(self, first: Factors, second: Factors) -> dict[str, Tensor]:
        """The inverse of ``split``, in the order in which factors are stored."""
        given = _joined(first, second)
        return {key: given[key] for key in self.tensor_shapes()}

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """The sum of the parts' products."""
        self.check_input(x)
        first, second = self.split(factors)
        return self.parts[0].matmul(x, first) + self.parts[1].matmul(x, second)

    def to_dense(self, factors: Factors) -> Tensor:
        """The sum of the parts' matrices."""
        first, second = self.split(factors)
        return self.parts[0].to_dense(first) + self.parts[1].to_dense(second)

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Each part's own initialisation over ``sqrt(2)``, from neighbouring seeds.

        The parts are independent, so that the variances of their entries add up to ``1/n``.
        """
        first, second = (
            part.scaled(part.init(seed=2 * seed + i, dtype=dtype, device=device), -0.5)
            for i, part in enumerate(self.parts)
        )
        return self.join(first, second)

    @classmethod
    def for_budget(
        cls,
        out_features: int,
        in_features: int,
        params: int,
        *,
        step: int = 1,
        share: float = 0.5,
        kinds: tuple[type[Structure], type[Structure]] = (LowRank, BlockDiagonal),
        **options: Any,
    ) -> Self:
        """The second part within ``1 - share`` of the budget, the first in all that then is left.

        Args:
            out_features: ``m``.
            in_features: ``n``.
            params: the budget of both parts together.
            step: of either part's rank.
            share: of the budget, for the first part; strictly between 0 and 1.
            kinds: the structures of the first and the second part, with their own default options.
            options: none; there to be refused by name.

        Raises:
            StructureError: a part's budget holds not even its smallest spec.
        """
        require_budget(params, step)
        if not 0.0 < share < 1.0:
            raise StructureError(f"share must lie strictly between 0 and 1, but is {share!r}")
        shape = (out_features, in_features)
        try:
            second = kinds[1].for_budget(*shape, int((1.0 - share) * params), step=step)
            first = kinds[0].for_budget(*shape, params - second.num_params, step=step)
        except StructureError as error:
            raise StructureError(
                f"sum {out_features} x {in_features} of {kinds[0].name} and {kinds[1].name} with "
                f"{params} parameters: {error}"
            ) from error
        return cls(*shape, (first, second), **options)

    def larger(self, step: int = 1) -> Self | None:
        """The first part's next larger spec with the second as it is; None where there is none."""
        grown = self.parts[0].larger(step)
        return None if grown is None else replace(self, parts=(grown, self.parts[1]))

    def scaled(self, factors: Factors, exponent: float) -> dict[str, Tensor]:
        """``2**exponent`` times both parts, each in its own way."""
        first, second = (
            part.scaled(own, exponent)
            for part, own in zip(self.parts, self.split(factors), strict=True)
        )
        return self.join(first, second)

    @property
    def num_multiplications(self) -> int:
        """Those of the parts together."""
        return sum(part.num_multiplications for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The spec with the JSON of its parts inside."""
        shape = {"out_features": self.out_features, "in_features": self.in_features}
        return {"structure": self.name, **shape, "parts": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Structure]
    ) -> Self:
        """The spec of ``to_json``'s values, its parts read by ``read``."""
        parts = values.get("parts")
        if not isinstance(parts, list):
            raise StructureError(f"the parts of a sum must be a list of two specs, not {parts!r}")
        return cls(**{**values, "parts": tuple(read(part) for part in parts)})


def _joined(first: Mapping[str, Value], second: Mapping[str, Value]) -> dict[str, Value]:
    """Both mappings in one, the keys with their part's prefix."""
    pairs = zip(PREFIXES, (first, second), strict=True)
    return {word + key: value for word, part in pairs for key, value in part.items()}
