r"""One sweep of the alternating solver without data: ``C = I``, and block columns separate.

Row by row of blocks ``U_i`` (given ``S, V``), then ``s_ij`` (given ``U_i, V``), and at the end all
``V_j``, whose normal equations the rows have summed on the way. A sweep reads ``A`` twice,
``4 m n r`` operations, and holds nothing larger than ``n r`` and a few ``b2 r^2``.
A wide matrix is solved transposed, so that ``n`` is the smaller side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blastnn.factorize.als_state import (
    SMALLEST_RIDGE,
    State,
    Sweeper,
    Swept,
    explained_apart,
    lift,
    multiply,
    quadratic,
    solve_rows,
    step,
)
from blastnn.factorize.blocks import padded_rows
from blastnn.factorize.problem import Problem
from blastnn.factorize.scratch import Scratch, chunks
from blastnn.kernels.normal_equations import (
    add_coupled,
    descend_couplings,
    paired_sums,
    sweep_freely,
    weighted_grams,
)
from blastnn.structures import Blast

COUPLING_STEPS = 2


class FreeSweep(Sweeper):
    """Problems without second moments, of one spec and dtype."""

    def __init__(self, problems: Sequence[Problem], spec: Blast) -> None:
        super().__init__(problems, spec)
        self.scratch = Scratch()
        self.wide = spec.out_features < spec.in_features
        (b1, b2), (p, q) = spec.blocks, spec.block_shape
        dtype = problems[0].compute_dtype
        rows = [padded_rows(problem.weight.to(dtype), spec) for problem in problems]
        self.rows = torch.stack(rows)  # (k, i, p, n)
        if self.wide:
            self.rows = self.rows.flatten(1, 2).mT.contiguous().view(-1, b2, q, b1 * p)

    def sweep(self, state: State, omega: Sequence[float], penalty: Sequence[float]) -> Swept:
        """``U``, ``S`` and ``V`` in turn."""
        inner = state.flipped() if self.wide else state
        # As many block rows together as leave their products, or Gram matrices, in cache.
        k, b2, q, r = inner.V.shape
        parts = chunks(inner.U.shape[1], max(k * b2 * r * r, b2 * q * r), inner.V.device)
        found = self._at_once(inner, omega, penalty) if len(parts) == 1 else None
        inner, objective, apart = found or self._sweep(inner, omega, penalty, parts)
        result = inner.flipped() if self.wide else inner
        return self.swept(result, objective, apart, penalty)

    def _at_once(
        self, state: State, omega: Sequence[float], penalty: Sequence[float]
    ) -> tuple[State, Tensor, Tensor] | None:
        """All rows in one call; None where that does not serve, or something special is to do."""
        smallest = SMALLEST_RIDGE[state.V.dtype]
        if any(each <= smallest for each in penalty):
            return None
        found = sweep_freely(self.rows, state.tensors(), omega, penalty, smallest, COUPLING_STEPS)
        return None if found is None else (State(*found[0]), *found[1:])

    def _sweep(
        self,
        state: State,
        omega: Sequence[float],
        penalty: Sequence[float],
        parts: Sequence[slice],
    ) -> tuple[State, Tensor, Tensor]:
        """Some rows after the other; its oracle, and what is done everywhere else."""
        U, S, V = torch.empty_like(state.U), torch.empty_like(state.S), state.V
        gram = lift(multiply(V.mT, V), penalty)  # (k, j, r, t)
        right, normal = torch.zeros_like(V), torch.zeros_like(gram)
        for rows in parts:
            U[:, rows] = self._left(state, rows, gram, omega, penalty)
            seen = multiply(self.rows[:, rows].mT, U[:, rows])  # (k, i, n, r)
            products = seen.view(*seen.shape[:2], *V.shape[1:])  # (k, i, j, q, r)
            own = multiply(U[:, rows].mT, U[:, rows])  # (k, i, r, t)
            S[:, rows] = self._couplings(state, rows, own, gram, products, omega)
            add_coupled(products, S[:, rows], right)
            normal += weighted_grams(own, S[:, rows].transpose(1, 2))
        new = solve_rows(lift(normal, penalty), right, penalty, self.notes)
        V = step(V, new, omega)
        return State(U, S, V), quadratic(V, normal, right), explained_apart(V, normal)

    def _left(
        self,
        state: State,
        rows: slice,
        gram: Tensor,
        omega: Sequence[float],
        penalty: Sequence[float],
    ) -> Tensor:
        """``U_i G_i = R_i`` with ``R_i = A_i [s_ij V_j]_j`` and ``G_i = sum_j s s^T * gram_j``."""
        S = state.S[:, rows]
        normal = weighted_grams(gram, S)
        right = multiply(self.rows[:, rows], self.scratch.scaled(state.V, S))
        new = solve_rows(normal, right, penalty, self.notes)
        return step(state.U[:, rows], new, omega)

    def _couplings(
        self,
        state: State,
        rows: slice,
        own: Tensor,
        gram: Tensor,
        products: Tensor,
        omega: Sequence[float],
    ) -> Tensor:
        """``(U_i^T U_i * V_j^T V_j) s_ij = diag(U_i^T A_ij V_j)``."""
        right = paired_sums(products, state.V)
        start = state.S[:, rows]
        return step(start, descend_couplings(own, gram, right, start, COUPLING_STEPS), omega)
