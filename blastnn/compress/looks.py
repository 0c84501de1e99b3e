"""What layers of a block see while hidden states pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from blastnn.compress.moments import Moments, MomentSum
from blastnn.models.linears import input_of
from blastnn.models.walk import Call, StopForward

END = ""  # in place of a module's name: what leaves the block


@dataclass(frozen=True)
class InputGroup:
    """Layers of one block that read the same tensor, by their names inside the block."""

    layers: tuple[str, ...]
    calls: int


def find_groups(
    block: nn.Module, calls: Sequence[Call], hidden: Tensor, layers: Iterable[str]
) -> list[InputGroup]:
    """Run a block once and see which layers read the same input, in order of their first call.

    Layers that are never called are in no group.
    """
    inputs: dict[str, list[Tensor]] = {}

    def remember(name: str, x: Tensor) -> None:
        inputs.setdefault(name, []).append(x)  # kept alive, so that no address is used twice

    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(_before(block.get_submodule(name), partial(remember, name)))
        run_calls(block, calls, hidden)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensors in inputs.items():
        key = tuple((t.data_ptr(), tuple(t.shape), t.stride()) for t in tensors)
        groups.setdefault(key, []).append(name)
    return [InputGroup(tuple(names), len(key)) for key, names in groups.items()]


def run_calls(block: nn.Module, calls: Sequence[Call], hidden: Tensor) -> Tensor:
    """All calls of one block, one after the other."""
    for call in calls:
        hidden = call.run(block, hidden)
    return hidden


@dataclass(frozen=True)
class Look:
    """What is wanted of a group of layers while hidden states pass through their block.

    Attributes:
        group: the layers.
        inputs: whether their input is wanted.
        output: whether the output of the first layer is wanted.
        place: the module whose input is the sum of that output and a stream, ``END`` what leaves
            the block; None where that is not wanted.
    """

    group: InputGroup
    inputs: bool = True
    output: bool = False
    place: str | None = None


class Seen:
    """What was seen of one ``Look``: ``x (tokens, n)``, ``y`` and ``total (tokens, m)``.

    With ``copied`` they are copies, for a pass that goes on and may change them in place.
    """

    def __init__(self, look: Look, copied: bool) -> None:
        self.look, self._copied = look, copied
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._calls = 0
        self.total: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The input of the group's layers."""
        return _joined(self._inputs)

    @property
    def y(self) -> Tensor:
        """The output of the group's first layer."""
        return _joined(self._outputs)

    @property
    def complete(self) -> bool:
        """Whether all that is wanted was seen, but for what leaves the block."""
        look = self.look
        called = len(self._outputs) if look.output else self._calls
        return called == look.group.calls and (look.place in (None, END) or self.total is not None)

    def enter(self, x: Tensor) -> None:
        """The first layer is called."""
        self._calls += 1
        if self.look.inputs:
            self._inputs.append(self._own(x))

    def leave(self, y: Tensor) -> None:
        """The first layer has given an output."""
        self._outputs.append(self._own(y))

    def reach(self, total: Tensor) -> None:
        """The place of the sum is reached; the first time behind the layer counts."""
        if self._calls and self.total is None:
            self.total = self._own(total).reshape(-1, total.shape[-1])

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self._copied else tensor


def _joined(parts: list[Tensor]) -> Tensor:
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def look_at(
    block: nn.Module,
    calls: Sequence[Call],
    hidden: Tensor,
    looks: Sequence[Look],
    to_end: bool = False,
) -> tuple[list[Seen], Tensor | None]:
    """Pass ``hidden`` through a block, no further than is wanted unless ``to_end``.

    Returns:
        What was seen, look by look, and what left the block, if it came to that.
    """
    to_end = to_end or any(look.place == END for look in looks)
    found = [Seen(look, copied=to_end) for look in looks]
    output = None

    def then_stop(happened: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def hear(tensor: Tensor) -> None:
            happened(tensor)
            if not to_end and all(each.complete for each in found):
                raise StopForward(tensor)

        return hear

    with ExitStack() as hooks, suppress(StopForward):
        for each in found:
            # Behind what the layer itself tells: a place may be the very next module.
            layer = block.get_submodule(each.look.group.layers[0])
            hooks.enter_context(_before(layer, then_stop(each.enter)))
            if each.look.output:
                hooks.enter_context(_behind(layer, then_stop(each.leave)))
            if each.look.place not in (None, END):
                place = block.get_submodule(str(each.look.place))
                hooks.enter_context(_before(place, then_stop(each.reach)))
        output = run_calls(block, calls, hidden)
    if output is not None:
        for each in found:
            if each.look.place == END:
                each.reach(output)
    return found, output


@contextmanager
def _before(module: nn.Module, hear: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell of every input of a module."""
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: hear(input_of(args, kwargs)), with_kwargs=True
    )
    with _removed(hook):
        yield


@contextmanager
def _behind(module: nn.Module, hear: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell of every output of a module."""
    with _removed(module.register_forward_hook(lambda _, __, output: hear(output))):
        yield


@contextmanager
def _removed(hook: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def pass_through(
    block: nn.Module,
    calls: Sequence[Call],
    hidden: list[Tensor],
    groups: Iterable[InputGroup],
    moment: str,
    prefix: str,
) -> dict[InputGroup, Moments]:
    """The moments of all groups of a block in one pass, which moves ``hidden`` behind it.

    ``prefix`` and a layer's name in the block are its full name.
    """
    sums = {group.layers[0]: MomentSum(moment) for group in groups}

    def take(name: str, x: Tensor) -> None:
        sums[name].add(x.reshape(-1, x.shape[-1]))

    with ExitStack() as hooks:
        for name in sums:
            hooks.enter_context(_before(block.get_submodule(name), partial(take, name)))
        for index, entering in enumerate(hidden):
            hidden[index] = run_calls(block, calls, entering)
    return {group: sums[group.layers[0]].finish(prefix + group.layers[0]) for group in groups}
