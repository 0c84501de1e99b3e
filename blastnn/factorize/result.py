"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class FactorizationResult:
    """Factors with the evidence of how well they fit.

    Attributes:
        factors: tensors by name, in the weight's dtype and on its device.
        relative_error: ``|| (A - A^) L || / || A L ||`` of these very tensors (``L = I`` without a
            second moment), after the cast to the weight's dtype.
        history: ``(seconds, relative error)`` after each iteration, seconds since the call began;
            the first pair is the initialisation where there is one. These errors are of what is
            minimised: before the cast, and with the damping of a second moment, so that a fit which
            is nearly exact on the inputs given has a larger error here.
        status: how the solver ended, in words.
        seconds: wall time of the whole call.
        solver: the registered name of the solver that ran.
        notes: fallbacks that were taken; empty where all went as planned.
    """

    factors: dict[str, Tensor]
    relative_error: float
    history: list[tuple[float, float]]
    status: str
    seconds: float
    solver: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Solution:
    """What a solver hands back before casting: factors of the scaled problem and the evidence."""

    factors: dict[str, Tensor]
    history: list[tuple[float, float]]
    status: str
    notes: list[str] = field(default_factory=list)
