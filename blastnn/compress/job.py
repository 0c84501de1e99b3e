"""A compression prepared: the model found, its layers planned, its calibration text cut.

Nothing here reads a weight, so that a wrong input fails before the long part starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from blastnn.compress.block import LayerRecord
from blastnn.compress.options import DTYPES, Options
from blastnn.compress.plan import LayerPlan, Plan, make_plan, plan_from_file
from blastnn.compress.walker import Walker
from blastnn.errors import CalibrationError
from blastnn.evaluate.text import Windows, read_text, spread_windows
from blastnn.models.demo import CALIBRATION
from blastnn.models.source import DEMO, ModelFolder, Say, open_model
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
