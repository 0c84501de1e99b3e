"""Systems of normal equations, many small ones at a time: what a solver sweeps over.

Each has a plain PyTorch form, for any device and dtype, and the oracle; in float32 on a CPU the C++
of ``csrc/solve.h`` and ``csrc/couplings.h`` serves, where it could be built. Its results do not
depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blastnn.kernels import native


def factor(G: Tensor, ridge: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Cholesky factors of ``G (k, ..., r, r)``, each with a ridge, and for which there is none.

    ``ridge``: for each of ``k`` problems what is added to the diagonals, relative to their means.
    """
    if _is_native(G):
        lower, failed = torch.ops.blastnn.factor(G, ridge)
        return lower, failed
    return factor_plainly(G, ridge)


def factor_plainly(G: Tensor, ridge: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The same by ``torch.linalg``."""
    shifted = G.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    each = G.new_tensor(ridge).view(-1, *[1] * (G.ndim - 2))
    diagonal += diagonal.mean(-1, keepdim=True) * each + torch.finfo(G.dtype).tiny
    lower, info = torch.linalg.cholesky_ex(shifted)
    return lower, info != 0


def solve_factored(L: Tensor, right: Tensor) -> Tensor:
    """``right (L L^T)^-1`` by rows: ``right (..., c, r)``, lower triangular ``L (..., r, r)``."""
    if _is_native(L):
        solved: Tensor = torch.ops.blastnn.solve_factored(L, right)
        return solved
    return solve_plainly(L, right)


def solve_plainly(L: Tensor, right: Tensor) -> Tensor:
    """The same by ``torch.linalg``.

    Two triangular solves from the left on the transpose, which is LAPACK's layout without a copy,
    are more than twice as fast as ``cholesky_solve``, and on two threads mostly faster than solves
    from the right.
    """
    first = torch.linalg.solve_triangular(L, right.mT, upper=False)
    return torch.linalg.solve_triangular(L.mT, first, upper=True).mT


def descend_couplings(
    own: Tensor, gram: Tensor, right: Tensor, start: Tensor, steps: int
) -> Tensor:
    """``steps`` of :func:`descend` for ``W_ij = own_i * gram_j``, elementwise.

    Args:
        own: ``U_i^T U_i``, ``(k, b1, r, r)``.
        gram: ``V_j^T V_j``, ``(k, b2, r, r)``.
        right: ``diag(U_i^T A_ij V_j)``, ``(k, b1, b2, r)``.
        start: the couplings now, of that shape.
        steps: how many.
    """
    if _is_native(own):
        found: Tensor = torch.ops.blastnn.descend_couplings(own, gram, right, start, steps)
        return found
    return descend(own[:, :, None] * gram[:, None], right, start, steps)


def descend(W: Tensor, right: Tensor, start: Tensor, steps: int) -> Tensor:
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


def weighted_grams(gram: Tensor, couplings: Tensor) -> Tensor:
    """``sum_j (s_ij s_ij^T) * gram_j``, ``(k, b1, r, r)``.

    ``gram (k, b2, r, r)``, ``couplings (k, b1, b2, r)``.
    """
    if _is_native(gram):
        total: Tensor = torch.ops.blastnn.weighted_grams(gram, couplings)
        return total
    total = gram.new_zeros(*couplings.shape[:2], *gram.shape[2:])
    add_weighted_grams(gram, couplings, couplings, total)
    return total


def add_weighted_grams(gram: Tensor, left: Tensor, right: Tensor, total: Tensor) -> None:
    """``total (k, a, r, r) += sum_b (left_ab right_ab^T) * gram_b``, in place.

    ``gram (k, b, r, r)``; ``left`` and ``right (k, a, b, r)`` may be expanded.
    """
    if _is_native(gram):
        torch.ops.blastnn.add_weighted_grams(gram, left, right, total)
        return
    for a in range(left.shape[1]):
        scaled = (gram * right[:, a, :, None, :]).mul_(left[:, a, :, :, None])
        total[:, a] += scaled.sum(1)


def explained_by(own: Tensor, gram: Tensor, couplings: Tensor) -> Tensor:
    """``sum_j W_ij s_ij``, ``(k, b1, r)``, for ``W_ij = own_i * gram_j``, transposed.

    ``own (k, b1, r, r)`` symmetric, ``gram (k, b2, r, r)`` with the rank of ``s_ij`` first,
    ``couplings (k, b1, b2, r)``.
    """
    if _is_native(own):
        sums: Tensor = torch.ops.blastnn.explained_by(own, gram, couplings)
        return sums
    rows = [
        (gram * couplings[:, i, :, :, None]).sum(1).mul_(own[:, i]).sum(1)
        for i in range(couplings.shape[1])
    ]
    return torch.stack(rows, dim=1)


def paired_sums(products: Tensor, factors: Tensor) -> Tensor:
    """``diag(X_ij^T V_j)``, ``(k, b1, b2, r)``.

    ``products (k, b1, b2, q, r)`` are the ``X_ij``, ``factors (k, b2, q, r)`` the ``V_j``.
    """
    if _is_native(products):
        sums: Tensor = torch.ops.blastnn.paired_sums(products, factors)
        return sums
    return (products * factors[:, None]).sum(3)


def add_coupled(products: Tensor, couplings: Tensor, total: Tensor) -> None:
    """``total (k, b2, q, r) += sum_i X_ij diag(s_ij)``, in place.

    ``products (k, b1, b2, q, r)`` are the ``X_ij``, ``couplings (k, b1, b2, r)`` the ``s_ij``.
    """
    if _is_native(products):
        torch.ops.blastnn.add_coupled(products, couplings, total)
    else:
        total += (products * couplings[:, :, :, None]).sum(1)


def sweep_freely(
    rows: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    omega: Sequence[float],
    penalty: Sequence[float],
    ridge: float,
    coupling_steps: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor] | None:
    """The whole of ``factorize/als_free.py``'s sweep over all rows at once, in one call.

    Args:
        rows: block rows ``A_i``, ``(k, b1, p, n)``.
        factors: ``U (k, b1, p, r)``, ``S (k, b1, b2, r)`` and ``V (k, b2, q, r)``.
        omega: how far to go, in exact steps, of each problem.
        penalty: by which share the diagonals of each problem's Gram matrices are to be larger.
        ridge: of every problem, as in :func:`factor`.
        coupling_steps: of :func:`descend_couplings`.

    Returns:
        The new factors, and ``|| A^ ||^2 - 2 <A, A^> + penalty P`` and ``(1 + penalty) P`` of each
        problem, float64, where ``P`` sums the squared norms of the components; None where the C++
        does not serve, or a normal matrix was not positive definite.
    """
    if not _is_native(rows):
        return None
    *found, objective, apart, failed = torch.ops.blastnn.sweep_freely(
        rows, *factors, omega, penalty, ridge, coupling_steps
    )
    return None if failed else (tuple(found), objective, apart)


def _times(W: Tensor, vector: Tensor) -> Tensor:
    """``W vector`` for symmetric ``W``, as a row: eight times as fast in a batch on a CPU."""
    return (vector[..., None, :] @ W)[..., 0, :]


def load(dtype: torch.dtype, device: str) -> None:
    """Load the C++, or compile it, where it will serve: once a session, before any clock starts."""
    _is_native(torch.empty(0, dtype=dtype, device=device))


def _is_native(tensor: Tensor) -> bool:
    """Whether the C++ serves; the first call that could use it compiles it."""
    return (
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and native.failure() is None
    )
