"""The hidden states of the calibration text on their way through the model, block after block.

There are two streams: that of the dense model and, once something was compressed, that of the
compressed one. ``OpenBlock`` is the block that they have reached, as it was and as it becomes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blastnn.compress.looks import (
    InputGroup,
    Look,
    Seen,
    find_groups,
    look_at,
    pass_through,
    run_calls,
)
from blastnn.compress.moments import Moments, MomentSum
from blastnn.compress.replay import Replay, count_calls
from blastnn.compress.residual import find_sums
from blastnn.linear import StructuredLinear
from blastnn.models.linears import dense_weight
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
        self._entered_equal = streams is not None and streams.equal
        self._watched: dict[InputGroup, _Watched] = {}
        self._replay = Replay(self.block, ())

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

    def dense_moments(self, groups: Sequence[InputGroup], moment: str) -> dict[InputGroup, Moments]:
        """Moments of all groups' inputs in the dense model, whose stream moves past the block."""
        assert self.streams is not None
        hidden = self.streams.dense
        return pass_through(self.dense, self.calls, hidden, groups, moment, self.prefix)

    def part_streams(self) -> None:
        """Let the dense stream move past the block without the compressed one."""
        assert self.streams is not None
        self.streams.part()

    def watch_dense(self, groups: Sequence[InputGroup], moment: str, drift: float) -> None:
        """Move the dense stream past a block called once, and keep what ``moments`` compares with.

        A layer that has its input for itself is compared by its output, where that is as good and
        smaller, or is added to a stream; others by their input.

        Args:
            groups: all of which moments will be asked for, in their order.
            moment: ``full`` or ``diagonal``.
            drift: the share of the stream's drift that layers repair (``residual.py``).
        """
        assert self.streams is not None
        places = self._places(groups) if drift > 0.0 and moment == "full" else {}
        for group in groups:
            place = places.get(group.layers[0])
            by_output = moment == "full" and self._by_output(group, place)
            look = Look(group, inputs=not by_output, output=by_output, place=place)
            self._watched[group] = _Watched(look, moment, drift)
        if groups:
            self.streams.part()
        looks = [watched.look for watched in self._watched.values()]
        children = _children_of(groups)
        for index, hidden in enumerate(self.streams.dense):
            with count_calls(self.dense, children) as counts:
                found, output = look_at(self.dense, self.calls, hidden, looks, to_end=True)
            assert output is not None
            self._replay = Replay(self.block, [name for name in children if counts[name] == 1])
            self.streams.dense[index] = output
            for seen in found:
                self._watched[seen.look.group].keep(seen)

    def _places(self, groups: Sequence[InputGroup]) -> dict[str, str]:
        """Where outputs of layers that have their input for themselves are added to a stream."""
        assert self.streams is not None
        single = [g.layers[0] for g in groups if len(g.layers) == 1 and g.calls == 1]
        first = self.streams.dense[0]
        return find_sums(self.dense, self.calls, first, single) if single else {}

    def _by_output(self, group: InputGroup, place: str | None) -> bool:
        rows, columns = dense_weight(self.dense.get_submodule(group.layers[0])).shape
        return len(group.layers) == 1 and (place is not None or rows <= columns)

    def moments(self, group: InputGroup) -> Moments:
        """Moments of a watched group's inputs, the layers before it replaced; once for each."""
        assert self.streams is not None
        done = self._replay.children - _children_of(self._watched)
        watched, layer = self._watched.pop(group), self.block.get_submodule(group.layers[0])
        same = self._entered_equal and self.untouched
        look = Look(group) if same else replace(watched.look, inputs=True)
        total = MomentSum(watched.moment)
        for index, current in enumerate(self.streams.compressed):
            with self._replay.remembering(done, index, layer, current):
                (now,), _ = look_at(self.block, self.calls, current, [look])
            if same:
                total.add(now.x)
            elif look.output:
                total.add(now.x, missing=watched.kept[index] - watched.wanted(now))
            else:
                total.add(now.x, watched.kept[index])
        return total.finish(self.prefix + group.layers[0])

    def forget(self) -> None:
        """Layers that were done will change all the same: let nothing be given again."""
        self._replay = Replay(self.block, ())

    def advance_compressed(self) -> None:
        """Move the compressed stream past the block as it has become, the dense one being there."""
        assert self.streams is not None
        if not self.streams.equal:
            for index, hidden in enumerate(self.streams.compressed):
                with self._replay.again(index):
                    self.streams.compressed[index] = run_calls(self.block, self.calls, hidden)


def _children_of(groups: Iterable[InputGroup]) -> set[str]:
    """The direct children of a block in which layers of groups lie."""
    return {layer.partition(".")[0] for group in groups for layer in group.layers}


class _Watched:
    """Of one group, what the dense model has and the compressed one is compared with.

    Attributes:
        look: at what.
        kept: for every window the input ``(tokens, n)``, or what is wanted of the output.
    """

    def __init__(self, look: Look, moment: str, drift: float) -> None:
        self.look, self.moment, self._drift = look, moment, drift
        self.kept: list[Tensor] = []

    def keep(self, seen: Seen) -> None:
        """What was seen of the next window."""
        self.kept.append(self.wanted(seen) if self.look.output else seen.x)

    def wanted(self, seen: Seen) -> Tensor:
        """``(1 - drift) y + drift t (tokens, m)``: of the layer still dense, its own output and,
        to the share that is to be repaired, the stream with it.
        """
        return seen.y if seen.total is None else torch.lerp(seen.y, seen.total, self._drift)
