"""Seconds to factorise all seven matrices of a Llama-7B block, at Table 9's ranks.

The paper's Algorithm 2 took 3.38 hours of an A40 for the 224 matrices of the model (Appendix C.3),
380 seconds for the seven of a block. Here ``als`` factorises made-up matrices of those shapes, with
16 x 16 blocks, without data; equal shapes in one batched call on a GPU, one after the other on a
CPU. Printed beside each shape's error is that of its low-rank start, and a few steps of Algorithm 2
extrapolated to its 300. Has not been run on a GPU yet.

    python -m benchmarks.llama_factorize [--device cuda] [--sweeps 40] [--steps 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.matrices import made_up
from benchmarks.solver_speed import seconds_a_step
from blastnn.factorize import FactorizationResult, factorize, factorize_many
from blastnn.structures import Blast

PAPER_HOURS, PAPER_MATRICES = 3.38, 224
TABLE_9 = {
    "q, k, v, o": (4, Blast(4096, 4096, rank=1024, blocks=(16, 16))),
    "gate, up": (2, Blast(11008, 4096, rank=1488, blocks=(16, 16))),
    "down": (1, Blast(4096, 11008, rank=1488, blocks=(16, 16))),
}


def fit(weights: Sequence[Tensor], spec: Blast, sweeps: int) -> list[FactorizationResult]:
    """In one batched call where a GPU needs it to be busy."""
    if weights[0].is_cuda:
        return factorize_many(weights, spec, solver="als", sweeps=sweeps)
    return [factorize(weight, spec, solver="als", sweeps=sweeps) for weight in weights]


def main() -> None:
    """Print a line for each shape, and the sum beside the paper's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweeps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3, help="of Algorithm 2; 0 leaves it out")
    given = parser.parse_args()
    total = slow = 0.0
    for name, (count, spec) in TABLE_9.items():
        m, n = spec.out_features, spec.in_features
        weights = [made_up(m, n, seed).to(given.device) for seed in range(count)]
        begin = time.perf_counter()
        results = fit(weights, spec, given.sweeps)
        seconds = time.perf_counter() - begin
        line = (
            f"{name}: {count} of {m} x {n}, r={spec.rank}: {seconds:.1f} s, relative error "
            f"{results[0].relative_error:.4f} (low-rank start {results[0].history[0][1]:.4f})"
        )
        if given.steps > 1:
            literal = count * 300 * seconds_a_step(weights[0], spec, given.steps)
            slow += literal
            line += f"; Algorithm 2, extrapolated: {literal:.0f} s"
        total += seconds
        print(line, flush=True)
    paper = PAPER_HOURS * 3600 * 7 / PAPER_MATRICES
    print(
        f"a block: {total:.0f} s on {given.device} ({torch.get_num_threads()} threads), paper "
        f"{paper:.0f} s on an A40" + (f"; Algorithm 2 here {slow:.0f} s" if slow else "")
    )


if __name__ == "__main__":
    main()
