r"""Least squares for one masked factor of a product, by conjugate gradients.

With the other factor fixed, ``|| (A - (M * X) Y^T) L ||^2`` is a quadratic in ``X``,

    ``f(X) = tr(Z^T H Z G) - 2 tr(Z^T T) + const``, ``Z = M * X``,

for both factors: rows of the matrix have ``H = I``, ``G = Y^T C Y``, ``T = A C Y``; columns have
``H = C``, ``G = Y^T Y``, ``T = C A^T Y``. Every row of ``Z`` has unknowns of its own, so there is
no common normal matrix to factorise; conjugate gradients need products only.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 20
# Gradients below this part of the target, and curvatures below this part of what the diagonal alone
# gives, are rounding: a step along them can only add noise.
NEGLIGIBLE = 1e-12


def masked_least_squares(
    X: Tensor, mask: Tensor, left: Tensor | None, right: Tensor, target: Tensor
) -> Tensor:
    """``X (s, r)`` after some steps from where it is; ``f`` never rises, but for rounding.

    Args:
        X: float64.
        mask: ``M (s, r)``.
        left: ``H (s, s)``, positive definite; None for the identity.
        right: ``G (r, r)``, positive semidefinite.
        target: ``T (s, r)``.
    """

    def product(Z: Tensor) -> Tensor:
        masked = mask * Z
        return mask * ((masked if left is None else left @ masked) @ right)

    diagonal = _diagonal(mask, left, right)
    scale = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))
    gradient = mask * target - product(X)  # minus half of it
    direction = step = scale * gradient
    descent = float((gradient * step).sum())
    smallest = NEGLIGIBLE**2 * float((scale * (mask * target).square()).sum())
    for _ in range(ITERATIONS):
        image = product(direction)
        curvature = float((direction * image).sum())
        steepest = float((direction.square() * diagonal).sum())
        if descent <= smallest or curvature <= NEGLIGIBLE * steepest:
            break
        X = X + descent / curvature * direction
        gradient = gradient - descent / curvature * image
        step = scale * gradient
        previous, descent = descent, float((gradient * step).sum())
        direction = step + descent / previous * direction
    return X


def _diagonal(mask: Tensor, left: Tensor | None, right: Tensor) -> Tensor:
    """The diagonal of the quadratic form, ``(s, r)``; its inverse is the preconditioner."""
    diagonal = mask.square() * right.diagonal()
    return diagonal if left is None else diagonal * left.diagonal()[:, None]
