"""Zero-shot accuracies, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from blastnn.display.table import table, wide_console

Step = Callable[[str, str, int, int], None]  # model, task, answers that are scored, all of them
LINES = 10  # for each task, where no terminal can show a bar
COLUMNS = ("task", "metric", "rows")


def print_tasks(found: dict[str, Any]) -> None:
    """A line for each task and metric, in percent with standard errors, and the means."""
    console = wide_console()
    models = [key for key in ("dense", "model", "difference") if key in found]
    last = found["model"]
    rows = [
        (name, metric, str(task["rows"]))
        + tuple(_percent(found[key]["tasks"][name]["metrics"][metric], key) for key in models)
        for name, task in last["tasks"].items()
        for metric in task["metrics"]
    ]
    rows += [
        ("mean", metric, "", *(_percent(found[key]["mean"][metric], key) for key in models))
        for metric in last["mean"]
    ]
    console.print(table((*COLUMNS, *models), rows))
    for key, name in found["models"].items():
        console.print(f"{key}: {name}{_remarks(found[key])}")
    origin = last["rows"]
    checksum = f", sha256 {origin['sha256']}" if "sha256" in origin else ""
    limit = f"; the first {last['limit']} of each task alone" if last["limit"] else ""
    splits = ", ".join(sorted({task["split"] for task in last["tasks"].values()}))
    console.print(f"{splits} rows from {origin['source']}{checksum}{limit}")
    console.print(
        f"protocol: lm-eval {last['lm_eval']}, {last['fewshot']}-shot; {last['protocol']}; "
        "in percent, ± standard error, that of a difference paired row by row"
    )


def _percent(metric: dict[str, float], key: str) -> str:
    sign = "+" if key == "difference" else ""
    return f"{100 * metric['value']:{sign}.1f} ± {100 * metric['stderr']:.1f}"


def _remarks(scores: dict[str, Any]) -> str:
    """What was not as usual: requests that were cut, sequences that ran alone."""
    told = f", {sum(task['seconds'] for task in scores['tasks'].values()):.0f} s"
    for name, task in scores["tasks"].items():
        if task["clipped"]:
            told += f"; {name}: {task['clipped']} requests lost their start, being too long"
        if task["fallback"]:
            told += f"; {name}: one sequence at a time, because {task['fallback']}"
    return told


@contextmanager
def task_progress() -> Iterator[Step]:
    """Told how far each task of each model is: a bar on a terminal, else a few lines a task.

    On standard error, so that standard output stays the answer alone.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    with Progress(
        *Progress.get_default_columns()[:-1], TimeRemainingColumn(), console=console
    ) as bars:
        yield _bars(bars)


def _bars(bars: Progress) -> Step:
    shown: dict[tuple[str, str], Any] = {}

    def step(model: str, task: str, done: int, total: int) -> None:
        if (model, task) not in shown:
            shown[model, task] = bars.add_task(f"{model} {task}", total=total)
        bars.update(shown[model, task], completed=done)

    return step


def _lines(console: Console) -> Step:
    told: dict[tuple[str, str], tuple[float, int]] = {}

    def step(model: str, task: str, done: int, total: int) -> None:
        start, last = told.setdefault((model, task), (time.perf_counter(), 0))
        part = done * LINES // total
        if part > last:
            told[model, task] = start, part
            spent = time.perf_counter() - start
            console.print(f"{model} {task}: {done} of {total} answers, {spent:.0f} s")

    return step
