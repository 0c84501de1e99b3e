r"""Second moments of a layer's inputs, gathered while calibration text passes through a block.

``C = E[x^ x^^T]`` with ``x^`` the input in the compressed model, and ``D = E[x x^^T]`` with ``x``
the input in the dense model; of a layer ``A`` by itself, instead of ``D``, the shortfall
``E[(w - A x^) x^^T]`` with ``w`` the output wanted. Products of one window are float32, their sum
is float64. Where only diagonals are wanted, nothing else is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from blastnn.errors import CalibrationError
from blastnn.models.walk import Call, StopForward


def refuse(layers: Sequence[str], why: str, otherwise: str) -> NoReturn:
    """Refuse layers of which the calibration text tells nothing.

    Raises:
        CalibrationError: names them, says ``why``, and what ``--no-strict`` does ``otherwise``.
    """
    more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
    raise CalibrationError(
        f"{layers[0]}{more}: {why}; calibrate with other text, leave it out (--targets), or "
        f"{otherwise} with --no-strict (strict=False)"
    )


@dataclass(frozen=True)
class Moments:
    """``C (n, n)`` and, where dense and compressed inputs differ, ``D (n, n)``; float64.

    ``shortfall (m, n)`` is, in place of ``D``, ``E[(w - A x^) x^^T]`` of the one layer ``A`` that
    reads this input, with ``w`` what it is to give.
    """

    second: Tensor
    cross: Tensor | None
    tokens: int
    shortfall: Tensor | None = None

    @property
    def differ(self) -> bool:
        """Whether there is something to repair: inputs that are not the dense model's."""
        return self.cross is not None or self.shortfall is not None

    def damped(self, damping: float) -> Tensor:
        """``C`` with ``damping`` times its mean diagonal added to its diagonal."""
        shifted = self.second.clone()
        shifted.diagonal().add_(damping * self.second.diagonal().mean())
        return shifted

    def shortfall_of(self, weight: Tensor) -> Tensor | None:
        """The shortfall of a layer ``A (m, n)``, ``A (D - C)`` where it is to give what it gave
        on the dense inputs; None where nothing is to repair.
        """
        if self.cross is None:
            return self.shortfall
        return weight.double() @ (self.cross - self.second)


def root_of(moment: Tensor) -> Tensor:
    """``L (n, n)`` with ``L L^T`` a second moment ``(n, n)``, float64, however singular that is.

    Sums of float32 products may be a little indefinite, which a Cholesky factorisation does not
    survive. Then by eigenvalues, those below zero counting as zero; it takes ten times as long.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.double())
    if not bool(failed):
        return factor
    squares, basis = torch.linalg.eigh(moment.double())
    return basis * squares.clamp(min=0.0).sqrt()


PANEL = 384  # columns of a symmetric product that are computed together, down to the diagonal


class MomentSum:
    """Accumulates ``x^T x`` or ``x^T x^`` over windows; of a ``diagonal`` moment no more."""

    def __init__(self, moment: str = "full") -> None:
        self._diagonal = moment == "diagonal"
        self._sums: dict[str, Tensor] = {}
        self.tokens = 0

    def add(
        self, compressed: Tensor, dense: Tensor | None = None, missing: Tensor | None = None
    ) -> None:
        """Inputs ``(tokens, n)`` of the compressed model and, aligned, of the dense one, or what
        is ``missing (tokens, m)`` from the output that a layer is to give.
        """
        self._add_second(compressed)
        if dense is not None:
            self._accumulate("cross", dense, compressed)
        if missing is not None:
            self._accumulate("shortfall", missing, compressed)
        self.tokens += compressed.shape[0]

    def _add_second(self, x: Tensor) -> None:
        """The lower triangle of ``x^T x``, in panels, and some of the upper one."""
        n = x.shape[1]
        if self._diagonal:
            return self._accumulate("second", x, x)
        if "second" not in self._sums:
            self._sums["second"] = torch.zeros(n, n, dtype=torch.float64)
        for first in range(0, n, PANEL):
            last = min(first + PANEL, n)
            self._sums["second"][first:last, :last] += x[:, first:last].mT @ x[:, :last]
        return None

    def _accumulate(self, key: str, left: Tensor, right: Tensor) -> None:
        product = (left * right).sum(0) if self._diagonal else left.mT @ right
        if key not in self._sums:
            self._sums[key] = torch.zeros(product.shape, dtype=torch.float64)
        self._sums[key] += product

    def finish(self, layer: str) -> Moments:
        """The means.

        Raises:
            CalibrationError: an input was not finite; names the layer.
        """
        means = {key: total / self.tokens for key, total in self._sums.items()}
        if not all(bool(torch.isfinite(mean).all()) for mean in means.values()):
            raise CalibrationError(
                f"the inputs of {layer} are not all finite: its weights, or those of a layer "
                "before it, are damaged"
            )
        if self._diagonal:
            means = {key: mean.diag() for key, mean in means.items()}
        else:
            means["second"] = means["second"].tril() + means["second"].tril(-1).mT
        return Moments(means["second"], means.get("cross"), self.tokens, means.get("shortfall"))


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
    """What was seen of one ``Look``: ``x (tokens, n)``, ``y`` and ``total (tokens, m)``."""

    def __init__(self, look: Look) -> None:
        self.look = look
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
            self._inputs.append(x)

    def leave(self, y: Tensor) -> None:
        """The first layer has given an output."""
        self._outputs.append(y)

    def reach(self, total: Tensor) -> None:
        """The place of the sum is reached; the first time behind the layer counts."""
        if self._calls and self.total is None:
            self.total = total.reshape(-1, total.shape[-1])


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
    found = [Seen(look) for look in looks]
    to_end = to_end or any(look.place == END for look in looks)
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
    with _removed(module.register_forward_pre_hook(lambda _, args: hear(args[0]))):
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
