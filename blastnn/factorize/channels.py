r"""Which rows or columns of a matrix to keep, and with which numbers.

``minimise || (A - W S) L ||_F^2`` with ``S`` a choice of columns ``J``: given the choice, the best
numbers are ``W = (A C)_J C_JJ^-1``, which make up for the columns that went as far as the kept ones
know of them (``refit``); without data, or without ``refit``, they are ``A_J``. Rows need no refit:
what is kept is exact, what is not is lost.

The choice is made group by group, by the squared error that removing one group alone would leave:
``tr(A_g C_gg A_g^T)`` for columns, ``tr(A_g C A_g^T)`` for rows. The best choice of many columns
together is a hard combinatorial problem; where the caller knows a choice (``kept``), it is taken.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize.blocks import padded_moment
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.structures import Channels, Structure
from blastnn.structures.grid import pad_last

STRUCTURES = (Channels,)
USES_SECOND_MOMENT = True
WHY = "keeps the rows or columns that would be missed most, with the best numbers for them"


def solve(
    problem: Problem,
    spec: Structure,
    seed: int,
    kept: Tensor | None = None,
    refit: bool = True,
) -> Solution:
    """Choose, and solve for the numbers; ``seed`` is unused.

    Args:
        kept: numbers of the groups that stay, ``(spec.kept,)``; None chooses.
        refit: whether kept columns make up for those that go.

    Raises:
        FactorizationError: ``kept`` is no choice of that many groups.
    """
    start = time.perf_counter()
    assert isinstance(spec, Channels)
    if kept is None:
        places = strongest(scores(problem.weight, problem.moment, spec), spec.kept)
        status = "optimal numbers for the groups of largest score"
    else:
        places = _checked(kept, spec).to(problem.weight.device)
        status = "the groups that were asked for"
    W = _numbers(problem, spec, spec.channels(places), refit)
    factors = {"W": W, "places": places}
    error = problem.objective_error(spec.to_dense(factors))
    return Solution(factors, [(time.perf_counter() - start, error)], status)


def scores(weight: Tensor, moment: Tensor | None, spec: Channels) -> Tensor:
    """``(groups,)``: the squared error that removing each group alone would leave.

    Args:
        weight: ``A (m, n)``.
        moment: ``C (n, n)``; None is the identity.
        spec: says what a group is.
    """
    shape, padded = (spec.groups, spec.group), spec.groups * spec.group
    if spec.axis == "rows":
        seen = weight if moment is None else weight @ moment
        return pad_last((seen * weight).sum(1), padded).view(shape).sum(1)
    blocks = pad_last(weight, padded).T.reshape(*shape, -1)
    own = blocks @ blocks.mT  # (groups, group, group)
    if moment is None:
        return own.diagonal(dim1=1, dim2=2).sum(1)
    inside = padded_moment(moment, padded).view(*shape, *shape).diagonal(dim1=0, dim2=2)
    return (own * inside.permute(2, 0, 1)).sum((1, 2))


def strongest(found: Tensor, count: int) -> Tensor:
    """The numbers of the ``count`` largest scores, rising; of equal ones the first."""
    return found.argsort(descending=True, stable=True)[:count].sort().values


def _numbers(problem: Problem, spec: Channels, channels: Tensor, refit: bool) -> Tensor:
    A, C, padded = problem.weight, problem.moment, spec.groups * spec.group
    if spec.axis == "rows":
        return pad_last(A.mT, padded).mT[channels]
    if C is None or not refit:
        return pad_last(A, padded)[:, channels]
    moment = padded_moment(C, padded)
    factor = torch.linalg.cholesky(moment[channels][:, channels])
    products = pad_last(A @ C, padded)[:, channels]
    return torch.cholesky_solve(products.mT, factor).mT


def _checked(kept: Tensor, spec: Channels) -> Tensor:
    given = kept.sort().values
    whole = not given.is_floating_point() and tuple(given.shape) == (spec.kept,)
    if not whole or len(given.unique()) < spec.kept or given[0] < 0 or given[-1] >= spec.groups:
        raise FactorizationError(
            f"kept must be {spec.kept} different numbers of groups below {spec.groups}, but is "
            f"{kept.tolist()}"
        )
    return given.long()
