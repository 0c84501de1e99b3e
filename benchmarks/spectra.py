"""How flat are the spectra of real weights, of their block rows, and of single blocks?

For all seven kinds of weight of one block of the demo model, plain and weighted by the second
moment of the inputs: the share of all singular values, largest first, that holds 90% of the energy.
A low share means that a few directions serve the whole; where a single block has no lower share
than the matrix, a factor pair of its own buys it nothing. A matrix of Gaussian entries, which has
nothing to find, stands beside it. A second table has the relative errors of structures with half
the parameters on such Gaussian matrices: what a structure gains on them over low rank, it gains by
having more of its numbers free, not by what is in the matrix.

    python -m benchmarks.spectra [--energy 0.9]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.matrices import KINDS, real_moments, real_weights
from blastnn.factorize import factorize
from blastnn.factorize.blocks import split_blocks, split_moment
from blastnn.structures import STRUCTURES, Blast

CUTS = {
    "whole": (1, 1),
    "4 block rows": (4, 1),
    "4 x 4 blocks": (4, 4),
    "16 x 16 blocks": (16, 16),
}
SHAPES = ((576, 576), (192, 576), (1536, 576))
STRUCTURES_COMPARED = (
    ("lowrank", None),
    ("blr", 4),
    ("blr", 16),
    ("blr2", 4),
    ("blast", 2),
    ("blast", 4),
    ("blast", 8),
    ("blast", 16),
)


def blocks_of(matrix: Tensor, moment: Tensor | None, cut: tuple[int, int]) -> Tensor:
    """All blocks ``A_ij``, or ``A_ij C_jj^(1/2)`` with the second moment of their own inputs."""
    spec = Blast(*matrix.shape, rank=1, blocks=cut)
    blocks = split_blocks(matrix.double(), spec)
    if moment is None:
        return blocks.flatten(0, 1)
    own = split_moment(moment, spec).diagonal().permute(2, 0, 1)  # C_jj, (j, q, q)
    return (blocks @ torch.linalg.cholesky(own)).flatten(0, 1)


def share_needed(blocks: Tensor, energy: float) -> float:
    """The mean over all blocks of the share of singular values that holds ``energy`` of a block."""
    squares = torch.linalg.svdvals(blocks).square()  # (blocks, values)
    held = squares.cumsum(1) / squares.sum(1, keepdim=True)
    needed = (held < energy).sum(1) + 1
    return float(needed.double().mean()) / squares.shape[1]


def matrices() -> Iterator[tuple[str, list[Tensor], list[Tensor | None]]]:
    """A label, one matrix of each kind, and the moments: plain, weighted, and Gaussian ones."""
    weights, moments = real_weights(), real_moments()
    plain = [weights[kind] for kind in KINDS]
    nothing = [None for _ in KINDS]
    yield "plain", plain, [*nothing]
    yield "weighted", plain, [moments[kind] for kind in KINDS]
    generator = torch.Generator().manual_seed(0)
    yield "Gaussian", [torch.randn(A.shape, generator=generator) for A in plain], [*nothing]


def gaussian_error(A: Tensor, name: str, options: dict[str, tuple[int, int]]) -> float:
    """The relative error of a structure with half the parameters."""
    m, n = A.shape
    spec = STRUCTURES[name].for_budget(m, n, m * n // 2, **options)
    sweeps = {"sweeps": 60} if name == "blast" else {}
    return factorize(A, spec, **sweeps).relative_error


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--energy", type=float, default=0.9)
    energy = parser.parse_args().energy
    print(f"| {energy:.0%} of the energy | " + " | ".join(KINDS) + " |")
    for label, each, moments in matrices():
        for name, cut in CUTS.items():
            pairs = zip(each, moments, strict=True)
            shares = [share_needed(blocks_of(A, C, cut), energy) for A, C in pairs]
            print(f"| {label}, {name} | " + " | ".join(f"{s:.0%}" for s in shares) + " |")
    print("\n| Gaussian | " + " | ".join(f"{m} x {n}" for m, n in SHAPES) + " |")
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for structure, blocks in STRUCTURES_COMPARED:
        options = {"blocks": (blocks, blocks)} if blocks else {}
        label = f"{structure} {blocks}" if blocks else structure
        errors = [gaussian_error(A, structure, options) for A in noise]
        print(f"| {label} | " + " | ".join(f"{e:.3f}" for e in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
