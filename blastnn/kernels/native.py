"""The C++ kernel for CPUs: BLAST, low rank, block low-rank and Monarch, float32 and bfloat16.

The three stages of Algorithm 1 are blocked over tokens and rank, so that what lies between them
stays in cache (``csrc/``: ``few_tokens.h`` streams the factors once for up to 4 tokens,
``many_tokens.h`` multiplies packed panels). bfloat16 is widened on the way in, sums are float32.
Every element is summed in one order, whatever the number of threads: equal bits on equal machines.

``torch.ops.blastnn.blast(x, U, S, V, out_features)``: ``x (..., n)``, ``U (b1, p, r)``,
``S (b1, b2, r)`` or None for couplings of 1, ``V (b2, q, r)``, to ``(..., m)``. An ordinary
operator to ``torch.compile`` and autograd; its gradients are plain PyTorch. ``blast_into`` and its
like write into given memory and have none. Block low-rank matrices that are trained are multiplied
in plain PyTorch altogether.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from blastnn.kernels.blast_backward import blast_backward
from blastnn.kernels.build import BuildError, library
from blastnn.quantization import SCALE, Quantization, dequantize_factors
from blastnn.structures import Blast, BlockLowRank, Factors, LowRank, Monarch, Structure

NAME = "native"
SERVED = (Blast, LowRank, BlockLowRank, Monarch)
DTYPES = (torch.float32, torch.bfloat16)
log = logging.getLogger("blastnn")


def obstacle(spec: Structure, device: str, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot serve, or None; the first call that gets that far compiles it."""
    if type(spec) not in SERVED:
        served = ", ".join(structure.name for structure in SERVED)
        return f"it multiplies {served} matrices, not {spec.name}"
    if device != "cpu":
        return f"it runs on CPUs, not on {device}"
    if dtype not in DTYPES:
        return f"it computes in float32 and bfloat16, not in {dtype}"
    return _failure()


def matmul(spec: Structure, x: Tensor, factors: Factors) -> Tensor:
    """``x @ A.T`` for ``x (..., n)``."""
    U, S, V, ops = factors["U"], factors.get("S"), factors["V"], torch.ops.blastnn
    trained = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in (x, U, S, V)
    )
    if isinstance(spec, LowRank):
        U, V = U.unsqueeze(0), V.unsqueeze(0)
    if trained:
        if isinstance(spec, BlockLowRank):
            return spec.matmul(x, factors)
        product: Tensor = ops.blast(x, U, S, V, spec.out_features)
        return product
    y = x.new_empty((*x.shape[:-1], spec.out_features))
    if isinstance(spec, BlockLowRank):
        ops.blocks_into(x, U, V, isinstance(spec, Monarch), y)
    else:
        ops.blast_into(x, U, S, V, y)
    return y


def quantized_obstacle(
    spec: Structure, quantization: Quantization, device: str, dtype: torch.dtype
) -> str | None:
    """Why this kernel cannot serve quantised factors, or None."""
    if isinstance(spec, BlockLowRank):
        return f"it multiplies quantised blast and lowrank matrices, not {spec.name}"
    return obstacle(spec, device, dtype)


def quantized_matmul(
    spec: Structure, quantization: Quantization, x: Tensor, factors: Factors
) -> Tensor:
    """``x @ A.T`` with the factors as they are stored; see ``csrc/quantized.h``.

    Where a gradient of the input is wanted, the factors are unpacked and multiplied plainly.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return spec.matmul(x, dequantize_factors(spec, factors, quantization, x.dtype))
    names = ("U", f"U{SCALE}", "V", f"V{SCALE}")
    U, U_scale, V, V_scale = (factors[name] for name in names)
    if isinstance(spec, LowRank):
        U, U_scale, V, V_scale = (f.unsqueeze(0) for f in (U, U_scale, V, V_scale))
    y = x.new_empty((*x.shape[:-1], spec.out_features))
    bits, group = quantization.bits, quantization.group
    torch.ops.blastnn.quantized_into(x, U, U_scale, factors.get("S"), V, V_scale, bits, group, y)
    return y


@cache
def _failure() -> str | None:
    """Compile, load and register, once a session; the reason, logged once, where that fails."""
    try:
        torch.ops.load_library(library())
    except (BuildError, OSError) as error:
        reason = f"it could not be built: {error}"
        log.warning("blastnn's CPU kernel is not used, plain PyTorch is: %s", error)
        return reason
    _register()
    return None


@cache
def _register() -> None:
    """Tell PyTorch the shapes of what comes out, and the gradients."""
    torch.library.register_fake("blastnn::blast", _shape)
    for name in ("blast_into", "blocks_into", "quantized_into"):
        torch.library.register_fake(f"blastnn::{name}", _nothing)
    torch.library.register_autograd("blastnn::blast", _backward, setup_context=_save)


def _shape(x: Tensor, U: Tensor, S: Tensor | None, V: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _nothing(*_: Any) -> None:
    """What an operator returns that writes into its last argument."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients in plain PyTorch, for inputs with any leading dimensions."""
    x, U, S, V = ctx.saved_tensors
    couplings = U.new_ones(1, 1, U.shape[2]) if S is None else S
    wanted = list(ctx.needs_input_grad[:4])
    gx, gU, gS, gV = blast_backward(
        grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1]), U, couplings, V, wanted
    )
    return None if gx is None else gx.view(x.shape), gU, gS, gV, None
