"""Which layer becomes what, and how large: what a plan says, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from blastnn.checkpoint import StoredLayer
from blastnn.quantization import Quantization, stored_bytes
from blastnn.structures import Structure

FORMAT = "blastnn-plan/1"
OUTSIDE = "outside the blocks; name it in targets to compress it"
UNTARGETED = "not among the targets"
ALLOCATED = "stays dense: its share of the budget is best spent whole"
WHOLE = "stays dense: pruning takes its share from other layers"
SLOWER = "would be slower than dense"  # how the reason of a layer begins that is not worth it
IN_BUDGET = (ALLOCATED, WHOLE)  # why a layer stays dense whose parameters count towards keep


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer: compressed into ``spec``, or kept dense for ``reason``.

    ``shared`` is the name of the layer, in the same block, whose right factor it uses.
    """

    name: str
    kind: str
    block: int | None
    out_features: int
    in_features: int
    spec: Structure | None
    reason: str | None
    shared: str | None = None

    @property
    def dense_params(self) -> int:
        """Parameters of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def planned_params(self) -> int:
        """Parameters of what it becomes; a shared factor counts where it is stored."""
        return self.dense_params if self.spec is None else self.stored.num_params

    @property
    def given_up(self) -> bool:
        """Whether it is a target, but any structure would be slower."""
        return self.reason is not None and self.reason.startswith(SLOWER)

    @property
    def stays_dense(self) -> bool:
        """Whether it is a target and stays dense all the same."""
        return self.reason in IN_BUDGET or self.given_up

    @property
    def stored(self) -> StoredLayer:
        """What is stored of a layer that is compressed."""
        assert self.spec is not None
        return StoredLayer(self.spec, shared=self.shared)

    def num_bytes(self, quantization: Quantization | None, dtype: torch.dtype) -> int:
        """Bytes of what it becomes, scales included."""
        if self.spec is None or self.shared is not None:
            return self.planned_params * dtype.itemsize
        return stored_bytes(self.spec, quantization, dtype)


@dataclass(frozen=True)
class Plan:
    """All linear layers of a model and the parameters around them."""

    layers: tuple[LayerPlan, ...]
    model_params: int
    keep: float
    of: str

    @property
    def compressed(self) -> tuple[LayerPlan, ...]:
        """The layers that will be compressed."""
        return tuple(layer for layer in self.layers if layer.spec is not None)

    @property
    def targets(self) -> tuple[LayerPlan, ...]:
        """The layers that share the budget: the compressed ones, and those that it keeps dense."""
        return tuple(la for la in self.layers if la.spec is not None or la.reason in IN_BUDGET)

    @property
    def given_up(self) -> tuple[LayerPlan, ...]:
        """Targeted layers that stay dense because any structure would be slower."""
        return tuple(layer for layer in self.layers if layer.given_up)

    @property
    def target_params(self) -> tuple[int, int]:
        """Parameters of the targeted layers' matrices, before and after."""
        before = sum(layer.dense_params for layer in self.targets)
        return before, sum(layer.planned_params for layer in self.targets)

    def of_block(self, index: int) -> list[LayerPlan]:
        """The layers of one block."""
        return [layer for layer in self.layers if layer.block == index]

    def keeping(self, reasons: dict[str, str]) -> Self:
        """The plan with some layers kept dense after all, each for its reason."""
        layers = (
            replace(layer, spec=None, reason=reasons[layer.name])
            if layer.name in reasons
            else layer
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def to_json(self) -> dict[str, Any]:
        """The plan as the file that ``compress --plan`` takes."""
        return {
            "format": FORMAT,
            "keep": self.keep,
            "of": self.of,
            "layers": {
                layer.name: {"keep": layer.reason} if layer.spec is None else layer.stored.to_json()
                for layer in self.layers
            },
        }


def count_params(model: nn.Module, tied: Iterable[str]) -> int:
    """Parameters of a model, weights tied by name (or one tensor under two names) counted once."""
    skipped = set(tied)
    return sum(value.numel() for name, value in model.named_parameters() if name not in skipped)
