r"""The loop that the paper's two data-free algorithms share; they differ in their steps alone.

Both minimise equation (4), ``l = 1/2 sum_ij || A_ij - U_i diag(s_ij) V_j^T ||_F^2``, by updating
all ``U_i``, then all ``V_j``, then all ``s_ij`` (equations (5) to (7)) from the small random start
of Algorithm 2, ``U, V ~ N(0, epsilon^2)`` and ``S ~ Unif(0, 1)``. Each block of unknowns ``x`` has
a quadratic loss with a normal matrix ``G``, so its gradient is ``G x - right-hand side``:

- ``U_i``: ``G_i = sum_j (s_ij s_ij^T) * (V_j^T V_j)`` and ``sum_j A_ij V_j diag(s_ij)``;
- ``V_j``: ``G_j = sum_i (s_ij s_ij^T) * (U_i^T U_i)`` and ``sum_i A_ij^T U_i diag(s_ij)``;
- ``s_ij``: ``W_ij = (U_i^T U_i) * (V_j^T V_j)`` and ``diag(U_i^T A_ij V_j)``.

No residual is formed, which is the same number for less work; each product with ``A`` is one matrix
product a block row; and ``W`` exists for a few block rows at a time. Neither algorithm is free of
the matrix's scale, so ``A`` is divided by its root mean square first, as in the authors' public
code.

Letters: ``i`` block row, ``j`` block column, ``p q`` rows and columns of a block, ``r s`` rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, Self

import torch
from torch import Tensor

from blastnn.arithmetic import DRAWN
from blastnn.errors import FactorizationError
from blastnn.factorize.blocks import padded_rows
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.scratch import Scratch, chunks
from blastnn.structures import Blast, Structure

EPSILON = 1e-3
# Below this squared relative error the normal-equation loss has cancelled.
CANCELLATION = 1e-5


class StepRule(Protocol):
    """What to subtract from a block of unknowns: the whole of what tells two algorithms apart."""

    def __call__(self, k: int, loss: float, gram: Tensor, gradient: Tensor) -> Tensor:
        """The step for ``gradient (..., c, r)``, given its normal matrix ``gram (..., r, r)``.

        ``k`` counts the iterations from 0; ``loss`` is equation (4) where iteration ``k`` began.
        """


@dataclass(frozen=True)
class _Target:
    """The block rows ``A (b1, p, b2 q)`` after scaling, their ``|| A ||^2``, and who is asking."""

    A: Tensor
    energy: float
    algorithm: str
    scratch: Scratch = field(default_factory=Scratch)

    @classmethod
    def build(cls, problem: Problem, spec: Blast, deviation: Tensor, algorithm: str) -> Self:
        A = padded_rows(problem.weight / deviation, spec).to(problem.compute_dtype)
        return cls(A, float(A.double().square().sum()), algorithm)

    def loss(self, U: Tensor, S: Tensor, V: Tensor, right: Tensor, moved: Tensor) -> float:
        """Equation (4), from ``moved = U G`` and ``right`` unless those have cancelled."""
        double = torch.float64
        squared = self.energy + float(((moved - 2 * right) * U).sum(dtype=double))
        if not squared < float("inf"):
            raise FactorizationError(
                f"{self.algorithm} overflowed on this matrix; use solver='als', which cannot"
            )
        if squared < CANCELLATION * self.energy:
            residual = self.A - U @ (S[:, :, None] * V).flatten(1, 2).mT
            squared = float(residual.square().sum(dtype=double))
        return 0.5 * squared


def descend(
    problem: Problem,
    spec: Structure,
    seed: int,
    *,
    rule: StepRule,
    steps: int,
    epsilon: float,
    algorithm: str,
) -> Solution:
    """Run ``steps`` iterations; the history has the start and the error after each of them.

    Args:
        problem: its second moment is not looked at; the solvers refuse one.
        spec: a ``Blast``.
        seed: draws the start.
        rule: the step of every block of unknowns.
        epsilon: the standard deviation of ``U`` and ``V`` at the start.
        algorithm: a name for the error message.

    Raises:
        FactorizationError: a negative number of steps, a start of no size, or iterates that
            overflowed.
    """
    begin = time.perf_counter()
    assert isinstance(spec, Blast)
    if steps < 0 or not epsilon > 0:
        raise FactorizationError(
            f"{algorithm} needs steps of at least 0 and an epsilon above 0 (at U = V = 0 every "
            f"gradient is zero); given were steps={steps!r}, epsilon={epsilon!r}"
        )
    deviation = problem.weight.square().mean().sqrt()
    target = _Target.build(problem, spec, deviation, algorithm)
    U, S, V = _random_start(spec, seed, epsilon, like=target.A)
    history = []
    for k in range(steps + 1):
        right, gram = _left_normal_equations(target, S, V)
        moved = U @ gram
        loss = target.loss(U, S, V, right, moved)
        history.append((time.perf_counter() - begin, (2 * loss / target.energy) ** 0.5))
        if k < steps:
            step = partial(rule, k, loss)
            U = U - step(gram, moved - right)
            V, S = _update_right(target, U, S, V, step)
    factors = {"U": U * deviation.to(U), "S": S, "V": V}
    return Solution(factors, history, f"ran its {steps} steps")


def _random_start(
    spec: Blast, seed: int, epsilon: float, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.factor_shapes()
    U = epsilon * torch.randn(shapes["U"], generator=generator, **DRAWN)
    V = epsilon * torch.randn(shapes["V"], generator=generator, **DRAWN)
    S = torch.rand(shapes["S"], generator=generator, **DRAWN)
    U, V = _without_padding(U, spec.out_features), _without_padding(V, spec.in_features)
    return U.to(like), S.to(like), V.to(like)


def _without_padding(factor: Tensor, size: int) -> Tensor:
    """Zeros in the rows ``(b, p)`` beyond ``size``, which stay: they would count as errors."""
    outside = torch.arange(factor.shape[0] * factor.shape[1], device=factor.device) >= size
    return factor.masked_fill(outside.view(*factor.shape[:2], 1), 0.0)


def _left_normal_equations(target: _Target, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Right-hand sides ``(i, p, r)`` and normal matrices ``(i, r, s)`` of all ``U_i``."""
    scaled = target.scratch.product("scaled", V, S[:, :, None])
    right, gram = target.A @ scaled.flatten(1, 2), V.mT @ V
    return right, _weighted_grams(target.scratch, S, gram)


def _update_right(
    target: _Target, U: Tensor, S: Tensor, V: Tensor, step: partial[Tensor]
) -> tuple[Tensor, Tensor]:
    """New ``V``, then new ``S``; both need the same products ``A_ij^T U_i``."""
    scratch = target.scratch
    products = (target.A.mT @ U).unflatten(1, V.shape[:2])  # (i, j, q, r)
    gram_u = U.mT @ U
    right = scratch.product("products", products, S[:, :, None]).sum(0)
    gram = _weighted_grams(scratch, S.transpose(0, 1), gram_u)
    V = V - step(gram, V @ gram - right)
    gram_v = V.mT @ V
    diagonals = scratch.product("seen", products, V).sum(2)  # diag(U_i^T A_ij V_j), (i, j, r)
    new = []
    for rows in chunks(S.shape[0], gram_v.numel(), S.device):
        W = scratch.product("W", gram_u[rows, None], gram_v)  # (i, j, r, s)
        gradient = S[rows][..., None, :] @ W - diagonals[rows][..., None, :]
        new.append(S[rows] - step(W, gradient)[..., 0, :])
    return V, torch.cat(new)


def _weighted_grams(scratch: Scratch, S: Tensor, gram: Tensor) -> Tensor:
    """``sum_j (s_ij s_ij^T) * gram_j`` for every ``i``."""
    parts = chunks(S.shape[0], gram.numel(), gram.device)
    return torch.cat([scratch.weighted_gram(S[rows], gram) for rows in parts])
