"""What a block's children gave is given again: the same bits, and less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blastnn.compress.block import BlockCompressor, BlockProgress
from blastnn.compress.job import Job, prepare_job
from blastnn.compress.moments import run_calls
from blastnn.compress.options import Options
from blastnn.compress.replay import Replay
from blastnn.compress.streams import Streams
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


class Doubled(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Twice its input."""
        self.calls += 1
        return 2 * x


class Parent(nn.Module):
    """A block with one child, and whatever it does with that."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.child, self.use = Doubled(), use

    def forward(self, x: Tensor) -> Tensor:
        """What is done with the child."""
        return self.use(self.child, x)


@pytest.mark.parametrize(
    ("use", "computed"),
    [
        (lambda child, x: child(x) + 1, 1),
        (lambda child, x: child(x).add_(1), 3),  # changed in place
        (lambda child, x: child(x) + child(3 * x), 6),
    ],
)
def test_only_what_is_certain_is_given_again(
    use: Callable[[nn.Module, Tensor], Tensor], computed: int
) -> None:
    block, x = Parent(use), torch.arange(3.0)
    replay, expected = Replay(block), use(Doubled(), x)
    for done in (["child"], ["child"], []):
        with replay.of(done, 0):
            assert torch.equal(block(x), expected)
    assert block.child.calls == computed
    with replay.of([], 1):
        assert torch.equal(block(2 * x), use(Doubled(), 2 * x))
