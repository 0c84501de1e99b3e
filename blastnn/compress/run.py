"""The main job, from disk to disk: read a block, calibrate, factorise, write, free, next.

At any moment memory holds one block, dense and compressed, and the hidden states of the
calibration text before it; never the model.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from blastnn.compress.block import BlockCompressor, LayerRecord, Streams, fit_layer
from blastnn.compress.journal import Journal, Lock
from blastnn.compress.memory_use import PeakMemory, give_memory_back
from blastnn.compress.moments import MomentSum
from blastnn.compress.options import DTYPES, Options
from blastnn.compress.plan import LayerPlan, Plan, make_plan, plan_from_file
from blastnn.compress.walker import Walker
from blastnn.compress.writer import Writer
from blastnn.errors import CalibrationError, ResumeError
from blastnn.evaluate.probe import digest
from blastnn.evaluate.text import Windows, read_text, spread_windows
from blastnn.linear import StructuredLinear
from blastnn.models.demo import CALIBRATION
from blastnn.models.source import DEMO, ModelFolder, Say, open_model
from blastnn.models.walk import StopForward, Trace, run_tail
from blastnn.version import __version__

NO_TEXT_WINDOW = 128


class Progress:
    """What a job tells while it runs; the base class is silent."""

    def say(self, message: str) -> None:
        """A remark, such as a download."""

    def planned(self, plan: Plan, finished: Sequence[LayerRecord]) -> None:
        """The job is about to start, or to go on behind the ``finished`` layers."""

    def layer(self, plan: LayerPlan, record: LayerRecord) -> None:
        """A layer is done."""

    def block(self, index: int, total: int) -> None:
        """A block is written."""


@dataclass
class Job:
    """A prepared compression: everything is known but no weight has been read."""

    folder: ModelFolder
    options: Options
    walker: Walker
    plan: Plan
    windows: Windows | None
    dtype: torch.dtype
    progress: Progress = field(default_factory=Progress)

    @property
    def head(self) -> LayerPlan | None:
        """The output layer, if it is to be compressed."""
        outside = [layer for layer in self.plan.compressed if layer.block is None]
        return outside[0] if outside else None

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output."""
        return {
            "model": self.folder.tensors.sha256(),
            "options": self.options.to_json(),
            "plan": self.plan.to_json()["layers"],
            "calibration": None if self.windows is None else self.windows.sha256,
            "blastnn": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }

    def check_ids(self) -> Tensor:
        """One window of token ids with which the written model is compared to the one computed."""
        if self.windows is not None:
            return self.windows.ids[:1]
        ids = torch.arange(NO_TEXT_WINDOW) * 37 % self.folder.config.vocab_size
        return ids[None]

    def output_bytes(self) -> int:
        """Bytes of the tensors that will be written."""
        before, after = self.plan.target_params
        return (self.plan.model_params - before + after) * self.dtype.itemsize

    def memory_bytes(self) -> dict[str, int]:
        """The parts of the peak memory that can be known in advance."""
        sizes = [
            sum(math.prod(_shape(self.walker.model, n)) for n in self.walker.names_of(i))
            for i in range(len(self.walker.blocks))
        ]
        outside = sum(math.prod(_shape(self.walker.model, n)) for n in self.walker.outside)
        widest = max((layer.in_features for layer in self.plan.compressed), default=0)
        hidden = self.folder.config.hidden_size
        tokens = 0 if self.windows is None else self.windows.ids.numel()
        return {
            "block, dense and compressed": 2 * max(sizes) * 4,
            "hidden states of the calibration text": 2 * tokens * hidden * 4,
            "second moments and their copies": 6 * widest * widest * 8 if tokens else 0,
            "embeddings, while entering": outside * 4,
        }


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    owner, _, leaf = name.rpartition(".")
    return tuple(getattr(model.get_submodule(owner), leaf).shape)


def prepare_job(
    model: str | Path,
    options: Options,
    calibration: Sequence[str | Path] | None,
    plan_file: Path | None = None,
    progress: Progress | None = None,
) -> Job:
    """Find the model, plan its layers and cut the calibration text; reads no weight.

    Args:
        model: as for ``open_model``.
        options: what to do.
        calibration: text files; None means the default of ``demo``; empty means no data.
        plan_file: a plan written earlier, instead of the uniform one.
        progress: told about downloads.

    Raises:
        BlastnnError: says what is wrong with which input.
    """
    progress = progress or Progress()
    folder = open_model(model, progress.say)
    walker = Walker(folder)
    plan = make_plan(walker.model, walker.block_names, options, walker.head, walker.loader.tied)
    if plan_file is not None:
        plan = plan_from_file(plan, plan_file, walker.head)
    windows = calibration_windows(folder, options, calibration, progress.say)
    return Job(folder, options, walker, plan, windows, _output_dtype(folder, options), progress)


def calibration_windows(
    folder: ModelFolder,
    options: Options,
    calibration: Sequence[str | Path] | None,
    say: Say = lambda _: None,
) -> Windows | None:
    """The calibration text as windows of tokens; None where none is wanted.

    Raises:
        CalibrationError: a text is needed but not given, or cannot be used.
    """
    if calibration is None:
        if folder.name != DEMO:
            raise CalibrationError(
                "give the text to calibrate with (--calibration FILE, repeatable), or "
                "--calibration none for a data-free factorisation"
            )
        calibration = CALIBRATION
    if not calibration:
        return None
    texts = [read_text(source) for source in calibration]
    window = window_length(folder, options.window)
    return spread_windows(texts, folder.tokenizer(), window, options.tokens)


def window_length(folder: ModelFolder, wanted: int) -> int:
    """The window length, at most what the model's positions allow."""
    longest = getattr(folder.config, "max_position_embeddings", None) or wanted
    if folder.config.model_type == "roberta":
        longest -= 2  # positions start behind the padding index
    return min(wanted, longest)


def _output_dtype(folder: ModelFolder, options: Options) -> torch.dtype:
    if options.dtype is not None:
        return DTYPES[options.dtype]
    stored = getattr(folder.config, "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype == stored), torch.float32)


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
    with Lock(output), PeakMemory() as memory:
        if journal.weights_done:
            return RunOutcome(journal, None, already_finished=True)
        _check_space(job, output)
        _Run(job, journal).all()
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


class _Run:
    """One sitting of a job."""

    def __init__(self, job: Job, journal: Journal) -> None:
        self.job, self.journal, self.walker = job, journal, job.walker
        self.writer = Writer(journal.output, job.walker, job.dtype, job.head is not None)
        self.compressor = BlockCompressor(job.options, job.dtype, job.progress.layer)

    def all(self) -> None:
        """Blocks, head, rest, configuration."""
        start, counted = time.perf_counter(), sum(self.journal.seconds.values())
        job, journal = self.job, self.journal
        job.progress.planned(job.plan, journal.records)
        trace, check_trace, streams, check = self._enter()
        for index in range(journal.finished, len(self.walker.blocks)):
            check = self._block(index, trace, check_trace, streams, check)
            job.progress.block(index, len(self.walker.blocks))
        head = self._head(trace, streams) if job.head is not None else None
        self._probe(check_trace, check, head)
        self.writer.write_rest()
        self.writer.finish(self._specs())
        known = sum(journal.seconds.values()) - counted
        journal.add_seconds("other", time.perf_counter() - start - known)
        journal.finish_weights()

    def _enter(self) -> tuple[Trace, Trace, Streams | None, Tensor]:
        """The arguments of all blocks, and the hidden states where this sitting starts."""
        job, started = self.job, time.perf_counter()
        resumed = self.journal.finished > 0
        check_trace, checks = self.walker.enter([job.check_ids()], job.dtype)
        trace, streams, check = check_trace, None, checks[0]
        if job.windows is not None:
            ids = job.windows.ids[:1] if resumed else job.windows.ids
            trace, hidden = self.walker.enter(ids.split(1), torch.float32)
            streams = Streams(hidden, hidden)
        if resumed:
            streams, check = self.journal.load_states()
        self.journal.add_seconds("forward", time.perf_counter() - started)
        return trace, check_trace, streams, check

    def _block(
        self,
        index: int,
        trace: Trace,
        check_trace: Trace,
        streams: Streams | None,
        check: Tensor,
    ) -> Tensor:
        """Compress and write one block; the check window behind it."""
        journal = self.journal
        dense = self.walker.load_block(index)
        plans = self.job.plan.of_block(index)
        outcome = self.compressor.run(dense, trace.of_block(index), plans, streams)
        started = time.perf_counter()
        check = _run_written(outcome.module, check_trace.of_block(index), check, self.job.dtype)
        journal.add_seconds("forward", outcome.forward_seconds + time.perf_counter() - started)
        journal.add_seconds("factorise", outcome.factorise_seconds)
        started = time.perf_counter()
        self.writer.write_block(index, outcome.module)
        self.walker.release_block(index)
        journal.records += outcome.records
        journal.add_seconds("other", time.perf_counter() - started)
        journal.finish_part(streams, check)
        del dense, outcome
        give_memory_back()
        return check

    def _head(self, trace: Trace, streams: Streams | None) -> StructuredLinear:
        """Compress the output layer, whose inputs lie behind the last block."""
        job = self.job
        assert job.head is not None
        started = time.perf_counter()
        self.walker.loader.load(self.walker.outside)
        layer = self.walker.model.get_submodule(job.head.name)
        moments = None
        if streams is not None:
            total = MomentSum()
            for dense, compressed in zip(streams.dense, streams.compressed, strict=True):
                inputs = [self._head_input(layer, trace, hidden) for hidden in (compressed, dense)]
                total.add(*inputs)
            moments = total.finish(job.head.name)
        gathered = time.perf_counter()
        fitted, fields = fit_layer(layer, job.head, moments, job.options, job.dtype)
        self.walker.loader.release(self.walker.outside)
        seconds = time.perf_counter() - gathered
        record = LayerRecord(job.head.name, "compressed", seconds=seconds, **fields)
        self.journal.add_seconds("forward", gathered - started)
        self.journal.add_seconds("factorise", seconds)
        self.writer.write_head(job.head.name, fitted)
        self.journal.records = [r for r in self.journal.records if r.name != job.head.name]
        self.journal.records.append(record)
        job.progress.layer(job.head, record)
        return fitted

    @torch.no_grad()
    def _head_input(self, layer: nn.Module, trace: Trace, hidden: Tensor) -> Tensor:
        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise StopForward(args[0])

        assert self.job.windows is not None
        model = self.walker.model
        hook = layer.register_forward_pre_hook(stop)
        run: Callable[[], Any] = partial(model, self.job.windows.ids[:1], use_cache=False)
        try:
            run_tail(run, self.walker.blocks, trace.wrap, hidden)
        except StopForward as stopped:
            return stopped.tensor.reshape(-1, stopped.tensor.shape[-1])
        finally:
            hook.remove()
        raise CalibrationError(f"the forward pass never reached {self.job.head}")

    def _probe(self, trace: Trace, check: Tensor, head: StructuredLinear | None) -> None:
        """The output of the compressed model as computed here, for the loaded one to be held to."""
        ids, started = self.job.check_ids(), time.perf_counter()
        replacement = None
        if head is not None and self.job.head is not None:
            replacement = (self.job.head.name, head.to(self.job.dtype))
        output = self.walker.leave(trace, check, ids, self.job.dtype, replacement)
        self.journal.add_seconds("forward", time.perf_counter() - started)
        self.journal.probe = {
            "ids": ids[0].tolist(),
            "positions": output.shape[1],
            "logits_sha256": digest(output),
        }

    def _specs(self) -> dict[str, Any]:
        done = {record.name for record in self.journal.records if record.status == "compressed"}
        return {layer.name: layer.spec for layer in self.job.plan.compressed if layer.name in done}


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
