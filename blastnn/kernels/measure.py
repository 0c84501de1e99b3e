"""How long every kernel takes, and dense takes, on this very machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

from blastnn.kernels.dispatch import kernels_for
from blastnn.structures import Factors, Structure

DENSE = "dense"
CACHE_BYTES = 64 * 2**20  # copies of the weights that together are larger are read from memory
MOST_COPIES = 64


@dataclass(frozen=True)
class Timing:
    """Median seconds of one product by each kernel, and by the dense matrix of the same size.

    Attributes:
        spec: the structured matrix.
        device, dtype: where and in what.
        tokens: rows of the input.
        seconds: by kernel name; ``"dense"`` is ``torch.nn.functional.linear``.
    """

    spec: Structure
    device: str
    dtype: torch.dtype
    tokens: int
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest kernel."""
        return min((name for name in self.seconds if name != DENSE), key=self.seconds.__getitem__)

    def speedup(self, kernel: str | None = None) -> float:
        """Dense seconds by those of a kernel, of the fastest one by default."""
        return self.seconds[DENSE] / self.seconds[kernel or self.best]


@torch.no_grad()
def measure(
    spec: Structure,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int = 1,
    budget: float = 0.3,
    cold: bool = False,
) -> Timing:
    """Medians of interleaved runs, on random numbers.

    Args:
        spec: what to multiply by.
        device, dtype, tokens: where, in what, and how many rows.
        budget: seconds to spend, roughly; at least three runs of each are made.
        cold: take turns between copies of the weights that do not fit the cache together, as the
            layers of a model do.
    """
    copies = 1
    if cold:
        size = spec.out_features * spec.in_features * dtype.itemsize
        copies = max(1, min(MOST_COPIES, -(-CACHE_BYTES // size)))
    x = torch.randn(tokens, spec.in_features, device=device).to(dtype)
    weights = [
        torch.randn(spec.out_features, spec.in_features, device=device).to(dtype)
        for _ in range(copies)
    ]
    factors = [spec.init(seed=seed, dtype=dtype, device=device) for seed in range(copies)]
    runs = {DENSE: _dense(x, weights)}
    kernels = kernels_for(spec, device, dtype)
    for place, kernel in enumerate(kernels):
        first = copies * place // len(kernels)  # or one would find what another has just read
        turned = factors[first:] + factors[:first]
        runs[kernel.NAME] = _structured(kernel.matmul, spec, x, turned)
    return Timing(spec, device, dtype, tokens, _medians(runs, torch.device(device), budget))


def _dense(x: Tensor, weights: list[Tensor]) -> Callable[[], Tensor]:
    turns = cycle(weights)
    return lambda: linear(x, next(turns))


def _structured(
    matmul: Callable[[Structure, Tensor, Factors], Tensor],
    spec: Structure,
    x: Tensor,
    factors: list[dict[str, Tensor]],
) -> Callable[[], Tensor]:
    turns = cycle(factors)
    return lambda: matmul(spec, x, next(turns))


def _medians(
    runs: dict[str, Callable[[], Tensor]], device: torch.device, budget: float
) -> dict[str, float]:
    first = {name: min(seconds(run, device) for _ in range(2)) for name, run in runs.items()}
    rounds = max(3, min(1000, int(budget / (sum(first.values()) + 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the device has finished it."""
    _finish(device)
    start = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
