"""``quantize_checkpoint``: a compressed folder into one with quantised factors, tensor by tensor.

Nothing is fitted and no text is read: every large factor is rounded by itself. A job that
compresses and quantises at once (``compress --quantize``) is better, because each layer is then
fitted on what the quantised layers before it give; this one is for folders that exist already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from blastnn.checkpoint import StoredLayer, check_factors, quantization_config, read_layers
from blastnn.compress.quantize_check import self_check
from blastnn.compress.report import JSON
from blastnn.compress.writer import copy_companions, write_index
from blastnn.errors import CheckpointError, ResumeError, StructureError
from blastnn.files import make_folder, read_json, write_json, write_tensors
from blastnn.models.skeleton import build_skeleton
from blastnn.models.tensors import TensorFolder, find_name
from blastnn.quantization import (
    Quantization,
    dequantize_factors,
    quantization_named,
    quantize_factors,
)
from blastnn.structures import Factors, cast_factors

ENTRY = "quantization_config"
FORMAT = "blastnn-quantize/1"


@dataclass(frozen=True)
class _Source:
    """A compressed folder: its layers, its tensors, and where those of each factor are."""

    layers: dict[str, StoredLayer]
    tensors: TensorFolder
    stored: dict[str, dict[str, str]]  # by layer and factor

    def factors(self, layer: str) -> dict[str, Tensor]:
        """The factors of a layer, wherever they lie."""
        return {factor: self.tensors.read(name) for factor, name in self.stored[layer].items()}

    def owners(self) -> dict[str, str]:
        """The layer that a stored factor belongs to."""
        return {name: layer for layer, names in self.stored.items() for name in names.values()}


def quantize_checkpoint(
    folder: str | Path, output: str | Path, bits: str, group: int | None = None
) -> dict[str, Any]:
    """Quantise the factors of a compressed folder into another folder.

    Args:
        folder: written by ``blastnn compress`` or ``save_pretrained``; it is not changed.
        output: a new or empty folder.
        bits: ``int8`` or ``int4``.
        group: rows that share a scale; None is 64 for ``int8``, 32 for ``int4``.

    Returns:
        What ``report.json`` holds: bytes before and after, bits a weight (scales included), for
        each layer the relative error that was added, in the Frobenius norm, and the self-check
        that ``blastnn inspect --verify`` repeats.

    Raises:
        CheckpointError: not compressed by blastnn, quantised already, damaged, or a full disk.
        ResumeError: the output folder is not empty or not writable.
    """
    quantization, folder, output = quantization_named(bits, group), Path(folder), Path(output)
    source = _open(folder)
    _claim(output)
    rows: dict[str, dict[str, Any]] = {}
    for file, names in source.tensors.files.items():
        shard = _quantized_shard(source, names, quantization, rows)
        if shard:  # a layer whose factors lay apart is together now
            write_tensors(output / file, shard, f"empty {output} and repeat the command")
    write_index(output, sorted(path.name for path in output.glob("*.safetensors")))
    copy_companions(folder, output)
    layers = {name: StoredLayer(layer.spec, quantization) for name, layer in source.layers.items()}
    config = {**read_json(folder / "config.json"), ENTRY: quantization_config(layers)}
    write_json(output / "config.json", config)
    result = _report(source, output, quantization, rows)
    result["self_check"] = self_check(folder, output, quantization)
    write_json(output / JSON, result)
    return result


def _open(folder: Path) -> _Source:
    layers, tensors = read_layers(folder), TensorFolder(folder)
    done = [name for name, layer in layers.items() if layer.quantization is not None]
    if done:
        raise CheckpointError(
            f"{folder} is quantised already (e.g. {done[0]}); quantise the folder that it was "
            "made from"
        )
    shared = [name for name, layer in layers.items() if layer.shared is not None]
    if shared:
        raise CheckpointError(
            f"{folder} has layers that share factors (e.g. {shared[0]}), which are not "
            "quantised; compress without --joint"
        )
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    prefix = f"{skeleton.base_model_prefix}."
    check_factors(layers, tensors, prefix)
    stored = {
        name: {f: str(find_name(f"{name}.{f}", prefix, tensors)) for f in layer.forms}
        for name, layer in layers.items()
    }
    return _Source(layers, tensors, stored)


def _claim(output: Path) -> None:
    make_folder(output)
    if any(output.iterdir()):
        raise ResumeError(f"the output folder {output} is not empty; choose another one")


def _quantized_shard(
    source: _Source,
    names: list[str],
    quantization: Quantization,
    rows: dict[str, dict[str, Any]],
) -> dict[str, Tensor]:
    """The tensors of a shard as written; a layer is written with its first factor, as a whole."""
    owners, found = source.owners(), {}
    for name in names:
        if name not in owners:
            found[name] = source.tensors.read(name)
        elif owners[name] not in rows:
            layer = owners[name]
            stored, rows[layer] = _quantized_layer(source, layer, quantization)
            stem = name.rpartition(".")[0]
            found |= {f"{stem}.{factor}": value for factor, value in stored.items()}
    return found


def _quantized_layer(
    source: _Source, name: str, quantization: Quantization
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is stored of a layer, and its row of the report."""
    spec, given = source.layers[name].spec, source.factors(name)
    try:
        stored = quantize_factors(spec, given, quantization)
    except StructureError as error:
        raise CheckpointError(f"{source.tensors.folder}: layer {name}: {error}") from error
    dense = spec.to_dense(cast_factors(given, torch.float32))
    rounded = spec.to_dense(dequantize_factors(spec, stored, quantization))
    energy = float(dense.double().square().sum())
    added = float((rounded.double() - dense.double()).square().sum())
    return stored, {
        "params": spec.num_params,
        "bytes": {"before": _num_bytes(given), "after": _num_bytes(stored)},
        "bits_per_weight": 8 * _num_bytes(stored) / spec.num_params,
        "error_added": math.sqrt(added / energy) if energy else 0.0,
    }


def _num_bytes(tensors: Factors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _report(
    source: _Source, output: Path, quantization: Quantization, rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    params = sum(row["params"] for row in rows.values())
    before, after = (sum(row["bytes"][key] for row in rows.values()) for key in ("before", "after"))
    errors = [row["error_added"] for row in rows.values()]
    return {
        "format": FORMAT,
        "source": str(source.tensors.folder),
        "quantized": quantization.to_json(),
        "targets": {"params": params, "bytes": {"before": before, "after": after}},
        "model": {
            "bytes": {
                "before": source.tensors.num_bytes,
                "after": TensorFolder(output).num_bytes,
            }
        },
        "bits_per_weight": 8 * after / params,
        "error_added": {"mean": sum(errors) / len(errors), "largest": max(errors)},
        "layers": rows,
    }
