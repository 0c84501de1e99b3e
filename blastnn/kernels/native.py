"""The C++ kernel for CPUs: BLAST, low rank, block low-rank and Monarch, float32 and bfloat16.

The three stages of Algorithm 1 are blocked over tokens and rank, so that what lies between them
stays in cache (``csrc/``: ``few_tokens.h`` streams the factors once for up to 4 tokens,
``many_tokens.h`` multiplies packed panels). bfloat16 is widened on the way in, sums are float32.
Every element is summed in one order, whatever the number of threads: equal bits on equal machines.

``torch.ops.blastnn.blast(x, U, S, V, out_features)``: ``x (..., n)``, ``U (b1, p, r)``,
``S (b1, b2, r)`` or None for couplings of 1, ``V (b2, q, r)``, to ``(..., m)``. An ordinary
operator to ``torch.compile`` and autograd; its gradients are plain PyTorch. ``blast_forward`` and
its like have none, and so cost a call less than ``torch.nn.functional.linear`` does; in compiled
graphs ``blast_into`` and its like write into given memory. Block low-rank matrices that are trained
are multiplied in plain PyTorch altogether.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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
STRIDED: dict[type[Structure], bool] = {
    BlockLowRank: False,
    Monarch: True,
}  # whether the rows of a block row are strided
QUANTIZED = ("U", f"U{SCALE}", "V", f"V{SCALE}")
DTYPES = (torch.float32, torch.bfloat16)
# The operators without gradients, by name: to look them up would take as long as to call them.
_forward: dict[str, Callable[..., Tensor]] = {}
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
    return failure()


def matmul(spec: Structure, x: Tensor, factors: Factors) -> Tensor:
    """``x @ A.T`` for ``x (..., n)``."""
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, *factors.values())):
        return _differentiable(spec, x, factors)
    U, V, strided = factors["U"], factors["V"], STRIDED.get(type(spec))
    if strided is None:
        return _called("blast", spec, x, U, factors.get("S"), V)
    return _called("blocks", spec, x, U, V, strided)


def _called(name: str, spec: Structure, x: Tensor, *arguments: Any) -> Tensor:
    """What an operator returns; compiled graphs have memory of their own for it."""
    if torch.compiler.is_compiling():
        y = x.new_empty((*x.shape[:-1], spec.out_features))
        getattr(torch.ops.blastnn, f"{name}_into")(x, *arguments, y)
    else:
        y = _forward[name](x, *arguments, spec.out_features)
    return y


def _differentiable(spec: Structure, x: Tensor, factors: Factors) -> Tensor:
    if type(spec) in STRIDED:
        return spec.matmul(x, factors)
    U, V = factors["U"], factors["V"]
    if isinstance(spec, LowRank):
        U, V = U.unsqueeze(0), V.unsqueeze(0)
    y: Tensor = torch.ops.blastnn.blast(x, U, factors.get("S"), V, spec.out_features)
    return y


def quantized_obstacle(
    spec: Structure, quantization: Quantization, device: str, dtype: torch.dtype
) -> str | None:
    """Why this kernel cannot serve quantised factors, or None."""
    if type(spec) in STRIDED:
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
    U, U_scale, V, V_scale = (factors[name] for name in QUANTIZED)
    how = quantization.bits, quantization.group
    return _called("quantized", spec, x, U, U_scale, factors.get("S"), V, V_scale, *how)


@cache
def failure() -> str | None:
    """Compile, load and register, once a session; the reason, logged once, where that fails."""
    try:
        torch.ops.load_library(library())
    except (BuildError, OSError) as error:
        reason = f"it could not be built: {error}"
        log.warning("blastnn's CPU kernel is not used, plain PyTorch is: %s", error)
        return reason
    _register()
    return None


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether there is no :func:`failure`; ``torch.compile`` asks once and looks no further."""
    return failure() is None


@cache
def _register() -> None:
    """Tell PyTorch the shapes of what comes out, and the gradients."""
    torch.library.register_fake("blastnn::blast", _shape)
    for name in ("blast", "blocks", "quantized"):
        torch.library.register_fake(f"blastnn::{name}_forward", _shape)
        _forward[name] = getattr(torch.ops.blastnn, f"{name}_forward").default
        torch.library.register_fake(f"blastnn::{name}_into", _nothing)
    torch.library.register_fake("blastnn::attend_causally", _attended)
    torch.library.register_autograd("blastnn::blast", _backward, setup_context=_save)


def _shape(x: Tensor, *others: Any) -> Tensor:
    """What an operator returns whose last argument is the number of output features."""
    return x.new_empty((*x.shape[:-1], others[-1]))


def _attended(q: Tensor, *_: Any) -> Tensor:
    """Heads behind tokens: ``(B, H, T, D)`` to ``(B, T, H, D)``."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


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
