r"""Our solver: extrapolated, over-relaxed block coordinate descent, data-free or data-aware.

Minimises ``|| (A - A^) L ||^2`` over BLAST ``A^``, with ``L L^T = C``, or ``L = I`` without data.
One *sweep* solves for each block of unknowns in turn (``als_free.py`` without data,
``als_weighted.py`` with) and goes ``omega`` times as far as the exact solution. It is applied to a
point extrapolated beyond the last two, the classical momentum of fixed-point maps.

At first a sweep lowers ``|| (A - A^) L ||^2 + penalty sum_k || M_k L ||^2``, with the components
``M_k``, of which ``A^`` is the sum. That is what would be left on average if each component were
scaled by a random number of variance ``penalty``: so none may rely on others to cancel it, and
fewer local minima are left. The penalty falls to nothing on the way (``als_pace.py``); where a
sweep ends depends less on where it began, and lower than from any other start we know
(docs/log.md, "Penalised overlaps").

Whenever the objective would rise, momentum is dropped for one sweep, and if it still rises,
over-relaxation and penalty too. The last sweep goes no further than the solutions. No result is
worse than the start.

The start is a (whitened) low-rank factorisation, of larger matrices by randomised range finding,
cut into blocks, with ``S = 1 + noise``: with equal couplings the blocks would move as one. With one
row or column of blocks, BLAST is low rank, and the (whitened) SVD is the answer.

Several problems of one spec and dtype are solved in one call, each with its own momentum; their
arithmetic is batched, which a GPU needs to be busy. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.arithmetic import DRAWN
from blastnn.factorize.als_free import FreeSweep
from blastnn.factorize.als_pace import Pace, Schedule
from blastnn.factorize.als_state import ROUNDING, State, Sweeper, Swept
from blastnn.factorize.als_weighted import WeightedSweep
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.svd import approximate_low_rank, whitened_svd
from blastnn.kernels import normal_equations
from blastnn.structures import Blast, Structure

STRUCTURES = (Blast,)
USES_SECOND_MOMENT = True
WHY = "has the error of the paper's Algorithm 2 in a fifteenth of its time or less, and goes on"


def solve(problem: Problem, spec: Structure, seed: int, sweeps: int = Schedule.sweeps) -> Solution:
    """Factorise into BLAST; ``seed`` draws the range finder's and the couplings' noise."""
    return solve_many([problem], spec, seed, sweeps)[0]


def solve_many(
    problems: Sequence[Problem], spec: Structure, seed: int, sweeps: int = Schedule.sweeps
) -> list[Solution]:
    """Factorise several matrices of one shape, all with or all without a second moment."""
    assert isinstance(spec, Blast)
    normal_equations.load(problems[0].compute_dtype, problems[0].weight.device.type)
    clock = time.perf_counter()
    if spec.rank >= min(spec.out_features, spec.in_features):
        return [_low_rank(problem, spec, clock, "exact: full rank") for problem in problems]
    if 1 in spec.blocks:
        status = "optimal: one row or column of blocks is a low-rank matrix"
        return [_low_rank(problem, spec, clock, status) for problem in problems]
    schedule = Schedule(sweeps=sweeps)
    weighted = problems[0].moment is not None
    sweeper: Sweeper = (WeightedSweep if weighted else FreeSweep)(problems, spec)
    start = _spectral_start(problems, spec, seed)
    run = _Run(sweeper, start, clock)
    rounding = 10 * torch.finfo(start.U.dtype).eps
    inexact = [index for index, error in enumerate(run.best_error) if error > rounding]
    if inexact:
        run.iterate(_disturbed(start, schedule.coupling_noise, seed), schedule, inexact)
    return run.solutions(_balanced)


class _Run:
    """The iteration over a batch: the best states so far, and each problem's history."""

    def __init__(self, sweeper: Sweeper, start: State, clock: float) -> None:
        self.sweeper, self.best, self.clock = sweeper, start, clock
        self.start_error = sweeper.error(start)
        self.best_error = list(self.start_error)
        self.history: list[list[tuple[float, float]]] = [[] for _ in self.best_error]
        self.status = ["kept the low-rank start"] * len(self.best_error)
        self._record(range(len(self.best_error)), self.best_error)

    def iterate(self, state: State, schedule: Schedule, active: list[int]) -> None:
        """Sweep until every one of the ``active`` problems has converged, or sweeps are used up."""
        previous = state
        paces = [Pace(schedule, error) for error in self.start_error]
        for sweep in range(schedule.sweeps):
            landing = sweep == schedule.sweeps - 1
            start = state.extrapolate(previous, [0.0 if landing else p.momentum for p in paces])
            omega = [1.0 if landing else pace.omega for pace in paces]
            penalty = [0.0 if landing else pace.penalty for pace in paces]
            swept = self.sweeper.sweep(start, omega, penalty)
            self._settle(paces, active, state, swept, penalty)
            better = [False] * len(paces)
            for index in active:
                found = swept.errors[index], swept.overlaps[index], penalty[index]
                better[index] = paces[index].learn(*found)
            previous, state = state.where(better, previous), swept.state.where(better, state)
            accepted = [pace.errors[-1] for pace in paces]
            self._keep(state, accepted)
            self._record(active, accepted)
            active = [index for index in active if not self._ends(index, paces[index].verdict())]
            if not active:
                return
        for index in active:
            self._ends(index, f"ran its {schedule.sweeps} sweeps")

    def _settle(
        self,
        paces: Sequence[Pace],
        active: Sequence[int],
        state: State,
        swept: Swept,
        penalty: Sequence[float],
    ) -> None:
        """Where an error seems to rise by no more than rounding, both it and the last one anew.

        From the residuals: a sweep's own errors have lost as many digits as their squares are
        small, and would end the iteration while it still descends.
        """
        for index in active:
            pace, last = paces[index], paces[index].errors[-1]
            rise = pace.rise(swept.errors[index], swept.overlaps[index], penalty[index])
            if 0.0 <= rise <= ROUNDING[state.U.dtype]:
                swept.errors[index] = self.sweeper.error_of(swept.state, index)
                pace.errors[-1] = self.sweeper.error_of(state, index)
                if self.best_error[index] == last:
                    self.best_error[index] = pace.errors[-1]

    def _keep(self, state: State, errors: Sequence[float]) -> None:
        better = [new < old for new, old in zip(errors, self.best_error, strict=True)]
        self.best = state.where(better, self.best)
        self.best_error = [min(pair) for pair in zip(errors, self.best_error, strict=True)]

    def _record(self, active: Iterable[int], errors: Sequence[float]) -> None:
        seconds = time.perf_counter() - self.clock
        for index in active:
            known = errors[index] if math.isfinite(errors[index]) else self.best_error[index]
            self.history[index].append((seconds, known))

    def _ends(self, index: int, verdict: str | None) -> bool:
        """Whether there is a verdict on a problem; if so it becomes its status."""
        if verdict is not None:
            kept = "; kept the low-rank start" if self._start_is_best(index) else ""
            self.status[index] = verdict + kept
        return verdict is not None

    def _start_is_best(self, index: int) -> bool:
        return self.best_error[index] >= self.start_error[index]

    def solutions(self, finish: Callable[[State], State]) -> list[Solution]:
        """The best factors of each problem."""
        best = finish(self.best)
        return [
            Solution(best.one(index), history, status, notes)
            for index, (history, status, notes) in enumerate(
                zip(self.history, self.status, self.sweeper.notes, strict=True)
            )
        ]


def _low_rank(problem: Problem, spec: Blast, clock: float, status: str) -> Solution:
    """Low rank with ``S = 1``, where nothing is better: ``V_j`` or ``U_i`` may hold the couplings
    of a single row or column of blocks, so that what is left to choose is a matrix of rank ``r``.
    """
    P, Q, squared = whitened_svd(problem, spec.rank)
    state = _balanced(_cut(P[None], Q[None], spec).to(problem.compute_dtype))
    error = (squared / problem.energy) ** 0.5
    history = [(time.perf_counter() - clock, error)]
    return Solution(state.one(0), history, status)


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
    normal = torch.randn(state.S.shape[1:], generator=generator, **DRAWN).to(state.S)
    return State(state.U, state.S + noise * normal, state.V)


def _balanced(state: State) -> State:
    """Each rank-one component with equal root mean squares in its three factors."""
    rms = [factor.square().mean((1, 2), keepdim=True).sqrt() for factor in state.tensors()]
    common = (rms[0] * rms[1] * rms[2]).pow(1 / 3)
    ratios = [torch.where(x > 0, common / x, torch.zeros_like(x)) for x in rms]
    return State(*(factor * ratio for factor, ratio in zip(state.tensors(), ratios, strict=True)))
