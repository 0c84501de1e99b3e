"""The dense linear layers of any module, whatever class they come as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearInfo:
    """A dense linear layer: its name, size, and why it cannot be replaced, if so."""

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    obstacle: str | None = None

    @property
    def num_params(self) -> int:
        """``out_features * in_features``; the bias is not part of the matrix."""
        return self.out_features * self.in_features


# How to see the (out_features, in_features) weight of each linear class; exact classes only, since
# a subclass may do something else with its weight.
LINEAR_CLASSES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Linear: lambda weight: weight,
    Conv1D: lambda weight: weight.T,  # GPT-2 stores (in_features, out_features)
}


def dense_weight(module: nn.Module) -> Tensor:
    """The ``(out_features, in_features)`` weight of a layer of a known linear class."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return LINEAR_CLASSES[type(module)](weight)


def find_linears(root: nn.Module, prefix: str = "") -> list[LinearInfo]:
    """Every linear layer below ``root``, each module once, in order of registration."""
    attention = {f"{name}.out_proj" for name, m in root.named_modules() if _is_fused_attention(m)}
    found = []
    for name, module in root.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        obstacle = _obstacle(name, module, attention)
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        full = f"{prefix}.{name}" if prefix and name else prefix or name
        found.append(LinearInfo(full, module, rows, columns, obstacle))
    return found


def _is_fused_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _obstacle(name: str, module: nn.Module, attention: set[str]) -> str | None:
    if name in attention:
        return "nn.MultiheadAttention reads its weight directly"
    if type(module) not in LINEAR_CLASSES:
        return f"the subclass {type(module).__name__} may use its weight in its own way"
    return None
