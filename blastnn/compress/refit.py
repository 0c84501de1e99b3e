r"""Layers that stay dense repair what the layers before them got wrong; it costs no parameter.

A layer that is kept dense reads the compressed model's inputs ``x^`` all the same. With its own
weight it hands their errors on, and where half of the layers stay dense, nobody repairs anything
for blocks on end. So it gets the weight ``A'`` that the others are fitted to (``shifted_target``):
the nearest on ``x^`` to what it gave on the dense inputs, with the stream's drift where it is added
to one. ``m n`` numbers are fitted, none held back by a structure; hence the larger ridge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from blastnn.compress.moments import Moments
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan
from blastnn.factorize import shifted_target
from blastnn.models.linears import dense_weight

# Of the inputs' second moment, relative to its mean diagonal.
RIDGE = 1.0


def to_refit(plans: Sequence[LayerPlan], options: Options) -> list[LayerPlan]:
    """The targeted layers that stay dense and are to be refitted."""
    possible = options.refit and options.inputs == "compressed" and options.moment == "full"
    return [plan for plan in plans if plan.stays_dense] if possible else []


def refit(layer: nn.Module, moments: Moments, dtype: torch.dtype) -> bool:
    """Give a dense layer, in place, the weight that repairs most; False where nothing is to repair.

    Args:
        layer: of a known linear class, float32.
        moments: of its inputs, and what its outputs fall short of.
        dtype: to which the weight is rounded.

    Raises:
        FactorizationError: the second moment is not positive definite even so.
    """
    missing = moments.shortfall_of(dense_weight(layer))
    if missing is None or not bool(moments.second.any()):
        return False
    weight = dense_weight(layer)
    weight.copy_(shifted_target(weight, moments.damped(RIDGE), missing).to(dtype))
    return True
