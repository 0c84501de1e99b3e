"""The format on disk: safetensors, and the specs of all structured layers in ``config.json``.

``config.json`` holds, under ``quantization_config`` (the key by which transformers finds who loads
a model), ``{"quant_method": "blastnn", "format": 1, "layers": {name: spec}}``. Layer names are
those of the model class that ``architectures`` names; the factors of layer ``x.y`` are the tensors
``x.y.U``, ``x.y.S`` and so on, and its bias keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from blastnn.errors import CheckpointError, StructureError
from blastnn.files import read_json
from blastnn.linear import StructuredLinear
from blastnn.models.linears import LINEAR_CLASSES
from blastnn.models.tensors import TensorFolder, find_name
from blastnn.structures import Structure, spec_from_json

METHOD = "blastnn"
FORMAT = 1


def quantization_config(specs: Mapping[str, Structure]) -> dict[str, Any]:
    """The entry of ``config.json`` that describes structured layers."""
    layers = {name: spec.to_json() for name, spec in specs.items()}
    return {"quant_method": METHOD, "format": FORMAT, "layers": layers}


def parse_specs(entry: Mapping[str, Any]) -> dict[str, Structure]:
    """The specs of an entry written by ``quantization_config``.

    Raises:
        CheckpointError: another format, or a spec that describes no matrix.
    """
    if entry.get("format") != FORMAT:
        raise CheckpointError(
            f"config.json: the blastnn format is {entry.get('format')!r}, but this version reads "
            f"format {FORMAT}"
        )
    layers = entry.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        raise CheckpointError("config.json: quantization_config lists no blastnn layers")
    try:
        return {str(name): spec_from_json(values) for name, values in layers.items()}
    except StructureError as error:
        raise CheckpointError(f"config.json: {error}") from error


def read_specs(folder: Path) -> dict[str, Structure]:
    """The structured layers of a compressed model folder.

    Raises:
        CheckpointError: not a folder that blastnn compressed.
    """
    config = read_json(folder / "config.json")
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder} was not compressed by blastnn: its config.json has no specs"
        )
    return parse_specs(entry)


def check_factors(specs: Mapping[str, Structure], tensors: TensorFolder, prefix: str) -> None:
    """Every factor must be there with the very shape of its spec.

    Args:
        specs: by layer name.
        tensors: of the compressed folder.
        prefix: of the base model, e.g. ``"model."``, which stored names may have or lack.

    Raises:
        CheckpointError: names the tensor that is missing or misshapen.
    """
    for layer, spec in specs.items():
        for factor, shape in spec.tensor_shapes().items():
            name = f"{layer}.{factor}"
            stored = find_name(name, prefix, tensors)
            if stored is None:
                raise CheckpointError(
                    f"{tensors.folder} lacks the factor {name} of a structured layer; the folder "
                    "is incomplete: compress again or copy it again"
                )
            if tensors.shape(stored) != shape:
                raise CheckpointError(
                    f"{tensors.folder}: factor {name} has the shape {tensors.shape(stored)}, but "
                    f"config.json makes it {shape}; one of the two was changed"
                )


def install_layers(model: nn.Module, specs: Mapping[str, Structure], prefix: str) -> None:
    """Put empty structured layers in the place of dense ones, on the devices of these.

    A model built without its head, or with one, has other names: ``prefix`` (of the base model) is
    added or removed as needed. Layers that the model does not have (an absent head) are left out.

    Raises:
        CheckpointError: no spec matches, or a layer is no linear layer of the spec's size.
    """
    modules = dict(model.named_modules())
    found = 0
    for layer, spec in specs.items():
        name = find_name(layer, prefix, modules)
        if name is not None:
            found += 1
            _install(model, name, modules[name], spec)
    if not found:
        raise CheckpointError(
            f"none of the structured layers in config.json is in this {type(model).__name__}"
        )


def _install(model: nn.Module, name: str, old: nn.Module, spec: Structure) -> None:
    weight = getattr(old, "weight", None)
    sizes = (spec.out_features, spec.in_features)
    if type(old) not in LINEAR_CLASSES or weight is None or sorted(weight.shape) != sorted(sizes):
        raise CheckpointError(f"config.json: {spec} does not fit the layer {name}, {old}")
    layer = StructuredLinear(
        spec, bias=getattr(old, "bias", None) is not None, device=weight.device, dtype=weight.dtype
    )
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
