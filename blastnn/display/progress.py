"""A running job: a live table on a terminal, plain lines when piped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live

from blastnn.compress.block import LayerRecord
from blastnn.compress.job import Progress
from blastnn.compress.memory_use import anonymous_bytes
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.compress.refine import Refined
from blastnn.display.table import MIB, table

COLUMNS = ("layer", "shape", "rank", "error", "seconds", "memory", "time left")
SHOWN_ROWS = 14


class Reporter(Progress):
    """Base of the two displays: keeps the clock and estimates the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._start = time.perf_counter()
        self._todo = self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def say(self, message: str) -> None:
        """A remark on a line of its own."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def planned(self, plan: Plan, finished: Sequence[LayerRecord]) -> None:
        """Start the clock; finished layers do not count towards the estimate."""
        names = {record.name for record in finished}
        self._todo = sum(la.dense_params for la in plan.compressed if la.name not in names)
        self._start = time.perf_counter()
        before, after = plan.target_params
        self.say(
            f"{len(plan.compressed)} layers, {before:,} parameters -> {after:,}"
            + (f"; going on behind {len(names)} finished layers" if names else "")
        )

    def row(self, plan: LayerPlan, record: LayerRecord) -> tuple[str, ...]:
        """The cells of one layer."""
        self._done += plan.dense_params
        spent = time.perf_counter() - self._start
        left = spent / self._done * max(self._todo - self._done, 0)
        memory = anonymous_bytes()
        error = record.relative_error
        return (
            plan.name,
            f"{plan.out_features}x{plan.in_features}",
            str(getattr(plan.spec, "rank", "-")),
            "-" if error is None else f"{error:.4f}",
            "-" if record.seconds is None else f"{record.seconds:.1f}",
            "-" if memory is None else f"{memory / MIB:.0f}M",
            f"{int(left) // 60}:{int(left) % 60:02d}",
        )


class PlainReporter(Reporter):
    """One line a layer, for pipes and files."""

    def measured(self, done: int, total: int) -> None:
        """Say so ten times, and at the end."""
        if done % max(total // 10, 1) == 0 or done == total:
            self.say(f"measured {done} of {total} passes of a block")

    def refined(self, block: str, outcome: Refined) -> None:
        """Print the held-out errors."""
        self.say(_words(block, outcome))

    def layer(self, plan: LayerPlan, record: LayerRecord) -> None:
        """Print the layer's cells."""
        cells = zip(COLUMNS[1:], self.row(plan, record)[1:], strict=True)
        self.say(f"{plan.name}  " + "  ".join(f"{key} {value}" for key, value in cells))


class LiveReporter(Reporter):
    """A table that is redrawn in place, with the last layers and the totals."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._rows: list[tuple[str, ...]] = []
        self._footer = ""
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._live.__exit__(*details)

    def layer(self, plan: LayerPlan, record: LayerRecord) -> None:
        """Add the layer and redraw."""
        self._rows.append(self.row(plan, record))
        self._draw()

    def measured(self, done: int, total: int) -> None:
        """Show how much of the measurement is done."""
        self._live.update(f"measured {done} of {total} passes of a block")

    def refining(self, block: str, done: int, total: int) -> None:
        """Show the steps of the refinement below the table."""
        self._footer = f"{block}: refined {done} of {total} steps"
        self._draw()

    def refined(self, block: str, outcome: Refined) -> None:
        """Show the held-out errors below the table."""
        self._footer = _words(block, outcome)
        self._draw()

    def block(self, index: int, total: int) -> None:
        """Show how many blocks are written."""
        self._footer = f"{index + 1} of {total} blocks written; Ctrl-C stops, --resume goes on"
        self._draw()

    def _draw(self) -> None:
        self._live.update(Group(table(COLUMNS, self._rows[-SHOWN_ROWS:]), self._footer))


def _words(block: str, outcome: Refined) -> str:
    return (
        f"{block} refined: held-out error {outcome.before:.3e} -> {outcome.after:.3e}, step "
        f"{outcome.kept_step} of {outcome.steps}"
    )


def make_progress(quiet: bool = False) -> Reporter:
    """The display that suits the terminal; on standard error where output must stay clean."""
    console = Console(stderr=quiet)
    return LiveReporter(console) if console.is_terminal else PlainReporter(console)
