"""What a quantised folder must compute: its source, with the rounded factors put in by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from blastnn.compress.job import made_up_ids
from blastnn.compress.report import JSON
from blastnn.evaluate.probe import digest, matches, probe
from blastnn.files import read_json
from blastnn.integrations.transformers import load_model
from blastnn.linear import StructuredLinear
from blastnn.models.tensors import TensorFolder, find_name
from blastnn.quantization import Quantization, stored_forms


def self_check(source: Path, output: Path, quantization: Quantization) -> dict[str, Any]:
    """The ``self_check`` of a report: token ids, the digest of the output, and whether they match.

    Holds the source model in memory, and then the quantised one.

    Args:
        source: the folder that was quantised.
        output: the folder written from it, complete but for its report.
        quantization: how its large factors are stored.
    """
    ids = _ids(source)
    logits = probe(_rounded(source, output, quantization), ids)
    check = {
        "ids": ids[0].tolist(),
        "positions": logits.shape[1],
        "logits_sha256": digest(logits),
    }
    return {**check, "verified": matches(load_model(output), check)}


def _ids(source: Path) -> Tensor:
    """The window that the source's own job was checked on; a made-up one where there is none."""
    report = read_json(source / JSON) if (source / JSON).is_file() else {}
    ids = (report.get("self_check") or {}).get("ids")
    if ids is None:
        return made_up_ids(AutoConfig.from_pretrained(source, trust_remote_code=False))
    return torch.tensor([ids])


def _rounded(source: Path, output: Path, quantization: Quantization) -> PreTrainedModel:
    """The source model, its layers replaced by what the output folder holds of them."""
    model, written = load_model(source), TensorFolder(output)
    prefix = f"{model.base_model_prefix}."
    for name, layer in list(model.named_modules()):
        if isinstance(layer, StructuredLinear):
            stored = {
                form: written.read(str(find_name(f"{name}.{form}", prefix, written)))
                for form in stored_forms(layer.spec, quantization)
            }
            rounded = StructuredLinear.from_factors(layer.spec, stored, layer.bias, quantization)
            model.set_submodule(name, rounded)
    return model
