"""The format on disk: safetensors, and the specs of all structured layers in ``config.json``.

``config.json`` holds, under ``quantization_config`` (the key by which transformers finds who loads
a model), ``{"quant_method": "blastnn", "format": 1, "layers": {name: spec}}``. Layer names are
those of the model class that ``architectures`` names; the factors of layer ``x.y`` are the tensors
``x.y.U``, ``x.y.S`` and so on, and its bias keeps its name.

A quantised layer's spec also has ``"quantized": {"bits": 4, "group": 32}``, and its tensors are
those of ``quantization/layout.py``, scales with ``_scale`` behind the factor's name. The format's
number is still 1: folders without quantised layers are what they were, and versions that know of
no ``quantized`` refuse the others. The same holds for ``"shared": "x.z"``: the layer's factor ``V``
is that of layer ``x.z``, and is stored there alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from blastnn.errors import CheckpointError, StructureError
from blastnn.files import read_json
from blastnn.linear import StructuredLinear
from blastnn.models.linears import LINEAR_CLASSES
from blastnn.models.tensors import TensorFolder, find_name
from blastnn.quantization import Form, Quantization, dtype_fits, stored_forms
from blastnn.structures import Structure, spec_from_json
from blastnn.structures.stack import RIGHT

METHOD = "blastnn"
FORMAT = 1


QUANTIZED, SHARED = "quantized", "shared"


@dataclass(frozen=True)
class StoredLayer:
    """A structured layer as ``config.json`` describes it: its spec, and how factors are stored.

    ``shared`` is the name of the layer whose right factor it uses, if it has none of its own.
    """

    spec: Structure
    quantization: Quantization | None = None
    shared: str | None = None

    @property
    def forms(self) -> dict[str, Form]:
        """The shape and dtype of every tensor that is the layer's own, its bias aside."""
        forms = stored_forms(self.spec, self.quantization)
        return {k: form for k, form in forms.items() if self.shared is None or k != RIGHT}

    @property
    def num_params(self) -> int:
        """Parameters of the factors that are the layer's own."""
        return own_params(self.spec, self.shared is not None)

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values, with ``quantized`` where it is."""
        how = {} if self.quantization is None else {QUANTIZED: self.quantization.to_json()}
        shared = {} if self.shared is None else {SHARED: self.shared}
        return {**self.spec.to_json(), **how, **shared}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """The inverse of ``to_json``; StructureError where the values describe no layer."""
        if not isinstance(values, Mapping):
            return cls(spec_from_json(values))
        plain = {key: v for key, v in values.items() if key not in (QUANTIZED, SHARED)}
        shared = values.get(SHARED)
        if QUANTIZED not in values:
            return cls(spec_from_json(plain), shared=None if shared is None else str(shared))
        if shared is not None:
            raise StructureError("a quantised layer shares no factor, but one has both entries")
        layer = cls(spec_from_json(plain), Quantization.from_json(values[QUANTIZED]))
        stored_forms(layer.spec, layer.quantization)  # refuses what has nothing to quantise
        return layer


def quantization_config(layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    """The entry of ``config.json`` that describes structured layers."""
    entries = {name: layer.to_json() for name, layer in layers.items()}
    return {"quant_method": METHOD, "format": FORMAT, "layers": entries}


def parse_layers(entry: Mapping[str, Any]) -> dict[str, StoredLayer]:
    """The layers of an entry written by ``quantization_config``.

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
        found = {str(name): StoredLayer.from_json(values) for name, values in layers.items()}
        check_owners(found)
    except StructureError as error:
        raise CheckpointError(f"config.json: {error}") from error
    return found


def check_owners(layers: Mapping[str, StoredLayer]) -> None:
    """A layer whose factor another one uses must have it for its own, of the same shape.

    Raises:
        StructureError: names the layer that uses what is not there.
    """
    for name, layer in layers.items():
        shape, owner = layer.spec.factor_shapes().get(RIGHT), layers.get(layer.shared or "")
        if layer.shared is None:
            continue
        if (
            shape is None
            or owner is None
            or RIGHT not in owner.forms
            or (owner.forms[RIGHT].shape != shape)
        ):
            raise StructureError(
                f"layer {name} uses the factor {RIGHT} of {layer.shared}, which has none of its "
                f"own of the shape {shape}"
            )


def own_params(spec: Structure, shared: bool) -> int:
    """Parameters of a layer's factors, the right one left out where it is another layer's."""
    return spec.num_params - (math.prod(spec.factor_shapes()[RIGHT]) if shared else 0)


def read_layers(folder: Path) -> dict[str, StoredLayer]:
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
    return parse_layers(entry)


def check_factors(layers: Mapping[str, StoredLayer], tensors: TensorFolder, prefix: str) -> None:
    """Every factor must be there with the very shape of its spec, and a dtype that fits.

    Args:
        layers: by name.
        tensors: of the compressed folder.
        prefix: of the base model, e.g. ``"model."``, which stored names may have or lack.

    Raises:
        CheckpointError: names the tensor that is missing, misshapen or of another dtype.
    """
    for layer_name, layer in layers.items():
        for factor, form in layer.forms.items():
            name = f"{layer_name}.{factor}"
            stored = find_name(name, prefix, tensors)
            if stored is None:
                raise CheckpointError(
                    f"{tensors.folder} lacks the factor {name} of a structured layer; the folder "
                    "is incomplete: compress again or copy it again"
                )
            _check_form(form, name, stored, tensors)


def _check_form(form: Form, name: str, stored: str, tensors: TensorFolder) -> None:
    shape, dtype = tensors.shape(stored), tensors.dtype(stored)
    if shape != form.shape:
        raise CheckpointError(
            f"{tensors.folder}: factor {name} has the shape {shape}, but config.json makes it "
            f"{form.shape}; one of the two was changed"
        )
    if not dtype_fits(dtype, form.dtype):
        raise CheckpointError(
            f"{tensors.folder}: factor {name} is {dtype}, but config.json makes it "
            f"{form.dtype or 'floating point'}; one of the two was changed"
        )


def install_layers(model: nn.Module, layers: Mapping[str, StoredLayer], prefix: str) -> None:
    """Put empty structured layers in the place of dense ones, on the devices of these.

    A model built without its head, or with one, has other names: ``prefix`` (of the base model) is
    added or removed as needed. Layers that the model does not have (an absent head) are left out.

    Raises:
        CheckpointError: no spec matches, or a layer is no linear layer of the spec's size.
    """
    modules = dict(model.named_modules())
    found = 0
    for stored_name, layer in layers.items():
        name = find_name(stored_name, prefix, modules)
        if name is not None:
            found += 1
            _install(model, name, modules[name], layer)
    for stored_name, layer in layers.items():
        name = find_name(stored_name, prefix, modules)
        if name is not None and layer.shared is not None:
            _share(model, name, find_name(layer.shared, prefix, modules))
    if not found:
        raise CheckpointError(
            f"none of the structured layers in config.json is in this {type(model).__name__}"
        )


def _share(model: nn.Module, name: str, owner: str | None) -> None:
    if owner is None:
        raise CheckpointError(
            f"config.json: the layer whose factor {name} uses is not in the model"
        )
    layer, other = (model.get_submodule(each) for each in (name, owner))
    assert isinstance(layer, StructuredLinear) and isinstance(other, StructuredLinear)
    layer.share(other)


def _install(model: nn.Module, name: str, old: nn.Module, stored: StoredLayer) -> None:
    weight, spec = getattr(old, "weight", None), stored.spec
    sizes = (spec.out_features, spec.in_features)
    if type(old) not in LINEAR_CLASSES or weight is None or sorted(weight.shape) != sorted(sizes):
        raise CheckpointError(f"config.json: {spec} does not fit the layer {name}, {old}")
    has_bias = getattr(old, "bias", None) is not None
    layer = StructuredLinear(spec, has_bias, weight.device, weight.dtype, stored.quantization)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
