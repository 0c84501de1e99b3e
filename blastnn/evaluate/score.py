"""What ``blastnn evaluate`` and ``blastnn inspect`` compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from blastnn.checkpoint import StoredLayer, check_factors, read_layers
from blastnn.dtypes import dtype_named
from blastnn.errors import CheckpointError
from blastnn.evaluate.perplexity import PROTOCOL, perplexity
from blastnn.evaluate.probe import matches
from blastnn.evaluate.text import first_windows, read_text
from blastnn.files import read_json, write_json
from blastnn.integrations.transformers import load_model, require_causal
from blastnn.kernels import explain, winners
from blastnn.kernels.explain import FILE as KERNELS_FILE
from blastnn.models.context import window_length
from blastnn.models.skeleton import build_skeleton
from blastnn.models.source import load_tokenizer, open_model
from blastnn.models.tensors import TensorFolder, find_name


def open_any(model: str) -> Path:
    """The folder of a compressed or dense model."""
    path = Path(model)
    if path.is_dir() and "quantization_config" in read_json(path / "config.json"):
        read_layers(path)
        return path
    return open_model(model).path


def score_models(
    model: str,
    against: str | None,
    texts: list[str],
    tokens: int,
    window: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Perplexities by text, of ``against`` first, with the protocol.

    ``say`` is told where windows are shorter than asked for: the model has no more positions.

    Raises:
        ModelError: a model that does not predict the next token.
    """
    read = [read_text(text) for text in texts]
    rows: list[dict[str, Any]] = [{"text": text.name, "sha256": text.sha256} for text in read]
    names = {"dense": against, "model": model} if against else {"model": model}
    first = open_any(against or model)
    length = window_length(AutoConfig.from_pretrained(first, trust_remote_code=False), window)
    if length < window:
        say(f"windows of {length} tokens instead of {window}: the model has no more positions")
    tokenizer = load_tokenizer(first)
    cut = [first_windows(text, tokenizer, length, tokens) for text in read]
    for key, name in names.items():
        loaded = load_model(open_any(str(name)))
        require_causal(loaded, str(name), "perplexity")
        for windows, row in zip(cut, rows, strict=True):
            score = perplexity(loaded, windows)
            row |= {key: score.perplexity, "tokens": score.tokens, "window": score.window}
    return {"protocol": PROTOCOL, "models": names, "perplexity": rows}


def inspect_folder(folder: Path, verify: bool = False) -> dict[str, Any]:
    """The structured layers of a compressed folder, checked; with ``verify`` its output too.

    Raises:
        CheckpointError: missing or misshapen factors, or nothing to verify against.
    """
    layers = read_layers(folder)
    tensors = TensorFolder(folder)
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    prefix = f"{skeleton.base_model_prefix}."
    check_factors(layers, tensors, prefix)
    specs = [layer.spec for layer in layers.values()]
    before = sum(spec.out_features * spec.in_features for spec in specs)
    after = sum(layer.num_params for layer in layers.values())
    entries = {n: _layer_entry(n, layer, tensors, prefix) for n, layer in layers.items()}
    stored = sum(entry["bytes"] for entry in entries.values())
    result: dict[str, Any] = {
        "folder": str(folder),
        "layers": entries,
        "targets": {
            "before": before,
            "after": after,
            "kept": after / before,
            "bytes": stored,
            "bits_per_weight": 8 * stored / after,
        },
        "bytes": tensors.num_bytes,
    }
    if verify:
        result["verified"] = _verify(folder)
    return result


def _layer_entry(
    name: str, layer: StoredLayer, tensors: TensorFolder, prefix: str
) -> dict[str, Any]:
    """A layer's entry of ``config.json``, with its numbers and their bytes, scales included."""
    found = [find_name(f"{name}.{factor}", prefix, tensors) for factor in layer.forms]
    size = sum(tensors.shape_bytes(stored) for stored in found if stored is not None)
    params = layer.num_params
    return {
        **layer.to_json(),
        "params": params,
        "bytes": size,
        "bits_per_weight": 8 * size / params,
    }


def _verify(folder: Path) -> bool:
    expected = read_json(folder / "report.json").get("self_check") or {}
    if "ids" not in expected:
        raise CheckpointError(f"{folder / 'report.json'} has no self_check to verify against")
    return matches(load_model(folder), expected)


def explain_kernels(
    folder: Path, dtype: str, tokens: Sequence[int], save: bool
) -> list[dict[str, Any]]:
    """What ``blastnn.kernels.explain`` says of a compressed folder's layers on this machine.

    Args:
        folder: a compressed model.
        dtype: of the inputs, e.g. ``"float32"``.
        tokens: for which to measure.
        save: whether to write the measured choices into the folder.

    Raises:
        CheckpointError: not a folder that blastnn compressed.
        DtypeError: no such dtype.
    """
    number, layers = dtype_named(dtype), read_layers(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [(layer.spec, layer.quantization) for layer in layers.values()]
    rows = explain(weights, device, number, tokens)
    if save:
        write_json(folder / KERNELS_FILE, winners(rows))
    return rows
