"""Tables 7 to 11 of the paper, as printed but for the layers, which have their modules' names."""

from __future__ import annotations

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
            ("attn.qkv", 3456, 1152, 384, _DIT_ALL),
            ("mlp.fc1", 4608, 1152, 256, _DIT_ALL),
            ("adaLN_modulation.1", 6912, 1152, 256, _DIT_ALL),
        ),
    ),
    Table(
        8,
        0.2,
        _rows(
            9,
            ("attn.qkv", 3456, 1152, 512, _DIT_ALL),
            ("mlp.fc1", 4608, 1152, 640, _DIT_ALL),
            ("adaLN_modulation.1", 6912, 1152, 768, _DIT_ALL),
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
