"""How much sooner does our solver reach the error of the literal Algorithm 2?

For every weight of one block of the demo model, half the parameters, without data: Algorithm 2 for
K = 300 steps and ``als`` are run in turns, and compared at the medians of several turns. Printed is
the time ``als`` takes to the error that Algorithm 2 ends with, given as many sweeps as it has by
default, and the error ``als`` has after the time Algorithm 2 takes, given as many as fit into that;
both plan over the steps that they are given. The latter also where Algorithm 2 has fewer steps to
decay its step size in (once each). Low rank (SVD) and independent blocks (a truncated SVD for each)
with as many parameters show what cheaper structures reach, and in what time. Writes a table, and a
plot of error over time as PNG and SVG.

    python -m benchmarks.solver_speed [--blocks 4 16] [--turns 3] [--kinds q k v o gate up down]
    python -m benchmarks.solver_speed --our-kernels  # gives Algorithm 2 the C++ that als has
    python -m benchmarks.solver_speed --large  # 4096 and 11008 x 4096, made up, 16 x 16 blocks

Of large matrices Algorithm 2 is timed for a few steps only and extrapolated to 300.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import matplotlib
import torch
from torch import Tensor

from benchmarks.drawing import save
from benchmarks.matrices import KINDS, made_up, real_weights
from blastnn.factorize import FactorizationResult, factorize, precgd
from blastnn.factorize.als_pace import Schedule
from blastnn.kernels import normal_equations
from blastnn.structures import STRUCTURES, Blast, Structure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SWEEPS = Schedule.sweeps  # the default
MOST_SWEEPS = 3000
FEWER_STEPS = (30, 100)
LARGE = ((4096, 4096), (11008, 4096))
POINTS = 60  # of a curve in the plot

Row = dict[str, object]


@contextmanager
def our_kernels() -> Iterator[None]:
    """Algorithm 2 with the C++ factors and solves of ``als`` in place of torch's, inside."""

    def solve(G: Tensor, delta: float, gradient: Tensor) -> Tensor:
        flat = G.flatten(0, -3)
        means = flat.diagonal(dim1=-2, dim2=-1).mean(-1)
        lower, failed = normal_equations.factor(flat, (delta / means).tolist())
        assert not bool(failed.any())
        right = gradient.reshape(len(flat), -1, G.shape[-1])
        return normal_equations.solve_factored(lower, right).view_as(gradient)

    plain, precgd._solve = precgd._solve, solve
    try:
        yield
    finally:
        precgd._solve = plain


def time_to(result: FactorizationResult, error: float) -> float:
    """Seconds until the history is at most ``error``; infinite where it never is."""
    return next((seconds for seconds, found in result.history if found <= error), float("inf"))


def error_at(result: FactorizationResult, seconds: float) -> float:
    """The last error of the history before ``seconds``; 1, that of nothing, before it begins."""
    return min((error for when, error in result.history if when <= seconds), default=1.0)


def compare(kind: str, weight: Tensor, blocks: int, turns: int) -> Row:
    """One row of the table; both solvers in turns within one run."""
    m, n = weight.shape
    spec = Blast.for_budget(m, n, m * n // 2, blocks=blocks)
    literal, soon, late = [], [], []
    for _ in range(turns):
        soon.append(factorize(weight, spec, solver="als", sweeps=SWEEPS))
        literal.append(factorize(weight, spec, solver="precgd"))
        late.append(within(literal[-1].history[-1][0], weight, spec, soon[-1]))
    target = literal[0].history[-1][1]
    slow = median(result.history[-1][0] for result in literal)
    fast = median(time_to(result, target) for result in soon)
    later = median(error_at(result, slow) for result in late)
    shorter = {}
    for steps in FEWER_STEPS:
        seconds, error = factorize(weight, spec, solver="precgd", steps=steps).history[-1]
        found = error_at(within(seconds, weight, spec, soon[-1]), seconds)
        shorter[f"less error, {steps} steps"] = 1.0 - found / error
    return {
        "kind": kind,
        "blocks": blocks,
        "rank": spec.rank,
        "literal error": target,
        "literal seconds": slow,
        "als seconds": fast,
        "times faster": slow / fast,
        "als error then": later,
        "less error": 1.0 - later / target,
        **shorter,
        **others(weight, blocks),
        "histories": {
            "Algorithm 2": literal[0].history,
            f"als, {SWEEPS} sweeps": soon[0].history,
            "als, as long": late[0].history,
        },
    }


def within(
    seconds: float, weight: Tensor, spec: Blast, timed: FactorizationResult
) -> FactorizationResult:
    """``als`` with as many sweeps as fit into so many seconds, judged by a run of it."""
    begun, ended = timed.history[0][0], timed.history[-1][0]
    each = (ended - begun) / (len(timed.history) - 1)
    sweeps = int(0.97 * (seconds - begun) / each)
    return factorize(weight, spec, solver="als", sweeps=max(1, min(sweeps, MOST_SWEEPS)))


def others(weight: Tensor, blocks: int) -> Row:
    """Errors and seconds of cheaper structures with half the parameters."""
    found: Row = {}
    for name, options in (("lowrank", {}), ("blr", {"blocks": (blocks, blocks)})):
        result = other(weight, STRUCTURES[name], options)
        found |= {name: result.relative_error, f"{name} seconds": result.seconds}
    return found


def other(
    weight: Tensor, structure: type[Structure], options: dict[str, tuple[int, int]]
) -> FactorizationResult:
    """Another structure with half the parameters, by its automatic solver."""
    m, n = weight.shape
    return factorize(weight, structure.for_budget(m, n, m * n // 2, **options))


def seconds_a_step(weight: Tensor, spec: Blast, steps: int) -> float:
    """Of Algorithm 2, from a few of them, without the first."""
    history = factorize(weight, spec, solver="precgd", steps=steps).history
    return (history[-1][0] - history[1][0]) / (steps - 1)


def compare_large(m: int, n: int, steps: int = 3, sweeps: int = SWEEPS, blocks: int = 16) -> Row:
    """A few steps of Algorithm 2 and their time extrapolated to 300, and ``als``."""
    weight = made_up(m, n)
    spec = Blast.for_budget(m, n, m * n // 2, blocks=blocks)
    step = seconds_a_step(weight, spec, steps)
    ours = factorize(weight, spec, solver="als", sweeps=sweeps)
    return {
        "kind": f"{m} x {n}, made up",
        "blocks": blocks,
        "rank": spec.rank,
        "literal seconds a step": step,
        "literal seconds, extrapolated": 300 * step,
        "als seconds": ours.history[-1][0],
        "als error then": ours.history[-1][1],
        **others(weight, blocks),
        "histories": {"als": ours.history},
    }


def thinned(history: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``POINTS`` of a history, evenly apart on a logarithmic scale of time, and its end."""
    first, last = max(history[0][0], 1e-3), history[-1][0]
    ratio = (last / first) ** (1 / POINTS)
    kept, due = [], 0.0
    for seconds, error in history:
        if seconds >= due:
            kept.append((max(seconds, 1e-3), error))
            due = max(seconds, first) * ratio
    return [*kept, (last, history[-1][1])]


def draw(row: Row, axis: plt.Axes) -> None:
    """Error over seconds of one matrix: curves of what iterates, points of what does not."""
    for name, history in row["histories"].items():  # type: ignore[attr-defined]
        axis.semilogx(*zip(*thinned(history), strict=True), label=name)
    for name, mark in (("lowrank", "s"), ("blr", "^")):
        label = {"lowrank": "low rank (SVD)", "blr": "independent blocks (SVDs)"}[name]
        axis.semilogx(row[f"{name} seconds"], row[name], mark, color="grey", label=label)
    if "literal seconds, extrapolated" in row:
        axis.axvline(row["literal seconds, extrapolated"], color="C0", linestyle=":")  # type: ignore[arg-type]
    highest = max(row["lowrank"], row["blr"])  # type: ignore[type-var]
    axis.set_ylim(0.9 * row["als error then"], 1.1 * highest)  # type: ignore[operator]
    axis.set_title(f"{row['kind']}, {row['blocks']} x {row['blocks']} blocks", fontsize=8)
    axis.tick_params(labelsize=7)


def write(rows: list[Row], folder: Path, name: str) -> None:
    """The rows as JSON; error over seconds as PNG and SVG, a column for each number of blocks."""
    (folder / f"{name}.json").write_text(json.dumps(rows))
    blocks = sorted({row["blocks"] for row in rows})  # type: ignore[type-var]
    columns = [[row for row in rows if row["blocks"] == each] for each in blocks]
    height = max(map(len, columns))
    size = (4 * len(columns), 1.7 * height + 0.6)
    figure, axes = plt.subplots(height, len(columns), figsize=size, squeeze=False)
    for column, each in zip(columns, axes.T, strict=True):
        for row, axis in zip(column, each, strict=False):
            draw(row, axis)
        each[-1].set_xlabel("seconds")
    axes[0, 0].legend(fontsize=6)
    axes[0, 0].set_ylabel("relative error", fontsize=7)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        save(figure, folder / f"{name}{suffix}")
    plt.close(figure)


def report(row: Row) -> None:
    """One line: the matrix and every number of its row."""
    cells = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    print(f"{row['kind']} b={row['blocks']} r={row['rank']}: " + ", ".join(cells), flush=True)


def main() -> None:
    """Print the table; write it and the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--our-kernels", action="store_true")
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(f"{torch.get_num_threads()} threads; half the parameters; seconds, relative errors")
    name = "solver_speed" + "_our_kernels" * given.our_kernels + "_large" * given.large
    rows: list[Row] = []
    with our_kernels() if given.our_kernels else nullcontext():
        for row in rows_of(given):
            rows.append(row)
            report(row)
            write(rows, given.folder, name)


def rows_of(given: argparse.Namespace) -> Iterator[Row]:
    """What was asked for, one matrix after the other."""
    if given.large:
        yield from (compare_large(*shape) for shape in LARGE)
        return
    weights = real_weights()
    for blocks in given.blocks:
        for kind in given.kinds:
            yield compare(kind, weights[kind], blocks, given.turns)


if __name__ == "__main__":
    main()
