r"""Block-sparse plus low-rank matrices by exact alternation, data-free or data-aware.

``minimise || (A - S - P Q^T) L ||_F^2`` with ``S`` zero outside the kept blocks. One *sweep* solves
for each term exactly, in turn:

- ``S`` given ``R = A - P Q^T``. Without data it is ``R`` on the kept blocks. With data each block
  row ``i`` is a least-squares problem of its own over the columns ``K`` of its kept blocks:
  ``S_i[:, K] = (R_i C)[:, K] C[K, K]^-1``.
- ``P Q^T`` given ``S``: the whitened truncated SVD of ``A - S``.

Neither step can increase the error. Where the mask is free, a sweep first proposes the blocks of
largest score ``|| (R_i C)_j L_jj^-T ||^2``, ``C_jj = L_jj L_jj^T``: what the squared error would
fall by if block ``(i, j)`` alone were fitted to ``R``; without data, the block's energy. Blocks of
one row share their gains where ``C`` couples them, so the score is a guess then, and the proposal
is taken only if it fits better than the blocks that it would replace.

Alternation finds a local minimum, and which one depends on who moves first. Both starts are run,
``S`` on ``A`` itself and the low rank on ``A`` itself, and the better end is returned.

Letters: ``m n`` rows and columns, ``i j`` block row and block column, ``p q`` a block's shape.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.sparse_step import BlockRegression, Mask, scores
from blastnn.factorize.svd import whitened_svd
from blastnn.structures import Pixelfly, SparseLowRank, Structure
from blastnn.structures.sparse_plus_low_rank import SparsePlusLowRank

STRUCTURES = (SparseLowRank, Pixelfly)
USES_SECOND_MOMENT = True
WHY = "solves for blocks and low rank exactly in turn, from two starts"

SWEEPS = 30
# Stop when a sweep lowers the error by less than this, relatively.
TOLERANCE = 1e-4
# Relative errors below this are float64 rounding.
EXACT = 1e-12


def solve(problem: Problem, spec: Structure, seed: int, sweeps: int = SWEEPS) -> Solution:
    """Alternate from both starts, at most ``sweeps`` each; ``seed`` unused.

    The history is that of the start that ended better: its first pair is the error of the start
    alone, low rank without blocks or nothing at all.
    """
    start = time.perf_counter()
    assert isinstance(spec, SparsePlusLowRank)
    runs = []
    for low_rank_first in (True, False):
        run = _Run(problem, spec, start)
        run.begin(low_rank_first)
        run.iterate(sweeps)
        runs.append(run)
        if run.error <= EXACT:
            break
    best = min(runs, key=lambda run: run.error)
    return Solution(best.factors(), best.history, best.status)


@dataclass
class _Run:
    """The alternation from one start."""

    problem: Problem
    spec: SparsePlusLowRank
    clock: float
    history: list[tuple[float, float]] = field(default_factory=list)
    status: str = ""
    regression: BlockRegression | None = None

    def begin(self, low_rank_first: bool) -> None:
        """Low rank of ``A`` without blocks, or no matrix at all."""
        A, spec = self.problem.weight, self.spec
        self.sparse = torch.zeros_like(A)
        self.P, self.Q = A.new_zeros(A.shape[0], spec.rank), A.new_zeros(A.shape[1], spec.rank)
        if low_rank_first:
            self.P, self.Q, _ = whitened_svd(self.problem, spec.rank)
        self.record()

    @property
    def error(self) -> float:
        """The relative error reached so far."""
        return self.history[-1][1]

    def record(self) -> None:
        """Append the time and the relative error of the present state."""
        error = self.problem.objective_error(self.sparse + self.P @ self.Q.T)
        self.history.append((time.perf_counter() - self.clock, error))

    def iterate(self, sweeps: int) -> None:
        """Sweep until the error is zero or no longer falls."""
        self.status = f"ran its {sweeps} sweeps"
        for _ in range(sweeps):
            self.fit_blocks()
            rest = replace(self.problem, weight=self.problem.weight - self.sparse)
            self.P, self.Q, _ = whitened_svd(rest, self.spec.rank)
            self.record()
            if self.error <= EXACT:
                self.status = "exact"
                return
            if self.history[-2][1] - self.error <= TOLERANCE * self.error:
                self.status = "converged: the error no longer falls"
                return

    def fit_blocks(self) -> None:
        """Fit the sparse part, on other blocks where that is better."""
        R = self.problem.weight - self.P @ self.Q.T
        old, places = self.regression, self.propose(R)
        if old is not None:
            self.sparse = old.fit(R)
            if torch.equal(places, old.mask.places):
                return
        new = BlockRegression.build(Mask(self.spec, places), self.problem.moment)
        sparse = new.fit(R)
        if old is None or self.energy(R - sparse) < self.energy(R - self.sparse):
            self.regression, self.sparse = new, sparse

    def propose(self, R: Tensor) -> Tensor:
        """The blocks of the highest scores, or those that the spec fixes."""
        if not isinstance(self.spec, SparseLowRank):
            return self.spec.block_places({"B": R})
        ranked = scores(R, self.spec, self.problem.moment).sort(descending=True, stable=True)
        return ranked.indices[: self.spec.kept].sort().values

    def energy(self, residual: Tensor) -> float:
        """``|| residual L ||^2``."""
        return replace(self.problem, weight=residual).energy

    def factors(self) -> dict[str, Tensor]:
        """The state as the factors of the spec."""
        if self.regression is None:  # no sweep was asked for
            places = self.propose(self.problem.weight - self.P @ self.Q.T)
        else:
            places = self.regression.mask.places
        factors = {"B": self.spec.split(self.sparse)[places], "U": self.P, "V": self.Q}
        return {**factors, **dict.fromkeys(self.spec.index_shapes(), places)}
