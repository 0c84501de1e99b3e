"""BLAST on a GPU by hand-written Triton kernels: two launches a product, the coupling fused.

Has not run on a GPU yet; checked with Triton's interpreter only. So it serves whoever sets
``BLASTNN_KERNELS=triton``, and nobody else. Low rank is not served: it is two dense products, which
plain PyTorch hands to the vendor's library already.

The kernels are in ``triton_decode.py`` and ``triton_prefill.py``. Triton is imported only once it
is asked for; without it this file says so.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from blastnn.dtypes import name_of
from blastnn.structures import Blast, Factors, Structure

NAME = "triton"
VARIABLE = "BLASTNN_KERNELS"
# CUDA's limit on all axes of a grid of programs but the first.
MOST_BLOCKS = 65_535
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(spec: Structure, device: str, dtype: torch.dtype) -> str | None:
    """Why these kernels do not serve; None where they do."""
    if not isinstance(spec, Blast):
        return f"multiplies {Blast.name} alone, not {spec.name}"
    if device != "cuda":
        return f"needs a CUDA device, not {device}"
    if dtype not in DTYPES:
        return f"multiplies float32, bfloat16 and float16, not {name_of(dtype)}"
    if max(spec.blocks) > MOST_BLOCKS:
        return f"takes at most {MOST_BLOCKS} blocks a side, not {max(spec.blocks)}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed; pip install triton"
    if os.environ.get(VARIABLE) != NAME:
        return f"has not been measured on a GPU yet; set {VARIABLE}={NAME} to use it"
    return None


def matmul(spec: Structure, x: Tensor, factors: Factors) -> Tensor:
    """``x @ A.T``: ``(..., n)`` to ``(..., m)``, with gradients."""
    from blastnn.kernels.triton_ops import triton_blast  # imports Triton

    tokens = x.reshape(-1, spec.in_features)  # (T, n)
    y = triton_blast(tokens, factors["U"], factors["S"], factors["V"], spec.out_features)
    return y.reshape(*x.shape[:-1], spec.out_features)
