"""``run_sweep``: every cell in turn; each is a job from disk to disk, scored, and then let go.

A cell that fails is recorded, and the sweep continues. The same call again goes on where the last
one stopped: finished cells are passed over, a cell that was stopped half-way is resumed by its own
journal, and failed cells are tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blastnn.compress.job import Progress
from blastnn.compress.journal import FOLDER, Lock
from blastnn.compress.measured import forget
from blastnn.compress.report import environment
from blastnn.errors import BlastnnError, ResumeError
from blastnn.files import make_folder, write_text
from blastnn.sweep.cell import CellRunner, let_go
from blastnn.sweep.ledger import FAILED, FINISHED, Ledger
from blastnn.sweep.page import PAGE, render
from blastnn.sweep.picture import PICTURE, draw
from blastnn.sweep.request import Cell, Prepared, Sweep, prepare
from blastnn.sweep.rows import summarize
from blastnn.sweep.scoring import Scorer
from blastnn.sweep.zero_shot import ZeroShot

CELLS, MEASUREMENTS = "cells", "measured"
# What a cell can fail with: our own errors, the disk, and whatever torch raises (numerical
# breakdown, lack of memory), and a perplexity beyond all numbers. A sweep that runs overnight must
# not end with the first of them.
FAILURES = (BlastnnError, OSError, RuntimeError, MemoryError, OverflowError)


class SweepProgress:
    """What a sweep tells while it runs; the base class is silent."""

    def say(self, message: str) -> None:
        """A remark, such as a download."""

    def job(self, cell: Cell) -> Progress:
        """A cell is about to run; returns what its job tells."""
        return Progress()

    def done(self, entry: dict[str, Any], number: int, total: int, fresh: bool) -> None:
        """A cell came to an end, or had its figures before."""


def run_sweep(
    sweep: Sweep,
    output: str | Path,
    *,
    keep_models: bool = False,
    progress: SweepProgress | None = None,
) -> dict[str, Any]:
    """Run all cells that have no figures yet, and write ``sweep.json``, ``.md`` and ``.svg``.

    Args:
        sweep: what to do.
        output: a new or empty folder, or one that holds the same sweep; methods and shares may be
            added to it.
        keep_models: whether the compressed models stay below ``output``; reports always do.
        progress: told what happens.

    Returns:
        What ``sweep.json`` holds: the ``dense`` scores, ``cells`` by name, and the ``table``.

    Raises:
        BlastnnError: the sweep cannot start; says which input is wrong and what to do.
        OSError: the disk is full or not writable; what was finished stays.
    """
    progress, folder = progress or SweepProgress(), Path(output)
    prepared = prepare(sweep, progress.say)
    make_folder(folder / FOLDER)  # for the lock
    with Lock(folder):
        return _Run(prepared, folder, keep_models, progress).all()


@dataclass
class _Run:
    """One sitting of a sweep."""

    prepared: Prepared
    output: Path
    keep_models: bool
    progress: SweepProgress

    def all(self) -> dict[str, Any]:
        """The dense scores, then all cells."""
        cells = self.prepared.sweep.cells
        ledger = Ledger.open(self.output, self.prepared.identity())
        for cell in cells:
            _refuse_another(ledger, cell)
        measurements = self.output / MEASUREMENTS
        runner = CellRunner(self.prepared, self._scorer(ledger), measurements)
        ledger.about = self._about(runner.scorer)
        values = self._save(ledger)
        for number, cell in enumerate(cells, 1):
            fresh = not ledger.finished(cell.name)
            if fresh:
                ledger.cells[cell.name] = self._entry(cell, runner)
                values = self._save(ledger)
            if ledger.finished(cell.name) and not self.keep_models:
                let_go(self._folder(cell))
            self.progress.done(ledger.cells[cell.name], number, len(cells), fresh)
        if all(ledger.finished(cell.name) for cell in cells):
            forget(measurements)
        return values

    def _scorer(self, ledger: Ledger) -> Scorer:
        known = ledger.about.get("dense")
        if known is None:
            self.progress.say("scoring the dense model")
        sweep, folder = self.prepared.sweep, self.prepared.folder.path
        tasks = ZeroShot(sweep.tasks, sweep.limit, folder, ledger.about.get("dense_tasks"))
        return Scorer(folder, self.prepared.texts, known, tasks)

    def _about(self, scorer: Scorer) -> dict[str, Any]:
        folder, given = self.prepared.folder, self.prepared.calibration
        calibration = given and {"sources": given.sources, "tokens": given.ids.numel()}
        return {
            "model": {"name": folder.name, "note": folder.note},
            "targets": sum(self.prepared.targets.values()),
            "dense": scorer.dense,
            "dense_tasks": scorer.zero_shot.dense,
            "protocol": scorer.protocol,
            "calibration": calibration,
            "environment": environment(),
        }

    def _save(self, ledger: Ledger) -> dict[str, Any]:
        """All three files, the page and the picture from what the JSON says."""
        sweep = self.prepared.sweep
        wanted = {cell.name: (cell.method.name, cell.options.keep) for cell in sweep.cells}
        values = ledger.save(table=summarize(ledger, wanted, sweep.compared_with))
        write_text(self.output / PICTURE, draw(values))
        write_text(self.output / PAGE, render(values))
        return values

    def _folder(self, cell: Cell) -> Path:
        return self.output / CELLS / cell.name

    def _entry(self, cell: Cell, runner: CellRunner) -> dict[str, Any]:
        """What the ledger has of a cell, whichever way it ends."""
        entry: dict[str, Any] = {"method": cell.method.name, "keep": cell.options.keep}
        entry |= {"options": cell.options.to_json()}
        try:
            figures = runner.run(cell, self._folder(cell), self.progress.job(cell))
        except FAILURES as error:
            return {**entry, "status": FAILED, "error": _one_line(error)}
        return {**entry, "status": FINISHED, **figures}


def _refuse_another(ledger: Ledger, cell: Cell) -> None:
    """A finished cell must be what the method of that name means now."""
    if ledger.finished(cell.name) and ledger.cells[cell.name]["options"] != cell.options.to_json():
        raise ResumeError(
            f"{ledger.output} holds a cell {cell.name} that another version of this method made; "
            "choose another output folder"
        )


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or "no message"
    return words if isinstance(error, BlastnnError) else f"{type(error).__name__}: {words}"
