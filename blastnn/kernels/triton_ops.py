"""The Triton kernels as one operator of torch, ``blastnn::triton_blast``, with its gradients.

A ``custom_op`` rather than a ``triton_op``: torch.compile, torch.export and CUDA graphs then see
one operator and never look inside, on a GPU just as in Triton's interpreter, where a ``triton_op``
cannot be traced. Nothing would be gained from looking inside: there is nothing to fuse that is not
fused, and the number of tokens, on which the kernels differ, would become a guard.

Importing this file imports Triton and registers the operator; a program that was exported with the
operator needs that too.

Shape letters: ``m`` out_features, ``n`` in_features, ``r`` rank, ``T`` tokens, ``b1 x b2`` blocks
of ``p x q``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blastnn.kernels.blast_backward import blast_backward
from blastnn.kernels.triton_decode import MOST_TOKENS, decode
from blastnn.kernels.triton_prefill import prefill


@torch.library.custom_op("blastnn::triton_blast", mutates_args=())
def triton_blast(x: Tensor, U: Tensor, S: Tensor, V: Tensor, out_features: int) -> Tensor:
    """``x @ A.T`` for the BLAST matrix ``A``: ``(T, n)`` to ``(T, m)``, in the dtype of ``x``.

    Args:
        x: ``(T, n)`` with ``n <= b2 q``.
        U, S, V: the factors ``(b1, p, r)``, ``(b1, b2, r)``, ``(b2, q, r)``, of the dtype of ``x``.
        out_features: ``m <= b1 p``.
    """
    y = x.new_empty(x.shape[0], out_features)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever x is on
        if 0 < x.shape[0] <= MOST_TOKENS:
            decode(x, U, S, V, y)
        elif x.shape[0] > 0:
            prefill(x, U, S, V, y)
    return y


@triton_blast.register_fake
def _shape(x: Tensor, U: Tensor, S: Tensor, V: Tensor, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, U, S, V = ctx.saved_tensors
    return *blast_backward(grad_y, x, U, S, V, ctx.needs_input_grad[:4]), None


triton_blast.register_autograd(_backward, setup_context=_save)
