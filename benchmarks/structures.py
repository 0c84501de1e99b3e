"""Relative errors of every registered structure at equal parameters, on real matrices.

All seven kinds of weight of one block of the demo model, each structure with its automatic solver
and block counts of 2, 4, 8 and 16, once plainly and once weighted by the second moment of the
weight's inputs. GBLR is there twice: by what it stores, as the others, and by its non-zeros, which
is how its paper counts. Resumes: finished cells are kept in the JSON file.

    python -m benchmarks.structures [--keep 0.5] [--blocks 2 4 8 16] [--kinds q gate down]
                                    [--structures blast lowrank]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from benchmarks.matrices import KINDS, real_moments, real_weights
from blastnn.errors import StructureError
from blastnn.factorize import choose_solver, factorize
from blastnn.structures import STRUCTURES, Structure

# Options that set the number of blocks; structures that are not here have none to set.
BLOCK_OPTIONS = {
    "blast": lambda b: {"blocks": (b, b)},
    "blr": lambda b: {"blocks": (b, b)},
    "monarch": lambda b: {"blocks": (b, b)},
    "blr2": lambda b: {"blocks": (b, b)},
    "blockdiag": lambda b: {"blocks": b},
    "sparse_lowrank": lambda b: {"grid": (b, b)},
    "pixelfly": lambda b: {"grid": b},
}
WEIGHTINGS = ["plain", "weighted"]
SWEEPS = {"als": {"sweeps": 60}}
# Boxes that leave half of twice the entries.
BY_NONZEROS, STORED, NONZEROS = "gblr, by non-zeros", 2, 0.5


def cells(names: list[str], blocks: list[int]) -> list[tuple[str, int | None]]:
    """Structures with each block count, or None for structures without blocks."""
    return [
        (name, b)
        for name in names
        for b in (blocks if name in BLOCK_OPTIONS else [None])  # type: ignore[list-item]
    ]


def fit(weight: Tensor, moment: Tensor | None, name: str, b: int | None, keep: float) -> float:
    """The relative error of one cell; NaN where the structure does not fit the budget."""
    m, n = weight.shape
    spec: Structure
    if name == BY_NONZEROS:
        spec = STRUCTURES["gblr"].for_budget(m, n, int(STORED * keep * m * n))
        return factorize(weight, spec, moment, nonzeros=NONZEROS).relative_error
    options = {} if b is None else BLOCK_OPTIONS[name](b)
    try:
        spec = STRUCTURES[name].for_budget(m, n, int(keep * m * n), **options)
    except StructureError:
        return float("nan")
    extra = SWEEPS.get(choose_solver(spec), {})
    return factorize(weight, spec, moment, **extra).relative_error


def main() -> None:
    """Print one table for each weighting."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    every = [*STRUCTURES, BY_NONZEROS]
    parser.add_argument("--structures", nargs="+", default=every, choices=every)
    parser.add_argument("--weightings", nargs="+", default=WEIGHTINGS, choices=WEIGHTINGS)
    parser.add_argument("--file", type=Path, default=Path("runs/benchmarks/structures.json"))
    given = parser.parse_args()
    given.file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(given.file.read_text()) if given.file.exists() else {}
    weights, moments = real_weights(), real_moments()
    for weighting in given.weightings:
        weighted = weighting == "weighted"
        print(f"keep {given.keep}, {weighting}")
        for name, b in cells(given.structures, given.blocks):
            row = []
            for kind in given.kinds:
                key = f"{given.keep}/{weighted}/{name}/{b}/{kind}"
                if key not in found:
                    moment = moments[kind] if weighted else None
                    found[key] = fit(weights[kind], moment, name, b, given.keep)
                    given.file.write_text(json.dumps(found))
                row.append(found[key])
            label = name if b is None else f"{name} {b}"
            print(f"| {label} | " + " | ".join(f"{e:.3f}" for e in row) + " |", flush=True)


if __name__ == "__main__":
    main()
