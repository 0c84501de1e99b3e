"""Arithmetic and random numbers as they are written, whatever the caller's context and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

DEVICES = ("cpu", "cuda")  # whose autocast is switched off

# Where and as what random numbers are drawn: torch's defaults would make other numbers of one seed.
DRAWN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """No autocast, no gradients unless asked for inside, and no inference mode.

    A solver's tolerances, and the buffers of its kernels, are those of the dtype that it chose:
    half precision by autocast would make nonsense of both. Inference mode would forbid the
    gradients that some solvers and measurements are made of. Also a decorator.
    """
    with ExitStack() as stack:
        for device in DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
