"""Files written whole or not at all, and JSON read with errors that name the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blastnn.errors import CheckpointError, ResumeError

PART = ".part"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], again: str = "repeat the command with --resume"
) -> None:
    """A safetensors file that appears under its name only once it is whole and on the disk.

    Args:
        again: what to do once there is room, for the error message.

    Raises:
        CheckpointError: it could not be written, for instance because the disk is full.
    """
    part = path.with_name(path.name + PART)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, part, metadata={"format": "pt"})
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} could not be written: {error}; make room or mend the disk, then {again}"
        ) from error
    _publish(part, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written as durably as ``write_tensors``; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_writable(path: Path | None) -> None:
    """Refuse a file that could not be written once there is something to write.

    Raises:
        FileNotFoundError: there is no folder to put it in.
        IsADirectoryError: it is a folder itself.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")


def make_folder(path: Path) -> None:
    """A folder that is there from now on, and those above it.

    Raises:
        ResumeError: it cannot be made; it, or one above it, is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(part for part in (path, *path.parents) if part.exists())
        raise ResumeError(f"cannot write to {path}: {file} is a file, not a folder") from error
    except OSError as error:
        raise ResumeError(f"cannot write to {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, written as durably as ``write_tensors``."""
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    _publish(part, path)


def _publish(part: Path, path: Path) -> None:
    """Flush the file, rename it, flush the folder: after this a power cut loses nothing."""
    with part.open("rb+") as handle:
        os.fsync(handle.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(staged: Path, target: Path) -> None:
    """Give a finished folder its name, unless another process was first: then that one's stays.

    Both must have been made from the same input, so that either is as good.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        staged.replace(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(staged)


def remove_parts(folder: Path) -> None:
    """Delete what an interrupted writer left behind."""
    for part in folder.glob(f"*{PART}"):
        part.unlink()


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CheckpointError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def cache_folder() -> Path:
    """``$BLASTNN_CACHE``, else ``blastnn`` in the user's cache folder; created if missing."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blastnn"
    folder = Path(os.environ.get("BLASTNN_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
