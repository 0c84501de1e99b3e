"""What the alternating solver iterates on, and the small solves that it is made of.

Every tensor has a leading batch dimension ``k`` of independent problems with one spec. Letters:
``i`` block row, ``j`` block column, ``p q`` rows and columns of a block, ``r t`` rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blastnn.factorize.problem import Problem
from blastnn.kernels import normal_equations
from blastnn.structures import Blast

# Added to normal matrices, relative to their mean diagonal: what a Cholesky factorisation needs.
SMALLEST_RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}
# Below this squared relative error the normal-equation value of the objective has cancelled.
CANCELLATION = {torch.float32: 1e-5, torch.float64: 1e-13}
# By how much that value is off, as a rule at the most; more where components cancel each other, as
# the overlap tells. No more follows from it than when an apparent rise is worth a second look.
ROUNDING = {torch.float32: 4e-6, torch.float64: 1e-14}


@dataclass(frozen=True)
class State:
    """The factors ``U (k, b1, p, r)``, ``S (k, b1, b2, r)``, ``V (k, b2, q, r)``."""

    U: Tensor
    S: Tensor
    V: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three factors."""
        return self.U, self.S, self.V

    def extrapolate(self, previous: State, momentum: Sequence[float]) -> State:
        """``self + momentum (self - previous)``, with a momentum for each problem."""
        if not any(momentum):
            return self
        weight = per_problem([-each for each in momentum], self.U)
        pairs = zip(self.tensors(), previous.tensors(), strict=True)
        return State(*(torch.lerp(new, old, weight) for new, old in pairs))

    def where(self, chosen: Sequence[bool], other: State) -> State:
        """This state for the ``chosen`` problems; ``other`` elsewhere."""
        if all(chosen):
            return self
        if not any(chosen):
            return other
        mask = torch.tensor(chosen, device=self.U.device)[:, None, None, None]
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


@dataclass(frozen=True)
class Swept:
    """What a sweep leads to.

    Attributes:
        state: the factors.
        errors: relative errors ``e`` of the problems.
        overlaps: ``P = sum_k || M_k L ||^2 / || A L ||^2`` with the components ``M_k`` (``A^`` is
            their sum): what they would explain if none overlapped another. Where components cancel
            each other, it is large.
    """

    state: State
    errors: list[float]
    overlaps: list[float]


class Sweeper(ABC):
    """Least-squares problems of one spec and dtype that one pass over all unknowns improves.

    Attributes:
        notes: for each problem, the fallbacks that were taken.
    """

    def __init__(self, problems: Sequence[Problem], spec: Blast) -> None:
        self.problems, self.spec = problems, spec
        self.notes: list[list[str]] = [[] for _ in problems]
        self.energy = [problem.energy for problem in problems]

    @abstractmethod
    def sweep(self, state: State, omega: Sequence[float], penalty: Sequence[float]) -> Swept:
        """One pass over all unknowns, towards less ``e^2 + penalty P`` (see :class:`Swept`).

        ``omega``: how far to go, in exact steps. A number of each for every problem.
        """

    def error(self, state: State) -> list[float]:
        """Relative errors from the residuals, in float64."""
        return [self.error_of(state, index) for index in range(len(self.problems))]

    def error_of(self, state: State, index: int) -> float:
        """The relative error of one problem from its residual, in float64."""
        factors = {name: factor.double() for name, factor in state.one(index).items()}
        return self.problems[index].objective_error(self.spec.to_dense(factors))

    def swept(
        self, state: State, objective: Tensor, apart: Tensor, penalty: Sequence[float]
    ) -> Swept:
        """Of :func:`quadratic` and :func:`explained_apart` with a lifted normal matrix.

        Errors are those of ``|| A^ L ||^2 - 2 <A C, A^>``, unless it has cancelled.
        """
        errors, overlaps = [], []
        values = zip(objective.tolist(), apart.tolist(), penalty, self.energy, strict=True)
        for index, (fitted, lifted, share, energy) in enumerate(values):
            overlap = lifted / (1.0 + share) / energy
            squared = 1.0 + fitted / energy - share * overlap
            cancelled = squared < CANCELLATION[state.U.dtype]
            errors.append(self.error_of(state, index) if cancelled else math.sqrt(squared))
            overlaps.append(overlap)
        return Swept(state, errors, overlaps)


def lift(G: Tensor, penalty: Sequence[float]) -> Tensor:
    """``G (k, ..., r, r)`` with its diagonals ``1 + penalty`` times as large, in place.

    That is all that a penalty on ``sum_k || M_k L ||^2`` takes: the squared norm of component ``k``
    is what the diagonals of Gram matrices, of factors and of their products with couplings, count.
    """
    if any(penalty):
        scale = 1.0 + G.new_tensor(penalty).view(-1, *[1] * (G.ndim - 2))
        G.diagonal(dim1=-2, dim2=-1).mul_(scale)
    return G


def explained_apart(X: Tensor, normal: Tensor) -> Tensor:
    """``sum_t G_tt |x_t|^2`` of each problem, in float64; arguments of :func:`quadratic`."""
    squares = X.square().sum(2) * normal.diagonal(dim1=-2, dim2=-1)
    return squares.flatten(1).sum(1, dtype=torch.float64)


def per_problem(values: Sequence[float], like: Tensor) -> Tensor | float:
    """A number for each problem, to be multiplied with ``like (k, ...)``; one that all share."""
    if all(value == values[0] for value in values):
        return values[0]
    return like.new_tensor(values).view(-1, *[1] * (like.ndim - 1))


def step(old: Tensor, exact: Tensor, omega: Sequence[float]) -> Tensor:
    """``old + omega (exact - old)``, with an ``omega`` for each problem."""
    return torch.lerp(old, exact, per_problem(omega, old))


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with equal leading dimensions.

    ``matmul`` takes longer to find out that nothing is broadcast than a small product takes.
    """
    product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3))
    return product.view(*left.shape[:-2], *product.shape[-2:])


def quadratic(X: Tensor, normal: Tensor, right: Tensor) -> Tensor:
    """``tr(X G X^T) - 2 <R, X>`` of each problem, in float64: the objective but for ``||A L||^2``.

    ``X`` and the right sides ``R`` are ``(k, blocks, rows, r)``, ``G (k, blocks, r, r)``.
    """
    rows, G, R = X.flatten(0, 1), normal.flatten(0, 1), right.flatten(0, 1)
    slope = torch.baddbmm(R, rows, G, beta=-2)
    return slope.mul_(rows).view(len(X), -1).sum(1, dtype=torch.float64)


def solve_rows(
    G: Tensor, right: Tensor, penalty: Sequence[float], notes: list[list[str]]
) -> Tensor:
    """``right G^-1`` for symmetric positive semidefinite ``G (k, ..., r, r)``, by rows.

    The ``penalty`` is in ``G`` already. A matrix that is not positive definite in spite of the
    smallest ridge gets a larger one, and a note.
    """
    smallest = SMALLEST_RIDGE[G.dtype]
    ridge = [smallest] * len(penalty)
    factor, failed = normal_equations.factor(G, ridge)
    for larger in (1e-4, 1e-2, 1.0):
        if not bool(failed.any()):
            break
        _note(notes, failed, f"a normal matrix was not positive definite: ridge {larger:g}")
        other, still = normal_equations.factor(G, [larger] * len(ridge))
        factor, failed = torch.where(failed[..., None, None], other, factor), failed & still
    solved = normal_equations.solve_factored(factor, right)
    sharp = [each <= smallest for each in penalty]
    if any(sharp):
        # Close to a solution the ridge's bias would be all that is left: take it out once.
        refined = solved + normal_equations.solve_factored(factor, right - solved @ G)
        if all(sharp):
            return refined
        chosen = torch.tensor(sharp, device=G.device).view(-1, *[1] * (G.ndim - 1))
        solved = torch.where(chosen, refined, solved)
    return solved


def _note(notes: list[list[str]], failed: Tensor, text: str) -> None:
    for index in failed.reshape(len(notes), -1).any(1).nonzero().flatten().tolist():
        if text not in notes[index]:
            notes[index].append(text)
