"""Does our solver's time grow with size as its operations do, and how much memory does it take?

Square made-up matrices, ``n`` from 256 to 8192 at a fixed ``rank / n``: seconds of one sweep (the
median of several), its operations, and the slopes of both on a log-log scale. Then the peak of the
resident memory of one process that factorises an 11008 x 4096 matrix, 16 x 16 blocks, rank 1488.
Each size runs in a process of its own; the small ones, of which one in five starts on cores that
are busy elsewhere and stays half as slow again, in several between the others, of which the median
counts.

    python -m benchmarks.solver_cost [--sizes 256 512 1024 2048 4096 8192] [--share 0.5]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np

from benchmarks.drawing import save
from benchmarks.matrices import made_up
from blastnn.factorize import factorize
from blastnn.structures import Blast

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

LARGE = (11008, 4096, 16, 1488)


def sweep_operations(m: int, n: int, blocks: int, rank: int) -> float:
    """Operations of one data-free sweep, two for each multiplication and addition.

    Two passes over ``A``; Gram matrices and triangular solves of both factors; the couplings.
    """
    passes = 4 * m * n * rank
    grams = 2 * (m + n) * rank**2
    solves = 2 * (m + n) * rank**2 + 2 * blocks * rank**3 / 3
    couplings = blocks**2 * rank**2 * 2 * (1 + 5 + 2 + 2)
    return passes + grams + solves + couplings


def one(m: int, n: int, blocks: int, rank: int, sweeps: int) -> dict[str, float]:
    """Factorise one made-up matrix in this process; seconds a sweep and peak memory."""
    weight = made_up(m, n)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = factorize(weight, Blast(m, n, rank=rank, blocks=(blocks, blocks)), sweeps=sweeps)
    times = [seconds for seconds, _ in result.history]
    return {
        "start": times[0],
        "sweep": median(b - a for a, b in zip(times, times[1:], strict=False)),
        "seconds": result.seconds,
        "error": result.relative_error,
        "before_mib": baseline / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_process(*arguments: int) -> dict[str, float]:
    """``one`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.solver_cost", "--one", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def sweeps_of(n: int) -> int:
    """Of small matrices so many that the first, which find caches and threads cold, do not tell."""
    return 3 if n > 4000 else 8 if n > 1500 else 60


def processes_of(n: int) -> int:
    """A sweep of a large matrix takes so long that one process sees the machine as it is."""
    return 1 if n > 4000 else 3 if n > 1500 else 5


def seconds_of(sizes: list[int], share: float, blocks: int) -> list[dict[str, float]]:
    """What ``one`` finds of each size: of several processes that with the median sweep."""
    found: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
    for number in range(max(map(processes_of, sizes))):
        for n in sizes:
            if number < processes_of(n):
                rank = math.floor(share * n / 2)
                found[n].append(in_process(n, n, blocks, rank, sweeps_of(n)))
    return [sorted(each, key=lambda run: run["sweep"])[len(each) // 2] for each in found.values()]


def slope(sizes: list[int], values: list[float]) -> float:
    """Of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def plot(sizes: list[int], seconds: list[float], operations: list[float], path: Path) -> None:
    """Seconds a sweep over n, and where operations at the rate of the largest would be.

    Written as PNG and SVG to ``path`` with those suffixes.
    """
    figure, axis = plt.subplots(figsize=(5, 4))
    label = f"seconds a sweep, slope {slope(sizes, seconds):.2f}"
    axis.loglog(sizes, seconds, "o-", label=label)
    ideal = [value * seconds[-1] / operations[-1] for value in operations]
    axis.loglog(sizes, ideal, ":", label=f"operations, slope {slope(sizes, operations):.2f}")
    axis.set_xlabel("n")
    axis.legend()
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        save(figure, path.with_suffix(suffix))


def main() -> None:
    """Print both slopes, the memory, and write the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--one", type=int, nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one)))
        return
    seconds, operations = [], []
    runs = seconds_of(given.sizes, given.share, given.blocks)
    for n, found in zip(given.sizes, runs, strict=True):
        rank = math.floor(given.share * n / 2)
        seconds.append(found["sweep"])
        operations.append(sweep_operations(n, n, given.blocks, rank))
        rate = operations[-1] / seconds[-1] / 1e9
        print(
            f"n={n} rank={rank}: start {found['start']:.3f} s, sweep {found['sweep']:.5f} s, "
            f"{rate:.0f} GFLOP/s, peak {found['peak_mib']:.0f} MiB",
            flush=True,
        )
    slopes = slope(given.sizes, seconds), slope(given.sizes, operations)
    print(f"slope of the seconds {slopes[0]:.2f}, of the operations {slopes[1]:.2f}", flush=True)
    # Below about 1000 the time is that of starting operations, not of doing them.
    large_only = [(n, s) for n, s in zip(given.sizes, seconds, strict=True) if n >= 1000]
    if len(large_only) > 1:
        print(f"slope of the seconds from n = {large_only[0][0]} on", end=" ")
        print(f"{slope(*map(list, zip(*large_only, strict=True))):.2f}")
    large = in_process(*LARGE, 3)
    print(f"{LARGE}: sweep {large['sweep']:.1f} s, peak {large['peak_mib']:.0f} MiB resident")
    given.folder.mkdir(parents=True, exist_ok=True)
    plot(given.sizes, seconds, operations, given.folder / "solver_cost")


if __name__ == "__main__":
    main()
