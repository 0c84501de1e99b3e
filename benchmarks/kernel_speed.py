"""Is the structured product faster than dense? Every block count and number of tokens, one run.

``python -m benchmarks.kernel_speed`` prints, for 1536 x 576, 4096 x 4096 and 11008 x 4096 at half
their parameters, how many times faster than dense (``torch.nn.functional.linear``) the CPU kernel
and plain PyTorch are: medians of interleaved runs on the same machine and threads. Before a figure
is printed, the kernel's error against float64 is checked: at most twice that of plain PyTorch.
Beside them: the share of the machine's arithmetic (largest rate of a dense product seen in this
run) and reading speed that the kernel reaches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from blastnn.evaluate.machine import ceilings, describe
from blastnn.files import write_json
from blastnn.kernels import native
from blastnn.kernels.measure import Timing, measure
from blastnn.structures import Blast, LowRank, Structure, cast_factors

SHAPES = ((1536, 576), (4096, 4096), (11008, 4096))
BLOCKS = (2, 4, 8, 16)
TOKENS = (1, 8, 128, 512, 2048)


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--shapes", nargs="*", help="such as 1536x576")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--blocks", nargs="*", type=int, default=BLOCKS)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each cell")
    parser.add_argument("--cold", action="store_true", help="weights from memory, not from cache")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/kernels.json"))
    given = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in given.shapes] if given.shapes else SHAPES
    dtype = getattr(torch, given.dtype)
    rows = []
    for m, n in shapes:
        specs: list[Structure] = [LowRank.for_budget(m, n, int(given.keep * m * n))]
        specs += [Blast.for_budget(m, n, int(given.keep * m * n), blocks=b) for b in given.blocks]
        for spec in specs:
            check(spec, dtype)
            cells = [
                measure(spec, "cpu", dtype, t, given.seconds, given.cold) for t in given.tokens
            ]
            rows += [as_row(cell) for cell in cells]
            print(line(spec, cells), flush=True)
    print(f"least: {min(row['native'] for row in rows):.2f} times dense")
    machine = {**describe(), **ceilings(torch.device("cpu"), dtype)}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.output, {"machine": machine, "threads": torch.get_num_threads(), "rows": rows})
    print(f"{machine}; {torch.get_num_threads()} threads; {given.output}")


def check(spec: Structure, dtype: torch.dtype) -> None:
    """The kernel serves, and its error is at most twice that of plain PyTorch."""
    assert native.obstacle(spec, "cpu", dtype) is None
    factors = spec.init(seed=torch.seed() % 2**31, dtype=dtype)
    dense = spec.to_dense(cast_factors(factors, torch.float64)).T
    for tokens in (1, 33):
        x = torch.randn(tokens, spec.in_features).to(dtype)
        exact = x.double() @ dense
        mine, plain = (
            float((product(x).double() - exact).norm())
            for product in (
                lambda x: native.matmul(spec, x, factors),
                lambda x: spec.matmul(x, factors),
            )
        )
        assert mine <= 2 * plain, (spec, tokens, mine, plain)


def as_row(cell: Timing) -> dict[str, object]:
    """One cell as plain values."""
    speeds = {name: cell.speedup(name) for name in cell.seconds if name != "dense"}
    work = cell.spec.num_multiplications * cell.tokens
    return {
        "spec": cell.spec.to_json(),
        "tokens": cell.tokens,
        "seconds": cell.seconds,
        **speeds,
        "gflops": 2e-9 * work / cell.seconds["native"],
        "read_gb_s": 1e-9 * cell.spec.num_params * cell.dtype.itemsize / cell.seconds["native"],
    }


def line(spec: Structure, cells: list[Timing]) -> str:
    """A row of the printed table: kernel (plain PyTorch) for every number of tokens."""
    blocks = getattr(spec, "blocks", (1, 1))[0]
    figures = [
        f"{c.tokens}: {c.speedup('native'):.2f} ({c.speedup('reference'):.2f}) "
        f"{2e-9 * spec.num_multiplications * c.tokens / c.seconds['native']:.0f} GF/s"
        for c in cells
    ]
    size = f"{spec.out_features}x{spec.in_features}"
    return f"{size:11} {spec.name:8} b {blocks:2} " + "  ".join(figures)


if __name__ == "__main__":
    main()
