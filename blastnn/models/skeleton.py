"""A model without its weights, and the weights of one part of it at a time.

The skeleton has every parameter on the meta device and every buffer real, so that what a
constructor computes (rotary frequencies, position ids) is right, and what a checkpoint holds costs
nothing until it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from blastnn.errors import CheckpointError, ModelError
from blastnn.models.families import FAMILIES
from blastnn.models.source import ModelFolder
from blastnn.models.tensors import name_variants

# Names that older checkpoints use for the same parameters.
LEGACY_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclass(frozen=True)
class Block:
    """One repeated part of a model: its full name and the module."""

    name: str
    module: nn.Module


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that ``config.architectures`` names, parameters on meta, in evaluation mode.

    Raises:
        ModelError: transformers has no such class, or it cannot be built.
    """
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    try:
        with init_empty_weights(include_buffers=False):
            if model_class is None:
                model = AutoModel.from_config(config, trust_remote_code=False)
            else:
                model = model_class._from_config(config)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise ModelError(
            f"transformers cannot build {names or config.model_type} as config.json has it: {error}"
        ) from error
    return model.eval()


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The model's blocks in order, by the family table.

    Raises:
        ModelError: the family is not in the table, or the path leads nowhere.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"blastnn cannot walk the architecture {kind!r} block by block; it knows "
            f"{', '.join(sorted(FAMILIES))}. Load the model and pass it to blastnn.compress(), or "
            "add a line to blastnn/models/families.py"
        )
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    blocks = base.get_submodule(FAMILIES[kind])
    return [
        Block(f"{prefix}{FAMILIES[kind]}.{key}", child) for key, child in blocks.named_children()
    ]


class WeightLoader:
    """Reads parameters and persistent buffers of a skeleton's modules from a model folder."""

    def __init__(self, model: PreTrainedModel, folder: ModelFolder) -> None:
        self.model, self.folder = model, folder
        self.prefix = f"{model.base_model_prefix}."
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a model parameter; tied weights are followed by name.

        Raises:
            CheckpointError: the folder holds no such tensor.
        """
        for candidate in self._candidates(name):
            if candidate in self.folder.tensors:
                return candidate
        raise CheckpointError(f"{self.folder.path} has no tensor for the parameter {name}")

    def _candidates(self, name: str) -> Iterator[str]:
        for alias in (name, self.tied.get(name)):
            if alias is None:
                continue
            yield from name_variants(alias, self.prefix)
            for new, old in LEGACY_NAMES.items():
                if alias.endswith(new):
                    yield alias.removesuffix(new) + old

    def load(self, names: Iterable[str], dtype: torch.dtype = torch.float32) -> None:
        """Fill parameters and buffers of the model from disk; floats become ``dtype``.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the model's.
        """
        read: dict[str, Tensor] = {}  # tied parameters share one tensor
        for name in names:
            stored = self.stored_name(name)
            if stored not in read:
                value = self.read(name, tuple(_get(self.model, name).shape))
                read[stored] = value.to(dtype) if value.is_floating_point() else value
            _set(self.model, name, read[stored])

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One parameter's value as stored, checked against the model's ``shape``."""
        stored = self.stored_name(name)
        if self.folder.tensors.shape(stored) != shape:
            raise CheckpointError(
                f"{self.folder.path}: tensor {stored} has the shape "
                f"{self.folder.tensors.shape(stored)}, but config.json makes it {shape}"
            )
        value = self.folder.tensors.read(stored)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{self.folder.path}: tensor {stored} has NaN or infinite entries; the model is "
                "damaged: download or convert it again"
            )
        return value

    def release(self, names: Iterable[str]) -> None:
        """Drop the values of parameters: they go back to the meta device."""
        for name in names:
            value = _get(self.model, name)
            if isinstance(value, nn.Parameter):
                _set(self.model, name, value.detach().to("meta"))


def names_below(names: Iterable[str], prefixes: Iterable[str]) -> list[str]:
    """Those of ``names`` that lie below one of ``prefixes``, in their order."""
    roots = tuple(f"{prefix}." for prefix in prefixes)
    return [name for name in names if name.startswith(roots)]


def _get(module: nn.Module, key: str) -> Tensor:
    owner, _, leaf = key.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _set(module: nn.Module, key: str, value: Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    holder = module.get_submodule(owner)
    if leaf in holder._parameters:
        holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        holder._buffers[leaf] = value
