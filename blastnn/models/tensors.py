"""The safetensors of a model folder, read one tensor at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blastnn.errors import CheckpointError
from blastnn.files import read_json, sha256_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def name_variants(name: str, prefix: str) -> tuple[str, str, str]:
    """A name as it is, without and with the base model's ``prefix`` (e.g. ``"model."``).

    A model saved with or without its head has its base model under another name.
    """
    return name, name.removeprefix(prefix), prefix + name


def find_name(name: str, prefix: str, known: Container[str]) -> str | None:
    """The first of ``name_variants`` that is ``known``; None where none is."""
    return next((variant for variant in name_variants(name, prefix) if variant in known), None)


class TensorFolder:
    """Names, shapes and lazily read values of all tensors in a model folder.

    Args:
        folder: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.
        files: the names of the files to read instead of these.

    Raises:
        CheckpointError: no safetensors, a missing, empty or truncated file, an index that does not
            match its shards, or only pickles, which are never read.
    """

    def __init__(self, folder: Path, files: list[str] | None = None) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in files or _shards(folder):
            for name in self._open(file).keys():  # noqa: SIM118 (not a mapping)
                self._file_of[name] = file
        if files is None:
            _check_index(folder, self._file_of)

    @property
    def names(self) -> list[str]:
        """Every tensor name, in the order of the files."""
        return list(self._file_of)

    @property
    def files(self) -> dict[str, list[str]]:
        """The tensor names in each file."""
        found: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            found.setdefault(file, []).append(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header alone."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(
                f"{self.folder / self._file_of[name]}: tensor {name} has the unsupported dtype "
                f"{stored}; dequantise the model first"
            )
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        try:
            return self._handle(name).get_tensor(name).clone()
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self._file_of[name]}: {error}") from error

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.shape_bytes(name) for name in self._file_of)

    def shape_bytes(self, name: str) -> int:
        """Bytes of one tensor, from the header alone."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def sha256(self) -> str:
        """One digest over all files, names included."""
        files = sorted(set(self._file_of.values()))
        lines = [f"{file} {sha256_of(self.folder / file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def close(self) -> None:
        """Let go of the mapped files."""
        self._handles.clear()

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            self._handles[file] = _open_shard(self.folder / file)
        return self._handles[file]

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor named {name}")
        return self._open(self._file_of[name])

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, sorted by name, in memory of their own.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    tensors = TensorFolder(path.parent, [path.name])
    found = {name: tensors.read(name) for name in sorted(tensors.names)}
    tensors.close()
    return found


def _open_shard(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though the index names it")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); download or convert it again"
        ) from error


def _shards(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        mapping = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        return sorted({_plain_name(folder, str(file)) for file in mapping.values()})
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which can execute "
            "code and are never loaded; convert the model to safetensors first"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _plain_name(folder: Path, file: str) -> str:
    if Path(file).name != file:
        raise CheckpointError(f"{folder / INDEX} points outside its folder: {file!r}")
    return file


def _check_index(folder: Path, file_of: dict[str, str]) -> None:
    if not (folder / INDEX).is_file():
        return
    listed = set(read_json(folder / INDEX)["weight_map"])
    missing = sorted(listed - set(file_of))
    if missing:
        raise CheckpointError(
            f"{folder / INDEX} lists {len(missing)} tensors that no shard holds, e.g. {missing[0]}"
        )
