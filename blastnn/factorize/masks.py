r"""Gaudi-GBLR by annealed masks (Lee & Kim 2023), then exact boxes and least squares.

``minimise || (A - (M_out * U)(M_in * V)^T) L ||_F^2`` over factors and boxes, with at most a share
``nonzeros`` of the ``r (m + n)`` entries inside the boxes:

1. *Start*: whitened SVD factors with full boxes.
2. *Anneal*: Adam on factors, widths and locations through ``smooth_mask``, ``sigma`` raised
   geometrically from 1 to 100. The allowed share falls linearly from 1 to ``nonzeros`` over the
   first part of the steps; after each step all widths are lowered by one amount and cut at zero (a
   soft threshold) until their mean meets it.
3. *Round*: widths and locations become whole multiples of the grid, the budget is checked entry by
   entry, and the smooth masks become exact boxes.
4. *Polish*: with the boxes frozen, least squares for ``U`` and for ``V`` in turn, by conjugate
   gradients from where they are, which never increases the error.

The plain alternative of as many non-zeros is the SVD with fewer ranks and full boxes. The better of
the two is returned, so the answer is never worse than a low-rank matrix of equal non-zeros. With
``nonzeros = 1``, the default, full boxes are allowed and nothing is better than the SVD.

Letters: ``m n`` rows and columns, ``r`` rank, ``k`` component.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize.boxes import (
    Boxes,
    covered,
    full_boxes,
    leading_boxes,
    narrowed,
    on_the_grid,
)
from blastnn.factorize.masked_least_squares import masked_least_squares
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.svd import whitened_svd
from blastnn.structures import GBLR, Factors, Structure

STRUCTURES = (GBLR,)
USES_SECOND_MOMENT = True
WHY = "finds boxes by gradients, and is never worse than an SVD of as many numbers"

STEPS = 300
SIGMAS = (1.0, 100.0)
# The part of the steps over which the allowed share falls to the budget. Early is better: boxes
# that narrow under a still smooth mask find their places. Mean errors of 48 x 40 matrices made of 4
# and of 8 boxes: 0.11 and 0.16 at 0.15, 0.10 and 0.19 at 0.3, 0.37 and 0.23 at 0.6. More steps gain
# nothing: which minimum is found is chance.
NARROWING = 0.2
# Step sizes: of U and V relative to their root mean square, of widths and locations as they are.
FACTOR_RATE = 0.01
BOX_RATE = 0.005
# Least-squares rounds at the end; each solves for U and for V.
ROUNDS = 10


def solve(
    problem: Problem, spec: Structure, seed: int, steps: int = STEPS, nonzeros: float = 1.0
) -> Solution:
    """Fit factors and boxes within a budget of non-zeros.

    Args:
        seed: of the locations at which boxes open.
        steps: of Adam.
        nonzeros: the share of the ``r (m + n)`` entries of ``U`` and ``V`` that boxes may cover.

    Raises:
        FactorizationError: ``nonzeros`` is not above 0 and at most 1.
    """
    clock = time.perf_counter()
    assert isinstance(spec, GBLR)
    budget = _entries(spec, nonzeros)
    P, Q, _ = whitened_svd(problem, spec.rank)
    svd = {"U": P, "V": Q}
    plain = _fewer_ranks(spec, svd, budget)
    history = [(time.perf_counter() - clock, problem.objective_error(spec.to_dense(plain)))]
    if nonzeros == 1:
        return Solution(plain, history, "optimal: truncated SVD with full boxes")
    factors = _Annealing(problem, spec, svd, full_boxes(spec, seed, P)).run(budget, steps)
    for _ in range(ROUNDS):
        factors = _polished(problem, spec, factors)
        error = problem.objective_error(spec.to_dense(factors))
        history.append((time.perf_counter() - clock, error))
    if not history[-1][1] < history[0][1]:
        return Solution(plain, history, "kept the SVD of equal non-zeros, which no boxes improved")
    return Solution(factors, history, f"ran its {steps} steps and {ROUNDS} least-squares rounds")


def _entries(spec: GBLR, nonzeros: float) -> int:
    """The budget as a number of entries; a box holds at least one."""
    if not 0 < nonzeros <= 1:
        raise FactorizationError(f"nonzeros must be a share in (0, 1], but is {nonzeros!r}")
    budget = int(nonzeros * spec.rank * (spec.out_features + spec.in_features))
    if budget < 2 * spec.rank:
        raise FactorizationError(
            f"nonzeros={nonzeros!r} allows {budget} entries, but {spec.rank} components have at "
            f"least {2 * spec.rank}; give a larger share or a smaller rank"
        )
    return budget


def _fewer_ranks(spec: GBLR, svd: Factors, budget: int) -> dict[str, Tensor]:
    """The leading components with full boxes; the others zero, on one row and one column each."""
    extra = spec.out_features + spec.in_features - 2
    count = min(spec.rank, (budget - 2 * spec.rank) // extra) if extra else spec.rank
    U = svd["U"].clone()
    U[:, count:] = 0.0
    return {"U": U, "V": svd["V"], **leading_boxes(spec, count, U)}


class _Annealing:
    """Adam on factors and smoothed boxes."""

    def __init__(self, problem: Problem, spec: GBLR, svd: Factors, boxes: Boxes) -> None:
        dtype = problem.compute_dtype
        self.problem, self.spec = problem, spec
        self.weight = problem.weight.to(dtype)
        self.root = None if problem.root is None else problem.root.to(dtype)
        self.factors = {k: f.to(dtype, copy=True).requires_grad_() for k, f in svd.items()}
        self.boxes = {k: f.to(dtype, copy=True).requires_grad_() for k, f in boxes.items()}
        groups = [
            {"params": [f], "lr": FACTOR_RATE * float(f.detach().square().mean().sqrt())}
            for f in self.factors.values()
        ]
        self.optimizer = torch.optim.Adam(
            [*groups, {"params": list(self.boxes.values()), "lr": BOX_RATE}]
        )

    def run(self, budget: int, steps: int) -> dict[str, Tensor]:
        """Factors with exact boxes of at most ``budget`` entries, float64."""
        spec, everything = self.spec, covered(self.spec, self.boxes)
        for k in range(steps):
            progress = (k + 1) / steps
            self._step(SIGMAS[0] * (SIGMAS[1] / SIGMAS[0]) ** progress)
            allowed = everything + (budget - everything) * min(1.0, progress / NARROWING)
            self._set(narrowed(self._boxes(), lambda b: covered(spec, b), max(allowed, budget)))
        boxes = {name: value.double() for name, value in self._boxes().items()}
        exact = narrowed(boxes, lambda b: spec.num_nonzero(on_the_grid(spec, b)), budget)
        factors = {name: f.detach().double() for name, f in self.factors.items()}
        return {**factors, **on_the_grid(spec, exact)}

    @torch.enable_grad()
    def _step(self, sigma: float) -> None:
        """One step down the smoothed loss; ``factorize`` itself runs without gradients."""
        self.optimizer.zero_grad()
        smooth = replace(self.spec, sigma=sigma)
        residual = self.weight - smooth.to_dense({**self.factors, **self.boxes})
        weighted = residual if self.root is None else residual @ self.root
        (weighted.square().sum() / self.problem.energy).backward()
        self.optimizer.step()

    def _boxes(self) -> Boxes:
        return {name: value.detach() for name, value in self.boxes.items()}

    def _set(self, boxes: Boxes) -> None:
        for name, value in boxes.items():
            self.boxes[name].detach().copy_(value)


def _polished(problem: Problem, spec: GBLR, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One round of least squares for ``U``, then for ``V``, with the boxes as they are."""
    A, C = problem.weight, problem.moment
    rows, columns = spec.masks(factors)
    Y = columns * factors["V"]
    weighted = Y if C is None else C @ Y
    U = masked_least_squares(factors["U"], rows, None, Y.T @ weighted, A @ weighted)
    Y = rows * U
    target = A.T @ Y if C is None else C @ (A.T @ Y)
    V = masked_least_squares(factors["V"], columns, C, Y.T @ Y, target)
    return {**factors, "U": U, "V": V}
