r"""The same BLAST matrix on another grid of blocks, exactly.

A new block row may lie in one old block row or straddle several. Where it straddles ``w1`` of them,
its rows get ``w1`` copies of the old columns: copy ``a`` holds the rows that lie in the ``a``-th of
the old block rows and zero elsewhere, and its coupling is that old block row's. Block columns
likewise with ``w2``, so that the new rank is ``r w1 w2``:

``U'_i = [U rows in the a-th old block row | a]``, ``s'_ij,(a,c) = s_{old(i, a), old(j, c)}``.

``w1 = 1`` for every matrix where the new ``p' = ceil(m / b1')`` divides the old ``p``, or where the
old grid has one block row; then nothing is added to the rank, which is the exact refinement of the
paper's Section 2. It holds whenever ``k b1`` divides ``m``, and sometimes where it does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, require_positive_int
from blastnn.structures.blast import Blast


def refine(spec: Blast, factors: Factors, k: int) -> tuple[Blast, dict[str, Tensor]]:
    """The matrix with ``k`` times as many block rows and block columns, at the same rank.

    Raises:
        StructureError: ``k`` times the blocks are more than the rows or columns; or a new block
            would straddle old ones: each of ``p`` and ``q`` after must divide the one before (or
            there be one old block). ``regrid`` takes that case too, at a larger rank.
    """
    require_positive_int("k", k)
    blocks = (k * spec.blocks[0], k * spec.blocks[1])
    finer, refined = regrid(spec, factors, blocks)
    if finer.rank != spec.rank:
        raise StructureError(
            f"{spec} cannot be refined {k} times at its rank: blocks of {finer.block_shape} do not "
            f"tile those of {spec.block_shape}; use regrid, which takes rank {finer.rank}"
        )
    return finer, refined


def regrid(
    spec: Blast, factors: Factors, blocks: tuple[int, int]
) -> tuple[Blast, dict[str, Tensor]]:
    """The matrix with ``blocks`` instead of its own; the rank grows where new blocks straddle old.

    Returns:
        A spec of rank ``r w1 w2`` (see the module) and its factors, in the given dtype.

    Raises:
        StructureError: more blocks than rows or columns, or factors of another spec.
    """
    spec.check(factors)
    rank, (m, n) = spec.rank, (spec.out_features, spec.in_features)
    target = Blast(m, n, rank, blocks)
    device = factors["S"].device
    (p, q), (new_p, new_q) = spec.block_shape, target.block_shape
    rows = _owners(m, target.blocks[0], new_p, p).to(device)  # (b1', w1)
    columns = _owners(n, target.blocks[1], new_q, q).to(device)  # (b2', w2)
    U = _placed(factors["U"], m, rows, new_p, p)  # (b1', p', w1, r)
    V = _placed(factors["V"], n, columns, new_q, q)
    w1, w2 = rows.shape[1], columns.shape[1]
    full = Blast(m, n, rank * w1 * w2, target.blocks)
    shapes = full.factor_shapes()
    new = {
        "U": U[:, :, :, None].expand(-1, -1, -1, w2, -1).reshape(shapes["U"]),
        "S": factors["S"][rows[:, None, :, None], columns[None, :, None, :]].reshape(shapes["S"]),
        "V": V[:, :, None].expand(-1, -1, w1, -1, -1).reshape(shapes["V"]),
    }
    return full, new


def _owners(size: int, blocks: int, new: int, old: int) -> Tensor:
    """``(b', w)``: the old blocks that each new block meets, the first one ``w`` times or less.

    Beyond the last old block, where a new block meets fewer than ``w``, any will do: no row has a
    place there.
    """
    last = (size - 1) // old
    starts = torch.arange(0, blocks * new, new, device="cpu")
    ends = (starts + new - 1).clamp(max=size - 1)
    met = torch.where(starts < size, ends // old - starts // old + 1, 1)
    steps = torch.arange(int(met.max()), device="cpu")
    return (starts[:, None] // old + steps).clamp(max=last)


def _placed(factor: Tensor, size: int, owners: Tensor, new: int, old: int) -> Tensor:
    """``(b, p, r)`` to ``(b', p', w, r)``: each row in its old block's slot, zero elsewhere."""
    blocks, slots = owners.shape
    rows = factor.flatten(0, 1)[:size]
    cut = pad(rows, (0, 0, 0, blocks * new - size)).view(blocks, new, 1, -1)
    places = torch.arange(blocks * new, device=factor.device).clamp(max=size - 1)
    slot = places.view(blocks, new) // old - owners[:, :1]
    mask = one_hot(slot.clamp(min=0), slots).to(factor.dtype)
    return cut * mask[..., None]
