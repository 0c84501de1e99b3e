"""What the alternating solver iterates on, and the small solves that it is made of.

Every tensor has a leading batch dimension ``k`` of independent problems with one spec. Letters:
``i`` block row, ``j`` block column, ``p q`` rows and columns of a block, ``r t`` rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blastnn.factorize.problem import Problem
from blastnn.structures import Blast

# Added to normal matrices, relative to their mean diagonal: this share of the squared relative
# error, but at least what a Cholesky factorisation needs. Far from the solution it keeps nearly
# equal components from cancelling each other; it vanishes with the error.
RIDGE_PER_SQUARED_ERROR = 4e-3
SMALLEST_RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}
# Below this squared relative error the normal-equation value of the objective has cancelled.
CANCELLATION = {torch.float32: 1e-5, torch.float64: 1e-13}


@dataclass(frozen=True)
class State:
    """The factors ``U (k, b1, p, r)``, ``S (k, b1, b2, r)``, ``V (k, b2, q, r)``."""

    U: Tensor
    S: Tensor
    V: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three factors."""
        return self.U, self.S, self.V

    def extrapolate(self, previous: State, momentum: Tensor) -> State:
        """``self + momentum (self - previous)``, with a momentum ``(k,)`` for each problem."""
        weight = -momentum[:, None, None, None].to(self.U)
        pairs = zip(self.tensors(), previous.tensors(), strict=True)
        return State(*(torch.lerp(new, old, weight) for new, old in pairs))

    def where(self, chosen: Tensor, other: State) -> State:
        """This state for the ``chosen`` problems, a bool mask ``(k,)``; ``other`` elsewhere."""
        if bool(chosen.all()):
            return self
        mask = chosen[:, None, None, None].to(self.U.device)
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return State(*(torch.where(mask, mine, theirs) for mine, theirs in pairs))

    def flipped(self) -> State:
        """The state of the transposed problem."""
        return State(self.V, self.S.transpose(1, 2).contiguous(), self.U)

    def to(self, dtype: torch.dtype) -> State:
        """The same factors in another dtype."""
        return State(*(tensor.to(dtype) for tensor in self.tensors()))

    def one(self, index: int) -> dict[str, Tensor]:
        """The factors of one problem by name."""
        return {"U": self.U[index], "S": self.S[index], "V": self.V[index]}


class Sweeper(ABC):
    """Least-squares problems of one spec and dtype that one pass over all unknowns improves.

    Attributes:
        notes: for each problem, the fallbacks that were taken.
    """

    def __init__(self, problems: Sequence[Problem], spec: Blast) -> None:
        self.problems, self.spec = problems, spec
        self.notes: list[list[str]] = [[] for _ in problems]
        self.energy = torch.tensor([problem.energy for problem in problems], dtype=torch.float64)

    @abstractmethod
    def sweep(self, state: State, omega: Tensor, ridge: Tensor) -> tuple[State, Tensor]:
        """One pass with steps ``omega (k,)`` times the exact ones; states and errors ``(k,)``."""

    def error(self, state: State) -> Tensor:
        """Relative errors ``(k,)`` from the residuals, float64."""
        found = []
        for index, problem in enumerate(self.problems):
            factors = {name: f.double() for name, f in state.one(index).items()}
            found.append(problem.objective_error(self.spec.to_dense(factors)))
        return torch.tensor(found, dtype=torch.float64)

    def errors_from(self, fitted: Tensor, state: State) -> Tensor:
        """Relative errors ``(k,)`` from ``|| A^ L ||^2 - 2 <A C, A^>``, unless it has cancelled."""
        squared = 1.0 + fitted.cpu() / self.energy
        cancelled = squared < CANCELLATION[state.U.dtype]
        errors = squared.clamp(min=0.0).sqrt()
        if bool(cancelled.any()):
            errors = torch.where(cancelled, self.error(state), errors)
        return errors


def ridge_for(errors: Tensor, dtype: torch.dtype) -> Tensor:
    """The relative ridge ``(k,)`` that goes with relative errors ``(k,)``."""
    return (RIDGE_PER_SQUARED_ERROR * errors.square()).clamp(min=SMALLEST_RIDGE[dtype])


def step(old: Tensor, exact: Tensor, omega: Tensor) -> Tensor:
    """``old + omega (exact - old)``, with an ``omega (k,)`` for each problem."""
    return torch.lerp(old, exact, omega.to(old).view(-1, *[1] * (old.ndim - 1)))


def solve_rows(G: Tensor, right: Tensor, ridge: Tensor, notes: list[list[str]]) -> Tensor:
    """``right G^-1`` for symmetric positive semidefinite ``G (k, ..., r, r)``, by rows.

    A matrix that is not positive definite in spite of the ridge gets a larger one, and a note.
    """
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    lift = diagonal.mean(-1) * ridge.to(G).view(-1, *[1] * (G.ndim - 3))
    lift += torch.finfo(G.dtype).tiny
    factor, info = torch.linalg.cholesky_ex(_shifted(G, lift))
    failed = info != 0
    for larger in (1e-4, 1e-2, 1.0):
        if not bool(failed.any()):
            break
        _note(notes, failed, f"a normal matrix was not positive definite: ridge {larger:g}")
        lift = torch.where(failed, larger * diagonal.mean(-1) + torch.finfo(G.dtype).tiny, lift)
        factor, info = torch.linalg.cholesky_ex(_shifted(G, lift))
        failed = info != 0
    solved = solve_factored(factor, right)
    sharp = ridge <= SMALLEST_RIDGE[G.dtype]
    if bool(sharp.any()):
        # Close to a solution the ridge's bias would be all that is left: take it out once.
        refined = solved + solve_factored(factor, right - solved @ G)
        chosen = sharp.to(G.device).view(-1, *[1] * (G.ndim - 1))
        solved = torch.where(chosen, refined, solved)
    return solved


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """``right (L L^T)^-1`` by rows, for a Cholesky factor ``L``.

    Two triangular solves from the left on the transpose, which is LAPACK's layout without a copy,
    are more than twice as fast as ``cholesky_solve``, and for few rows ten times as fast as
    solves from the right.
    """
    first = torch.linalg.solve_triangular(factor, right.mT, upper=False)
    return torch.linalg.solve_triangular(factor.mT, first, upper=True).mT


def _shifted(G: Tensor, lift: Tensor) -> Tensor:
    shifted = G.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(lift[..., None])
    return shifted


def _note(notes: list[list[str]], failed: Tensor, text: str) -> None:
    for index in failed.reshape(len(notes), -1).any(1).nonzero().flatten().tolist():
        if text not in notes[index]:
            notes[index].append(text)


def descend_couplings(W: Tensor, right: Tensor, start: Tensor, steps: int) -> Tensor:
    """``steps`` of conjugate gradients for ``W s = right`` from ``start``, Jacobi-preconditioned.

    ``W (..., r, r)``, the others ``(..., r)``. Every step descends, whatever ``W``'s condition.
    """
    tiny = torch.finfo(W.dtype).tiny
    scale = 1.0 / W.diagonal(dim1=-2, dim2=-1).clamp(min=tiny)
    x, residual = start, right - _times(W, start)
    z = scale * residual
    direction, inner = z, (residual * z).sum(-1, keepdim=True)
    for count in range(1, steps + 1):
        product = _times(W, direction)
        curvature = (direction * product).sum(-1, keepdim=True)
        length = torch.where(curvature > tiny, inner / curvature.clamp(min=tiny), 0.0)
        x = x + length * direction
        if count < steps:
            residual = residual - length * product
            z = scale * residual
            new = (residual * z).sum(-1, keepdim=True)
            direction = z + torch.where(inner > tiny, new / inner.clamp(min=tiny), 0.0) * direction
            inner = new
    return x


def _times(W: Tensor, vector: Tensor) -> Tensor:
    """``W vector`` for symmetric ``W``, as a row: eight times as fast in a batch on a CPU."""
    return (vector[..., None, :] @ W)[..., 0, :]
