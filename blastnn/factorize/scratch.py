"""Memory for the large products inside a sweep: kept from one to the next, and small enough.

Letters: ``i`` block row, ``j`` block column, ``q`` columns of a block, ``r t`` rank.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Block rows are taken together while their products stay this small: in a CPU's cache, or large
# enough to fill a GPU.
CHUNK_NUMBERS = {"cpu": 2**20, "cuda": 2**28}


def chunks(rows: int, numbers: int, device: torch.device) -> list[slice]:
    """``rows`` block rows in groups whose products, of ``numbers`` each, are held together."""
    limit = CHUNK_NUMBERS.get(device.type, CHUNK_NUMBERS["cpu"])
    size = max(1, min(rows, limit // numbers))
    return [slice(start, start + size) for start in range(0, rows, size)]


# Cached: working a shape out anew takes longer than many a small product.
_broadcast = lru_cache(torch.broadcast_shapes)


class Scratch:
    """Memory for large products, kept from one to the next.

    A fresh tensor of some megabytes is mapped and cleared by the system each time, which takes
    over ten times as long as the multiplication that fills it. A product is valid until the
    next one of the same ``name``.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """``left * right``, broadcast, in the memory that goes by ``name``."""
        shape = _broadcast(left.shape, right.shape)
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape:
            kept = self._kept[name] = left.new_empty(shape)
        return torch.mul(left, right, out=kept)

    def weighted_gram(self, scales: Tensor, gram: Tensor) -> Tensor:
        """``sum_j (s_j s_j^T) * gram_j`` over the third last dimension of ``gram``."""
        product = self.product("pairs", gram, scales[..., None, :])
        return product.mul_(scales[..., None]).sum(-3)

    def scaled(self, factors: Tensor, scales: Tensor) -> Tensor:
        """``[s_ij F_j]_j``: ``(k, j, q, r)`` and ``(k, i, j, r)`` to ``(k, i, j q, r)``."""
        return self.product("scaled", factors[:, None], scales[:, :, :, None]).flatten(2, 3)
