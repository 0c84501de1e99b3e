"""Attention of a prompt over itself in C++, float32 on a CPU: ``csrc/attention.h``.

Dense and compressed models share it. It takes half of torch's time there, partly because it makes
next to none of the scores that causality throws away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.kernels import native


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether it can compute this: no gradients wanted, and the heads go into groups."""
    tensors = (query, key, value)
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
        and native.available()
    )


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``softmax(scale Q K^T) V`` where a query sees the keys up to its own place.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, L, D)``, of which the first ``T`` count; a head of it serves ``H / H_kv``
            consecutive ones of the queries.
        value: the same.
        scale: of the scores.

    Returns:
        ``(B, T, H, D)``, contiguous.
    """
    y: Tensor = torch.ops.blastnn.attend_causally(query, key, value, scale)
    return y
