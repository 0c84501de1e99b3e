r"""The paper's Algorithm 2, literally: preconditioned gradient descent on the data-free loss.

It is the reference that our own solver is measured against, so nothing is improved here: step size
decayed linearly 1 -> 0, ``delta = 0.1 sqrt(l)``, ``K = 300``, ``U, V ~ N(0, eps^2)`` and
``S ~ Unif(0, 1)``. The algorithm is not scale-free, so ``A`` is divided by its standard deviation
and ``eps = 1e-3``, as the authors do. Gradients are formed from normal equations,
``U_i G_i - R_i``, which is the same number for less work.

Letters: ``i`` block row, ``j`` block column, ``p q`` rows and columns of a block, ``r s`` rank.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize.blocks import split_blocks
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.structures import Blast, Structure

STRUCTURES = (Blast,)
USES_SECOND_MOMENT = False

STEPS = 300
DELTA_0 = 0.1
EPSILON = 1e-3
# Below this squared relative error the float32 normal-equation loss has cancelled.
CANCELLATION = 1e-5


def solve(problem: Problem, spec: Structure, seed: int, steps: int = STEPS) -> Solution:
    """Run ``steps`` iterations of Algorithm 2 from the small random start drawn with ``seed``.

    Raises:
        FactorizationError: the iterates overflowed.
    """
    start = time.perf_counter()
    assert isinstance(spec, Blast)
    deviation = problem.weight.square().mean().sqrt()
    A = split_blocks(problem.weight / deviation, spec).to(problem.compute_dtype)
    energy = float(A.double().square().sum())
    U, S, V = _random_start(spec, seed, A)
    history = []
    for k in range(steps):
        eta = 1.0 - k / steps
        R, G = _left_normal_equations(A, S, V)
        loss = _loss(A, U, S, V, R, G, energy)
        history.append((time.perf_counter() - start, (2 * loss / energy) ** 0.5))
        delta = DELTA_0 * loss**0.5
        U = U - eta * _solve(G, delta, (U @ G - R).mT).mT
        products = torch.einsum("ijpq,ipr->ijqr", A, U)  # A_ij^T U_i
        gram_u = U.mT @ U
        R = torch.einsum("ijqr,ijr->jqr", products, S)
        G = torch.einsum("ijr,ijs,irs->jrs", S, S, gram_u)
        V = V - eta * _solve(G, delta, (V @ G - R).mT).mT
        W = gram_u[:, None] * (V.mT @ V)[None]  # (i, j, r, s)
        slope = (W @ S[..., None])[..., 0] - (products * V).sum(2)
        S = S - eta * _solve(W, delta, slope[..., None])[..., 0]
    R, G = _left_normal_equations(A, S, V)
    loss = _loss(A, U, S, V, R, G, energy)
    history.append((time.perf_counter() - start, (2 * loss / energy) ** 0.5))
    status = f"ran its {steps} steps"
    return Solution({"U": U * deviation.to(U), "S": S, "V": V}, history, status)


def _random_start(spec: Blast, seed: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.factor_shapes()
    U = EPSILON * torch.randn(shapes["U"], generator=generator)
    V = EPSILON * torch.randn(shapes["V"], generator=generator)
    S = torch.rand(shapes["S"], generator=generator)
    return U.to(like), S.to(like), V.to(like)


def _left_normal_equations(A: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``R_i = sum_j A_ij V_j diag(s_ij)`` and ``G_i = sum_j (s_ij s_ij^T) * (V_j^T V_j)``."""
    R = torch.einsum("ijpr,ijr->ipr", A @ V[None], S)
    G = torch.einsum("ijr,ijs,jrs->irs", S, S, V.mT @ V)
    return R, G


def _loss(A: Tensor, U: Tensor, S: Tensor, V: Tensor, R: Tensor, G: Tensor, energy: float) -> float:
    """Equation (4), from the normal equations where float32 allows it, else from the residual."""
    double = torch.float64
    squared = energy - 2 * float((R * U).sum(dtype=double)) + float((U @ G * U).sum(dtype=double))
    if not squared < float("inf"):
        raise FactorizationError(
            "Algorithm 2 overflowed on this matrix; use solver='als', which cannot"
        )
    if squared < CANCELLATION * energy:
        residual = A - torch.einsum("ipr,ijr,jqr->ijpq", U, S, V)
        squared = float(residual.square().sum(dtype=double))
    return 0.5 * squared


def _solve(G: Tensor, delta: float, right: Tensor) -> Tensor:
    """``(G + delta I)^-1 right`` by Cholesky, batched."""
    shifted = G.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(delta)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if bool(info.any()):
        # A singular normal matrix at a vanishing delta: the minimum-norm step is the limit.
        inverse = torch.linalg.pinv(shifted.double(), hermitian=True, rtol=1e-12)
        return (inverse @ right.double()).to(right)
    return torch.cholesky_solve(right, factor)
