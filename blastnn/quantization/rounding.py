"""One factor to whole numbers and scales, and back; the layout is that of ``layout.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.errors import StructureError
from blastnn.quantization.layout import SCALE_DTYPE, Quantization

# What the largest number of a group becomes, in units of -2^(bits - 1): beyond 1 nothing is
# clipped at the other end either, below 1 the largest are clipped for the sake of the others.
SHARES = {
    8: (1.0, 128 / 127),
    4: (8 / 7, 1.07, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52),
}


def quantize_tensor(factor: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """``(..., q, r)`` as packed whole numbers and scales; see the module's layout.

    Raises:
        StructureError: NaN or infinite numbers.
    """
    bad = int((~torch.isfinite(factor)).sum())
    if bad:
        raise StructureError(f"{bad} of its numbers are NaN or infinite; nothing was quantised")
    groups = _grouped(factor.detach().float(), quantization.group)
    scales = _best_scales(groups, quantization.bits)
    whole = _rounded(groups, scales, quantization.bits).flatten(-3, -2)
    whole = whole[..., : factor.shape[-2], :].to(torch.int8)
    packed = whole.contiguous() if quantization.bits == 8 else _pack(whole)
    return packed, scales.squeeze(-2).to(SCALE_DTYPE)


def dequantize_tensor(
    packed: Tensor, scales: Tensor, quantization: Quantization, columns: int
) -> Tensor:
    """The float32 factor ``(..., q, columns)`` that ``quantize_tensor`` stands for, exactly."""
    whole = packed if quantization.bits == 8 else _unpack(packed, columns)
    rows = packed.shape[-2]
    spread = scales.float().repeat_interleave(min(quantization.group, rows), dim=-2)
    return whole.float() * spread[..., :rows, :]


def _grouped(factor: Tensor, group: int) -> Tensor:
    """``(..., q, r)`` as ``(..., groups, rows, r)``, the last group filled up with zeros."""
    rows = min(group, factor.shape[-2])
    return pad(factor, (0, 0, 0, -factor.shape[-2] % rows)).unflatten(-2, (-1, rows))


def _best_scales(groups: Tensor, bits: int) -> Tensor:
    """The scale ``(..., groups, 1, r)`` of least squared error among ``SHARES``, either sign."""
    largest = groups.abs().amax(-2, keepdim=True)
    unit = torch.where(largest == 0, 1.0, largest)  # errors relative to it cannot overflow
    best, least = torch.zeros_like(largest), torch.full_like(largest, math.inf)
    for share in SHARES[bits]:
        for sign in (1.0, -1.0):
            scales = (largest * (sign * share / 2 ** (bits - 1))).to(SCALE_DTYPE).float()
            off = (groups - _rounded(groups, scales, bits) * scales) / unit
            error = off.square().sum(-2, keepdim=True)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
    return best


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
