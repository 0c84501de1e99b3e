"""Structures by name: what a saved spec, the command line and the conformance suites go by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from blastnn.errors import StructureError
from blastnn.structures.base import Structure

STRUCTURES: dict[str, type[Structure]] = {}
S = TypeVar("S", bound=type[Structure])


def register(structure: S) -> S:
    """Class decorator: make a structure known under its ``name``, outside the library too.

    Raises:
        StructureError: the name is taken by another class.
    """
    other = STRUCTURES.setdefault(structure.name, structure)
    same = (other.__module__, other.__qualname__) == (structure.__module__, structure.__qualname__)
    if same:  # the same definition run again, as in a notebook
        STRUCTURES[structure.name] = structure
    else:
        raise StructureError(
            f"the name {structure.name!r} belongs to {other.__module__}.{other.__qualname__}; "
            "choose another"
        )
    return structure


def structure_named(name: str) -> type[Structure]:
    """The structure registered under ``name``; StructureError lists the names there are."""
    if name not in STRUCTURES:
        raise StructureError(f"unknown structure {name!r}; choose from {sorted(STRUCTURES)}")
    return STRUCTURES[name]


def spec_from_json(values: Mapping[str, Any]) -> Structure:
    """The spec that ``Structure.to_json`` wrote.

    Raises:
        StructureError: an unknown structure, or values that its constructor refuses.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("structure"), str):
        raise StructureError(f"a spec is an object with a 'structure' name, but this is {values!r}")
    arguments = {key: value for key, value in values.items() if key != "structure"}
    structure = structure_named(values["structure"])
    try:
        return structure.from_json(arguments, spec_from_json)
    except TypeError as error:
        raise StructureError(f"{dict(values)!r} does not describe a matrix: {error}") from error
