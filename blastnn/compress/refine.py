r"""Refinement: all factors of a block together, on the calibration tokens alone.

Layers are fitted one by one, each to its own target. What they do together, through softmax and
gates, is left over, and a few passes of the calibration text through the finished block take some
of it away. The loss is the block's whole error, weighted by what it does to the model's output:

    sum_t || R (h_t - h^_t) ||^2,    R^T R = G + ridge,    G = E[g g^T]

with ``h`` what leaves the block in the dense model, ``h^`` in the compressed one on its own inputs,
and ``g`` the gradients of the model's loss there (``spectrum.py``). Without ``G`` a few positions
with enormous activations, which no gradient asks for, are all that counts; with the dense block on
the *compressed* inputs as the target the model drifts away while every block gets better
(``docs/log.md``). Some windows are held out: the factors end where the loss of those was lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blastnn.compress.looks import run_calls
from blastnn.compress.moments import root_of
from blastnn.compress.options import Options
from blastnn.errors import PlanError
from blastnn.linear import StructuredLinear
from blastnn.models.walk import Call

RIDGE = 0.05  # added to ``G``, relative to its mean diagonal
RATE = 4e-4  # of Adam's first steps, relative to each factor's root mean square; falls to zero
BETAS = (0.9, 0.99)
WARM_UP = 0.1  # share of the steps in which the rate rises
HELD_OUT = 8  # of so many windows one is held out
CHECKS = 4  # how often the held-out windows are looked at
LEAST_WINDOWS = 2
PATIENCE = 2  # so many checks without a better loss end it


@dataclass(frozen=True)
class Refined:
    """How a block's refinement went: the held-out loss before it, and of the factors kept.

    ``kept_step`` is the step whose factors were kept, of ``steps`` taken; 0 if none was better.
    """

    before: float
    after: float
    kept_step: int
    steps: int


class BlockError:
    """The weighted error of what leaves a block, for one window."""

    def __init__(
        self,
        calls: Sequence[Call],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        weight: Tensor,
    ) -> None:
        """``weight (h, h)`` is ``G``; ``inputs`` and ``targets`` are ``(1, window, h)``."""
        self.calls, self.inputs, self.targets = calls, inputs, targets
        exact = weight.double()
        ridge = RIDGE * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)
        self.root = root_of(exact + ridge).mT.float()

    def __call__(self, block: nn.Module, window: int) -> Tensor:
        """The mean over tokens."""
        wrong = run_calls(block, self.calls, self.inputs[window]) - self.targets[window]
        return (wrong.reshape(-1, wrong.shape[-1]) @ self.root.mT).square().sum(-1).mean()


@torch.no_grad()
def refine(
    block: nn.Module,
    error: BlockError,
    epochs: int,
    seed: int,
    dtype: torch.dtype,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Refined | None:
    """Improve the factors of all structured layers of a block, in place.

    Args:
        block: on the CPU in float32, compressed; quantised layers and dense ones stay as they are.
        error: of this block; its inputs are those of the compressed model.
        epochs: how often the windows that are not held out pass through the block.
        seed: of their order.
        dtype: to which the factors that are kept are rounded, before they are judged.
        step: told how many of how many steps are done.

    Returns:
        None where there is nothing to train, or fewer than two windows.
    """
    factors = trainable(block)
    held, train = split_windows(len(error.inputs))
    if not factors or not train:
        return None
    best = before = _mean(block, error, held)
    kept, kept_step, worse = _copies(factors), 0, 0
    steps, generator = epochs * len(train), torch.Generator().manual_seed(seed)
    checks = {max(1, round(steps * part / CHECKS)) for part in range(1, CHECKS + 1)}
    optimizer = _optimizer(factors)
    for done, window in enumerate(_order(train, epochs, generator), 1):
        _descend(block, error, window, factors, optimizer, _rate(done, steps))
        step(done, steps)
        if done not in checks:
            continue
        exact = _copies(factors)
        _set(factors, [factor.to(dtype) for factor in exact])  # as they would be written
        found = _mean(block, error, held)
        if found < best:
            best, kept, kept_step, worse = found, _copies(factors), done, 0
        elif (worse := worse + 1) == PATIENCE:
            break
        _set(factors, exact)
    _set(factors, kept)
    for factor in factors:
        factor.requires_grad_(False)
        factor.grad = None
    return Refined(before, best, kept_step, done)


def require_windows(options: Options, windows: int) -> None:
    """Refuse a refinement without windows to train on and to hold out.

    Raises:
        PlanError: says how many there are.
    """
    if options.refine and windows < LEAST_WINDOWS:
        raise PlanError(
            f"refine needs at least {LEAST_WINDOWS} windows of calibration text, one of them to be "
            f"held out, but there are {windows}; give more text, or leave it out (--refine 0)"
        )


def split_windows(count: int) -> tuple[list[int], list[int]]:
    """Windows held out, spread evenly, and the others; of fewer than two none is for training."""
    held = max(1, count // HELD_OUT)
    out = [(2 * index + 1) * count // (2 * held) for index in range(held)]
    return out, [window for window in range(count) if window not in out]


def trainable(block: nn.Module) -> list[nn.Parameter]:
    """The trainable factors of all structured layers, a shared one once."""
    layers = [module for module in block.modules() if isinstance(module, StructuredLinear)]
    found = {
        id(factor): factor
        for layer in layers
        for factor in layer.factors.values()
        if isinstance(factor, nn.Parameter)
    }
    return list(found.values())


def _copies(factors: Sequence[Tensor]) -> list[Tensor]:
    return [factor.detach().clone() for factor in factors]


def _set(factors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for factor, value in zip(factors, values, strict=True):
        factor.copy_(value)


def _optimizer(factors: Sequence[nn.Parameter]) -> torch.optim.Adam:
    """Adam with a group for each factor, whose rate goes with the factor's size."""
    groups = []
    for factor in factors:
        size = float(factor.square().mean().sqrt())
        groups.append({"params": [factor.requires_grad_()], "size": size})
    return torch.optim.Adam(groups, lr=RATE, betas=BETAS)


def _rate(step: int, steps: int) -> float:
    """Rises, and then falls to zero, along straight lines."""
    return RATE * min(1.0, step / (WARM_UP * steps)) * (1.0 - (step - 1) / steps)


def _order(train: Sequence[int], epochs: int, generator: torch.Generator) -> list[int]:
    """The windows of each epoch in an order of its own."""
    count = len(train)
    return [
        train[at]
        for _ in range(epochs)
        for at in torch.randperm(count, generator=generator).tolist()
    ]


def _descend(
    block: nn.Module,
    error: BlockError,
    window: int,
    factors: Sequence[nn.Parameter],
    optimizer: torch.optim.Adam,
    rate: float,
) -> None:
    """One step; other parameters of the block get no gradient, whether they ask for one or not."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["size"]
    with torch.enable_grad():
        gradients = torch.autograd.grad(error(block, window), factors)
    for factor, gradient in zip(factors, gradients, strict=True):
        factor.grad = gradient
    optimizer.step()


@torch.no_grad()
def _mean(block: nn.Module, error: BlockError, windows: Sequence[int]) -> float:
    return sum(float(error(block, window)) for window in windows) / len(windows)
