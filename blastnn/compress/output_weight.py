r"""Errors weighted by what they do: a layer's outputs count as the gradients there say.

With ``G = E[g g^T]`` the second moment of the gradients at a layer's outputs (``spectrum.py``), the
model's loss rises by ``|| G^(1/2) (A - A^) C^(1/2) ||^2``. A structure whose rows of ``U`` may be
multiplied from the left, block row by block row, stays what it is under a block-diagonal ``G``:
with ``G_i = R_i^T R_i`` the solver gets ``R_i A_i`` for a target, and ``R_i^-1`` turns the ``U_i``
that it finds into the one wanted. No solver knows of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.structures import Structure

# Added to ``G``, relative to its mean diagonal: directions without a gradient still count.
RIDGE = 1.0


class OutputWeight:
    """The block-diagonal root of ``G`` for one layer and spec."""

    def __init__(self, moment: Tensor, spec: Structure) -> None:
        """``moment (blocks, p, p)`` is the block diagonal of ``G``, padded at its end.

        Where its blocks and the spec's rows are cut in different places, both cuts are kept.
        """
        blocks = spec.row_blocks()
        assert blocks is not None
        stored, rows = moment.shape[1], spec.out_features
        cut = -(-rows // blocks)
        edges = sorted({*range(0, rows, stored), *range(0, rows, cut), rows})
        ridge = RIDGE * moment.double().diagonal(dim1=1, dim2=2).sum() / rows
        self._roots: list[tuple[slice, Tensor]] = []
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            inside = slice(start % stored, start % stored + end - start)
            block = moment[start // stored, inside, inside].double()
            block = block + ridge * torch.eye(end - start, dtype=torch.float64)
            root = torch.linalg.cholesky(block, upper=True)
            self._roots.append((slice(start, end), root))

    def apply(self, target: Tensor) -> Tensor:
        """``R A`` for a dense ``(out_features, in_features)`` ``A``, in its dtype."""
        parts = [root @ target[rows].double() for rows, root in self._roots]
        return torch.cat(parts).to(target.dtype)

    def undo(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``R^-1 U`` in place of ``U``."""
        U = factors["U"].double().clone()
        flat = U.reshape(-1, U.shape[-1])
        for rows, root in self._roots:
            flat[rows] = torch.linalg.solve_triangular(root, flat[rows], upper=True)
        return {**factors, "U": flat.view_as(U).to(factors["U"].dtype)}
