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

from blastnn.factorize.als_state import (
    State,
    Sweeper,
    Swept,
    explained_apart,
    lift,
    multiply,
    per_problem,
    quadratic,
    solve_rows,
    step,
)
from blastnn.factorize.blocks import split_blocks, split_moment
from blastnn.factorize.problem import Problem
from blastnn.kernels.normal_equations import (
    add_coupled,
    add_weighted_grams,
    descend_couplings,
    explained_by,
    paired_sums,
)
from blastnn.structures import Blast

KEEP_BYTES = 2**30
COUPLING_STEPS = 3


class WeightedSweep(Sweeper):
    """Problems with second moments, of one spec and dtype.

    ``target[:, j]`` is ``Y_j`` as ``(k, b1 p, q)``; ``moment[:, c]`` are all ``C_jc`` as ``(k, b2
    q, q)``, ``inverse[:, j]`` is ``C_jj^-1``, inverted in float64.
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
        columns = pairs.to(dtype).transpose(0, 1).reshape(b2, b2 * q, q)
        return by_column.to(dtype).contiguous(), columns, inverse.to(dtype)

    def sweep(self, state: State, omega: Sequence[float], penalty: Sequence[float]) -> Swept:
        """``V``, ``S`` and ``U`` in turn."""
        gram = lift(multiply(state.U.mT, state.U), penalty)  # (k, i, r, t)
        V, moved = self._right(state, gram, omega, penalty)
        projected = multiply(self.target, V).unflatten(2, state.U.shape[1:3])  # Y_ij V_j
        products = _Products(V, moved)
        S = self._couplings(state, gram, projected, products, omega)
        normal = self._left_gram(S, products)
        right = torch.zeros_like(state.U)
        add_coupled(projected, S.transpose(1, 2), right)
        new = solve_rows(lift(normal, penalty), right, penalty, self.notes)
        U = step(state.U, new, omega)
        objective, apart = quadratic(U, normal, right), explained_apart(U, normal)
        return self.swept(State(U, S, V), objective, apart, penalty)

    def _right(
        self, state: State, gram: Tensor, omega: Sequence[float], penalty: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """New ``V`` and the products ``C_jc V_c`` as ``(k, c, j, q, r)``."""
        U, V, by_column = state.U, state.V.clone(), state.S.transpose(1, 2)  # (k, c, i, r)
        moved = multiply(self.moment, V).unflatten(2, V.shape[1:3])
        for j in range(V.shape[1]):
            # H_cj for all c: the i-th summand is (s_ic s_ij^T) * gram_i.
            H = gram.new_zeros(V.shape[0], V.shape[1], *gram.shape[2:])  # (k, c, r, t)
            add_weighted_grams(gram, by_column, by_column[:, j, None].expand_as(by_column), H)
            own = H[:, j].clone()
            H[:, j] = 0.0
            scaled = (U * state.S[:, :, j, None]).flatten(1, 2)
            right = torch.bmm(self.target[:, j].mT, scaled)  # (k, q, r)
            right -= multiply(moved[:, :, j], H).sum(1)
            right = torch.bmm(self.inverse[:, j], right)
            V[:, j] = step(V[:, j], solve_rows(own, right, penalty, self.notes), omega)
            moved[:, j] = torch.bmm(self.moment[:, j], V[:, j]).view_as(moved[:, j])
        return V, moved

    def _couplings(
        self,
        state: State,
        gram: Tensor,
        projected: Tensor,
        products: _Products,
        omega: Sequence[float],
    ) -> Tensor:
        """``s_ij``, block column by block column, by some conjugate gradients given the others."""
        S = state.S.clone()
        wanted = paired_sums(projected, state.U)  # (k, j, i, r)
        for j in range(S.shape[2]):
            M = products[j]  # (k, c, t, r)
            gap = (wanted[:, j] - explained_by(gram, M, S))[:, :, None]
            M_jj = M[:, j, None].contiguous()
            change = descend_couplings(gram, M_jj, gap, torch.zeros_like(gap), COUPLING_STEPS)
            S[:, :, j] += change[:, :, 0] * per_problem(omega, change[:, :, 0])
        return S

    @staticmethod
    def _left_gram(S: Tensor, products: _Products) -> Tensor:
        """``G_i = sum_jc (s_ij s_ic^T) * M_jc``, ``(k, i, r, t)``."""
        total = S.new_zeros(*S.shape[:2], S.shape[3], S.shape[3])
        for j in range(S.shape[2]):
            # (k, c, t, r) with the rank of c first: G_i transposed, which is the same.
            add_weighted_grams(products[j], S, S[:, :, j, None].expand_as(S), total)
        return total


class _Products:
    """``M_jc = V_j^T C_jc V_c`` by ``j`` as ``(k, c, t, r)``, with ``t`` of ``V_c``."""

    def __init__(self, V: Tensor, moved: Tensor) -> None:
        self._V, self._moved = V, moved
        size = V.shape[1] ** 2 * V[:, 0, 0].numel() * V.shape[3] * V.element_size()
        self._kept: dict[int, Tensor] | None = {} if size <= KEEP_BYTES else None

    def __getitem__(self, j: int) -> Tensor:
        if self._kept is not None and j in self._kept:
            return self._kept[j]
        own = self._V[:, j, None].expand(-1, self._V.shape[1], -1, -1)
        product = multiply(self._moved[:, :, j].mT, own)
        if self._kept is not None:
            self._kept[j] = product
        return product
