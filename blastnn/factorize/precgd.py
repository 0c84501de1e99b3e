r"""The paper's Algorithm 2, literally: preconditioned gradient descent on the data-free loss.

It is the reference that our own solver is measured against, so nothing is improved here: step size
decayed linearly 1 -> 0, ``delta = 0.1 sqrt(l)`` (equation (19)), ``K = 300`` (Appendix C.3), the
gradient of every block of unknowns multiplied by ``(G + delta I)^-1`` (equations (8) and (9)). The
start, the scaling of ``A`` and the order of the updates are in ``descent.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.factorize.descent import EPSILON, descend
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.kernels.normal_equations import solve_plainly
from blastnn.structures import Blast, Structure

STRUCTURES = (Blast,)
USES_SECOND_MOMENT = False
WHY = "is the paper's Algorithm 2, kept to the letter as the reference"

STEPS = 300
DELTA_0 = 0.1


def solve(
    problem: Problem, spec: Structure, seed: int, steps: int = STEPS, epsilon: float = EPSILON
) -> Solution:
    """Run ``steps`` iterations of Algorithm 2 from the small random start drawn with ``seed``.

    Args:
        epsilon: the standard deviation of ``U`` and ``V`` at the start, for an ``A`` of unit root
            mean square.

    Raises:
        FactorizationError: the iterates overflowed.
    """

    def preconditioned(k: int, loss: float, gram: Tensor, gradient: Tensor) -> Tensor:
        return (1.0 - k / steps) * _solve(gram, DELTA_0 * loss**0.5, gradient)

    return descend(
        problem,
        spec,
        seed,
        rule=preconditioned,
        steps=steps,
        epsilon=epsilon,
        algorithm="Algorithm 2",
    )


def _solve(G: Tensor, delta: float, gradient: Tensor) -> Tensor:
    """``gradient (G + delta I)^-1`` by Cholesky, batched, by rows."""
    shifted = G.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(delta)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if bool(info.any()):
        # A singular normal matrix at a vanishing delta: the minimum-norm step is the limit.
        inverse = torch.linalg.pinv(shifted.double(), hermitian=True, rtol=1e-12)
        return (gradient.double() @ inverse).to(gradient)
    return solve_plainly(factor, gradient)
