"""The main job, from disk to disk: read a block, calibrate, factorise, write, free, next.

At any moment memory holds one block, dense and compressed, the hidden states of the calibration
text before it, and a few as large inside it; never the model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blastnn.checkpoint import StoredLayer
from blastnn.compress.block import BlockCompressor
from blastnn.compress.head import compress_head
from blastnn.compress.job import Job
from blastnn.compress.journal import Journal, Lock
from blastnn.compress.measured import MEASUREMENT, Settled, forget, settle
from blastnn.compress.memory_use import PeakMemory, give_memory_back, objects_at_rest
from blastnn.compress.streams import Streams
from blastnn.compress.writer import Writer
from blastnn.errors import ResumeError
from blastnn.evaluate.probe import digest
from blastnn.linear import StructuredLinear
from blastnn.models.walk import Trace


@dataclass(frozen=True)
class RunOutcome:
    """What a job left behind, besides the model."""

    journal: Journal
    peak_anonymous_bytes: int | None
    already_finished: bool


def run_job(job: Job, output: Path, resume: bool = False) -> RunOutcome:
    """Compress from disk to disk.

    Raises:
        ResumeError: the output folder is taken, or holds another job.
        OSError: the disk is full or the folder not writable; what was finished stays resumable.
    """
    journal = Journal.open(output, job.identity(), resume)
    with Lock(output), objects_at_rest(), PeakMemory() as memory:
        settled = settle(job, journal)
        job.plan = settled.plan
        if journal.weights_done:
            return RunOutcome(journal, None, already_finished=True)
        _check_space(job, output)
        _Run(job, journal, settled).all()
        return RunOutcome(journal, memory.peak, already_finished=False)


def _check_space(job: Job, output: Path) -> None:
    states = job.memory_bytes()["hidden states of the calibration text"]
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    needed = max(job.output_bytes() + 2 * states - written, 0)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ResumeError(
            f"{output} needs about {needed / 2**20:.0f} MiB, but its disk has "
            f"{free / 2**20:.0f} MiB free; free some space or choose another folder"
        )


@dataclass
class _Front:
    """Where a sitting has come to: how blocks are called, and the hidden states before the next.

    ``check`` is the job's check window in the compressed model, in the written dtype;
    ``check_trace`` holds the calls that go with it.
    """

    trace: Trace
    check_trace: Trace
    streams: Streams | None
    check: Tensor


class _Run:
    """One sitting of a job."""

    def __init__(self, job: Job, journal: Journal, settled: Settled) -> None:
        self.job, self.journal, self.walker = job, journal, job.walker
        self.settled = settled
        self.writer = Writer(journal.output, job.walker, job.dtype, job.head is not None)
        self.compressor = BlockCompressor(job.options, job.dtype, job.progress)

    def all(self) -> None:
        """Blocks, head, rest, configuration."""
        start, counted = time.perf_counter(), sum(self.journal.seconds.values())
        job, journal = self.job, self.journal
        job.progress.planned(job.plan, journal.records)
        front = self._enter()
        for index in range(journal.finished, len(self.walker.blocks)):
            self._block(index, front)
            job.progress.block(index, len(self.walker.blocks))
        head = self._head(front) if job.head is not None else None
        self._probe(front, head)
        self.writer.write_rest()
        self.writer.finish(self._layers())
        known = sum(journal.seconds.values()) - counted
        journal.add_seconds("other", time.perf_counter() - start - known)
        journal.finish_weights()
        forget(journal.folder / MEASUREMENT)

    def _enter(self) -> _Front:
        """The arguments of all blocks, and the hidden states where this sitting starts."""
        job, started = self.job, time.perf_counter()
        resumed = self.journal.finished > 0
        check_trace, checks = self.walker.enter([job.check_ids()], job.dtype)
        front = _Front(check_trace, check_trace, None, checks[0])
        if job.windows is not None:
            ids = job.windows.ids[:1] if resumed else job.windows.ids
            front.trace, hidden = self.walker.enter(ids.split(1), torch.float32)
            front.streams = Streams(hidden, hidden)
        if resumed:
            front.streams, front.check = self.journal.load_states()
        self.journal.add_seconds("forward", time.perf_counter() - started)
        return front

    def _block(self, index: int, front: _Front) -> None:
        """Compress and write one block, and move the front behind it."""
        journal = self.journal
        dense = self.walker.load_block(index)
        plans = self.job.plan.of_block(index)
        outcome = self.compressor.run(
            dense,
            front.trace.of_block(index),
            plans,
            front.streams,
            self.settled.outputs(index),
            self.settled.block_weight(index),
        )
        started = time.perf_counter()
        calls = front.check_trace.of_block(index)
        front.check = _run_written(outcome.module, calls, front.check, self.job.dtype)
        journal.add_seconds("forward", outcome.forward_seconds + time.perf_counter() - started)
        journal.add_seconds("factorise", outcome.factorise_seconds)
        if outcome.refined is not None:
            journal.refined[self.walker.blocks[index].name] = asdict(outcome.refined)
            journal.add_seconds("refine", outcome.refine_seconds)
        started = time.perf_counter()
        self.writer.write_block(index, outcome.module)
        self.walker.release_block(index)
        journal.records += outcome.records
        journal.add_seconds("other", time.perf_counter() - started)
        journal.finish_part(front.streams, front.check)
        del dense, outcome
        give_memory_back()

    def _head(self, front: _Front) -> StructuredLinear:
        """Compress and write the output layer."""
        job, journal = self.job, self.journal
        assert job.head is not None
        outcome = compress_head(job, front.trace, front.streams)
        journal.add_seconds("forward", outcome.forward_seconds)
        journal.add_seconds("factorise", outcome.record.seconds or 0.0)
        self.writer.write_head(job.head.name, outcome.layer)
        journal.records = [r for r in journal.records if r.name != job.head.name]
        journal.records.append(outcome.record)
        job.progress.layer(job.head, outcome.record)
        return outcome.layer

    def _probe(self, front: _Front, head: StructuredLinear | None) -> None:
        """The output of the compressed model as computed here, for the loaded one to be held to."""
        ids, started = self.job.check_ids(), time.perf_counter()
        replacement = None
        if head is not None and self.job.head is not None:
            replacement = (self.job.head.name, head.to(self.job.dtype))
        output = self.walker.leave(front.check_trace, front.check, ids, self.job.dtype, replacement)
        self.journal.add_seconds("forward", time.perf_counter() - started)
        self.journal.probe = {
            "ids": ids[0].tolist(),
            "positions": output.shape[1],
            "logits_sha256": digest(output),
        }

    def _layers(self) -> dict[str, StoredLayer]:
        done = {record.name for record in self.journal.records if record.status == "compressed"}
        how = self.job.options.quantization
        return {
            layer.name: StoredLayer(layer.spec, how, layer.shared)
            for layer in self.job.plan.compressed
            if layer.spec is not None and layer.name in done
        }


@torch.no_grad()
def _run_written(
    block: nn.Module, calls: Sequence[Any], hidden: Tensor, dtype: torch.dtype
) -> Tensor:
    """The check window through a block exactly as it is written, in the written dtype."""
    if dtype != torch.float32:
        block = block.to(dtype)
    for call in calls:
        hidden = call.run(block, hidden)
    return hidden
