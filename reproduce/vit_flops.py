r"""Which ranks give the relative FLOPs of the paper's Table 1, ViT-Base/16 on 224 x 224 pixels.

The paper counts multiplications (Section 4) and replaces the stacked query, key and value weights
and both layers of the feed-forward modules (Appendix C.2) with one rank for all. It does not say
what the total contains. With every multiplication of the network counted, the attention products
included, both of Table 1's shares belong to ranks that are multiples of 8, 104 for BLAST_3 and 144
for low rank; without the attention products neither share belongs to any rank.
"""

from __future__ import annotations

from collections.abc import Iterable

DEPTH, WIDTH, PATCHES, CLASSES = 12, 768, 196, 1000
TOKENS = PATCHES + 1
TARGETS = ((3 * WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))


def multiplications(per_token: Iterable[int]) -> int:
    """Of one image, when the targets of one block take ``per_token`` multiplications each."""
    block = TOKENS * (sum(per_token) + WIDTH * WIDTH)  # and the attention's output layer
    attention = 2 * TOKENS * TOKENS * WIDTH
    ends = PATCHES * WIDTH * (16 * 16 * 3) + WIDTH * CLASSES
    return DEPTH * (block + attention) + ends


def relative(per_token: Iterable[int]) -> float:
    """The same as a share of the dense network's."""
    return multiplications(per_token) / multiplications(m * n for m, n in TARGETS)
