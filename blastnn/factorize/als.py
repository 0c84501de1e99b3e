r"""Our solver: extrapolated, over-relaxed block coordinate descent, data-free or data-aware.

Minimises ``|| (A - A^) L ||^2`` over BLAST ``A^``, with ``L L^T = C``, or ``L = I`` without data.
One *sweep* solves for each block of unknowns in turn (``als_free.py`` without data,
``als_weighted.py`` with) and goes ``omega`` times as far as the exact solution. It is applied to a
point extrapolated beyond the last two, the classical momentum of fixed-point maps; whenever
the error would rise, momentum is dropped for one sweep, and if it still rises, over-relaxation
and ridge too. The last sweep is exact. No result is worse than the start.

The start is a (whitened) low-rank factorisation, of larger matrices by randomised range finding,
cut into blocks, with ``S = 1 + noise``: with equal couplings the blocks would move as one.

Several problems of one spec and dtype are solved in one call, each with its own momentum; their
arithmetic is batched, which a GPU needs to be busy. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.factorize.als_free import FreeSweep
from blastnn.factorize.als_state import SMALLEST_RIDGE, State, Sweeper, ridge_for
from blastnn.factorize.als_weighted import WeightedSweep
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.svd import approximate_low_rank, whitened_svd
from blastnn.structures import Blast, Structure

STRUCTURES = (Blast,)
USES_SECOND_MOMENT = True


@dataclass(frozen=True)
class Schedule:
    """How long and how boldly to iterate.

    ``momentum`` grows from ``momentum_start`` by ``momentum_growth`` a sweep to ``momentum_end``;
    growing it matters: a constant 0.9 from the start is worse than none for ten sweeps.
    ``omega`` is the over-relaxation; what exceeds 1 shrinks with the error: close to a solution
    momentum alone is faster (docs/log.md).
    ``tolerance`` is the relative fall of the error over ten sweeps below which it stops.
    """

    sweeps: int = 40
    omega: float = 1.35
    momentum_start: float = 0.3
    momentum_growth: float = 0.1
    momentum_end: float = 0.9
    tolerance: float = 1e-4
    coupling_noise: float = 0.9


def solve(problem: Problem, spec: Structure, seed: int, sweeps: int = Schedule.sweeps) -> Solution:
    """Factorise into BLAST; ``seed`` draws the range finder's and the couplings' noise."""
    return solve_many([problem], spec, seed, sweeps)[0]


def solve_many(
    problems: Sequence[Problem], spec: Structure, seed: int, sweeps: int = Schedule.sweeps
) -> list[Solution]:
    """Factorise several matrices of one shape, all with or all without a second moment."""
    clock = time.perf_counter()
    assert isinstance(spec, Blast)
    if spec.rank >= min(spec.out_features, spec.in_features):
        return [_exact(problem, spec, clock) for problem in problems]
    schedule = Schedule(sweeps=sweeps)
    weighted = problems[0].moment is not None
    sweeper: Sweeper = (WeightedSweep if weighted else FreeSweep)(problems, spec)
    start = _spectral_start(problems, spec, seed)
    run = _Run(sweeper, start, clock)
    rounding = 10 * torch.finfo(start.U.dtype).eps
    if bool((run.best_error > rounding).any()):
        run.iterate(_disturbed(start, schedule.coupling_noise, seed), schedule)
    return run.solutions(_balanced)


class _Pace:
    """How boldly each problem of a batch moves, learnt from its errors; every tensor is ``(k,)``.

    Attributes:
        error: of the last accepted state; infinite before the first.
        caution: how often in a row the error rose. Once drops momentum, twice over-relaxation and
            ridge too; after a third time nothing is left to try.
        landing: the last sweep is neither extrapolated nor over-relaxed.
    """

    def __init__(self, schedule: Schedule, start_error: Tensor, dtype: torch.dtype) -> None:
        self.schedule, self.start_error, self.dtype = schedule, start_error, dtype
        self.error = torch.full_like(start_error, torch.inf)
        self.caution = torch.zeros_like(start_error, dtype=torch.int64)
        self.landing = False
        self._momentum = torch.zeros_like(start_error)

    @property
    def momentum(self) -> Tensor:
        """How far to extrapolate beyond the last two states."""
        return torch.zeros_like(self._momentum) if self.landing else self._momentum

    @property
    def omega(self) -> Tensor:
        """The over-relaxation; what exceeds 1 shrinks with the error."""
        tiny = torch.finfo(torch.float64).tiny
        progress = (self.error / self.start_error.clamp(min=tiny)).clamp(max=1.0)
        bold = 1.0 + (self.schedule.omega - 1.0) * progress
        return torch.where((self.caution > 1) | self.landing, 1.0, bold)

    @property
    def ridge(self) -> Tensor:
        """Relative to the normal matrices' mean diagonals."""
        usual = ridge_for(torch.minimum(self.error, self.start_error), self.dtype)
        return torch.where(self.caution > 1, SMALLEST_RIDGE[self.dtype], usual)

    def learn(self, found: Tensor, active: Tensor) -> Tensor:
        """Take note of the errors of a sweep; which of its states are accepted."""
        better = active & (found < self.error)
        grown = self._momentum + self.schedule.momentum_growth
        grown = torch.where(self._momentum > 0.0, grown, self.schedule.momentum_start)
        grown = grown.clamp(max=self.schedule.momentum_end)
        self._momentum = torch.where(better & torch.isfinite(self.error), grown, 0.0)
        self.caution = torch.where(better, 0, self.caution + 1)
        self.error = torch.where(better, found, self.error)
        return better


class _Run:
    """The iteration over a batch: the best states so far, and each problem's history."""

    def __init__(self, sweeper: Sweeper, start: State, clock: float) -> None:
        self.sweeper, self.best, self.clock = sweeper, start, clock
        self.best_error = self.start_error = sweeper.error(start)
        self.history: list[list[tuple[float, float]]] = [[] for _ in self.best_error]
        self.status = ["kept the low-rank start"] * len(self.best_error)
        self._record(torch.ones_like(self.best_error, dtype=torch.bool), self.best_error)

    def iterate(self, state: State, schedule: Schedule) -> None:
        """Sweep until every problem has converged or the sweeps are used up."""
        pace = _Pace(schedule, self.start_error, state.U.dtype)
        active = torch.ones_like(self.start_error, dtype=torch.bool)
        previous = state
        for sweep in range(schedule.sweeps):
            pace.landing = sweep == schedule.sweeps - 1
            start = state.extrapolate(previous, pace.momentum)
            candidate, found = self.sweeper.sweep(start, pace.omega, pace.ridge)
            better = pace.learn(found, active)
            previous, state = state.where(better, previous), candidate.where(better, state)
            self._keep(state, pace.error)
            self._record(active, torch.where(pace.error.isfinite(), pace.error, self.best_error))
            active &= self._goes_on(active, pace.caution, schedule.tolerance)
            if not bool(active.any()):
                return
        self._finish(active, f"ran its {schedule.sweeps} sweeps")

    def _goes_on(
        self, active: Tensor, caution: Tensor, tolerance: float, window: int = 10
    ) -> Tensor:
        """Which problems have not converged; sets the status of those that have."""
        stuck = active & (caution > 2)
        self._finish(stuck, "converged: exact sweeps no longer descend")
        errors = [[error for _, error in history[1:]] for history in self.history]
        stalled = torch.tensor(
            [len(e) > window and e[-1 - window] - e[-1] <= tolerance * e[-1] for e in errors]
        )
        self._finish(active & stalled & ~stuck, "converged: the error no longer falls")
        return ~(stuck | stalled)

    def _keep(self, state: State, error: Tensor) -> None:
        better = error < self.best_error
        self.best = state.where(better, self.best)
        self.best_error = torch.where(better, error, self.best_error)

    def _record(self, active: Tensor, error: Tensor) -> None:
        seconds = time.perf_counter() - self.clock
        for index, (on, value) in enumerate(zip(active.tolist(), error.tolist(), strict=True)):
            if on:
                self.history[index].append((seconds, value))

    def _finish(self, which: Tensor, text: str) -> None:
        for index in which.nonzero().flatten().tolist():
            kept = "; kept the low-rank start" if self._start_is_best(index) else ""
            self.status[index] = text + kept

    def _start_is_best(self, index: int) -> bool:
        return float(self.best_error[index]) >= self.history[index][0][1]

    def solutions(self, finish: Callable[[State], State]) -> list[Solution]:
        """The best factors of each problem."""
        best = finish(self.best)
        return [
            Solution(best.one(index), history, status, notes)
            for index, (history, status, notes) in enumerate(
                zip(self.history, self.status, self.sweeper.notes, strict=True)
            )
        ]


def _exact(problem: Problem, spec: Blast, clock: float) -> Solution:
    """The rank alone represents the matrix: low rank with ``S = 1`` is exact."""
    P, Q, squared = whitened_svd(problem, spec.rank)
    state = _balanced(_cut(P[None], Q[None], spec).to(problem.compute_dtype))
    error = (squared / problem.energy) ** 0.5
    history = [(time.perf_counter() - clock, error)]
    return Solution(state.one(0), history, "exact: full rank")


def _spectral_start(problems: Sequence[Problem], spec: Blast, seed: int) -> State:
    """Approximate low rank cut into blocks, ``S = 1``."""
    pairs = [approximate_low_rank(problem, spec.rank, seed) for problem in problems]
    P, Q = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return _cut(P, Q, spec).to(problems[0].compute_dtype)


def _cut(P: Tensor, Q: Tensor, spec: Blast) -> State:
    """``P (k, m, r)`` and ``Q (k, n, r)`` in padded blocks, with couplings of one."""
    (b1, b2), (p, q) = spec.blocks, spec.block_shape
    U = pad(P, (0, 0, 0, b1 * p - P.shape[1])).unflatten(1, (b1, p))
    V = pad(Q, (0, 0, 0, b2 * q - Q.shape[1])).unflatten(1, (b2, q))
    return State(U, torch.ones_like(U[:, :, :1]).expand(-1, -1, b2, -1).contiguous(), V)


def _disturbed(state: State, noise: float, seed: int) -> State:
    """``S + noise N(0, 1)``, the same for every problem."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(state.S.shape[1:], generator=generator).to(state.S)
    return State(state.U, state.S + noise * normal, state.V)


def _balanced(state: State) -> State:
    """Each rank-one component with equal root mean squares in its three factors."""
    rms = [factor.square().mean((1, 2), keepdim=True).sqrt() for factor in state.tensors()]
    common = (rms[0] * rms[1] * rms[2]).pow(1 / 3)
    ratios = [torch.where(x > 0, common / x, torch.zeros_like(x)) for x in rms]
    return State(*(factor * ratio for factor, ratio in zip(state.tensors(), ratios, strict=True)))
