"""How boldly the alternating solver moves from sweep to sweep, learnt from the errors so far."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How long and how boldly to iterate.

    ``momentum`` grows from ``momentum_start`` by ``momentum_growth`` a sweep to ``momentum_end``;
    growing it matters: a constant 0.9 from the start is worse than none for ten sweeps.
    ``omega`` is the over-relaxation; what exceeds 1 shrinks with the error: close to a solution
    momentum alone is faster (docs/log.md).
    ``tolerance`` is the relative fall of the error over ten sweeps below which it stops.

    The penalty of overlaps falls, by the same factor every sweep, for ``penalty_share`` of the
    sweeps: from ``penalty_start`` to ``penalty_end``, in units of the squared relative error of the
    low-rank start. It is at most ``penalty_largest``, and ``penalty_most`` times the squared error
    at the time: where there is an exact solution, it is soon found. ``penalty_last`` times that
    remains to the end, lest nearly equal components cancel each other.
    """

    sweeps: int = 40
    omega: float = 1.35
    momentum_start: float = 0.3
    momentum_growth: float = 0.1
    momentum_end: float = 0.9
    tolerance: float = 1e-6
    coupling_noise: float = 0.9
    penalty_share: float = 0.65
    penalty_start: float = 4.0
    penalty_end: float = 0.05
    penalty_largest: float = 1.0
    penalty_most: float = 10.0
    penalty_last: float = 1e-3

    def eases(self, sweep: int) -> bool:
        """Whether the penalty still falls by plan in that sweep, counted from 0."""
        return sweep < self.penalty_share * self.sweeps

    def penalty(self, sweep: int, start_error: float, error: float) -> float:
        """What a sweep's penalty is, given the start's relative error and that now."""
        last = self.penalty_last * error**2
        if not self.eases(sweep) or not start_error:
            return last
        end = self.penalty_end * start_error**2
        first = min(self.penalty_start * start_error**2, self.penalty_largest)
        planned = first * (end / first) ** (sweep / (self.penalty_share * self.sweeps))
        return max(last, min(planned, self.penalty_most * error**2))


class Pace:
    """How boldly one problem moves.

    Plain numbers: a tensor of one would cost a small matrix more than its arithmetic does.

    Attributes:
        errors: of the accepted states, the last repeated for every sweep that was rejected;
            infinite before the first.
        overlap: ``P`` of the last accepted state (:class:`blastnn.factorize.als_state.Swept`).
        momentum: how far to extrapolate beyond the last two states.
        caution: how often in a row the objective rose. Once drops momentum, twice over-relaxation
            and what is left of the penalty; after a third time nothing is left to try.
    """

    def __init__(self, schedule: Schedule, start_error: float) -> None:
        self.schedule, self.start_error = schedule, start_error
        self.errors, self.overlap = [math.inf], 0.0
        self.momentum, self.caution = 0.0, 0

    @property
    def sweep(self) -> int:
        """How many sweeps there have been."""
        return len(self.errors) - 1

    @property
    def omega(self) -> float:
        """The over-relaxation; what exceeds 1 shrinks with the error."""
        if self.caution > 1:
            return 1.0
        progress = min(self.errors[-1] / max(self.start_error, sys.float_info.min), 1.0)
        return 1.0 + (self.schedule.omega - 1.0) * progress

    @property
    def penalty(self) -> float:
        """That of the sweep to come."""
        if self.caution > 1 and not self.schedule.eases(self.sweep):
            return 0.0
        error = min(self.errors[-1], self.start_error)
        return self.schedule.penalty(self.sweep, self.start_error, error)

    def rise(self, error: float, overlap: float, penalty: float) -> float:
        """By how much ``e^2 + penalty P`` is larger than that of the last accepted state."""
        return error**2 - self.errors[-1] ** 2 + penalty * (overlap - self.overlap)

    def learn(self, error: float, overlap: float, penalty: float) -> bool:
        """Take note of a sweep's error and overlap; whether its state is accepted."""
        last, schedule = self.errors[-1], self.schedule
        better = self.rise(error, overlap, penalty) < 0.0
        if not better or math.isinf(last):
            self.momentum = 0.0
        elif self.momentum > 0.0:
            grown = self.momentum + schedule.momentum_growth
            self.momentum = min(grown, schedule.momentum_end)
        else:
            self.momentum = schedule.momentum_start
        self.caution = 0 if better else self.caution + 1
        self.errors.append(error if better else last)
        self.overlap = overlap if better else self.overlap
        return better

    def verdict(self, window: int = 10) -> str | None:
        """Why to stop, or None. While the penalty falls, a small fall of the error says nothing."""
        if self.schedule.eases(self.sweep - window):
            return None
        if self.caution > 2:
            return "converged: exact sweeps no longer descend"
        if self.sweep > window:
            last = self.errors[-1]
            if self.errors[-1 - window] - last <= self.schedule.tolerance * last:
                return "converged: the error no longer falls"
        return None
