"""How much sooner does our solver reach the error of the literal Algorithm 2?

For every weight of one block of the demo model, half the parameters, without data: Algorithm 2 for
K = 300 steps and ``als`` are run in turns, and compared at the medians of several turns. Printed is
the time ``als`` takes to the error that Algorithm 2 ends with, and the error ``als`` has after the
time Algorithm 2 takes; that also where Algorithm 2 has fewer steps to decay its step size in (once
each). Low rank (SVD) and independent blocks (a truncated SVD for each) with as
many parameters show what cheaper structures reach. Writes a table and a plot of error over time.

    python -m benchmarks.solver_speed [--blocks 4 16] [--turns 3] [--kinds q k v o gate up down]
    python -m benchmarks.solver_speed --large    # 4096 and 11008 x 4096, made up, 16 x 16 blocks

Of large matrices Algorithm 2 is timed for a few steps only and extrapolated to 300.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import matplotlib
import torch

from benchmarks.matrices import KINDS, made_up, real_weights
from blastnn.factorize import FactorizationResult, factorize
from blastnn.structures import STRUCTURES, Blast, Structure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SWEEPS = 3000  # more than Algorithm 2 has time for
FEWER_STEPS = (30, 100)


def time_to(result: FactorizationResult, error: float) -> float:
    """Seconds until the history is at most ``error``; infinite where it never is."""
    return next((seconds for seconds, found in result.history if found <= error), float("inf"))


def error_at(result: FactorizationResult, seconds: float) -> float:
    """The last error of the history before ``seconds``; 1, that of nothing, before it begins."""
    return min((error for when, error in result.history if when <= seconds), default=1.0)


def compare(kind: str, weight: torch.Tensor, blocks: int, turns: int) -> dict[str, object]:
    """One row of the table; both solvers in turns within one run."""
    m, n = weight.shape
    spec = Blast.for_budget(m, n, m * n // 2, blocks=blocks)
    literal, ours = [], []
    for _ in range(turns):
        ours.append(factorize(weight, spec, solver="als", sweeps=SWEEPS))
        literal.append(factorize(weight, spec, solver="precgd"))
    target = literal[0].history[-1][1]
    slow = median(result.history[-1][0] for result in literal)
    fast = median(time_to(result, target) for result in ours)
    later = median(error_at(result, slow) for result in ours)
    shorter = {}
    for steps in FEWER_STEPS:
        seconds, error = factorize(weight, spec, solver="precgd", steps=steps).history[-1]
        shorter[f"less error, {steps} steps"] = 1.0 - error_at(ours[0], seconds) / error
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
        "lowrank": other(weight, STRUCTURES["lowrank"], {}),
        "blr": other(weight, STRUCTURES["blr"], {"blocks": (blocks, blocks)}),
        "histories": {"Algorithm 2": literal[0].history, "als": ours[0].history},
    }


def other(weight: torch.Tensor, structure: type[Structure], options: dict[str, object]) -> float:
    """The plain relative error of another structure with half the parameters."""
    m, n = weight.shape
    return factorize(weight, structure.for_budget(m, n, m * n // 2, **options)).relative_error


def compare_large(m: int, n: int, steps: int = 3, sweeps: int = 12) -> None:
    """Seconds of 300 steps of Algorithm 2, extrapolated, and of some sweeps of ``als``."""
    weight = made_up(m, n)
    spec = Blast.for_budget(m, n, m * n // 2, blocks=16)
    literal = factorize(weight, spec, solver="precgd", steps=steps).history
    step = (literal[-1][0] - literal[1][0]) / (steps - 1)
    ours = factorize(weight, spec, solver="als", sweeps=sweeps)
    print(
        f"{m} x {n}, r={spec.rank}: Algorithm 2 {step:.1f} s a step, {300 * step:.0f} s for 300 "
        f"(extrapolated); als {ours.history[-1][0]:.0f} s for {sweeps} sweeps, "
        f"error {ours.history[-1][1]:.4f}; low rank {other(weight, STRUCTURES['lowrank'], {}):.4f}",
        flush=True,
    )


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Error over seconds, one panel a matrix."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 2.2 * len(rows)), squeeze=False)
    for row, axis in zip(rows, axes[:, 0], strict=True):
        for name, history in row["histories"].items():  # type: ignore[attr-defined]
            seconds, errors = zip(*history, strict=True)
            axis.semilogx([max(s, 1e-3) for s in seconds], errors, label=name)
        axis.axhline(row["lowrank"], linestyle=":", color="grey", label="low rank (SVD)")
        axis.set_ylim(0.9 * row["als error then"], 1.05 * row["lowrank"])  # type: ignore[operator]
        axis.set_title(f"{row['kind']}, {row['blocks']} x {row['blocks']} blocks", fontsize=9)
        axis.legend(fontsize=7)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table; write it and the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args()
    if given.large:
        for shape in ((4096, 4096), (11008, 4096)):
            compare_large(*shape)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    weights, rows = real_weights(), []
    print(f"{torch.get_num_threads()} threads; half the parameters; seconds, relative errors")
    for blocks in given.blocks:
        for kind in given.kinds:
            row = compare(kind, weights[kind], blocks, given.turns)
            rows.append(row)
            cells = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
            print(f"{kind} b={blocks} r={row['rank']}: " + ", ".join(cells), flush=True)
            (given.folder / "solver_speed.json").write_text(json.dumps(rows))
    plot(rows, given.folder / "solver_speed.png")


if __name__ == "__main__":
    main()
