"""A running sweep, a line a cell, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.status import Status

from blastnn.compress.block import LayerRecord
from blastnn.compress.job import Progress
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.display.table import print_json, table, wide_console
from blastnn.sweep import SweepProgress
from blastnn.sweep.request import Cell
from blastnn.sweep.rows import notes, worded


class SweepReporter(SweepProgress):
    """A line for every cell; on a terminal also how many layers of the present one are done.

    On standard error, so that standard output stays the answer alone.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = Status("", console=self._console) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, message: str) -> None:
        """A remark on a line of its own."""
        self._console.print(message)

    def job(self, cell: Cell) -> Progress:
        """The display of a cell's layers."""
        if self._status is None:
            return Progress()
        self._status.start()
        return _Layers(self._status, cell.name)

    def done(self, entry: dict[str, Any], number: int, total: int, fresh: bool) -> None:
        """Print the cell's figures, or its error."""
        start = f"[{number}/{total}] {entry['method']}, keep {entry['keep']:g}: "
        if self._status is not None:
            self._status.stop()
        if "error" in entry:
            self.say(f"{start}failed: {entry['error']}")
            return
        scores = ", ".join(
            f"{score['text']} {score.get('perplexity', score.get('cosine')):.4g}"
            for score in entry["scores"]
        )
        again = "" if fresh else " (finished before)"
        self.say(f"{start}{entry['seconds']:.0f} s, {scores}{again}")


class _Layers(Progress):
    """Counts the layers of one cell in a terminal's last line."""

    def __init__(self, status: Status, name: str) -> None:
        self._status, self._name, self._done, self._total = status, name, 0, 0

    def planned(self, plan: Plan, finished: Sequence[LayerRecord]) -> None:
        """Set the counter."""
        self._total = len(plan.compressed)
        names = {layer.name for layer in plan.compressed}
        self._done = sum(record.name in names for record in finished)
        self._show()

    def layer(self, plan: LayerPlan, record: LayerRecord) -> None:
        """One more."""
        self._done += 1
        self._show()

    def _show(self) -> None:
        self._status.update(f"{self._name}: {self._done} of {self._total} layers")


def print_sweep(values: dict[str, Any], output: Path, as_json: bool) -> None:
    """The table and what must be known to read it."""
    if as_json:
        print_json(values)
        return
    # As wide as the table wants: a narrow terminal breaks its lines, but loses no figure.
    console = wide_console()
    console.print(table(*worded(values)))
    for note in notes(values):
        console.print(note, markup=False)
    console.print(f"{output / 'sweep.md'}")
