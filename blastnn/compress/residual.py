r"""Where a layer's output is added to a running stream, and so can repair how far that drifted.

A block of a transformer adds to its input what attention and MLP give. With ``t`` the sum in the
dense model and ``t^`` the one in the compressed model, the layer before the addition still dense,
the error of that layer is only a part of ``t - t^``: the rest has come with the stream, from all
layers before. A layer fitted to ``A x + beta (t - t^ - A (x - x^))`` takes a share ``beta`` of the
rest upon itself, as far as its input can express it.

Which layers these are is observed, not known of a family: the sum is the input of some module, or
what leaves the block, and equals the layer's output plus an earlier tensor of the same shape, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from blastnn.compress.looks import END, run_calls
from blastnn.models.walk import Call


@torch.no_grad()
def find_sums(
    block: nn.Module, calls: Sequence[Call], hidden: Tensor, layers: Iterable[str]
) -> dict[str, str]:
    """For each layer whose output is added to a stream, the module whose input is the sum.

    Args:
        block: the dense block.
        calls: how the model calls it; nothing is found where that is more than once.
        hidden: what enters it, of one window.
        layers: names of linear layers in it.
    """
    if len(calls) != 1:
        return {}
    wanted, outputs = set(layers), {}
    seen: list[tuple[str | None, Tensor]] = [(None, hidden)]  # None: no module's input
    with ExitStack() as hooks:

        def enter(name: str, x: object) -> None:
            if isinstance(x, Tensor) and x.shape == hidden.shape:
                seen.append((name, x))

        def leave(name: str, y: object) -> None:
            if isinstance(y, Tensor) and y.shape == hidden.shape:
                if name in wanted:
                    outputs[name] = (len(seen), y)
                seen.append((None, y))

        for name, module in block.named_modules():
            if name:
                hooks.callback(
                    module.register_forward_pre_hook(
                        lambda _, args, name=name: enter(name, args[0]) if args else None
                    ).remove
                )
                hooks.callback(
                    module.register_forward_hook(
                        lambda _, args, y, name=name: leave(name, y)
                    ).remove
                )
        seen.append((END, run_calls(block, calls, hidden)))
    found = {}
    for layer, (at, y) in outputs.items():
        for index in range(at + 1, len(seen)):
            name, total = seen[index]
            if name is not None and any(torch.equal(total, y + r) for _, r in seen[:at]):
                found[layer] = name
                break
    return found
