"""A compression prepared: drafted, and its calibration text cut into windows.

Nothing here reads a weight, so that a wrong input fails before the long part starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from blastnn.compress.block import BlockProgress, LayerRecord
from blastnn.compress.draft import Draft, draft_job
from blastnn.compress.options import Options
from blastnn.compress.plan import Plan
from blastnn.compress.refine import require_windows
from blastnn.errors import CalibrationError
from blastnn.evaluate.text import Windows, read_text, spread_windows
from blastnn.models.context import window_length
from blastnn.models.demo import CALIBRATION
from blastnn.models.source import DEMO, ModelFolder
from blastnn.version import __version__

NO_TEXT_WINDOW = 128


class Progress(BlockProgress):
    """What a job tells while it runs; the base class is silent."""

    def say(self, message: str) -> None:
        """A remark, such as a download."""

    def planned(self, plan: Plan, finished: Sequence[LayerRecord]) -> None:
        """The job is about to start, or to go on behind the ``finished`` layers."""

    def measured(self, done: int, total: int) -> None:
        """The measurement of how much layers matter has done one more of its steps."""

    def block(self, index: int, total: int) -> None:
        """A block is written."""


@dataclass
class Job(Draft):
    """A prepared compression: everything is known but no weight has been read.

    Attributes:
        windows: the calibration text; None without data.
        progress: told what happens.
        measurements: a folder in which jobs that would measure the same find what the first of
            them did; without one, each measures for itself.

    Raises:
        PlanError: there is too little text for what is asked.
    """

    windows: Windows | None
    progress: Progress = field(default_factory=Progress)
    measurements: Path | None = None

    def __post_init__(self) -> None:
        require_windows(self.options, 0 if self.windows is None else len(self.windows.ids))

    @property
    def tokens(self) -> int:
        """How many tokens there are to calibrate with."""
        return 0 if self.windows is None else self.windows.ids.numel()

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output.

        Not ``strict``: it decides whether there is one, and a job that was refused goes on without.
        """
        return {
            "model": self.folder.tensors.sha256(),
            "options": {k: v for k, v in self.options.to_json().items() if k != "strict"},
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
        return made_up_ids(self.folder.config)


def prepare_job(
    model: str | Path,
    options: Options,
    calibration: Sequence[str | Path] | None,
    plan_file: Path | None = None,
    progress: Progress | None = None,
) -> Job:
    """Draft the job and cut its calibration text; reads no weight.

    Args:
        model, options, plan_file: as for ``draft_job``.
        calibration: text files; None means the default of ``demo``; empty means no data.
        progress: told about downloads, and later about the job.

    Raises:
        BlastnnError: says what is wrong with which input.
    """
    progress = progress or Progress()
    draft = draft_job(model, options, plan_file, progress.say)
    windows = calibration_windows(draft.folder, options, calibration)
    return Job(**vars(draft), windows=windows, progress=progress)


def calibration_windows(
    folder: ModelFolder,
    options: Options,
    calibration: Sequence[str | Path] | None,
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
    window = window_length(folder.config, options.window)
    return spread_windows(texts, folder.tokenizer(), window, options.tokens)


def made_up_ids(config: PreTrainedConfig) -> Tensor:
    """A window of token ids ``(1, window)`` for a check where there is no text."""
    length = window_length(config, NO_TEXT_WINDOW)
    return (torch.arange(length) * 37 % config.vocab_size)[None]
