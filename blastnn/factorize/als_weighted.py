r"""One sweep of the alternating solver under second moments: ``tr((A - A^) C (A - A^)^T)``.

``C`` couples the block columns, so ``V`` and ``S`` are solved one block column ``j`` after the
other, ``c`` being the others. With ``Y = A C``, ``M_jc = V_j^T C_jc V_c``:

- ``C_jj V_j H_jj = Y_j^T Ubar_j - sum_{c != j} C_jc V_c H_cj`` with
  ``H_cj = sum_i (s_ic s_ij^T) * (U_i^T U_i)``;
- ``((U_i^T U_i) * M_jj) s_ij = diag(U_i^T Y_ij V_j) - sum_{c != j} ((U_i^T U_i) * M_jc) s_ic``;
- ``U_i G_i = R_i`` with ``G_i = sum_jc (s_ij s_ic^T) * M_jc``, ``R_i = sum_j Y_ij V_j diag(s_ij)``.

No step forms ``A^``. Where all ``M_jc`` would be too large to keep they are computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blastnn.factorize.als_state import State, Sweeper, per_problem, quadratic, solve_rows, step
from blastnn.factorize.blocks import split_blocks, split_moment
from blastnn.factorize.problem import Problem
from blastnn.structures import Blast

KEEP_BYTES = 2**30


class WeightedSweep(Sweeper):
    """Problems with second moments, of one spec and dtype.

    ``target[:, j]`` is ``Y_j`` as ``(k, b1 p, q)``; ``moment[:, j, c]`` is ``C_jc``, ``inverse[:,
    j]`` is ``C_jj^-1``, inverted in float64.
    """

    def __init__(self, problems: Sequence[Problem], spec: Blast) -> None:
        super().__init__(problems, spec)
        cut = [self._cut(problem) for problem in problems]
        self.target, self.moment, self.inverse = (
            torch.stack(parts) for parts in zip(*cut, strict=True)
        )

    def _cut(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        assert problem.moment is not None
        (_, b2), (_, q) = self.spec.blocks, self.spec.block_shape
        dtype = problem.compute_dtype
        pairs = split_moment(problem.moment, self.spec)
        diagonal = torch.stack([pairs[j, j] for j in range(b2)])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(diagonal))
        target = split_blocks(problem.weight @ problem.moment, self.spec)
        by_column = target.transpose(0, 1).reshape(b2, -1, q)
        return by_column.to(dtype).contiguous(), pairs.to(dtype), inverse.to(dtype)

    def sweep(
        self, state: State, omega: Sequence[float], ridge: Sequence[float]
    ) -> tuple[State, list[float]]:
        """``V``, ``S`` and ``U`` in turn; the new states and their relative errors."""
        V, moved = self._right(state, omega, ridge)
        gram = state.U.mT @ state.U  # (k, i, r, t)
        projected = (self.target @ V).unflatten(2, state.U.shape[1:3])  # Y_ij V_j: (k, j, i, p, r)
        products = _Products(V, moved)
        S = self._couplings(state, gram, projected, products, omega, ridge)
        normal = self._left_gram(S, products)
        right = torch.einsum("kjipr,kijr->kipr", projected, S)
        U = step(state.U, solve_rows(normal, right, ridge, self.notes), omega)
        result = State(U, S, V)
        return result, self.errors_from(quadratic(U, normal, right), result)

    def _right(
        self, state: State, omega: Sequence[float], ridge: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """New ``V`` and the products ``C_jc V_c`` as ``(k, j, q, c, r)``."""
        U, S, V = state.U, state.S, state.V.clone()
        gram = (U.mT @ U).transpose(1, 2)  # (k, r, i, t)
        moved = torch.einsum("kjcqw,kcwr->kjqcr", self.moment, V).contiguous()
        for j in range(V.shape[1]):
            # H_cj for all c: a product over i for every r.
            H = S.permute(0, 3, 2, 1).contiguous() @ (gram * S[:, None, :, j])  # (k, r, c, t)
            own = H[:, :, j].clone()
            H[:, :, j] = 0.0
            others = H.transpose(1, 2).flatten(1, 2)  # (k, c r, t)
            right = self.target[:, j].mT @ (U * S[:, :, j, None]).flatten(1, 2)  # (k, q, r)
            right = self.inverse[:, j] @ (right - moved[:, j].flatten(2) @ others)
            V[:, j] = step(V[:, j], solve_rows(own, right, ridge, self.notes), omega)
            moved[:, :, :, j] = self.moment[:, :, j] @ V[:, None, j]
        return V, moved

    def _couplings(
        self,
        state: State,
        gram: Tensor,
        projected: Tensor,
        products: _Products,
        omega: Sequence[float],
        ridge: Sequence[float],
    ) -> Tensor:
        """``s_ij``, block column by block column, each exact given the others."""
        S, by_rank = state.S.clone(), gram.transpose(1, 2)  # (k, t, i, r), symmetric in r and t
        for j in range(S.shape[2]):
            M = products[j]  # (k, c, t, r)
            explained = S.permute(0, 3, 1, 2).contiguous() @ M.transpose(1, 2)  # (k, t, i, r)
            gap = (projected[:, j] * state.U).sum(2) - (explained * by_rank).sum(1)  # (k, i, r)
            change = solve_rows(gram * M[:, None, j], gap[:, :, None], ridge, self.notes)
            S[:, :, j] += change[:, :, 0] * per_problem(omega, change[:, :, 0])
        return S

    @staticmethod
    def _left_gram(S: Tensor, products: _Products) -> Tensor:
        """``G_i = sum_jc (s_ij s_ic^T) * M_jc``, ``(k, i, r, t)``."""
        by_rank = S.permute(0, 3, 1, 2).contiguous()  # (k, t, i, c)
        total: Tensor | None = None
        for j in range(S.shape[2]):
            explained = by_rank @ products[j].transpose(1, 2)  # (k, t, i, r)
            explained *= S[:, None, :, j]
            total = explained if total is None else total.add_(explained)
        assert total is not None
        return total.permute(0, 2, 3, 1).contiguous()


class _Products:
    """``M_jc = V_j^T C_jc V_c`` by ``j`` as ``(k, c, t, r)``."""

    def __init__(self, V: Tensor, moved: Tensor) -> None:
        self._V, self._moved = V, moved
        size = moved.shape[1] * moved[:, 0, 0].numel() * V.shape[3] * V.element_size()
        self._kept: dict[int, Tensor] | None = {} if size <= KEEP_BYTES else None

    def __getitem__(self, j: int) -> Tensor:
        if self._kept is not None and j in self._kept:
            return self._kept[j]
        columns, rank = self._moved.shape[3:]
        product = self._moved[:, j].flatten(2).mT @ self._V[:, j]
        product = product.unflatten(1, (columns, rank))
        if self._kept is not None:
            self._kept[j] = product
        return product
