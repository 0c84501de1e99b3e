"""What a sweep is asked to do, checked before anything is opened; then its model and texts found.

Nothing here reads a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from blastnn.compress.job import calibration_windows
from blastnn.compress.options import Options
from blastnn.compress.planning import find_targets
from blastnn.compress.report import DEFAULT_TOKENS
from blastnn.compress.walker import Walker
from blastnn.errors import CalibrationError, PlanError
from blastnn.evaluate.tasks import check_request
from blastnn.evaluate.text import Windows, first_windows, read_text
from blastnn.models.context import window_length
from blastnn.models.demo import HELD_OUT
from blastnn.models.source import DEMO, ModelFolder, Say, open_model
from blastnn.sweep.methods import METHODS, REFERENCE, Method, method_named
from blastnn.version import __version__


@dataclass(frozen=True)
class Cell:
    """One combination: a method and the share that it is asked to keep."""

    method: Method
    options: Options
    calibrated: bool

    @property
    def name(self) -> str:
        """Of the cell's entry and of its folder."""
        return f"{self.method.name}-{self.options.keep}"


@dataclass(frozen=True)
class Sweep:
    """Methods, shares to keep, and what all cells have in common.

    Attributes:
        model: as for ``open_model``.
        methods: names from ``METHODS``; the table has them in this order.
        keeps: shares of the parameters to keep, each in (0, 1].
        common: all other choices; ``keep`` and what the methods set count for nothing.
        calibration: text files; None is the default of ``demo``, an empty sequence means no data.
        texts: text files to score on; None is the default of ``demo``.
        scored_tokens: how many tokens of each text are scored.
        tasks: zero-shot tasks to score as well (``blastnn.evaluate.tasks``); causal models alone.
        limit: rows of each task; None for all.
        reference: the method that others are divided by; None is ``whitened-svd`` where it is
            among the methods.

    Raises:
        PlanError: an unknown method, a share out of range, nothing to do, or a method that needs
            the calibration text that is not wanted.
        MeasurementError: a task that is unknown or cannot be scored here.
    """

    model: str | Path
    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    common: Options
    calibration: Sequence[str | Path] | None = None
    texts: Sequence[str | Path] | None = None
    scored_tokens: int = DEFAULT_TOKENS
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        if not self.methods or not self.keeps:
            raise PlanError(
                f"give at least one method (--method NAME, of {', '.join(METHODS)}) and one share "
                "to keep (--keep 0.8)"
            )
        if self.scored_tokens < 1:
            raise PlanError(f"scored_tokens must be at least 1, but is {self.scored_tokens}")
        if self.reference is not None and self.reference not in self.methods:
            raise PlanError(
                f"the reference must be one of the methods {', '.join(self.methods)}, but is "
                f"{self.reference!r}"
            )
        if self.tasks:
            check_request(self.tasks, self.limit)
        needy = [cell.method.name for cell in self.cells if cell.calibrated]
        if needy and self.calibration is not None and not self.calibration:
            raise PlanError(
                f"{needy[0]} is fitted to data; give a calibration text, or leave that method out"
            )

    @property
    def cells(self) -> list[Cell]:
        """All combinations in the order in which they run: by share, then by method."""
        return [
            Cell(method, method.options(self.common, keep), method.calibrated)
            for keep in dict.fromkeys(self.keeps)
            for method in map(method_named, dict.fromkeys(self.methods))
        ]

    @property
    def compared_with(self) -> str | None:
        """The method that others are divided by, if there is one."""
        return self.reference or (REFERENCE if REFERENCE in self.methods else None)


@dataclass(frozen=True)
class Prepared:
    """A sweep with its model found and its texts cut; ``targets`` are names with parameters."""

    sweep: Sweep
    folder: ModelFolder
    targets: dict[str, int]
    calibration: Windows | None
    texts: list[Windows]

    def identity(self) -> dict[str, Any]:
        """What all cells have in common: a folder can be gone on with only if all of it is equal.

        Methods, shares and the reference are not in it, so that a sweep can grow.
        """
        common = self.sweep.common.to_json()
        return {
            "model": self.folder.tensors.sha256(),
            "options": {key: value for key, value in common.items() if key != "keep"},
            "calibration": None if self.calibration is None else self.calibration.sha256,
            "texts": [windows.sha256 for windows in self.texts],
            "tasks": {"names": list(self.sweep.tasks), "limit": self.sweep.limit},
            "blastnn": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }


def prepare(sweep: Sweep, say: Say = lambda _: None) -> Prepared:
    """Find the model and cut all texts.

    Raises:
        BlastnnError: says what is wrong with which input.
    """
    folder = open_model(sweep.model, say)
    walker = Walker(folder)
    found = find_targets(walker.model, walker.block_names, sweep.common.targets, walker.head)
    needed = any(cell.calibrated for cell in sweep.cells)
    # Also where no cell needs it yet: a sweep can grow.
    wanted = needed or sweep.calibration is not None or folder.name == DEMO
    calibration = calibration_windows(folder, sweep.common, sweep.calibration) if wanted else None
    return Prepared(
        sweep=sweep,
        folder=folder,
        targets={info.name: info.num_params for info in found},
        calibration=calibration,
        texts=_scored(sweep, folder),
    )


def _scored(sweep: Sweep, folder: ModelFolder) -> list[Windows]:
    """The windows to score, one entry a text."""
    names = sweep.texts
    if names is None:
        names = HELD_OUT if folder.name == DEMO else ()
    if not names:
        raise CalibrationError("give a text to score on (--text FILE, repeatable)")
    tokenizer, window = folder.tokenizer(), window_length(folder.config, sweep.common.window)
    texts = [read_text(name) for name in dict.fromkeys(names)]
    return [first_windows(text, tokenizer, window, sweep.scored_tokens) for text in texts]
