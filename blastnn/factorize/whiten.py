"""Best low-rank matrices by truncated SVD, many at once, in the metric of a second moment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def truncated_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``(..., p, q)`` to ``P (..., p, rank)``, ``Q (..., q, rank)`` with ``P Q^T`` nearest to each.

    Each side carries the square roots of the singular values. Ranks beyond ``min(p, q)`` are zero
    columns.
    """
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return halves(left, values, right, rank)


def halves(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading ``rank`` triplets of an SVD as ``P``, ``Q``, as ``truncated_svd`` has them."""
    kept = min(rank, values.shape[-1])
    roots = values[..., None, :kept].sqrt()
    P, Q = left[..., :kept] * roots, right[..., :kept, :].mT * roots
    return pad(P, (0, rank - kept)), pad(Q, (0, rank - kept))


def nearest_low_rank(products: Tensor, factor: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    r"""``P Q^T`` of rank ``rank`` that minimises ``|| (T - P Q^T) L ||_F``, given ``G = T L L^T``.

    ``T L = G L^-T``: its SVD truncated, times ``L^-1``. ``T`` itself is never needed.

    Args:
        products: ``G (..., p, q)``, float64.
        factor: ``L (..., q, q)`` lower triangular; None for the identity.
        rank: of ``P (..., p, rank)`` and ``Q (..., q, rank)``.
    """
    if factor is None:
        return truncated_svd(products, rank)
    whitened = torch.linalg.solve_triangular(factor, products.mT, upper=False).mT
    P, Q = truncated_svd(whitened, rank)
    return P, torch.linalg.solve_triangular(factor.mT, Q, upper=True)
