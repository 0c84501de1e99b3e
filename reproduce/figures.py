"""What the scripts of Figures 3 and 9 do with their curves: tables, pictures, other targets.

python -m reproduce.figure3                tables and verdicts; runs/reproduce/figure3.png
python -m reproduce.figure3 --write        and docs/figure3.svg
python -m reproduce.figure3 --targets 8    instead, the ends of the curves on eight targets
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.drawing import save
from reproduce.convergence import (
    OURS,
    PRECGD,
    RANKS,
    TRUE_RANK,
    Curve,
    Verdict,
    compare,
    ours_is_first,
)

ROOT = Path(__file__).parents[1]
FOLDER, DOCS = Path("runs/reproduce"), ROOT / "docs"
# Rounding ends the curves of float32 between 1e-7 and 1e-6; this counts as arrived.
ARRIVED = 1e-5


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    ``target`` makes a target from the number of the draw, and ``verdicts`` says what is claimed of
    the curves at a rank besides that ours is first.
    """

    name: str
    title: str
    target: Callable[[int], Tensor]
    steps: int
    verdicts: Callable[[list[Curve], int], list[Verdict]]

    def panel(self, rank: int) -> str:
        """The title of one column."""
        return f"{self.title}, r* = {TRUE_RANK}, r = {rank}"


def run(figure: Figure) -> None:
    """Do what the command line asks for.

    Raises:
        SystemExit: a required claim does not hold.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="write the picture of the docs, too")
    parser.add_argument(
        "--targets", type=int, default=0, help="how many draws of the target to try"
    )
    arguments = parser.parse_args()
    if arguments.targets:
        for rank in RANKS:
            print(f"{figure.panel(rank)}\n{over_targets(figure, rank, arguments.targets)}\n")
    else:
        _show(figure, arguments.write)


def _show(figure: Figure, write: bool) -> None:
    panels, verdicts = {}, {}
    for rank in RANKS:
        name = figure.panel(rank)
        curves = panels[name] = compare(figure.target(0), rank, figure.steps)
        verdicts[name] = [*ours_is_first(curves), *figure.verdicts(curves, rank)]
    plot(panels, FOLDER / f"{figure.name}.png")
    if write:
        plot(panels, DOCS / f"{figure.name}.svg")
    report(panels, verdicts)


def over_targets(figure: Figure, rank: int, count: int) -> str:
    """Where every method ends on each of ``count`` targets, and how often it arrives."""
    runs = [compare(figure.target(draw), rank, figure.steps) for draw in range(count)]
    methods = [curve.method for curve in runs[0]]
    rows = [["target", *methods, f"{OURS} against {PRECGD}"]]
    for draw, curves in enumerate(runs):
        ends = [f"{curve.errors[-1]:.1e}" for curve in curves]
        rows.append([str(draw), *ends, _first_in_steps(curves)])
    arrived = [sum(curves[i].errors[-1] <= ARRIVED for curves in runs) for i in range(len(methods))]
    rows.append([f"<= {ARRIVED:.0e}", *map(str, arrived), ""])
    return _aligned(rows)


def _first_in_steps(curves: list[Curve]) -> str:
    claim = f"ours is no later than {PRECGD}, in steps"
    return next(v.measured for v in ours_is_first(curves) if v.claim == claim)


def table(curves: list[Curve]) -> str:
    """Errors after some steps, and the step and second at which levels are first reached."""
    marks = [k for k in (1, 10, 30, 100, 300) if k < max(len(c.errors) for c in curves)]
    levels = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    head = ["method", *(f"at {k}" for k in marks), "s", *(f"{x:.0e}" for x in levels)]
    rows = [head]
    for curve in curves:
        errors = [f"{curve.errors[min(k, len(curve.errors) - 1)]:.1e}" for k in marks]
        firsts = [_first(curve, level) for level in levels]
        rows.append([curve.method, *errors, f"{curve.seconds[-1]:.2f}", *firsts])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _first(curve: Curve, level: float) -> str:
    step, seconds = curve.first_below(level)
    return "never" if step == math.inf else f"{step} ({1000 * seconds:.1f} ms)"


def plot(panels: dict[str, list[Curve]], path: Path) -> None:
    """One column a panel; errors against steps above, against seconds below.

    The end of the file's name says in which format.
    """
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(2, len(panels), figsize=(10, 7), sharey="row", squeeze=False)
    for column, (name, curves) in enumerate(panels.items()):
        draw(axes[0, column], axes[1, column], curves)
        axes[0, column].set(title=name, xlabel="step")
        axes[1, column].set(xlabel="seconds")
    for row in axes:
        row[0].set_ylabel("relative error")
    axes[0, 0].legend()
    figure.tight_layout()
    save(figure, path)
    pyplot.close(figure)


def draw(by_step: Axes, by_second: Axes, curves: list[Curve]) -> None:
    """The curves of one panel, with few marks on the axes: they are most of a picture's bytes."""
    for curve in curves:
        # A method that ends where it starts has one point, and a line of one point shows nothing.
        marker = "o" if len(curve.errors) == 1 else None
        style = {"label": curve.method, "marker": marker}
        by_step.semilogy(range(len(curve.errors)), curve.errors, **style)
        by_second.loglog(curve.seconds, curve.errors, **style)
    for axes in (by_step, by_second):
        axes.minorticks_off()


def report(panels: dict[str, list[Curve]], verdicts: dict[str, list[Verdict]]) -> None:
    """Print tables and verdicts.

    Raises:
        SystemExit: a required claim does not hold.
    """
    for name, curves in panels.items():
        print(f"{name}\n{table(curves)}\n")
        for verdict in verdicts[name]:
            word = "holds:         " if verdict.holds else "DOES NOT HOLD: "
            print(f"  {word}{verdict.claim} ({verdict.measured})")
        print()
    required = [v for found in verdicts.values() for v in found if v.required]
    failed = sum(not verdict.holds for verdict in required)
    if failed:
        raise SystemExit(f"{failed} of {len(required)} required claims do not hold")
