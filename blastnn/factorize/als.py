r"""Our solver: extrapolated block coordinate descent with exact steps, data-free or data-aware.

``minimise f = tr(A^ C A^^T) - 2 tr(Y A^^T) + const``, ``Y = A C``, over BLAST matrices ``A^``
(``C = I`` without data). One *sweep* solves for each block of unknowns exactly, in turn:

- ``V_j``, one block column after the other, since ``C`` couples them:
  ``C_jj V_j H_jj = Y_j^T Ubar_j - sum_{k != j} C_jk V_k H_kj`` with
  ``H_kj = sum_i (s_ik s_ij^T) * (U_i^T U_i)``;
- ``s_ij``, likewise over ``j``: ``W_ij = (U_i^T U_i) * M_jj`` with ``M_jk = V_j^T C_jk V_k``;
- ``U_i``, all at once: ``U_i G_i = R_i`` with ``G_i = sum_jk (s_ij s_ik^T) * M_jk``.

No step forms ``A^`` or a residual, and nothing of size ``b1 b2 r^2`` is held unless it is small.
Exact sweeps never increase ``f`` but crawl; the sweep is therefore applied to a point extrapolated
beyond the last two, the classical momentum of fixed-point maps, which is dropped for one sweep
whenever ``f`` would rise. What is returned never has a larger ``f`` than the start: whitened SVD
with ``S = 1``, whose couplings are disturbed to let the blocks part.

Letters: ``i`` block row, ``j k`` block columns, ``p q`` rows and columns of a block, ``r t`` rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blastnn.factorize.als_sweep import BlockProblem, State
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.factorize.svd import whitened_svd
from blastnn.structures import Blast, Structure

STRUCTURES = (Blast,)
USES_SECOND_MOMENT = True


@dataclass(frozen=True)
class Schedule:
    """How long and how boldly to iterate.

    ``momentum`` grows from ``momentum_start`` by ``momentum_growth`` a sweep to ``momentum_end``;
    growing it matters: a constant 0.9 from the start is worse than none for ten sweeps.
    ``tolerance`` is the relative fall of the error over ten sweeps below which it stops.
    """

    sweeps: int = 40
    momentum_start: float = 0.3
    momentum_growth: float = 0.1
    momentum_end: float = 0.9
    tolerance: float = 1e-4
    coupling_noise: float = 0.5


def solve(problem: Problem, spec: Structure, seed: int, sweeps: int = Schedule.sweeps) -> Solution:
    """Factorise into BLAST; ``seed`` draws the disturbance of the couplings at the start."""
    start = time.perf_counter()
    assert isinstance(spec, Blast)
    schedule = Schedule(sweeps=sweeps)
    blocks = BlockProblem.build(problem, spec)
    spectral = _spectral_start(problem, spec)
    history = [(time.perf_counter() - start, blocks.error(spectral))]
    if history[0][1] == 0.0 or spec.rank >= min(problem.weight.shape):
        # The rank alone represents the matrix: low rank is already exact.
        return Solution(_as_dict(_balanced(spectral)), history, "exact: full rank")
    disturbed = _disturbed(spectral, schedule.coupling_noise, seed)
    clock = _Clock(start, history)
    best, status = _iterate(blocks, disturbed, schedule, clock)
    if min(error for _, error in history) == history[0][1]:
        best, status = spectral, f"{status}; kept the whitened SVD it started from"
    return Solution(_as_dict(_balanced(best)), history, status, blocks.notes)


@dataclass
class _Clock:
    """Appends (seconds, error) pairs to a history."""

    start: float
    history: list[tuple[float, float]]

    def record(self, error: float) -> None:
        self.history.append((time.perf_counter() - self.start, error))


def _iterate(
    blocks: BlockProblem, state: State, schedule: Schedule, clock: _Clock
) -> tuple[State, str]:
    """Extrapolated sweeps with restart; returns the last accepted state, which is the best."""
    previous: State | None = None
    error, momentum = float("inf"), 0.0
    errors: list[float] = []
    for _ in range(schedule.sweeps):
        start = state if previous is None else state.extrapolate(previous, momentum)
        candidate, candidate_error = blocks.sweep(start)
        if not candidate_error <= error:
            if previous is None:
                return state, "converged: exact sweeps no longer descend"
            previous, momentum = None, 0.0
            clock.record(error)
            continue
        momentum = _next_momentum(momentum, schedule, first=previous is None)
        previous, state, error = state, candidate, candidate_error
        clock.record(error)
        errors.append(error)
        if _stalled(errors, schedule.tolerance):
            return state, "converged: the error no longer falls"
    return state, f"ran its {schedule.sweeps} sweeps"


def _next_momentum(momentum: float, schedule: Schedule, first: bool) -> float:
    grown = schedule.momentum_start if first else momentum + schedule.momentum_growth
    return min(schedule.momentum_end, grown)


def _stalled(errors: list[float], tolerance: float, window: int = 10) -> bool:
    return len(errors) > window and errors[-1 - window] - errors[-1] <= tolerance * errors[-1]


def _spectral_start(problem: Problem, spec: Blast) -> State:
    """Whitened SVD of rank ``r`` cut into blocks, ``S = 1``: exactly the low-rank error."""
    P, Q, _ = whitened_svd(problem, spec.rank)
    (b1, b2), (p, q), r = spec.blocks, spec.block_shape, spec.rank
    U = _padded_rows(P, b1 * p).view(b1, p, r)
    V = _padded_rows(Q, b2 * q).view(b2, q, r)
    S = torch.ones(b1, b2, r, dtype=U.dtype, device=U.device)
    return State(U, S, V).to(problem.compute_dtype)


def _padded_rows(matrix: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))


def _disturbed(state: State, noise: float, seed: int) -> State:
    """``S + noise N(0, 1)``: with all couplings equal the blocks would move as one."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(state.S.shape, generator=generator).to(state.S)
    return State(state.U, state.S + noise * normal, state.V)


def _balanced(state: State) -> State:
    """Each rank-one component with equal root mean squares in its three factors."""
    rms: Callable[[Tensor], Tensor] = lambda x: x.square().mean((0, 1)).sqrt()  # noqa: E731
    u, s, v = rms(state.U), rms(state.S), rms(state.V)
    common = (u * s * v).pow(1 / 3)
    ratios = [torch.where(x > 0, common / x, torch.zeros_like(x)) for x in (u, s, v)]
    return State(state.U * ratios[0], state.S * ratios[1], state.V * ratios[2])


def _as_dict(state: State) -> dict[str, Tensor]:
    return {"U": state.U, "S": state.S, "V": state.V}
