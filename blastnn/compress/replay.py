"""Parts of a block that will not change any more give again what they gave, window by window.

A block is passed through once for each of its groups of layers, and once more when all are
replaced. What lies in a child of which all layers are done, attention above all, would be computed
again each time, to the same bits.

What a child gives depends on what runs before it alone. In a pass that looks at a layer all of what
runs before that one is done; so what a child gives before the layer is called is final, and only
that is remembered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

# Times the numbers that enter a block; attention may return its weights, a hundred times as many.
LARGEST = 2


class Replay:
    """What direct children of a block, called once in it, gave for each window.

    Only tensors and flat tuples of them are remembered, no larger than ``LARGEST`` times what
    enters the block, and no longer than nobody changes them in place.

    Args:
        block: the block.
        children: names of the children that it calls exactly once.
    """

    def __init__(self, block: nn.Module, children: Iterable[str]) -> None:
        self._block, self.children = block, set(children)
        self._given: dict[tuple[str, int], _Given] = {}

    @contextmanager
    def again(self, window: int) -> Iterator[None]:
        """While open, children give what they gave for this window."""
        with ExitStack() as stack:
            for (name, index), given in self._given.items():
                if index == window and not given.altered:
                    stack.enter_context(_forward(self._block.get_submodule(name), given.again))
            yield

    @contextmanager
    def remembering(
        self, done: Iterable[str], window: int, layer: nn.Module, entering: Tensor
    ) -> Iterator[None]:
        """``again``, and what children give before ``layer`` is called is remembered.

        Args:
            done: names of the children of which all layers are done.
            window: of which the hidden states pass.
            layer: that is looked at.
            entering: the hidden states.
        """
        reached = False

        def reach(*_: object) -> None:
            nonlocal reached
            reached = True

        def remember(name: str, output: Any) -> None:
            if not reached and _lasting(output, LARGEST * entering.numel()):
                self._given[name, window] = _Given(output)

        known = {name for name, index in self._given if index == window}
        with ExitStack() as stack:
            stack.enter_context(self.again(window))
            stack.callback(layer.register_forward_pre_hook(reach).remove)
            for name in self.children.intersection(done) - known:
                module = self._block.get_submodule(name)
                hook = module.register_forward_hook(
                    lambda _, __, output, name=name: remember(name, output)
                )
                stack.callback(hook.remove)
            yield


@contextmanager
def count_calls(block: nn.Module, children: Iterable[str]) -> Iterator[Counter[str]]:
    """How often children of a block are called while open, by name."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in children:
            hook = block.get_submodule(name).register_forward_pre_hook(
                lambda _, __, name=name: counts.update([name])
            )
            stack.callback(hook.remove)
        yield counts


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another ``forward`` for a while; one of the instance's own is put back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _lasting(output: Any, largest: int) -> bool:
    """Whether an output can be kept, and changes to it be noticed."""
    parts = output if type(output) is tuple else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    known = all(part is None or isinstance(part, Tensor) for part in parts)
    seen = not any(tensor.is_inference() for tensor in tensors)
    return known and seen and sum(tensor.numel() for tensor in tensors) <= largest


class _Given:
    """An output, and whether somebody has changed it since."""

    def __init__(self, output: Any) -> None:
        self._output, self._versions = output, _versions(output)

    @property
    def altered(self) -> bool:
        """Whether a tensor in it was written to."""
        return _versions(self._output) != self._versions

    def again(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the child's ``forward``."""
        return self._output


def _versions(output: Any) -> list[int]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part._version for part in parts if isinstance(part, Tensor)]
