"""The output folder: one shard a block, then the rest, then the files that make it loadable.

Shards are numbered in advance, so that an interrupted job and an uninterrupted one write the same
names. ``config.json`` comes last: until then no loader takes the folder for a model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blastnn.checkpoint import StoredLayer, quantization_config
from blastnn.compress.walker import Walker
from blastnn.dtypes import name_of
from blastnn.files import read_json, write_json, write_tensors
from blastnn.linear import StructuredLinear
from blastnn.models.tensors import INDEX, TensorFolder

# Tensors outside the blocks are written in shards of about this size, to hold few at a time.
REST_BYTES = 256 * 2**20
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling",
)


class Writer:
    """Writes parts of a compressed model under the names of the source's tensors."""

    def __init__(self, output: Path, walker: Walker, dtype: torch.dtype, head: bool) -> None:
        self.output, self.walker, self.dtype, self.head = output, walker, dtype, head
        self.rest = self._split_rest()
        self.parts = len(walker.blocks) + int(head)
        self.total = self.parts + len(self.rest)

    def write_block(self, index: int, module: nn.Module) -> None:
        """The shard of one block: factors, and what else the block has."""
        self._write(index, self._tensors(self.walker.blocks[index].name, module))

    def write_head(self, name: str, layer: StructuredLinear) -> None:
        """The shard of a compressed output layer."""
        self._write(len(self.walker.blocks), self._tensors(name, layer))

    def _tensors(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        """A module's parameters and persistent buffers under their stored names, in ``dtype``."""
        found = {}
        module = module.to(self.dtype)  # a module knows which of its tensors may be cast
        for key, value in module.state_dict().items():
            owner, _, leaf = key.rpartition(".")
            holder = module.get_submodule(owner)
            is_factor = isinstance(holder, StructuredLinear) and leaf in holder.factors
            source = f"{prefix}.{owner}.weight" if owner else f"{prefix}.weight"
            if is_factor and source in self.walker.loader.tied:
                name = f"{prefix}.{key}"  # the tensor it was tied to stays where it is
            elif is_factor:
                name = self.walker.loader.stored_name(source).removesuffix("weight") + leaf
            else:
                name = self.walker.loader.stored_name(f"{prefix}.{key}")
            found[name] = value
        return found

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def _split_rest(self) -> list[list[str]]:
        """The stored tensors that belong to no block, in groups of limited size."""
        walker, tensors = self.walker, self.walker.folder.tensors
        indices = range(len(walker.blocks))
        taken = {walker.loader.stored_name(n) for i in indices for n in walker.names_of(i)}
        if (
            self.head
            and walker.head is not None
            and f"{walker.head}.weight" not in walker.loader.tied
        ):
            taken.add(walker.loader.stored_name(f"{walker.head}.weight"))
        groups: list[list[str]] = [[]]
        size = 0
        for name in tensors.names:
            if name in taken:
                continue
            if groups[-1] and size + tensors.shape_bytes(name) > REST_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += tensors.shape_bytes(name)
        return [group for group in groups if group]

    def write_rest(self) -> None:
        """All tensors outside the blocks, copied."""
        read = self.walker.folder.tensors.read
        for offset, names in enumerate(self.rest):
            tensors = {name: self._cast(read(name)) for name in names}
            self._write(self.parts + offset, tensors)

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(self.output / self._shard(number), tensors)

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.total:05d}.safetensors"

    def finish(self, layers: Mapping[str, StoredLayer]) -> None:
        """Index, tokenizer files and, last, ``config.json``."""
        write_index(self.output, [self._shard(number) for number in range(self.total)])
        copy_companions(self.walker.folder.path, self.output)
        write_json(self.output / "config.json", self._config(layers))

    def _config(self, layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
        config: dict[str, Any] = read_json(self.walker.folder.path / "config.json")
        config.pop("torch_dtype", None)
        config["dtype"] = name_of(self.dtype)
        config["architectures"] = [type(self.walker.model).__name__]
        if self.head:
            config["tie_word_embeddings"] = False
        if layers:
            config["quantization_config"] = quantization_config(layers)
        return config


def write_index(folder: Path, shards: list[str]) -> None:
    """The index of the shards in a folder."""
    tensors = TensorFolder(folder, shards)
    names = {name: file for file, names in tensors.files.items() for name in names}
    metadata = {"total_size": tensors.num_bytes}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": names})


def copy_companions(source: Path, output: Path) -> None:
    """Tokenizer and generation files, as they are."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, output / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, output / path.name)
