r"""Figure 9 of the paper: BLAST factorisation of a BLAST matrix, GD against PrecGD.

Target: a 256 x 256 BLAST matrix with 16 x 16 blocks and ``r* = 8``, all factors standard normal;
the paper does not say how it draws them. With couplings from Unif(0, 1) the target is nearly low
rank and GD does converge at ``r = 8``, which the paper says it does not. 300 steps, the ``K`` of
the paper's Appendix C.3, since the figure's own number of steps is not in the text.

The paper's figure, in words: plain gradient descent converges neither at ``r = 8`` nor at
``r = 32``; preconditioned, it easily finds a low error at ``r = 8`` and is two orders of magnitude
better than plain at ``r = 32``.

At ``r = 32`` we do not find two orders of magnitude: docs/reproduce.md.

    python -m reproduce.figure9
"""

from __future__ import annotations

from torch import Tensor

from blastnn.structures import Blast
from reproduce.convergence import (
    BLOCKS,
    SIZE,
    TRUE_RANK,
    Curve,
    Verdict,
    far_below,
    far_below_on_most,
    normal,
)
from reproduce.figures import Figure, run

STEPS = 300
# The paper's "two orders of magnitude". At r = 32 it is reported and not required.
FAR = 100.0
# What is required there instead. GD at its best step size against PrecGD, on 32 targets: factors
# of 1.8 to 6.3, and a median of 2.9 or more in each eight of them.
TARGETS, MEDIAN, LEAST = 8, 2.0, 1.5


def blast_target(draw: int) -> Tensor:
    """The dense matrix of random BLAST factors; the figure has draw 0."""
    spec = Blast(SIZE, SIZE, rank=TRUE_RANK, blocks=BLOCKS)
    shapes = spec.factor_shapes()
    factors = {
        key: normal(*shape, seed=len(shapes) * draw + i)
        for i, (key, shape) in enumerate(shapes.items())
    }
    return spec.to_dense(factors)


def verdicts(curves: list[Curve], rank: int) -> list[Verdict]:
    """What the paper says of both ranks, and what we answer for."""
    if rank == TRUE_RANK:
        return [far_below(curves, FAR)]
    targets = map(blast_target, range(TARGETS))
    most = far_below_on_most(targets, rank, STEPS, MEDIAN, LEAST)
    return [far_below(curves, FAR, required=False), most]


FIGURE = Figure("figure9", "BLAST target", blast_target, STEPS, verdicts)

if __name__ == "__main__":
    run(FIGURE)
