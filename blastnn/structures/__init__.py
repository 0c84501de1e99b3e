"""The registered structures. A new one is one file here and one line in ``STRUCTURES``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, Structure, cast_factors
from blastnn.structures.blast import Blast
from blastnn.structures.block_diagonal import BlockDiagonal
from blastnn.structures.block_low_rank import BlockLowRank, Monarch
from blastnn.structures.block_sparse import SparseLowRank
from blastnn.structures.blr2 import BLR2
from blastnn.structures.gblr import GBLR
from blastnn.structures.lowrank import LowRank
from blastnn.structures.pixelfly import Pixelfly
from blastnn.structures.sum import Sum

STRUCTURES: dict[str, type[Structure]] = {
    structure.name: structure
    for structure in (
        Blast,
        LowRank,
        BlockDiagonal,
        BlockLowRank,
        Monarch,
        BLR2,
        Pixelfly,
        SparseLowRank,
        GBLR,
        Sum,
    )
}


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


__all__ = [
    "BLR2",
    "GBLR",
    "STRUCTURES",
    "Blast",
    "BlockDiagonal",
    "BlockLowRank",
    "Factors",
    "LowRank",
    "Monarch",
    "Pixelfly",
    "SparseLowRank",
    "Structure",
    "Sum",
    "cast_factors",
    "spec_from_json",
    "structure_named",
]
