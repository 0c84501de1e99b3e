"""A model on disk, walked block by block: weights come and go, hidden states stay.

Everything outside the blocks (embeddings, final norm, head) is loaded only to produce the hidden
states that enter the first block, and once more at the end for the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blastnn.evaluate.probe import output_of, probe_arguments
from blastnn.models.skeleton import Block, WeightLoader, build_skeleton, find_blocks, names_below
from blastnn.models.source import ModelFolder
from blastnn.models.walk import Trace, capture_input, first_tensor, record_calls, run_tail


class Walker:
    """A skeleton with its loader; loads and releases one part at a time."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.model: PreTrainedModel = build_skeleton(folder.config)
        self.blocks: list[Block] = find_blocks(self.model)
        self.loader = WeightLoader(self.model, folder)
        self.names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        self.names += [n for n in self.model.state_dict(keep_vars=True) if n not in set(self.names)]
        inside = {name for index in range(len(self.blocks)) for name in self.names_of(index)}
        self.outside = [name for name in self.names if name not in inside]

    @property
    def block_names(self) -> list[str]:
        """The full names of the blocks."""
        return [block.name for block in self.blocks]

    @property
    def head(self) -> str | None:
        """The name of the output layer, if the model has one."""
        output = self.model.get_output_embeddings()
        return next((n for n, m in self.model.named_modules() if m is output), None)

    def names_of(self, index: int) -> list[str]:
        """All parameter names of one block."""
        return names_below(self.names, [self.blocks[index].name])

    def load_block(self, index: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A block with its weights."""
        self.loader.load(self.names_of(index), dtype)
        return self.blocks[index].module

    def release_block(self, index: int) -> None:
        """Let a block's weights go."""
        self.loader.release(self.names_of(index))

    def enter(self, ids: Iterable[Tensor], dtype: torch.dtype) -> tuple[Trace, list[Tensor]]:
        """How the blocks are called, and the hidden states of each window before the first one.

        Args:
            ids: windows of token ids, each ``(1, window)``, all of one length.
            dtype: of the weights and so of the hidden states.
        """
        self._load_outside(dtype, head=False)
        self.load_block(0, dtype)
        base, windows = self.model.base_model, list(ids)
        run: Callable[[Tensor], Any] = lambda window: base(window, **_no_cache(base))  # noqa: E731
        trace = record_calls(partial(run, windows[0]), self.blocks)
        hidden = [capture_input(partial(run, window), self.blocks) for window in windows]
        self.loader.release([*self.outside, *self.names_of(0)])
        return trace, hidden

    @contextmanager
    def tail(self, trace: Trace) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """What stands behind the blocks as a function of their output and one window of ids.

        Its weights are in memory while the context is open; gradients pass through it.
        """
        self._load_outside(torch.float32, head=True)

        def run(hidden: Tensor, ids: Tensor) -> Tensor:
            @torch.enable_grad()
            def forward() -> Any:
                return self.model(ids, **_no_cache(self.model))

            return first_tensor(run_tail(forward, self.blocks, trace.wrap, hidden))

        try:
            yield run
        finally:
            self.loader.release(self.outside)

    @torch.no_grad()
    def leave(
        self,
        trace: Trace,
        hidden: Tensor,
        ids: Tensor,
        dtype: torch.dtype,
        replacement: tuple[str, nn.Module] | None = None,
    ) -> Tensor:
        """The probed output for one window whose hidden states after the last block are given.

        ``replacement`` is the name of a layer outside the blocks and what stands in for it.
        """
        self._load_outside(dtype, head=True)
        original = None
        if replacement is not None:
            original = self._swap(*replacement)
        arguments = probe_arguments(self.model, ids)
        run: Callable[[], Any] = lambda: self.model(**arguments)  # noqa: E731
        output = output_of(run_tail(run, self.blocks, trace.wrap, hidden))
        if replacement is not None and original is not None:
            self._swap(replacement[0], original)
        self.loader.release(self.outside)
        return output

    def _swap(self, name: str, layer: nn.Module) -> nn.Module:
        """Put ``layer`` in the place of another one, and return that."""
        owner, _, leaf = name.rpartition(".")
        old = self.model.get_submodule(name)
        setattr(self.model.get_submodule(owner), leaf, layer)
        return old

    def _load_outside(self, dtype: torch.dtype, head: bool) -> None:
        base = {name for name in self.outside if self._in_base(name)}
        self.loader.load([name for name in self.outside if head or name in base], dtype)

    def _in_base(self, name: str) -> bool:
        prefix = self.loader.prefix
        return self.model.base_model is self.model or name.startswith(prefix)


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in probe_arguments(model, torch.empty(0)).items() if k == "use_cache"}
