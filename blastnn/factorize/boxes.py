"""Widths and locations of GBLR boxes: how many entries they cover, and how to make them cover less.

Letters: ``m n`` rows and columns, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blastnn.arithmetic import DRAWN
from blastnn.structures import GBLR
from blastnn.structures.base import generator
from blastnn.structures.gblr import FULL_BOXES

Boxes = dict[str, Tensor]

# Boxes begin and end at multiples of 1 / 256 where a side is longer: bfloat16 holds those exactly,
# so a cast of the factors moves no box.
FINEST_GRID = 256
HALVINGS = 30
WIDTHS = {"widths_out": "locations_out", "widths_in": "locations_in"}


def full_boxes(spec: GBLR, seed: int, like: Tensor) -> Boxes:
    """Boxes that cover everything, at random locations: where each opens once it is narrowed."""
    numbers = {name: like.new_full((spec.rank,), value) for name, value in FULL_BOXES.items()}
    for stream, name in enumerate(WIDTHS.values()):
        numbers[name] = torch.rand(spec.rank, generator=generator(seed, stream), **DRAWN)
    return {name: value.to(like) for name, value in numbers.items()}


def leading_boxes(spec: GBLR, count: int, like: Tensor) -> Boxes:
    """Full boxes for the first ``count`` components and the smallest possible for the others."""
    kept = (torch.arange(spec.rank, device=like.device) < count).to(like)
    return {name: value * kept for name, value in FULL_BOXES.items()}


def covered(spec: GBLR, boxes: Boxes) -> float:
    """The entries under continuous widths, at least one a box."""
    sizes = {"widths_out": spec.out_features, "widths_in": spec.in_features}
    return sum(float((boxes[k] * size).clamp(min=1).sum()) for k, size in sizes.items())


def narrowed(boxes: Boxes, entries: Callable[[Boxes], float], budget: float) -> Boxes:
    """All widths lowered by the least amount, the same for all, that keeps ``entries`` in budget.

    The soft threshold of the method; boxes keep their centres. Found by bisection.
    """
    if entries(boxes) <= budget:
        return boxes
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = entries(_lowered(boxes, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return _lowered(boxes, high)


def on_the_grid(spec: GBLR, boxes: Boxes) -> Boxes:
    """Widths and locations rounded to whole cells of the finest grid, at least one entry each."""
    cells = {"out": min(spec.out_features, FINEST_GRID), "in": min(spec.in_features, FINEST_GRID)}
    rounded = {}
    for name, value in boxes.items():
        count = cells[name.rpartition("_")[2]]
        whole = torch.round(value * count)
        rounded[name] = (whole if name in WIDTHS else whole % count) / count
    return rounded


def _lowered(boxes: Boxes, amount: float) -> Boxes:
    changed = dict(boxes)
    for width, location in WIDTHS.items():
        changed[width] = (boxes[width] - amount).clamp(0, 1)
        changed[location] = boxes[location] + (boxes[width] - changed[width]) / 2
    return changed
