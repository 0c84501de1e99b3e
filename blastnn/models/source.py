"""Where a dense model comes from: a folder, a hub id, a GGUF file or the embedded ``demo``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from blastnn.errors import CheckpointError, ModelError, first_line
from blastnn.files import read_json
from blastnn.models.tensors import TensorFolder

Say = Callable[[str], None]
DEMO = "demo"


@dataclass
class ModelFolder:
    """A dense model on disk: configuration read, weights not."""

    name: str
    path: Path
    config: PreTrainedConfig
    note: str | None = None
    _tensors: TensorFolder | None = field(default=None, repr=False)

    @property
    def tensors(self) -> TensorFolder:
        """The folder's tensors; opened, and checked, on first use."""
        if self._tensors is None:
            self._tensors = TensorFolder(self.path)
        return self._tensors

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer.

        Raises:
            ModelError: there is none that can be read without executing code.
        """
        return load_tokenizer(self.path)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; ModelError where there is none to read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise ModelError(f"{folder} has no tokenizer that can be loaded: {reason}") from error


def open_model(model: str | Path, say: Say = lambda _: None) -> ModelFolder:
    """Find a dense model and read its configuration.

    Args:
        model: ``"demo"``, a folder, a ``.gguf`` file, or a hub id ``owner/name``.
        say: told about downloads and conversions, which happen once and are cached.

    Raises:
        ModelError: nothing of that name, or an architecture transformers does not know.
        CheckpointError: a folder without a readable ``config.json``.
    """
    from blastnn.models import demo, gguf  # they come back here for the folder they made

    path = Path(model)
    if str(model) == DEMO and not path.exists():
        return read_folder(DEMO, demo.prepare_model(say), demo.MODEL_NOTE)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return read_folder(str(model), gguf.convert(path, say), gguf.NOTE)
    if path.is_dir():
        return read_folder(str(model), path)
    if path.exists():
        raise ModelError(f"{path} is neither a folder nor a .gguf file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return read_folder(str(model), _from_hub(str(model), say))
    raise ModelError(
        f"there is no model {str(model)!r}: give a folder, a .gguf file, a hub id or demo"
    )


def read_folder(name: str, path: Path, note: str | None = None) -> ModelFolder:
    """A ModelFolder for an existing folder, its configuration checked."""
    return ModelFolder(name, path, read_config(path), note)


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration of a dense model folder, executing nothing from it.

    Raises:
        CheckpointError: ``config.json`` is missing or broken, or the model is quantised already.
        ModelError: transformers does not know the architecture.
    """
    values: Any = read_json(path / "config.json")
    if not isinstance(values, dict) or "model_type" not in values:
        raise CheckpointError(f"{path / 'config.json'} names no model_type")
    method = (values.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise CheckpointError(
            f"{path / 'config.json'}: the model is already quantised or compressed ({method}); "
            "start from its dense weights"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (
        ValueError,
        KeyError,
        TypeError,
        OSError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise ModelError(
            f"{path / 'config.json'}: transformers cannot build the architecture "
            f"{values['model_type']!r} without executing code from the folder: "
            f"{first_line(error)}"
        ) from error


def _from_hub(model: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"looking up {model} on the hub")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{model!r} is no folder here and could not be downloaded: {reason}"
        ) from error
