r"""Joint Rank-k, the baseline of the paper's Appendix D: one right factor for several weights.

Weights that read the same input (query, key and value; gate and up) are stacked along their
outputs, ``[A_1; A_2; ...] ~ [U_1; U_2; ...] V^T``, by one truncated SVD, whitened where the input's
second moment is known. Parameters: ``r (m_1 + m_2 + ... + n)``; at equal parameters the rank is
larger than separate factorisations allow, and the best fit is that of the stack, not of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blastnn.arithmetic import plain_arithmetic
from blastnn.errors import FactorizationError
from blastnn.factorize.problem import Problem, prepare
from blastnn.factorize.svd import whitened_svd
from blastnn.structures import LowRank


@dataclass(frozen=True)
class JointResult:
    """Low-rank factors of several weights with a right factor in common.

    Attributes:
        factors: for each weight ``U (m_i, r)`` and ``V (n, r)``; all ``V`` are one tensor.
        errors: ``|| (A_i - U_i V^T) L || / || A_i L ||`` of these very tensors, for each weight.
        relative_error: the same of the stack, which is what is smallest possible.
    """

    factors: list[dict[str, Tensor]]
    errors: list[float]
    relative_error: float


@plain_arithmetic()
def joint_low_rank(
    weights: Sequence[Tensor], rank: int, second_moment: Tensor | None = None
) -> JointResult:
    """The best rank-``rank`` matrix for weights ``(m_i, n)`` stacked along their outputs.

    Args:
        weights: matrices of one dtype, on one device, with the same number of inputs.
        rank: of the stack, hence at most of each weight.
        second_moment: ``C = E[x x^T]`` of the input they share, ``(n, n)``.

    Raises:
        FactorizationError: no weights, weights that do not stack, or inputs that ``factorize``
            refuses as well.
        StructureError: a rank that is no whole number of at least 1.
    """
    _check_stackable(weights)
    stacked = torch.cat(tuple(weights))
    spec = LowRank(stacked.shape[0], stacked.shape[1], rank)
    problem = prepare(stacked, second_moment)
    P, Q, _ = whitened_svd(problem, rank)
    exact = spec.scaled({"U": P, "V": Q}, round(math.log2(problem.scale)))
    U, V = (exact[key].to(stacked.dtype).contiguous() for key in ("U", "V"))
    rows = [weight.shape[0] for weight in weights]
    parts = U.split(rows)
    return JointResult(
        factors=[{"U": part.clone(), "V": V} for part in parts],
        errors=[
            _error(replace(problem, weight=weight), part, V)
            for weight, part in zip(problem.weight.split(rows), parts, strict=True)
        ],
        relative_error=_error(problem, U, V),
    )


def _error(problem: Problem, U: Tensor, V: Tensor) -> float:
    return problem.relative_error(U.double() @ V.double().T / problem.scale)


def _check_stackable(weights: Sequence[Tensor]) -> None:
    if not weights:
        raise FactorizationError("joint_low_rank needs at least one weight, but was given none")
    kinds = [(weight.shape[1:], weight.dtype, weight.device) for weight in weights]
    for index, (weight, kind) in enumerate(zip(weights, kinds, strict=True)):
        if weight.ndim != 2 or kind != kinds[0]:
            first = weights[0]
            raise FactorizationError(
                "weights that share their input must be matrices with as many columns, of one "
                f"dtype and on one device, but weight 0 is {tuple(first.shape)} {first.dtype} on "
                f"{first.device} and weight {index} is {tuple(weight.shape)} {weight.dtype} on "
                f"{weight.device}"
            )
