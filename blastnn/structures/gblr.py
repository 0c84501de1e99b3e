r"""Gaudi-GBLR (Lee & Kim 2023, arXiv 2310.18882): ``sum_k (m_k^out * u_k)(m_k^in * v_k)^T``.

Every rank-one component lives on one box of rows and one box of columns, and the boxes are learned.
A mask of ``n`` entries has a width ``w`` and a location ``l``, both shares of ``n``: it is one on
the ``n w`` entries, at least one, from ``n l`` on, past the end and round to the start again.
Low-rank, block low-rank and block-sparse matrices are all of this form.

Two ways to read a width:

- ``sigma = None``: exact boxes, ``n w`` and ``n l`` rounded to whole entries. A box does not change
  under a small change of its width, so the gradients of widths and locations are zero: use it to
  evaluate, and to train ``U`` and ``V`` alone.
- a number: the box smoothed by a Gaussian in the frequency domain (``smooth_mask``), in which
  widths and locations are differentiable; training raises ``sigma`` from about 1 to 100.

**What it costs.** The non-zeros depend on the widths (``num_nonzero``), and an implementation that
skips the zeros multiplies only with those. Ours does not skip them: the forward is a masked dense
product with all ``r (m + n)`` stored entries of ``U`` and ``V``, so narrow boxes save arithmetic on
paper, not time or memory. ``num_params`` counts what is stored, widths and locations included. By
that count a GBLR matrix is never better than a low-rank one of the same rank: it is for tables
that count non-zeros.

Letters: ``m n`` rows and columns, ``r`` rank, ``k`` component, ``f`` frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures.base import (
    Factors,
    Structure,
    rank_for_budget,
    require_positive_int,
    seeded_normal,
)
from blastnn.structures.registry import register

# The vectors of widths and locations, with the values that make every mask all ones.
FULL_BOXES = {"widths_out": 1.0, "locations_out": 0.0, "widths_in": 1.0, "locations_in": 0.0}


@register
@dataclass(frozen=True)
class GBLR(Structure):
    """``rank`` components, each on a box of its own; ``sigma`` is None for exact boxes."""

    rank: int
    sigma: float | None = None
    name: ClassVar[str] = "gblr"
    example_options = ({}, {"sigma": 2.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("rank", self.rank)
        if self.sigma is None:
            return
        if not isinstance(self.sigma, (int, float)) or not 0 < self.sigma < math.inf:
            raise StructureError(f"sigma must be None or a positive number, but is {self.sigma!r}")
        object.__setattr__(self, "sigma", float(self.sigma))

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``U (m, r)``, ``V (n, r)`` and four vectors ``(r,)``: widths and locations."""
        matrices = {"U": (self.out_features, self.rank), "V": (self.in_features, self.rank)}
        return {**matrices, **dict.fromkeys(FULL_BOXES, (self.rank,))}

    def step_factors(self) -> frozenset[str]:
        """Widths and locations where the boxes are exact."""
        return frozenset(FULL_BOXES) if self.sigma is None else frozenset()

    def masks(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The masks of the rows ``(m, r)`` and of the columns ``(n, r)``, in the dtype of ``U``."""
        rows = (factors["widths_out"], factors["locations_out"], self.out_features)
        columns = (factors["widths_in"], factors["locations_in"], self.in_features)
        dtype = factors["U"].dtype
        return self._mask(*rows).to(dtype), self._mask(*columns).to(dtype)

    def _mask(self, width: Tensor, location: Tensor, size: int) -> Tensor:
        if self.sigma is None:
            return box_mask(width, location, size)
        return smooth_mask(width, location, size, self.sigma)

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """``(x (M_in * V)) (M_out * U)^T``: a dense product with masked factors."""
        self.check_input(x)
        rows, columns = self.masks(factors)
        return (x @ (columns * factors["V"])) @ (rows * factors["U"]).mT

    def to_dense(self, factors: Factors) -> Tensor:
        """``(M_out * U)(M_in * V)^T``."""
        rows, columns = self.masks(factors)
        return (rows * factors["U"]) @ (columns * factors["V"]).mT

    def num_nonzero(self, factors: Factors) -> int:
        """The entries of ``U`` and ``V`` inside their (rounded) boxes."""
        rows = box_sizes(factors["widths_out"], self.out_features)
        columns = box_sizes(factors["widths_in"], self.in_features)
        return int(rows.sum() + columns.sum())

    @property
    def num_multiplications(self) -> int:
        """``r (m + n)``, what the dense product uses; ``num_nonzero`` is the lower count."""
        return self.rank * (self.out_features + self.in_features)

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Full boxes, ``w = 1`` and ``l = 0``, with ``U, V`` of variance ``1 / sqrt(n r)``."""
        std = (1.0 / (self.in_features * self.rank)) ** 0.25
        shapes = self.factor_shapes()
        return {
            "U": std * seeded_normal(shapes["U"], seed, 0, dtype, device),
            "V": std * seeded_normal(shapes["V"], seed, 1, dtype, device),
            **{
                name: torch.full(shapes[name], value, dtype=dtype, device=device)
                for name, value in FULL_BOXES.items()
            },
        }

    def scaled(self, factors: Factors, exponent: float) -> dict[str, Tensor]:
        """``U`` and ``V`` take half of the exponent each; the boxes stay."""
        exponents = {"U": exponent // 2, "V": exponent - exponent // 2}
        return {
            name: factor * 2.0 ** exponents[name] if name in exponents else factor
            for name, factor in factors.items()
        }

    @classmethod
    def for_budget(
        cls, out_features: int, in_features: int, params: int, *, step: int = 1, **options: Any
    ) -> Self:
        """The largest rank whose stored numbers fit: ``r = params // (m + n + 4)``.

        A budget of non-zeros is the business of the solver that finds the boxes, not of the spec.
        """
        one = cls(out_features, in_features, rank=1, **options)
        label = f"GBLR {out_features} x {in_features}"
        rank = rank_for_budget(label, params, one.num_params, step)
        return cls(out_features, in_features, rank=rank, **options)


def box_sizes(width: Tensor, size: int) -> Tensor:
    """How many of ``size`` entries boxes of the given widths cover, as float64 whole numbers."""
    return torch.round(width.double() * size).clamp(1, size)


def box_mask(width: Tensor, location: Tensor, size: int) -> Tensor:
    """Exact boxes, ones and zeros ``(size, r)``, from widths and locations ``(r,)``.

    Entry ``t`` belongs to a box of ``c`` entries from ``s`` on iff ``(t - s) mod size < c``. That
    is written with operations that pass gradients on, all of them zero, so that widths and
    locations have gradients of zero instead of none.
    """
    # Rounded in float64, which holds every product of a narrower width and a size exactly; the
    # rest is whole numbers, exact in float32 up to 2^24.
    count = box_sizes(width, size).float()
    start = torch.round(location.double() * size).float()
    position = torch.arange(size, device=width.device, dtype=torch.float32)[:, None]
    return (count - torch.remainder(position - start, size)).clamp(0, 1)


def smooth_mask(width: Tensor, location: Tensor, size: int, sigma: float) -> Tensor:
    r"""The box smoothed by a Gaussian (Lee & Kim 2023): ``(size, r)`` from vectors ``(r,)``.

    ``size irfft[w sinc(f w) / sinc(f / size) exp(-f^2 / (2 sigma^2) - 2 pi i f l + pi i f
    (1 / size - w))]`` over the frequencies ``f = 0 .. size / 2``, with ``sinc(x) = sin(pi x) /
    (pi x)``. For ``w`` and ``l`` multiples of ``1 / size`` and ``sigma`` to infinity it is
    ``box_mask``. Widths are held to [1 / size, 1]. The FFT works in float32, or float64 for such
    widths.
    """
    dtype = torch.float64 if width.dtype == torch.float64 else torch.float32
    w, l = width.to(dtype).clamp(1 / size, 1.0)[:, None], location.to(dtype)[:, None]  # noqa: E741
    f = torch.arange(size // 2 + 1, device=width.device, dtype=dtype)
    size_at = w * torch.sinc(f * w) / torch.sinc(f / size) * torch.exp(-0.5 * (f / sigma) ** 2)
    phase = math.pi * f * (1 / size - w - 2 * l)
    spectrum = torch.complex(size_at * torch.cos(phase), size_at * torch.sin(phase))
    return size * torch.fft.irfft(spectrum, n=size).mT
