"""A dense matrix cut into the blocks of a spec, zero-padded where they do not divide it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from blastnn.structures.grid import BlockGrid


def padded_rows(matrix: Tensor, spec: BlockGrid) -> Tensor:
    """``(m, n)`` to its block rows ``(b1, p, b2 q)``."""
    rows, columns = spec.padded_shape
    padded = pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    return padded.unflatten(0, (spec.blocks[0], -1))


def split_blocks(matrix: Tensor, spec: BlockGrid) -> Tensor:
    """``(m, n)`` to ``(b1, b2, p, q)``, contiguous."""
    rows = padded_rows(matrix, spec)
    return rows.unflatten(2, (spec.blocks[1], -1)).transpose(1, 2).contiguous()


def split_moment(moment: Tensor, spec: BlockGrid) -> Tensor:
    """``(n, n)`` to ``(b2, b2, q, q)``; padding as in ``padded_moment``."""
    b2, q = spec.blocks[1], spec.block_shape[1]
    padded = padded_moment(moment, b2 * q)
    return padded.view(b2, q, b2, q).transpose(1, 2).contiguous()


def padded_moment(moment: Tensor, size: int) -> Tensor:
    """``(n, n)`` to ``(size, size)``; features that are padding get a one on the diagonal.

    The one keeps every diagonal block invertible. It changes nothing else: the padded columns of
    the weight are zero, so the solution is zero there.
    """
    n, missing = moment.shape[0], size - moment.shape[0]
    padded = pad(moment, (0, missing, 0, missing))
    padded.diagonal()[n:] = 1.0
    return padded
