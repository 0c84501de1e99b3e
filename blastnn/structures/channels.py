r"""Kept channels: a dense submatrix, and zero in all other rows or columns.

What structured pruning leaves of a weight. ``axis`` says whether output channels (``rows``) or
input channels (``columns``) were removed; they come in runs of ``group``, such as the features of
one attention head, that stay or go together. Where that does not divide, the matrix is zero-padded.

Factors ``W (k, n)`` or ``W (m, k)`` with ``k = kept group``, and the index factor
``places (kept,)``: the groups that stay, rising. ``k n`` or ``m k`` parameters, each used once per
token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.errors import StructureError
from blastnn.structures.base import (
    Factors,
    Structure,
    normal_factors,
    permutation,
    rank_for_budget,
    require_budget,
    require_positive_int,
)
from blastnn.structures.grid import pad_last
from blastnn.structures.registry import register

AXES = ("columns", "rows")
PLACES_STREAM = 1  # of the generator that draws the places; 0 draws the numbers


@register
@dataclass(frozen=True)
class Channels(Structure):
    """A matrix of which ``kept`` groups of rows or columns are not zero."""

    kept: int
    axis: str = "columns"
    group: int = 1
    name: ClassVar[str] = "channels"
    example_options = ({}, {"axis": "rows"}, {"group": 2}, {"axis": "rows", "group": 3})

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("kept", "group"):
            require_positive_int(field, getattr(self, field))
        if self.axis not in AXES:
            raise StructureError(f"axis must be one of {AXES}, but is {self.axis!r}")
        if self.kept > self.groups:
            raise StructureError(
                f"kept must be at most the {self.groups} groups of {self.axis}, but is {self.kept}"
            )

    @property
    def size(self) -> int:
        """How many rows or columns there are."""
        return self.out_features if self.axis == "rows" else self.in_features

    @property
    def groups(self) -> int:
        """How many groups they form, the last one padded."""
        return -(-self.size // self.group)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``W (k, n)`` or ``W (m, k)``."""
        k = self.kept * self.group
        rows = self.axis == "rows"
        return {"W": (k, self.in_features) if rows else (self.out_features, k)}

    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        """``places (kept,)``: distinct, rising numbers of groups."""
        return {"places": (self.kept,)}

    def channels(self, places: Tensor) -> Tensor:
        """The kept rows or columns one by one, ``(k,)``, padding among them."""
        inside = torch.arange(self.group, device=places.device)
        return (places[:, None] * self.group + inside).flatten()

    def _spread(self, values: Tensor, places: Tensor) -> Tensor:
        """``(..., k)`` to ``(..., size)``, zero where nothing was kept."""
        k = self.kept * self.group
        positions = torch.arange(k, device=places.device)
        padded = self.groups * self.group
        source = torch.full((padded,), k, device=places.device, dtype=places.dtype)
        source = source.scatter(0, self.channels(places), positions)
        return pad(values, (0, 1)).index_select(-1, source[: self.size])

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """``x`` at the kept columns times ``W^T``, or ``x W^T`` at the kept rows."""
        self.check_input(x)
        places = factors["places"]
        if self.axis == "columns":
            padded = pad_last(x, self.groups * self.group)
            return padded.index_select(-1, self.channels(places)) @ factors["W"].mT
        return self._spread(x @ factors["W"].mT, places)

    def to_dense(self, factors: Factors) -> Tensor:
        """``W`` in its place, zeros around it."""
        W, places = factors["W"], factors["places"]
        return self._spread(W, places) if self.axis == "columns" else self._spread(W.mT, places).mT

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Normal numbers that give the whole matrix, zeros included, a mean square of ``1/n``."""
        std = (self.groups / self.kept / self.in_features) ** 0.5
        drawn = permutation(self.groups, seed, PLACES_STREAM)
        places = drawn[: self.kept].sort().values.to(device)
        return {**normal_factors(self, std, seed, dtype, device), "places": places}

    @classmethod
    def for_budget(
        cls,
        out_features: int,
        in_features: int,
        params: int,
        *,
        step: int = 1,
        axis: str = "columns",
        group: int = 1,
        **options: Any,
    ) -> Self:
        """The most groups that fit, at most all of them."""
        require_budget(params, step)
        one = cls(out_features, in_features, 1, axis, group, **options)
        label = f"{axis} of a {out_features} x {in_features} matrix, in groups of {group}"
        most = one.groups // step * step or one.groups  # all of them where one step is too many
        kept = min(rank_for_budget(label, params, one.num_params, min(step, one.groups)), most)
        return cls(out_features, in_features, kept, axis, group)

    def larger(self, step: int = 1) -> Self | None:
        """``step`` groups more, if there are."""
        return replace(self, kept=self.kept + step) if self.kept + step <= self.groups else None
