"""Running a model block by block: what each block is called with, observed once.

The model's own forward is run with every block's forward replaced by a recorder that passes its
input through. It tells, without any knowledge of the family, in which order blocks are called (a
shared block several times), with which further arguments, and what a block returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blastnn.errors import ModelError
from blastnn.models.skeleton import Block


@dataclass(frozen=True)
class Call:
    """One call of a block: its index, and its arguments after the hidden states."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``module`` on ``hidden`` with the recorded arguments; its hidden states."""
        return first_tensor(module(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True)
class Trace:
    """The calls of all blocks in order, and how hidden states look as a block's output."""

    calls: list[Call]
    wrap: Callable[[Tensor], Any]

    def of_block(self, index: int) -> list[Call]:
        """The calls of one block."""
        return [call for call in self.calls if call.block == index]


class StopForward(Exception):  # noqa: N818 (not an error: a signal)
    """Raised inside a forward pass to end it early, carrying the tensor that was wanted."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__("stopped on purpose")
        self.tensor = tensor


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a block's output: the tensor itself, or the first of several.

    Raises:
        ModelError: there is none.
    """
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Tensor):
        return output
    if isinstance(parts, Iterable):
        for part in parts:
            if isinstance(part, Tensor):
                return part
    raise ModelError(f"a model or block must return tensors, but returned {type(output)}")


def record_calls(run: Callable[[], Any], blocks: Sequence[Block]) -> Trace:
    """The calls of all blocks, in order, while ``run`` runs the model once.

    The first block must hold its weights: it is really run once, to see what a block returns.

    Raises:
        ModelError: blocks are called in an order that cannot be walked one block at a time.
    """
    calls: list[Call] = []
    wraps: list[Callable[[Tensor], Any]] = []

    def recorder(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passing(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(Call(index, args, kwargs))
            if not wraps:
                wraps.append(_like(forward(hidden, *args, **kwargs)))
            return wraps[0](hidden)

        return passing

    with _replaced(blocks, recorder):
        run()
    _check_order([call.block for call in calls], blocks)
    return Trace(calls, wraps[0])


def capture_input(run: Callable[[], Any], blocks: Sequence[Block]) -> Tensor:
    """The hidden states that enter the first block while ``run`` runs the model."""

    def recorder(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise StopForward(hidden.detach())

        return stopping

    with _replaced(blocks, recorder):
        return stopped(run)


def run_tail(
    run: Callable[[], Any], blocks: Sequence[Block], wrap: Callable[[Tensor], Any], hidden: Tensor
) -> Any:
    """What ``run`` returns when the blocks, taken together, produce ``hidden``."""

    def recorder(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: wrap(hidden)

    with _replaced(blocks, recorder):
        return run()


def stopped(run: Callable[[], Any]) -> Tensor:
    """The tensor with which ``run`` was stopped early; ModelError if it ran to its end."""
    try:
        run()
    except StopForward as stop:
        return stop.tensor
    raise ModelError("the forward pass never reached the layer whose input was wanted")


@contextmanager
def _replaced(
    blocks: Sequence[Block],
    recorder: Callable[[int, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Give every block another forward for a while; modules and attributes stay."""
    try:
        for index, block in enumerate(blocks):
            block.module.forward = recorder(index, block.module.forward)
        with torch.no_grad():
            yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)


def _like(output: Any) -> Callable[[Tensor], Any]:
    """How to wrap hidden states so that they look like a block's output."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    rest = tuple(output[1:])
    return lambda hidden: (hidden, *rest)


def _check_order(order: list[int], blocks: Sequence[Block]) -> None:
    """Each block's calls must be consecutive, and the blocks in order."""
    if order != sorted(order) or set(order) != set(range(len(blocks))):
        names = [blocks[index].name for index in dict.fromkeys(order)]
        raise ModelError(
            f"the model calls its blocks in an order that cannot be walked block by block: {names}"
        )
