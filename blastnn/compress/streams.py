"""The hidden states of the calibration text on their way through the model, block after block.

There are two streams: that of the dense model and, once something was compressed, that of the
compressed one. ``OpenBlock`` is the block that they have reached, as it was and as it becomes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from blastnn.compress.moments import (
    InputGroup,
    Moments,
    MomentSum,
    find_groups,
    layer_inputs,
    pass_through,
    run_calls,
)
from blastnn.compress.residual import find_sums
from blastnn.linear import StructuredLinear
from blastnn.models.walk import Call


@dataclass
class Streams:
    """Hidden states ``(windows, window, hidden)`` in the dense and in the compressed model.

    While both are equal, ``compressed`` is the same list as ``dense``; so it stays where layers are
    fitted on dense inputs, and the compressed model's are not asked for.
    """

    dense: list[Tensor]
    compressed: list[Tensor]

    @property
    def equal(self) -> bool:
        """Whether there is one stream, that of the dense model."""
        return self.compressed is self.dense

    def part(self) -> None:
        """Let the two move apart from here on; the tensors so far stay shared."""
        if self.equal:
            self.compressed = list(self.dense)


class OpenBlock:
    """A block while it is compressed, and what flows through it.

    Attributes:
        dense: the block as it was.
        block: a copy, in which layers are replaced.
        calls: how the model calls it. A block that is called several times feeds itself: what it
            will see depends on its own, not yet known, factors.
        streams: what enters the block; None where nothing is known of its inputs.
        prefix: and the name of a layer in the block are the layer's full name.
    """

    def __init__(
        self, dense: nn.Module, calls: Sequence[Call], streams: Streams | None, prefix: str
    ) -> None:
        self.dense, self.block = dense, copy.deepcopy(dense)
        self.calls, self.streams, self.prefix = calls, streams, prefix

    @property
    def once(self) -> bool:
        """Whether the model calls it once."""
        return len(self.calls) == 1

    @property
    def untouched(self) -> bool:
        """Whether no layer was replaced yet."""
        return not any(isinstance(module, StructuredLinear) for module in self.block.modules())

    def groups(self, layers: Sequence[str]) -> list[InputGroup]:
        """Which of the layers read the same input, in the order in which they run."""
        if self.streams is None:
            return [InputGroup(tuple(layers), 0)] if layers else []
        return find_groups(self.dense, self.calls, self.streams.dense[0], layers)

    def sums(self, groups: Sequence[InputGroup]) -> dict[str, str]:
        """Where outputs of layers that have their input for themselves are added to a stream."""
        single = [group.layers[0] for group in groups if len(group.layers) == 1]
        if self.streams is None:
            return {}
        return find_sums(self.dense, self.calls, self.streams.dense[0], single)

    def dense_moments(self, groups: Sequence[InputGroup], moment: str) -> dict[InputGroup, Moments]:
        """Moments of all groups' inputs in the dense model, whose stream moves past the block."""
        assert self.streams is not None
        hidden = self.streams.dense
        return pass_through(self.dense, self.calls, hidden, groups, moment, self.prefix)

    def moments(
        self, group: InputGroup, sums: Mapping[str, str], moment: str, advance: bool
    ) -> Moments:
        """Moments of a group's inputs; of the dense model's alone where a block is called again.

        Args:
            sums: as the method of that name gives them; without a layer's its drift is not asked
                for.
            moment: ``full`` or ``diagonal``.
            advance: whether to move the dense stream past the block as well.
        """
        assert self.streams is not None
        total = MomentSum(moment)
        same = not self.once or (self.streams.equal and self.untouched)
        place = None if same else sums.get(group.layers[0])
        if advance:
            self.streams.part()
        for index, (original, current) in enumerate(
            zip(self.streams.dense, self.streams.compressed, strict=True)
        ):
            seen = layer_inputs(self.dense, self.calls, original, group, advance, place)
            if advance and seen.output is not None:
                self.streams.dense[index] = seen.output
            if same:
                total.add(seen.x)
                continue
            now = layer_inputs(self.block, self.calls, current, group, sum_at=place)
            drifted = None
            if seen.total is not None and now.total is not None:
                drifted = seen.total - now.total
            total.add(now.x, seen.x, drifted)
        return total.finish(self.prefix + group.layers[0])

    def advance_dense(self) -> None:
        """Move the dense stream past the block."""
        assert self.streams is not None
        if not self.untouched:
            self.streams.part()
        for index, hidden in enumerate(self.streams.dense):
            self.streams.dense[index] = run_calls(self.dense, self.calls, hidden)

    def advance_compressed(self) -> None:
        """Move the compressed stream past the block as it has become, the dense one being there."""
        assert self.streams is not None
        if not self.streams.equal:
            for index, hidden in enumerate(self.streams.compressed):
                self.streams.compressed[index] = run_calls(self.block, self.calls, hidden)
