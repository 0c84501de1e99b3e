r"""Second moments of a layer's inputs, gathered window by window.

``C = E[x^ x^^T]`` with ``x^`` the input in the compressed model, and ``D = E[x x^^T]`` with ``x``
the input in the dense model; of a layer ``A`` by itself, instead of ``D``, the shortfall
``E[(w - A x^) x^^T]`` with ``w`` the output wanted. Products of one window are float32, their sum
is float64. Where only diagonals are wanted, nothing else is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from blastnn.errors import CalibrationError


def refuse(layers: Sequence[str], why: str, otherwise: str) -> NoReturn:
    """Refuse layers of which the calibration text tells nothing.

    Raises:
        CalibrationError: names them, says ``why``, and what ``--no-strict`` does ``otherwise``.
    """
    more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
    raise CalibrationError(
        f"{layers[0]}{more}: {why}; calibrate with other text, leave it out (--targets), or "
        f"{otherwise} with --no-strict (strict=False)"
    )


@dataclass(frozen=True)
class Moments:
    """``C (n, n)`` and, where dense and compressed inputs differ, ``D (n, n)``; float64.

    ``shortfall (m, n)`` is, in place of ``D``, ``E[(w - A x^) x^^T]`` of the one layer ``A`` that
    reads this input, with ``w`` what it is to give.
    """

    second: Tensor
    cross: Tensor | None
    tokens: int
    shortfall: Tensor | None = None

    def damped(self, damping: float) -> Tensor:
        """``C`` with ``damping`` times its mean diagonal added to its diagonal."""
        shifted = self.second.clone()
        shifted.diagonal().add_(damping * self.second.diagonal().mean())
        return shifted

    def shortfall_of(self, weight: Tensor) -> Tensor | None:
        """The shortfall of a layer ``A (m, n)``, ``A (D - C)`` where it is to give what it gave
        on the dense inputs; None where nothing is to repair.
        """
        if self.cross is None:
            return self.shortfall
        return weight.double() @ (self.cross - self.second)


def root_of(moment: Tensor) -> Tensor:
    """``L (n, n)`` with ``L L^T`` a second moment ``(n, n)``, float64, however singular that is.

    Sums of float32 products may be a little indefinite, which a Cholesky factorisation does not
    survive. Then by eigenvalues, those below zero counting as zero; it takes ten times as long.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.double())
    if not bool(failed):
        return factor
    squares, basis = torch.linalg.eigh(moment.double())
    return basis * squares.clamp(min=0.0).sqrt()


PANEL = 384  # columns of a symmetric product that are computed together, down to the diagonal


class MomentSum:
    """Accumulates ``x^T x`` or ``x^T x^`` over windows; of a ``diagonal`` moment no more."""

    def __init__(self, moment: str = "full") -> None:
        self._diagonal = moment == "diagonal"
        self._sums: dict[str, Tensor] = {}
        self.tokens = 0

    def add(
        self, compressed: Tensor, dense: Tensor | None = None, missing: Tensor | None = None
    ) -> None:
        """Inputs ``(tokens, n)`` of the compressed model and, aligned, of the dense one, or what
        is ``missing (tokens, m)`` from the output that a layer is to give.
        """
        if self._diagonal:
            self._accumulate("second", compressed, compressed)
        else:
            self._add_second(compressed)
        if dense is not None:
            self._accumulate("cross", dense, compressed)
        if missing is not None:
            self._accumulate("shortfall", missing, compressed)
        self.tokens += compressed.shape[0]

    def _add_second(self, x: Tensor) -> None:
        """The lower triangle of ``x^T x``, in panels, and some of the upper one."""
        n = x.shape[1]
        second = self._sums.setdefault("second", torch.zeros(n, n, dtype=torch.float64))
        for first in range(0, n, PANEL):
            last = min(first + PANEL, n)
            second[first:last, :last] += x[:, first:last].mT @ x[:, :last]

    def _accumulate(self, key: str, left: Tensor, right: Tensor) -> None:
        product = (left * right).sum(0) if self._diagonal else left.mT @ right
        if key not in self._sums:
            self._sums[key] = torch.zeros(product.shape, dtype=torch.float64)
        self._sums[key] += product

    def finish(self, layer: str) -> Moments:
        """The means.

        Raises:
            CalibrationError: an input was not finite; names the layer.
        """
        means = {key: total / self.tokens for key, total in self._sums.items()}
        if not all(bool(torch.isfinite(mean).all()) for mean in means.values()):
            raise CalibrationError(
                f"the inputs of {layer} are not all finite: its weights, or those of a layer "
                "before it, are damaged"
            )
        if self._diagonal:
            means = {key: mean.diag() for key, mean in means.items()}
        else:
            means["second"] = means["second"].tril() + means["second"].tril(-1).mT
        return Moments(means["second"], means.get("cross"), self.tokens, means.get("shortfall"))
