r"""What BLAST contains, by construction (paper, Section 2 and A.1), and what contains BLAST.

Every function here is exact: the factors change, the matrix does not. ``r`` is the rank of the
BLAST matrix that comes out.

================================== =======================================================
low rank ``r``                     ``S = 1``, on any grid
``b`` full diagonal blocks         ``r = min(p, q)``, ``U`` or ``V`` the identity, ``S_ii = 1``
``b`` diagonal blocks of rank r    their factors, ``S_ii = 1``
block low-rank, block rank ``t``   ``r = t max(b1, b2)``, slots in a Latin square (see below)
BLR^2 of rank ``s``                ``r = s min(s, b1, b2)`` (see ``blr2_to_blast``)
sums                               the ranks add up, on a common grid (see ``regrid``)
Monarch                            as block low-rank, up to a permutation of the rows
================================== =======================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import Factors, Structure
from blastnn.structures.blast import Blast
from blastnn.structures.block_diagonal import BlockDiagonal
from blastnn.structures.block_low_rank import BlockLowRank, Monarch
from blastnn.structures.blr2 import BLR2
from blastnn.structures.lowrank import LowRank
from blastnn.structures.regrid import regrid
from blastnn.structures.sum import Sum

Converted = tuple[Blast, dict[str, Tensor]]


def to_blast(spec: Structure, factors: Factors, blocks: tuple[int, int] | None = None) -> Converted:
    """The same matrix as BLAST.

    Args:
        spec: of a structure that BLAST contains; see the table of this module.
        factors: of ``spec``.
        blocks: the grid wanted; where it is not the structure's own, ``regrid`` brings it there,
            for low rank at no cost, for others at a larger rank where the grids do not fit.

    Raises:
        StructureError: a structure without an exact conversion, factors of another spec, or more
            blocks than rows or columns.
    """
    if type(spec) not in CONVERSIONS:
        remedy = "; use monarch_to_blast, which also returns the row permutation"
        known = sorted(kind.name for kind in CONVERSIONS)
        raise StructureError(
            f"no exact conversion of a {spec.name} into BLAST; there is one for {known}"
            + (remedy if isinstance(spec, Monarch) else "")
        )
    spec.check(factors)
    blast, same = CONVERSIONS[type(spec)](spec, factors)
    return (blast, same) if blocks is None else regrid(blast, same, blocks)


def low_rank_to_blast(spec: LowRank, factors: Factors) -> Converted:
    """One block, ``S = 1``; ``regrid`` cuts it at no cost."""
    blast = Blast(spec.out_features, spec.in_features, spec.rank, (1, 1))
    ones = factors["U"].new_ones(1, 1, spec.rank)
    return blast, {"U": factors["U"][None], "S": ones, "V": factors["V"][None]}


def block_diagonal_to_blast(spec: BlockDiagonal, factors: Factors) -> Converted:
    """``s_ij = 1`` iff ``i = j``; of full blocks, the thinner side becomes the identity."""
    b, (p, q) = spec.blocks, spec.block_shape
    U, V = (factors["B"], factors["B"].mT) if spec.rank is None else (factors["U"], factors["V"])
    if spec.rank is None:
        identity = torch.eye(min(p, q), dtype=U.dtype, device=U.device).expand(b, -1, -1)
        U, V = (identity, V) if p <= q else (U, identity)
    rank = U.shape[2]
    S = torch.eye(b, dtype=U.dtype, device=U.device)[:, :, None].expand(b, b, rank)
    blast = Blast(spec.out_features, spec.in_features, rank, (b, b))
    return blast, {"U": U.contiguous(), "S": S.contiguous(), "V": V.contiguous()}


def block_low_rank_to_blast(spec: BlockLowRank, factors: Factors) -> Converted:
    r"""``B = max(b1, b2)`` slots of ``t`` columns; block ``(i, j)`` uses slot ``(i + j) mod B``.

    A Latin square: two blocks of one row or one column never share a slot, so slot ``s`` of ``U_i``
    can hold ``U_ij`` and slot ``s`` of ``V_j`` hold ``V_ij`` with ``s = (i + j) mod B``, and
    ``s_ij = 1`` on that slot alone gives ``U_ij V_ij^T``. (The paper's A.1 picks the slot by ``j``
    alone. All blocks of column ``j`` then share one slot of ``V_j``, which gives
    ``u_ij v_jj^T``: an error there.) Slots that a non-square grid leaves empty are zero.
    """
    (b1, b2), t = spec.blocks, spec.rank
    slots = max(b1, b2)
    device = factors["U"].device
    i, j = torch.arange(b1, device=device), torch.arange(b2, device=device)
    slot = torch.arange(slots, device=device)
    chosen = (i[:, None] + j) % slots  # (b1, b2)
    S = torch.nn.functional.one_hot(chosen, slots).to(factors["U"].dtype)
    U = _in_slots(factors["U"], (slot - i[:, None]) % slots)
    V = _in_slots(factors["V"].transpose(0, 1), (slot - j[:, None]) % slots)
    blast = Blast(spec.out_features, spec.in_features, t * slots, spec.blocks)
    return blast, {"U": U, "S": S.repeat_interleave(t, dim=2), "V": V}


def _in_slots(factor: Tensor, source: Tensor) -> Tensor:
    """``(b, c, p, t)`` to ``(b, p, slots t)``: slot ``s`` of row ``i`` is ``factor[i, source]``.

    Zero where ``source (b, slots)`` is ``c`` or more.
    """
    b, c, p, t = factor.shape
    rows = torch.arange(b, device=factor.device)[:, None]
    taken = factor[rows, source.clamp(max=c - 1)]  # (b, slots, p, t)
    kept = torch.where((source < c)[..., None, None], taken, torch.zeros_like(taken))
    return kept.transpose(1, 2).reshape(b, p, -1)


def blr2_to_blast(spec: BLR2, factors: Factors) -> Converted:
    r"""Rank ``r min(r, b1, b2)``, in the cheapest of three ways.

    - Pairs, ``r^2``: ``U_i S_ij V_j^T = sum_ac S_ij[a, c] u_ia v_jc^T``, so ``U`` and ``V`` repeat
      their columns and ``s_ij`` is ``S_ij`` read row by row.
    - By column, ``r b2``: slot ``k`` of ``U_i`` is ``U_i S_ik``, slot ``k`` of ``V_j`` is ``V_j``,
      and ``s_ij`` selects slot ``j``. By row, ``r b1``, likewise.

    Counting free numbers, a BLR^2 matrix has ``b1 b2 r^2`` in its couplings, and BLAST of rank
    ``R`` over the same bases has ``R ((b1 + b2) r + b1 b2)``: with ``b1 = b2`` no general
    construction can need less than a third of this one's rank.
    """
    (b1, b2), r = spec.blocks, spec.rank
    U, S, V = factors["U"], factors["S"], factors["V"]
    rank = r * min(r, b1, b2)
    blast = Blast(spec.out_features, spec.in_features, rank, spec.blocks)
    if r <= min(b1, b2):
        U, V = U.repeat_interleave(r, dim=2), V.repeat(1, 1, r)
        return blast, {"U": U, "S": S.flatten(2).contiguous(), "V": V}
    eye = torch.eye(min(b1, b2), dtype=S.dtype, device=S.device).repeat_interleave(r, dim=1)
    if b2 <= b1:
        U = (U[:, None] @ S).transpose(1, 2).flatten(2)  # (b1, p, b2 r)
        return blast, {"U": U, "S": eye.repeat(b1, 1, 1), "V": V.repeat(1, 1, b2)}
    V = (V @ S.mT).permute(1, 2, 0, 3).flatten(2)  # (b2, q, b1 r)
    return blast, {"U": U.repeat(1, 1, b1), "S": eye[:, None].repeat(1, b2, 1), "V": V}


def sum_to_blast(spec: Sum, factors: Factors) -> Converted:
    """Both parts on a common grid, concatenated along the rank.

    The grid is the least common multiple of the parts' block counts where there are that many
    rows (columns), else the larger count.
    """
    first, second = (
        to_blast(part, own) for part, own in zip(spec.parts, spec.split(factors), strict=True)
    )
    sizes = (spec.out_features, spec.in_features)
    counts = zip(sizes, first[0].blocks, second[0].blocks, strict=True)
    rows, columns = (
        math.lcm(a, b) if math.lcm(a, b) <= size else max(a, b) for size, a, b in counts
    )
    (one, left), (other, right) = (regrid(*pair, (rows, columns)) for pair in (first, second))
    joined = {key: torch.cat((left[key], right[key]), dim=2) for key in left}
    return Blast(*sizes, one.rank + other.rank, one.blocks), joined


def monarch_permutation(spec: Monarch) -> Tensor:
    """``(m,)`` int64: row ``x`` of the Monarch matrix is this row of the block low-rank one.

    The block low-rank matrix has all ``b1 p`` rows of the blocks: where ``b1`` does not divide
    ``m``, rows that Monarch shows lie among those that a cut to ``m`` rows would lose.
    """
    rows = torch.arange(spec.padded_shape[0]).view(spec.blocks[0], -1)
    return spec.join_rows(rows)


def monarch_to_blast(spec: Monarch, factors: Factors) -> tuple[Blast, dict[str, Tensor], Tensor]:
    """Monarch as ``blast.to_dense(...)[permutation]``, with ``monarch_permutation``.

    Raises:
        StructureError: factors of another spec.
    """
    spec.check(factors)
    rows = spec.padded_shape[0]
    unpermuted = BlockLowRank(rows, spec.in_features, spec.rank, spec.blocks)
    return *block_low_rank_to_blast(unpermuted, factors), monarch_permutation(spec)


def blast_to_blr2(spec: Blast, factors: Factors) -> tuple[BLR2, dict[str, Tensor]]:
    """The same rank and grid, every coupling a diagonal matrix: BLR^2 contains BLAST.

    Raises:
        StructureError: factors of another spec.
    """
    spec.check(factors)
    full = BLR2(spec.out_features, spec.in_features, spec.rank, spec.blocks)
    return full, {**factors, "S": torch.diag_embed(factors["S"])}


CONVERSIONS: dict[type[Structure], Callable[[Any, Factors], Converted]] = {
    Blast: lambda spec, factors: (spec, dict(factors)),
    LowRank: low_rank_to_blast,
    BlockDiagonal: block_diagonal_to_blast,
    BlockLowRank: block_low_rank_to_blast,
    BLR2: blr2_to_blast,
    Sum: sum_to_blast,
}
