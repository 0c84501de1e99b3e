"""Whether a structured product can be faster than the dense one: what the planner is told.

A static estimate, so that a plan is the same on every machine: a product costs what it reads or
multiplies, plus a fixed cost, near what was measured (``benchmarks/kernel_speed.py``, two cores of
an AMD EPYC, float32, weights read from memory as the layers of a model are). ``measure.py``
measures instead.
"""

from __future__ import annotations

from blastnn.kernels import native
from blastnn.structures import Blast, Structure

# In numbers that could be read meanwhile: the fixed cost of one product for one token.
STRUCTURED_CALL = 24_000
DENSE_CALL = 12_000
# Multiplications for many tokens take this much longer than dense ones: short products inside
# blocks, packing, and intermediates on their way through the caches.
OVERHEAD = 0.06
COUPLING = 2.5  # and those by a coupling as much longer again: no number is used twice there
# Matrices with fewer numbers take microseconds either way, and are never judged.
SMALLEST = 2**16


def predicted_speedup(spec: Structure) -> float | None:
    """How many times faster than dense, for one token or for many, whichever is less.

    None for structures that no kernel of ours multiplies, and for small matrices.
    """
    dense = spec.out_features * spec.in_features
    if dense < SMALLEST or type(spec) not in native.SERVED:
        return None
    decode = (dense + DENSE_CALL) / (spec.num_params + STRUCTURED_CALL)
    return min(decode, dense / _prefill_cost(spec))


def _prefill_cost(spec: Structure) -> float:
    """Multiplications for a token, weighted by what they take."""
    cost = (1 + OVERHEAD) * spec.num_multiplications
    if isinstance(spec, Blast):
        b1, b2 = spec.blocks
        cost += COUPLING * spec.rank * b1 * b2
    return cost
