r"""One exact sweep over the unknowns of a BLAST matrix; the mathematics is in ``als.py``.

Where ``C`` couples the block columns, ``columns(j)`` is all of them; without data it is ``j``
alone, and the same code is the data-free solver. Letters as in ``als.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from blastnn.factorize.blocks import split_blocks, split_moment
from blastnn.factorize.problem import Problem
from blastnn.structures import Blast

# Relative ridge of the r x r solves: float32 Cholesky needs it where components are nearly equal.
RIDGE = 1e-6
# Below this squared relative error the float32 normal-equation value of f has cancelled.
CANCELLATION = 1e-5
# The r x r products M_jk of all pairs are kept for the second use up to this many bytes.
KEEP_BYTES = 2**30


@dataclass(frozen=True)
class State:
    """The factors ``U (b1, p, r)``, ``S (b1, b2, r)``, ``V (b2, q, r)``."""

    U: Tensor
    S: Tensor
    V: Tensor

    def extrapolate(self, previous: State, momentum: float) -> State:
        """``self + momentum (self - previous)``."""
        pairs = zip(self.tensors(), previous.tensors(), strict=True)
        return State(*(new.lerp(old, -momentum) for new, old in pairs))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three factors."""
        return self.U, self.S, self.V

    def to(self, dtype: torch.dtype) -> State:
        """The same factors in another dtype."""
        return State(*(tensor.to(dtype) for tensor in self.tensors()))


@dataclass
class BlockProblem:
    """``Y`` by block column and ``C`` by block pairs, in the compute dtype.

    ``target[j]`` is ``Y_j`` as ``(b1 p, q)``; ``moment[j, k]`` is ``C_jk`` and ``inverse[j]`` is
    ``C_jj^-1``, both None without data.
    """

    spec: Blast
    target: Tensor
    moment: Tensor | None
    inverse: Tensor | None
    energy: float
    problem: Problem
    notes: list[str] = field(default_factory=list)

    @classmethod
    def build(cls, problem: Problem, spec: Blast) -> Self:
        """Cut the weight and the moment into blocks; invert the diagonal blocks in float64."""
        dtype = problem.compute_dtype
        b2, q = spec.blocks[1], spec.block_shape[1]
        target, moment, inverse = problem.weight, None, None
        if problem.moment is not None:
            target = problem.weight @ problem.moment
            pairs = split_moment(problem.moment, spec)
            diagonal = torch.stack([pairs[j, j] for j in range(b2)])
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(diagonal)).to(dtype)
            moment = pairs.to(dtype)
        blocks = split_blocks(target, spec).transpose(0, 1).reshape(b2, -1, q)
        return cls(spec, blocks.to(dtype).contiguous(), moment, inverse, problem.energy, problem)

    def columns(self, j: int) -> slice:
        """The block columns that ``C`` couples with ``j``."""
        return slice(0, self.spec.blocks[1]) if self.moment is not None else slice(j, j + 1)

    def sweep(self, state: State) -> tuple[State, float]:
        """Solve for ``V``, ``S`` and ``U`` in turn; the new state and its relative error."""
        V, moved = self._solve_right(state)
        gram = state.U.mT @ state.U  # (i, r, t)
        projected = torch.bmm(self.target, V).view(V.shape[0], *state.U.shape)  # Y_ij V_j
        products = self._products(V, moved)
        S = self._solve_couplings(state, gram, projected, products)
        G = self._left_gram(S, products)
        R = torch.einsum("jipr,ijr->ipr", projected, S)
        U = self._solve_spd(G, R.mT).mT
        double = torch.float64
        squared = self.energy + float(((U @ G - 2 * R) * U).sum(dtype=double))
        result = State(U.contiguous(), S, V)
        if squared < CANCELLATION * self.energy:
            return result, self.error(result)
        return result, (squared / self.energy) ** 0.5

    def error(self, state: State) -> float:
        """The relative error from the residual, under the damped moment that is minimised."""
        if self.energy <= 0.0:
            return 0.0
        dense = self.spec.to_dense({"U": state.U, "S": state.S, "V": state.V}).double()
        residual = self.problem.weight - dense
        weighted = residual if self.problem.moment is None else residual @ self.problem.moment
        return max(float((weighted * residual).sum()) / self.energy, 0.0) ** 0.5

    def _solve_right(self, state: State) -> tuple[Tensor, list[Tensor]]:
        """New ``V`` and, by ``j``, the products ``C_jk V_k`` as ``(q, k, r)``."""
        U, S, V = state.U, state.S, state.V.clone()
        gram = (U.mT @ U).transpose(0, 1)  # (r, i, t)
        moment, inverse = self.moment, self.inverse
        moved = (
            V[:, :, None].clone() if moment is None else torch.einsum("jkqw,kwr->jqkr", moment, V)
        )
        for j in range(V.shape[0]):
            columns = self.columns(j)
            # H_kj for all k: a product over i for every r.
            H = torch.bmm(S[:, columns].permute(2, 1, 0), gram * S[None, :, j])  # (r, k, t)
            own = 0 if moment is None else j
            H_jj = H[:, own].clone()
            right = self.target[j].mT @ (U * S[:, j, None]).reshape(-1, U.shape[2])  # (q, r)
            if inverse is not None:
                H[:, own] = 0.0
                others = H.transpose(0, 1).reshape(-1, H.shape[2])  # (k r, t)
                right = right - moved[j].reshape(right.shape[0], -1) @ others
                right = inverse[j] @ right
            V[j] = self._solve_spd(H_jj, right.mT).mT
            if moment is not None:
                moved[:, :, j] = moment[:, j] @ V[j]
            else:
                moved[j, :, 0] = V[j]
        return V, list(moved)

    def _products(self, V: Tensor, moved: list[Tensor]) -> _Products:
        return _Products(V, moved)

    def _solve_couplings(
        self, state: State, gram: Tensor, projected: Tensor, products: _Products
    ) -> Tensor:
        """``s_ij``, block column by block column: ``W_ij s_ij`` equals what the others leave."""
        S = state.S.clone()
        by_rank = gram.transpose(0, 1)  # (t, i, r), symmetric in r and t
        for j in range(S.shape[1]):
            columns, M = self.columns(j), products[j]  # (k, t, r)
            own = j if self.moment is not None else 0
            explained = torch.bmm(S[:, columns].permute(2, 0, 1), M.transpose(0, 1))  # (t, i, r)
            gap = (projected[j] * state.U).sum(1) - (explained * by_rank).sum(0)  # (i, r)
            S[:, j] += self._solve_spd(gram * M[own], gap[..., None])[..., 0]
        return S

    def _left_gram(self, S: Tensor, products: _Products) -> Tensor:
        """``G_i = sum_jk (s_ij s_ik^T) * M_jk``, ``(i, r, t)``."""
        total: Tensor | None = None
        for j in range(S.shape[1]):
            explained = torch.bmm(
                S[:, self.columns(j)].permute(2, 0, 1), products[j].transpose(0, 1)
            )
            explained *= S[None, :, j]
            total = explained if total is None else total.add_(explained)
        assert total is not None
        return total.permute(1, 2, 0).contiguous()

    def _solve_spd(self, G: Tensor, right: Tensor) -> Tensor:
        """``G^-1 right`` for symmetric positive semidefinite ``G``; a note where float32 fails."""
        mean = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
        for ridge in (RIDGE, 1e-4, 1e-2):
            shifted = G.clone()
            shifted.diagonal(dim1=-2, dim2=-1).add_(ridge * mean + torch.finfo(G.dtype).tiny)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if not bool(info.any()):
                return torch.cholesky_solve(right, factor)
            note = f"a normal matrix was not positive definite: ridge raised above {ridge:g}"
            if note not in self.notes:
                self.notes.append(note)
        return torch.linalg.lstsq(shifted.double(), right.double(), driver="gelsd").solution.to(
            right
        )


class _Products:
    """``M_jk = V_j^T C_jk V_k`` by ``j`` as ``(k, t, r)``; recomputed when too large to keep."""

    def __init__(self, V: Tensor, moved: list[Tensor]) -> None:
        self._V, self._moved = V, moved
        size = sum(m.shape[1] * m.shape[2] * V.shape[2] for m in moved) * V.element_size()
        self._kept: dict[int, Tensor] | None = {} if size <= KEEP_BYTES else None

    def __getitem__(self, j: int) -> Tensor:
        if self._kept is not None and j in self._kept:
            return self._kept[j]
        q, k, r = self._moved[j].shape
        product = (self._moved[j].reshape(q, k * r).mT @ self._V[j]).view(k, r, r)
        if self._kept is not None:
            self._kept[j] = product
        return product
