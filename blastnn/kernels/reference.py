"""Plain PyTorch: the structure's own product. Every device, dtype and structure; the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.quantization import Quantization, dequantize_factors
from blastnn.structures import Factors, Structure

NAME = "reference"


def obstacle(spec: Structure, device: str, dtype: torch.dtype) -> str | None:
    """None: it serves everything."""
    return None


def matmul(spec: Structure, x: Tensor, factors: Factors) -> Tensor:
    """``Structure.matmul``."""
    return spec.matmul(x, factors)


def quantized_obstacle(
    spec: Structure, quantization: Quantization, device: str, dtype: torch.dtype
) -> str | None:
    """None: it serves everything."""
    return None


def quantized_matmul(
    spec: Structure, quantization: Quantization, x: Tensor, factors: Factors
) -> Tensor:
    """``Structure.matmul`` with the factors unpacked into the dtype of ``x``, for this call."""
    return spec.matmul(x, dequantize_factors(spec, factors, quantization, x.dtype))
