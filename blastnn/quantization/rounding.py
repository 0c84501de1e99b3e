"""One factor to whole numbers and scales, and back; the layout is that of ``layout.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.quantization.layout import SCALE_DTYPE, Quantization

# What the largest number of a group becomes, in units of -2^(bits - 1): beyond 1 nothing is
# clipped at the other end either, below 1 the largest are clipped for the sake of the others.
SHARES = {
    8: (1.0, 128 / 127),
    4: (8 / 7, 1.07, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52),
}

# Added to a Gram matrix's diagonal, relative to its mean.
DAMPING = 0.01


def quantize_tensor(
    factor: Tensor, quantization: Quantization, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(..., q, r)`` as packed whole numbers and scales; see the layout.

    Args:
        factor: floating point, finite.
        quantization: bits and group.
        gram: ``G (..., r, r)``, positive semidefinite, if columns are known to work together: an
            error ``E`` of the factor then counts as ``trace(E G E^T)`` instead of ``|| E ||^2``.
    """
    exact = factor.detach().to(torch.float32)
    whole, scales = _by_columns(exact, quantization, None if gram is None else _feedback(gram))
    packed = whole if quantization.bits == 8 else _pack(whole)
    return packed.contiguous(), scales.to(SCALE_DTYPE)


def _feedback(gram: Tensor) -> Tensor:
    """Upper triangular ``R`` with ``R^T R = G^-1``: what rounding a column does to later ones."""
    exact = gram.double()
    mean = exact.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damping = torch.where(mean > 0, DAMPING * mean, 1.0)
    damped = exact + damping * torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _by_columns(
    factor: Tensor, quantization: Quantization, feedback: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Whole numbers ``(..., q, r)`` and scales ``(..., groups, r)``, one column after the other.

    With feedback each column's error is made good in the columns behind it as far as these can
    (GPTQ, arXiv 2210.17323, Algorithm 1, with columns for inputs).
    """
    rest, rows = factor.clone(), factor.shape[-2]
    numbers, scales = [], []
    for k in range(factor.shape[-1]):
        groups = _grouped(rest[..., k], quantization.group)
        scale = _best_scales(groups, quantization.bits)
        whole = _rounded(groups, scale, quantization.bits)
        numbers.append(whole.flatten(-2)[..., :rows].to(torch.int8))
        scales.append(scale.squeeze(-1))
        if feedback is not None:
            error = rest[..., k] - (whole * scale).flatten(-2)[..., :rows]
            row = feedback[..., k, k:] / feedback[..., k, k, None]
            rest[..., k:] -= error[..., None] * row[..., None, :]
    return torch.stack(numbers, -1), torch.stack(scales, -1)


def dequantize_tensor(
    packed: Tensor, scales: Tensor, quantization: Quantization, columns: int
) -> Tensor:
    """The float32 factor ``(..., q, columns)`` that ``quantize_tensor`` stands for, exactly."""
    whole = packed if quantization.bits == 8 else _unpack(packed, columns)
    rows = packed.shape[-2]
    spread = scales.float().repeat_interleave(min(quantization.group, rows), dim=-2)
    return whole.float() * spread[..., :rows, :]


def _grouped(column: Tensor, group: int) -> Tensor:
    """``(..., q)`` as ``(..., groups, rows)``, the last group filled up with zeros."""
    rows = min(group, column.shape[-1])
    return pad(column, (0, -column.shape[-1] % rows)).unflatten(-1, (-1, rows))


def _best_scales(groups: Tensor, bits: int) -> Tensor:
    """The scale ``(..., groups, 1)`` of least squared error among ``SHARES``, either sign."""
    shares = torch.tensor(SHARES[bits], device=groups.device) / 2 ** (bits - 1)
    signed = torch.cat((shares, -shares)).view(-1, *[1] * groups.ndim)
    largest = groups.abs().amax(-1, keepdim=True)
    unit = torch.where(largest == 0, 1.0, largest)  # squares of small errors must not vanish
    scales = (largest * signed).to(SCALE_DTYPE).float()
    off = (groups - _rounded(groups, scales, bits) * scales) / unit
    errors = off.square().sum(-1, keepdim=True)
    return scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def _rounded(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers within the range; zero where the scale is zero."""
    half = 2 ** (bits - 1)
    return (groups / torch.where(scales == 0, math.inf, scales)).round().clamp(-half, half - 1)


def _pack(whole: Tensor) -> Tensor:
    """Two columns to a byte, ``(..., r)`` to ``(..., ceil(r / 2))``."""
    shifted = (pad(whole, (0, whole.shape[-1] % 2)) + 8).to(torch.uint8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``_pack``, int8."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return pairs[..., :columns].to(torch.int8) - 8
