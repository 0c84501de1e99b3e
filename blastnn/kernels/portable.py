"""For graphs that leave PyTorch: one form for any number of tokens, of operators that all have.

A structure's own product may take another path for few tokens than for many. A graph exported with
a symbolic token count can hold only one, so this kernel gives those structures a form without a
branch; every other structure has one already. ``dispatch.matmul`` takes it while ``torch.export``
traces. For BLAST it is the form that was fastest over one and many tokens in ONNX Runtime
(benchmarks/onnx_forms.py); each factor appears in the graph once, so that it is stored once.
Batch axes are kept: folded into one, every layer would carry a product of symbolic sizes.

Letters: ``i`` block row, ``j`` block column, ``p q`` rows and columns of a block, ``r`` rank,
``T`` tokens, behind any batch axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.structures import Factors, Structure
from blastnn.structures.blast import Blast
from blastnn.structures.block_low_rank import BlockLowRank, Monarch
from blastnn.structures.blr2 import BLR2
from blastnn.structures.grid import BlockGrid, pad_last
from blastnn.structures.sum import Sum

NAME = "portable"


def obstacle(spec: Structure, device: str, dtype: torch.dtype) -> str | None:
    """None: it serves everything, in forms made for other runtimes."""
    return None


def matmul(spec: Structure, x: Tensor, factors: Factors) -> Tensor:
    """``(..., n)`` to ``(..., m)``, for a number of tokens that is not known."""
    if isinstance(spec, Sum):
        first, second = spec.split(factors)
        return matmul(spec.parts[0], x, first) + matmul(spec.parts[1], x, second)
    if not isinstance(spec, (Blast, BlockLowRank, BLR2)):
        return spec.matmul(x, factors)
    if x.ndim == 1:
        return matmul(spec, x[None], factors)[0]
    columns = _columns(spec, x)  # (b2, ..., T, q)
    if isinstance(spec, Blast):
        rows = _blast(columns, factors)
    elif isinstance(spec, BLR2):
        rows = _blr2(columns, factors)
    else:
        rows = _block_low_rank(columns, factors)
    # Monarch's row l b1 + j is row l of block row j: there the block row comes last.
    joined = rows.movedim(0, -1 if isinstance(spec, Monarch) else -2).flatten(-2)
    return joined[..., : spec.out_features]


def _columns(spec: BlockGrid, x: Tensor) -> Tensor:
    """The input cut into the grid's block columns: ``(b2, ..., T, q)``."""
    b2, q = spec.blocks[1], spec.block_shape[1]
    return pad_last(x, b2 * q).unflatten(-1, (b2, q)).movedim(-2, 0)


def _beside(factor: Tensor, columns: Tensor, lead: int = 1) -> Tensor:
    """The factor with axes of size 1, behind its ``lead`` first, for the input's batch axes."""
    return factor[(slice(None),) * lead + (None,) * (columns.ndim - 3)]


def _blast(columns: Tensor, factors: Factors) -> Tensor:
    """``z_j = V_j^T x_j``; ``w_i = sum_j s_ij z_j`` by broadcasting; ``y_i = U_i w_i``."""
    couplings = _beside(factors["S"].unsqueeze(2), columns, 2)  # (b1, b2, ..., 1, r)
    z = torch.matmul(columns, _beside(factors["V"], columns))  # (b2, ..., T, r)
    w = (z.unsqueeze(0) * couplings).sum(1)  # (b1, ..., T, r)
    return torch.matmul(w, _beside(factors["U"].mT, columns))  # (b1, ..., T, p)


def _block_low_rank(columns: Tensor, factors: Factors) -> Tensor:
    """``z_ij = V_ij^T x_j``; ``y_i = sum_j U_ij z_ij``; the input is broadcast over ``i``."""
    z = torch.matmul(columns, _beside(factors["V"], columns, 2))  # (b1, b2, ..., T, r)
    return torch.matmul(z, _beside(factors["U"].mT, columns, 2)).sum(1)  # (b1, ..., T, p)


def _blr2(columns: Tensor, factors: Factors) -> Tensor:
    """``z_j = V_j^T x_j``; ``w_i = sum_j S_ij z_j``; ``y_i = U_i w_i``."""
    z = torch.matmul(columns, _beside(factors["V"], columns))  # (b2, ..., T, r)
    w = torch.matmul(z, _beside(factors["S"].mT, columns, 2)).sum(1)  # (b1, ..., T, r)
    return torch.matmul(w, _beside(factors["U"].mT, columns))  # (b1, ..., T, p)
