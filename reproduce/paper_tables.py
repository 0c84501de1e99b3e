"""Tables 7 to 11 of the paper, as printed, and the sizes of the models that they are about."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blastnn.structures import Blast


@dataclass(frozen=True)
class TableRow:
    """One printed row: a kind of layer, its shape, BLAST's blocks and rank, and which layers."""

    layer: str
    m: int
    n: int
    b: int
    r: int
    indices: range

    @property
    def spec(self) -> Blast:
        """What the row makes of a layer."""
        return Blast(self.m, self.n, rank=self.r, blocks=(self.b, self.b))


@dataclass(frozen=True)
class Table:
    """A printed table and the compression ratio in its caption."""

    number: int
    ratio: float
    rows: tuple[TableRow, ...]

    @property
    def saved(self) -> int:
        """Parameters that the table removes from its model."""
        return sum((row.m * row.n - row.spec.num_params) * len(row.indices) for row in self.rows)


def _rows(b: int, *printed: tuple[str, int, int, int, range]) -> tuple[TableRow, ...]:
    return tuple(TableRow(layer, m, n, b, r, indices) for layer, m, n, r, indices in printed)


_DIT_ALL, _ALL, _LATE = range(28), range(32), range(10, 32)
DIT_TABLES = (
    Table(
        7,
        0.5,
        _rows(
            9,
            ("QKV_proj", 3456, 1152, 384, _DIT_ALL),
            ("FC1", 4608, 1152, 256, _DIT_ALL),
            ("adaLN_proj", 6912, 1152, 256, _DIT_ALL),
        ),
    ),
    Table(
        8,
        0.2,
        _rows(
            9,
            ("QKV_proj", 3456, 1152, 512, _DIT_ALL),
            ("FC1", 4608, 1152, 640, _DIT_ALL),
            ("adaLN_proj", 6912, 1152, 768, _DIT_ALL),
        ),
    ),
)
LLAMA_TABLES = (
    Table(
        9,
        0.5,
        _rows(
            16,
            ("self_attn.q_proj", 4096, 4096, 1024, _ALL),
            ("self_attn.k_proj", 4096, 4096, 1024, _ALL),
            ("self_attn.v_proj", 4096, 4096, 1024, _ALL),
            ("self_attn.o_proj", 4096, 4096, 1024, _ALL),
            ("mlp.gate_proj", 11008, 4096, 1488, _ALL),
            ("mlp.up_proj", 11008, 4096, 1488, _ALL),
            ("mlp.down_proj", 4096, 11008, 1488, _ALL),
        ),
    ),
    Table(
        10,
        0.2,
        _rows(
            16,
            ("self_attn.q_proj", 4096, 4096, 496, _ALL),
            ("self_attn.k_proj", 4096, 4096, 496, _ALL),
            ("mlp.gate_proj", 11008, 4096, 2048, _LATE),
            ("mlp.up_proj", 11008, 4096, 2048, _LATE),
        ),
    ),
    Table(
        11,
        0.1,
        _rows(
            16,
            ("self_attn.q_proj", 4096, 4096, 1024, _ALL),
            ("self_attn.k_proj", 4096, 4096, 1024, _ALL),
            ("mlp.gate_proj", 11008, 4096, 2368, _LATE),
        ),
    ),
)

# DiT-XL/2 on 32 x 32 x 4 latents: depth 28, width 1152, patches of 2 x 2, 1000 classes and "none".
# Weight shapes; every one has a bias of its first size, except the two embeddings below.
_WIDTH = 1152
DIT_BLOCK = {
    "QKV_proj": (3 * _WIDTH, _WIDTH),
    "attention output": (_WIDTH, _WIDTH),
    "FC1": (4 * _WIDTH, _WIDTH),
    "FC2": (_WIDTH, 4 * _WIDTH),
    "adaLN_proj": (6 * _WIDTH, _WIDTH),
}
DIT_OUTSIDE = {
    "patch embedding": (_WIDTH, 2 * 2 * 4),
    "time embedding 1": (_WIDTH, 256),
    "time embedding 2": (_WIDTH, _WIDTH),
    "final adaLN": (2 * _WIDTH, _WIDTH),
    "final projection": (2 * 2 * 8, _WIDTH),
}
DIT_CLASS_EMBEDDING = (1001, _WIDTH)
DIT_POSITION_EMBEDDING = (16 * 16, _WIDTH)


def dit_params() -> int:
    """All parameters of DiT-XL/2, its position embedding included, which is fixed sines."""
    layers = 28 * list(DIT_BLOCK.values()) + list(DIT_OUTSIDE.values())
    embeddings = math.prod(DIT_CLASS_EMBEDDING) + math.prod(DIT_POSITION_EMBEDDING)
    return sum(m * n + m for m, n in layers) + embeddings
