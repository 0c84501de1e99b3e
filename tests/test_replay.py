"""What a block's children gave is given again: the same bits, and less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from blastnn.compress.block import BlockCompressor, BlockProgress
from blastnn.compress.job import Job, prepare_job
from blastnn.compress.looks import run_calls
from blastnn.compress.options import Options
from blastnn.compress.replay import Replay, count_calls
from blastnn.compress.streams import Streams
from blastnn.models.walk import first_tensor
from tests.made_up import FAMILIES, TEXT, make_folder

WINDOWS = 8
CHOICES = {"keep": 0.5, "structure": "lowrank", "tokens": 64 * WINDOWS, "window": 64}


def job_of(folder: Path, **choices: Any) -> Job:
    """A job on a made-up model, all of whose layers are compressed, low rank."""
    options = Options(**{**CHOICES, "allow_slower": True, "outputs": "equal", **choices})
    return prepare_job(folder, options, [str(TEXT)])


def entered(job: Job) -> tuple[Any, Streams]:
    """The calls of all blocks, and the streams before the first."""
    assert job.windows is not None
    trace, hidden = job.walker.enter(job.windows.ids.split(1), torch.float32)
    return trace, Streams(hidden, hidden)


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_what_the_finished_block_gives(
    family: str, refine: int, tmp_path: Path
) -> None:
    job = job_of(make_folder(tmp_path, family), refine=refine)
    trace, streams = entered(job)
    compressor = BlockCompressor(job.options, torch.float32, BlockProgress())
    for index in range(len(job.walker.blocks)):
        calls, entry = trace.of_block(index), list(streams.compressed)
        block = job.walker.load_block(index)
        before = [run_calls(block, calls, hidden) for hidden in streams.dense]
        leaving = torch.eye(entry[0].shape[-1]) if refine else None
        plans = job.plan.of_block(index)
        outcome = compressor.run(block, calls, plans, streams, {}, leaving)
        assert all(map(torch.equal, before, streams.dense))
        after = [run_calls(outcome.module, calls, hidden) for hidden in entry]
        assert all(map(torch.equal, after, streams.compressed))
        assert not any("forward" in vars(module) for module in outcome.module.modules())
        job.walker.release_block(index)


def test_finished_attention_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice to see what is what; dense, for its last layer, and once more with that replaced."""
    job = job_of(make_folder(tmp_path, "llama"))
    trace, streams = entered(job)
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(*args: Tensor, **kwargs: Any) -> Tensor:
        calls.append(args)
        return attend(*args, **kwargs)

    block = job.walker.load_block(0)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    compressor = BlockCompressor(job.options, torch.float32, BlockProgress())
    compressor.run(block, trace.of_block(0), job.plan.of_block(0), streams, {})
    assert len(calls) == 2 + 3 * WINDOWS


class Child(nn.Module):
    """Two layers, the second of which is what changes; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """The layers in turn."""
        self.calls += 1
        return self.last(self.first(x))


class Named(NamedTuple):
    """What other models return."""

    hidden: Tensor


class Block(nn.Module):
    """Two children and a layer, and whatever it does with them."""

    def __init__(self, use: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.layer = Child(), Child(), nn.Linear(4, 4, bias=False)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        """What is done with the children."""
        return self.use(self, x)


def in_place(block: Block, x: Tensor) -> Tensor:
    """The child's output is written to."""
    y = block.a(x)
    y += x
    return block.layer(y)


def beside(block: Block, x: Tensor) -> Tensor:
    """What the second child reads is not done when the first one is."""
    return block.b(x + block.layer(block.a(x)))


def wrapped(block: Block, x: Tensor) -> Tensor:
    """The child's output is in something that cannot be watched, and written to."""
    y = Named(block.a(x)).hidden
    y += x
    return block.layer(y)


USES: dict[str, tuple[Callable[[Block, Tensor], Tensor], int]] = {
    "as attention": (lambda block, x: block.layer(x + block.a(x)), 1),
    "changed in place": (in_place, 3),
    "wrapped": (wrapped, 3),
    "before and behind": (lambda block, x: block.a(block.layer(block.a(x))), 6),
    "behind alone": (beside, 1),
}


@torch.no_grad()
@pytest.mark.parametrize("use", USES)
def test_only_what_is_final_is_given_again(use: str) -> None:
    """The layer looked at changes after the pass, like the layers of a child not called yet."""
    block, x = Block(USES[use][0]), torch.arange(8.0).view(2, 4)
    with count_calls(block, ["a", "b"]) as counts:
        block(x)
    block.a.calls = 0
    replay = Replay(block, [name for name in ("a", "b") if counts[name] == 1])
    for _ in range(2):
        with replay.remembering(["a", "b"], 0, block.layer, x):
            block(x)
        block.layer.weight.mul_(2.0)
        block.b.last.weight.mul_(2.0)
    with replay.again(0):
        found = block(x)
    assert block.a.calls == USES[use][1]
    assert torch.equal(found, block(x))
    with replay.again(1):
        assert torch.equal(block(2 * x), block(2 * x))


@torch.no_grad()
@pytest.mark.parametrize("why", ["larger", "a class of its own", "inference"])
def test_outputs_that_cannot_be_kept_are_computed_again(why: str) -> None:
    def forward(self: Child, x: Tensor) -> Any:
        self.calls += 1
        return {"larger": (x, x.new_zeros(1000)), "inference": 2 * x}.get(why, Named(x))

    block, x = Block(lambda block, x: block.layer(first_tensor(block.a(x)))), torch.ones(2, 4)
    block.a.forward = MethodType(forward, block.a)  # type: ignore[method-assign]
    replay = Replay(block, ["a"])
    with torch.inference_mode(why == "inference"):
        for window in (0, 0):
            with replay.remembering(["a"], window, block.layer, x):
                block(x)
    assert block.a.calls == 2


@torch.no_grad()
def test_an_instances_own_forward_is_put_back() -> None:
    block, x = Block(lambda block, x: block.layer(block.a(x))), torch.ones(2, 4)
    block.a.forward = MethodType(lambda self, x: 3 * x, block.a)  # type: ignore[method-assign]
    expected, replay = block(x), Replay(block, ["a"])
    with replay.remembering(["a"], 0, block.layer, x):
        block(x)
    with replay.again(0):
        assert torch.equal(block(x), expected)
    assert torch.equal(block(x), expected)
    assert torch.equal(block.a(x), 3 * x)
