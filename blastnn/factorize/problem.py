r"""The least-squares problem that every solver receives, prepared once and for all solvers alike.

``minimise || (A - A^) L ||_F^2`` with ``C = L L^T`` the second moment of the inputs, or with
``C = I``. ``A`` arrives divided by a power of two near its root mean square, and ``C`` by its mean
diagonal, so that entries of 1e-30 and 1e30 are solved alike and float32 iterations stay in range;
a power of two makes the scaling exact.

A layer that should repair the errors before it, ``E || A x - A^ x^ ||^2`` with ``x^ != x``, is the
same problem: its best unconstrained answer is ``A' = A D C^-1`` with ``D = E[x x^^T]``, and the
rest of the objective is ``|| (A' - A^) L ||^2`` up to a constant (see ``shifted_target``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from blastnn.errors import FactorizationError

# What can be computed with; float8 knows not even which of its numbers are finite.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Added to a second moment's diagonal, relative to its mean: float32 iterations need the inverse.
SOLVER_DAMPING = 1e-6
# Of a second moment's largest entry: more between two entries across the diagonal is no rounding,
# not even of sums in bfloat16.
ASYMMETRY = 1e-2


@dataclass(frozen=True)
class Problem:
    """A scaled weight ``A (m, n)`` and second moment ``C (n, n)``, both float64.

    ``scale`` is what ``A`` was divided by; ``moment`` is None for a plain Frobenius problem;
    ``given_moment`` lacks the solver's damping and is what errors are reported with.
    """

    weight: Tensor
    moment: Tensor | None
    given_moment: Tensor | None
    scale: float
    compute_dtype: torch.dtype

    @cached_property
    def root(self) -> Tensor | None:
        """``L`` with ``C = L L^T``, lower triangular, float64; None without data."""
        return None if self.moment is None else torch.linalg.cholesky(self.moment)

    @cached_property
    def energy(self) -> float:
        """``|| A L ||_F^2``, the denominator of the squared relative error of the solvers."""
        return _energy(self.weight, self.moment)

    @cached_property
    def _given_energy(self) -> float:
        return _energy(self.weight, self.given_moment)

    @cached_property
    def invisible(self) -> bool:
        """Whether the inputs, as given, cannot tell the weight from zero."""
        rounding = self.weight.shape[1] * torch.finfo(torch.float64).eps
        largest = rounding * float(self.weight.square().sum())
        return self._given_energy <= largest

    def objective_error(self, dense: Tensor) -> float:
        """``|| (A - A^) L || / || A L ||`` under the damped moment, which is what is minimised."""
        residual = _energy(self.weight - dense, self.moment)
        return math.sqrt(max(residual, 0.0) / self.energy) if self.energy > 0.0 else 0.0

    def relative_error(self, dense: Tensor) -> float:
        """``|| (A - A^) L || / || A L ||`` under the moment as given, for ``A^`` scaled like ``A``.

        Zero for an invisible weight, whose answer is zero.
        """
        if self.invisible:
            return 0.0
        residual = _energy(self.weight - dense, self.given_moment)
        return math.sqrt(max(residual, 0.0) / self._given_energy)


def _energy(weight: Tensor, moment: Tensor | None) -> float:
    """``|| A L ||_F^2``, without another matrix of ``A``'s size where it can be."""
    if moment is None:
        return float(torch.linalg.vector_norm(weight)) ** 2
    return float((weight @ moment).mul_(weight).sum())


def prepare(weight: Tensor, second_moment: Tensor | None) -> Problem:
    """Check and scale a weight ``(m, n)`` and its inputs' second moment ``(n, n)``.

    Raises:
        FactorizationError: not a matrix, not floating point, NaN or infinite entries, or a second
            moment that is misshapen, zero or has clearly negative eigenvalues.
    """
    _check_matrix("weight", weight)
    compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    exact = weight.detach().to(torch.float64)
    largest = float(exact.abs().max())
    rms = largest and largest * float((exact / largest).square().mean().sqrt())
    scale = 2.0 ** math.floor(math.log2(rms)) if rms else 1.0
    given = damped = None
    if second_moment is not None:
        given = _scaled_moment(second_moment, weight.shape[1]).to(exact.device)
        damped = given.clone()
        damped.diagonal().add_(SOLVER_DAMPING)
    return Problem(exact / scale, damped, given, scale, compute_dtype)


def _check_matrix(what: str, matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise FactorizationError(f"the {what} must be a torch tensor, but is {type(matrix)}")
    if matrix.is_meta or matrix.layout != torch.strided:
        raise FactorizationError(
            f"the {what} must be an ordinary tensor with numbers in it, but is on "
            f"{matrix.device} with layout {matrix.layout}; load it, or convert it with to_dense()"
        )
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise FactorizationError(f"the {what} must be a matrix, but has {tuple(matrix.shape)}")
    if matrix.dtype not in FLOATS:
        raise FactorizationError(
            f"the {what} must be floating point of 16, 32 or 64 bits, but is {matrix.dtype}"
        )
    bad = int((~torch.isfinite(matrix.double())).sum())
    if bad:
        raise FactorizationError(
            f"the {what} of shape {tuple(matrix.shape)} has {bad} NaN or infinite entries; "
            "the model that it comes from, or its input, is damaged: repair or replace it"
        )


def _scaled_moment(moment: Tensor, in_features: int) -> Tensor:
    """Symmetrised and divided by its mean diagonal, in float64."""
    _check_matrix("second moment", moment)
    if moment.shape != (in_features, in_features):
        raise FactorizationError(
            f"the second moment must be {in_features} x {in_features}, one row per input feature, "
            f"but is {tuple(moment.shape)}"
        )
    moment = moment.detach().to(torch.float64)
    largest = float(moment.abs().max())
    skew = float((moment - moment.T).abs().max())
    if skew > ASYMMETRY * largest:
        raise FactorizationError(
            f"the second moment is not symmetric: entries across its diagonal differ by {skew:.1e} "
            f"at a largest entry of {largest:.1e}; E[x x^T] is, so give both of its halves"
        )
    if largest > 0.0:  # a power of two, so that sums cannot overflow and no digit changes
        moment = moment / 2.0 ** math.floor(math.log2(largest))
    mean = float(moment.diagonal().mean())
    if mean <= 0.0:
        raise FactorizationError(
            "the second moment's diagonal is zero or negative: no input reached this layer; "
            "calibrate with other text or pass second_moment=None"
        )
    moment = (moment + moment.T) / (2.0 * mean)
    probe = moment.clone()
    probe.diagonal().add_(SOLVER_DAMPING)
    if torch.linalg.cholesky_ex(probe).info:
        lowest = float(torch.linalg.eigvalsh(moment)[0])
        if lowest < -SOLVER_DAMPING:
            raise FactorizationError(
                f"the second moment has the eigenvalue {lowest:.1e} (relative to its mean "
                "diagonal); E[x x^T] cannot have negative ones: accumulate it in float64"
            )
        # Rounding alone made it indefinite: lift the spectrum by what is missing.
        moment.diagonal().add_(-lowest)
    return moment


def shifted_target(weight: Tensor, moment: Tensor, shortfall: Tensor) -> Tensor:
    r"""``A' = A + F C^-1``: the dense map of the compressed inputs nearest to the outputs wanted.

    Args:
        weight: ``A (m, n)``.
        moment: ``C = E[x^ x^^T]``, ``(n, n)`` float64, positive definite (damped by the caller).
        shortfall: ``F = E[(w - A x^) x^^T]``, ``(m, n)``, where ``w`` is the output wanted; that on
            the dense inputs ``x`` gives ``A (D - C)`` with ``D = E[x x^^T]``.

    Returns:
        float64; exactly ``A`` where nothing is missing.

    Raises:
        FactorizationError: ``C`` is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(moment)
    if info:
        raise FactorizationError(
            "the second moment is not positive definite even after damping; raise the damping"
        )
    exact = weight.to(torch.float64)
    return exact + torch.cholesky_solve(shortfall.to(exact).T, factor).T
