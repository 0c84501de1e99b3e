"""What the machine is, and what it can do at most, measured: bytes read and products per second."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from blastnn.kernels import processor
from blastnn.kernels.measure import seconds

# Far beyond any cache, so that memory itself is measured.
READ_BYTES = 2**29
# A GPU needs larger matrices to fill it, and has the time for them.
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
ROUNDS = 5
HOW = (
    f"best of {ROUNDS}: sum, copy and matrix times vector over {READ_BYTES // 2**20} MiB "
    "(the fastest counts; a copy counts what it reads and writes); products: square matrices"
)


@torch.inference_mode()
def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes and multiplications per second with all threads, in ``dtype`` on ``device``."""
    rates = _read_rates(device, dtype)
    return {
        "bytes_per_second": max(rates.values()),
        "bytes_per_second_by": rates,
        "multiplications_per_second": _product_rate(device, dtype),
        "how": HOW,
    }


def describe() -> dict[str, Any]:
    """Processor, threads, device and versions: what a speed must be quoted with."""
    cuda = torch.cuda.is_available()
    return {
        "processor": processor.model_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _read_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    width = 4096
    data = torch.zeros(READ_BYTES // dtype.itemsize // width, width, dtype=dtype, device=device)
    other, vector = torch.empty_like(data), torch.zeros(width, dtype=dtype, device=device)
    return {
        "sum": READ_BYTES / _best(data.sum, device),
        "copy": 2 * READ_BYTES / _best(lambda: other.copy_(data), device),
        "matrix_vector": READ_BYTES / _best(lambda: data @ vector, device),
    }


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = PRODUCT_SIZE[device.type]
    left = torch.randn(size, size, dtype=dtype, device=device)
    return float(size) ** 3 / _best(lambda: left @ left, device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    return min(seconds(run, device) for _ in range(ROUNDS))
