"""A plan read from a file, written by ``blastnn plan`` or by hand, for a model at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from blastnn.checkpoint import StoredLayer, check_owners
from blastnn.compress.plan import FORMAT, OUTSIDE, UNTARGETED, LayerPlan, Plan
from blastnn.errors import PlanError, StructureError
from blastnn.files import read_json


def plan_from_file(plan: Plan, path: Path, head: str | None = None) -> Plan:
    """The model's layers with the specs of a plan file instead of the uniform ones.

    Args:
        plan: of the model that is to be compressed.
        path: a file written from ``Plan.to_json``.
        head: the name of the output layer, the only one outside the blocks that may have a spec.

    Raises:
        PlanError: another format, or layers or shapes that are not this model's.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise PlanError(f"{path} is not a plan file ({FORMAT})")
    entries = values.get("layers")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise PlanError(f"{path}: 'layers' must be an object with an object for every layer")
    unknown = sorted(set(entries) ^ {layer.name for layer in plan.layers})
    if unknown:
        raise PlanError(f"{path} was made for another model: layers differ, e.g. {unknown[0]}")
    layers = tuple(_planned(layer, entries[layer.name], path, head) for layer in plan.layers)
    try:
        check_owners({layer.name: layer.stored for layer in layers if layer.spec is not None})
    except StructureError as error:
        raise PlanError(f"{path}: {error}") from error
    return replace(plan, layers=layers, keep=float(values["keep"]), of=str(values["of"]))


def _planned(layer: LayerPlan, entry: dict[str, Any], path: Path, head: str | None) -> LayerPlan:
    if set(entry) == {"keep"}:
        if not isinstance(entry["keep"], str):
            raise PlanError(f"{path}: layer {layer.name} is kept for no reason given in words")
        return replace(layer, spec=None, reason=entry["keep"])
    fixed = layer.reason not in (None, OUTSIDE, UNTARGETED)
    if fixed or (layer.block is None and layer.name != head):
        reason = layer.reason if fixed else "it is neither in a block nor the output layer"
        raise PlanError(f"{path}: layer {layer.name} cannot be compressed: {reason}")
    stored = StoredLayer.from_json(entry)
    spec = stored.spec
    if (spec.out_features, spec.in_features) != (layer.out_features, layer.in_features):
        raise PlanError(f"{path}: {spec} does not fit layer {layer.name}")
    return replace(layer, spec=spec, reason=None, shared=stored.shared)
