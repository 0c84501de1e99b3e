r"""Plain gradient descent on equation (4), with the step sizes of the paper's Theorem 1.

The loss is quadratic in each block of unknowns, with the normal matrix ``G`` as its curvature, so a
step of ``1 / sigma_1(G)`` never raises it. Theorem 1 as Appendix B proves it (its statement in
Section 3.2 has lost the size for ``V_j``):

- ``1 / sigma_1(Vbar_i^T Vbar_i)`` for ``U_i``, where ``Vbar_i`` stacks the ``V_j diag(s_ij)``;
- ``1 / sigma_1(Ubar_j^T Ubar_j)`` for ``V_j``, where ``Ubar_j`` stacks the ``U_i diag(s_ij)``;
- ``1 / sigma_1(W_ij)`` for ``s_ij``, ``W_ij = (U_i^T U_i) * (V_j^T V_j)``.

``sigma_1`` is exact, by ``eigvalsh``; an upper bound would be safe too, but would shorten steps.

``schedule="decay"`` is instead what the paper's Figures 3 and 9 show: one step size for all blocks
of unknowns, decayed linearly to zero. The paper does not say where it starts, so ``step_size`` has
to be given.

The start, the scaling of ``A`` and the order of the updates are in ``descent.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize.descent import EPSILON, StepRule, descend
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.structures import Blast, Structure

STRUCTURES = (Blast,)
USES_SECOND_MOMENT = False
WHY = "is the plain gradient descent of the paper's Theorem 1, kept for comparison"

STEPS = 300


def solve(
    problem: Problem,
    spec: Structure,
    seed: int,
    steps: int = STEPS,
    schedule: str = "theorem",
    step_size: float | None = None,
    epsilon: float = EPSILON,
) -> Solution:
    """Run ``steps`` iterations from the small random start drawn with ``seed``.

    Args:
        schedule: ``"theorem"`` (the error never rises) or ``"decay"`` (no such promise).
        step_size: where ``"decay"`` starts, for an ``A`` of unit root mean square.
        epsilon: the standard deviation of ``U`` and ``V`` at the start, for the same ``A``.

    Raises:
        FactorizationError: another schedule, a step size that is missing or has no use, or iterates
            that overflowed.
    """
    return descend(
        problem,
        spec,
        seed,
        rule=_rule(schedule, step_size, steps),
        steps=steps,
        epsilon=epsilon,
        algorithm=f"gradient descent with schedule={schedule!r}",
    )


def _rule(schedule: str, step_size: float | None, steps: int) -> StepRule:
    if schedule == "theorem" and step_size is None:
        return _theorem_step
    if schedule == "decay" and step_size is not None and step_size > 0:
        return _decaying_step(step_size, steps)
    raise FactorizationError(
        "gd takes schedule='theorem' without a step_size, or schedule='decay' with a step_size "
        f"above 0; given were schedule={schedule!r}, step_size={step_size!r}"
    )


def _theorem_step(k: int, loss: float, gram: Tensor, gradient: Tensor) -> Tensor:
    """``gradient / sigma_1(gram)``; a zero ``gram`` has a zero gradient and gives a zero step."""
    largest = torch.linalg.eigvalsh(gram)[..., -1, None, None]
    return gradient / largest.clamp_min(torch.finfo(gram.dtype).tiny)


def _decaying_step(step_size: float, steps: int) -> StepRule:
    def step(k: int, loss: float, gram: Tensor, gradient: Tensor) -> Tensor:
        return step_size * (1.0 - k / steps) * gradient

    return step
