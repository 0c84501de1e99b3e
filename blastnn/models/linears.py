"""The dense linear layers of any module, whatever class they come as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


# Modules that read the weights of layers below them without calling those layers.
READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),  # the fast path of eval mode
}


def find_linears(root: nn.Module, prefix: str = "") -> list[LinearInfo]:
    """Every linear layer below ``root``, each module once, in order of registration."""
    read = _read_directly(root)
    found = []
    for name, module in root.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        obstacle = _obstacle(name, module, read)
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        full = f"{prefix}.{name}" if prefix and name else prefix or name
        found.append(LinearInfo(full, module, rows, columns, obstacle))
    return found


def _read_directly(root: nn.Module) -> dict[str, str]:
    """By the name of a layer, the class of the module above it that reads its weight directly."""
    return {
        f"{name}.{leaf}" if name else leaf: kind.__name__
        for name, module in root.named_modules()
        for kind, leaves in READERS.items()
        if isinstance(module, kind)
        for leaf in leaves
    }


def _obstacle(name: str, module: nn.Module, read: Mapping[str, str]) -> str | None:
    if name in read:
        return f"nn.{read[name]} reads its weight directly"
    if type(module) not in LINEAR_CLASSES:
        return f"the subclass {type(module).__name__} may use its weight in its own way"
    return None


def find_tied(root: nn.Module) -> dict[str, str]:
    """Linear layers with a parameter that another module has as well, and why they stay dense."""
    owners: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    shared = [sorted(names) for names in owners.values() if len(names) > 1]
    return {
        info.name: f"its weight or bias is also that of {[n for n in names if n != info.name][0]}"
        for info in find_linears(root)
        for names in shared
        if info.name in names
    }


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear layer was called with, whether by position or by keyword."""
    x = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(x, Tensor)
    return x


def replace_module(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """``root`` with ``module`` under all names of that called ``name``; ``module`` for ``""``."""
    old = root.get_submodule(name)
    if old is root:
        return module
    for alias, found in [*root.named_modules(remove_duplicate=False)]:
        if found is old:
            owner, _, leaf = alias.rpartition(".")
            setattr(root.get_submodule(owner), leaf, module)
    return root
