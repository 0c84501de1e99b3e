"""Parts of a block that will not change any more give again what they gave, window by window.

A block is passed through once for each of its groups of layers, and once more when all are
replaced. What lies in a child of which all layers are done, attention above all, would be computed
again each time, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


class Replay:
    """What direct children of a block gave for each window, from when they were done.

    A child that the block calls more than once is always computed, and so is one whose output was
    changed in place by what came after.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._given: dict[tuple[str, int], _Given] = {}
        self._repeated: set[str] = set()

    @contextmanager
    def of(self, done: Iterable[str], window: int) -> Iterator[None]:
        """While open, children give what they gave for this window.

        Args:
            done: names of children to be remembered if nothing is known of them yet: those which,
                and whose inputs, will not change any more.
            window: of which the hidden states pass.
        """
        again = {name for name, index in self._given if index == window}
        with ExitStack() as stack:
            for name in {*done, *again} - self._repeated:
                stack.enter_context(self._child(name, window))
            yield

    @contextmanager
    def _child(self, name: str, window: int) -> Iterator[None]:
        module, known = self._block.get_submodule(name), self._given.get((name, window))
        if known is None or known.altered:
            module.forward = self._remembering(name, window, module.forward)
        else:
            module.forward = known.again
        try:
            yield
        finally:
            del module.forward  # that of its class is back

    def _remembering(
        self, name: str, window: int, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        calls = 0

        def remember(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            output = forward(*args, **kwargs)
            if calls > 1:
                self._repeated.add(name)
            self._given[name, window] = _Given(output)
            return output

        return remember


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
    tensors = output if isinstance(output, tuple | list) else [output]
    return [tensor._version for tensor in tensors if isinstance(tensor, Tensor)]
