"""``silu(gate) * up`` in C++, float32 on a CPU: ``csrc/gated.h``.

Dense and compressed models share it. In two operations, each with memory of its own, it moves more
than twice the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.kernels import native


def serves(x: Tensor) -> bool:
    """Whether it can compute this for what layers make of ``x``: no gradients wanted."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and native.available()
    )


def silu_times(gate: Tensor, up: Tensor) -> None:
    """``gate = silu(gate) * up`` in place; ``gate`` is contiguous, both of one shape."""
    torch.ops.blastnn.silu_times(gate, up)
