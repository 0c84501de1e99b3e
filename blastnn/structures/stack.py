"""Matrices that read the same input, stacked along their outputs: one right factor for all.

The factor ``V`` is that of the stack, and of each of its matrices; every other factor holds the
rows, or block rows, of one matrix after those of another. So low rank stacks as it is, and BLAST
where all blocks have as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, Structure
from blastnn.structures.grid import BlockGrid

RIGHT = "V"  # the factor that an input meets first, in every structure that has it


def stacked(specs: Sequence[Structure]) -> Structure:
    """The spec ``(m_1 + m_2 + ..., n)`` of structures ``(m_i, n)`` that are to share their ``V``.

    Raises:
        StructureError: they differ in more than their outputs, have no right factor in common, or
            blocks that are not all of one height and full.
    """
    first = specs[0]
    changes: dict[str, Any] = {"out_features": sum(spec.out_features for spec in specs)}
    if isinstance(first, BlockGrid):
        rows = sum(spec.blocks[0] for spec in specs if isinstance(spec, BlockGrid))
        changes["blocks"] = (rows, first.blocks[1])
    whole = replace(first, **changes)
    if not all(type(spec) is type(first) and replace(spec, **changes) == whole for spec in specs):
        raise StructureError(f"{_named(specs)} cannot share a right factor: they are not alike")
    if not all(_fits(spec, whole) for spec in specs) or not all(map(_full, specs[:-1])):
        raise StructureError(
            f"{_named(specs)} cannot share a right factor: it takes one that does not depend on "
            "the outputs, and blocks that have all as many rows and are full"
        )
    return whole


def _fits(spec: Structure, whole: Structure) -> bool:
    """Whether the stack's factors are those of its parts, one after the other, but for ``V``."""
    own, shapes = spec.factor_shapes(), whole.factor_shapes()
    return own.get(RIGHT) == shapes.get(RIGHT) is not None and all(
        own[key][1:] == shape[1:] for key, shape in shapes.items() if key != RIGHT
    )


def _full(spec: Structure) -> bool:
    """Whether the rows of the factors are those of the matrix, without padding."""
    return not isinstance(spec, BlockGrid) or spec.padded_shape[0] == spec.out_features


def unstacked(specs: Sequence[Structure], factors: Factors) -> list[dict[str, Tensor]]:
    """The factors of each of the matrices, from those of their stack; all ``V`` are one tensor."""
    parts: list[dict[str, Tensor]] = [{} for _ in specs]
    for key, factor in factors.items():
        if key == RIGHT:
            pieces: Sequence[Tensor] = [factor] * len(specs)
        else:
            pieces = factor.split([spec.factor_shapes()[key][0] for spec in specs])
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece if key == RIGHT else piece.contiguous()
    return parts


def _named(specs: Sequence[Structure]) -> str:
    return " and ".join(map(str, specs))
