r"""BLAST times many tokens in Triton: two launches, the coupling inside the first.

Launch 1 walks the block columns: it makes a tile of ``z_j = V_j^T x_j`` and adds it, times
``s_ij``, to the tile's ``w_i`` of all ``b1`` block rows, which stay in registers. Launch 2 is one
product for each block row, ``y_i = U_i w_i``. Neither ``z`` nor anything of size ``b1 b2`` is ever
in memory; ``w`` is, once.

Why there and not in launch 2, which could combine the ``z_j`` on the fly? Because of what the
caches would have to deliver. Launch 2 would read all ``b2`` block columns of ``z`` for every tile
of output rows, ``b2 T r m / BP`` numbers; launch 1 pays for its smaller tiles (the registers hold
``b1 BT BR`` sums) with ``T n r (1 / BT + 1 / BR)``. For a 4096 x 4096 matrix with 16 x 16 blocks,
rank 1024, 4096 tokens, ``BP = 256`` and ``BT x BR = 64 x 32``, that is 1.07 against 0.81 thousand
million numbers, and the other launch is a plain product either way. Also, the coupling is
multiplied out once, not ``p / BP`` times, and ``z``, as large as ``w``, is neither written nor
read. Counted, not measured.

More than 16 block rows do not fit the registers: they are done in groups of 16, each of which makes
``z`` again.

``w`` is rounded once, to the input's dtype; ``z`` never is. Every size may be anything: tiles are
masked, ``x`` is never padded.

Shape letters: ``m`` out_features, ``n`` in_features, ``r`` rank, ``T`` tokens, ``b1 x b2`` blocks
of ``p x q``; ``BT, BR, BP, BQ, BI`` the sides of tiles of tokens, ranks, rows, columns and block
rows. An argument like ``x_t`` is the stride of ``x`` along ``t``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blastnn.kernels.triton_tuning import config, next_power_of_two, precision, tuned

MOST_BLOCK_ROWS = 16

_PROJECT = [
    config(4, 3, BT=32, BR=32, BQ=64),
    config(8, 3, BT=64, BR=32, BQ=64),
    config(8, 3, BT=32, BR=64, BQ=64),
    config(8, 4, BT=64, BR=64, BQ=32),
    config(8, 3, BT=128, BR=64, BQ=64),
    config(8, 3, BT=128, BR=128, BQ=64),
]
_EXPAND = [
    config(4, 3, BT=32, BP=64, BR=64),
    config(4, 4, BT=64, BP=64, BR=32),
    config(4, 3, BT=64, BP=128, BR=64),
    config(8, 3, BT=128, BP=128, BR=64),
    config(8, 4, BT=128, BP=128, BR=32),
    config(8, 3, BT=128, BP=256, BR=64),
]


@tuned(_PROJECT, ["n", "r", "q", "b1", "b2"], accumulators=("BI", "BT", "BR"))
@triton.jit(do_not_specialize=["tokens"])
def _project_and_couple(
    x, S, V, w, tokens, n, r, q, b1, b2, x_t, x_n, S_i, S_j, S_r, V_j, V_q, V_r,
    BI: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``w[t, i] = sum_j s_ij * (V_j^T x_j)`` for ``BT`` tokens, ``BR`` ranks, ``BI`` block rows.

    Has not run on a GPU yet; checked with Triton's interpreter only.
    """
    # Neighbouring programs share their tokens: V fits the cache, x need not.
    rank_tiles = tl.cdiv(r, BR)
    ranks = tl.program_id(0) % rank_tiles * BR + tl.arange(0, BR)
    rows = (tl.program_id(0) // rank_tiles).to(tl.int64) * BT + tl.arange(0, BT)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    in_rank, in_rows, in_i = ranks < r, rows < tokens, i < b1
    S_at = S + i[:, None] * S_i + ranks[None, :] * S_r
    sums = tl.zeros((BI, BT, BR), tl.float32)
    for j in range(b2):
        z = tl.zeros((BT, BR), tl.float32)
        for start in range(0, q, BQ):
            local = start + tl.arange(0, BQ)
            columns = j * q + local
            inside = (local < q) & (columns < n)
            x_at = x + rows[:, None] * x_t + columns[None, :].to(tl.int64) * x_n
            x_tile = tl.load(x_at, mask=in_rows[:, None] & inside[None, :], other=0.0)
            V_at = V + local[:, None] * V_q + ranks[None, :] * V_r
            V_tile = tl.load(V_at, mask=inside[:, None] & in_rank[None, :], other=0.0)
            z = tl.dot(x_tile, V_tile, z, input_precision=PRECISION)
        s = tl.load(S_at, mask=in_i[:, None] & in_rank[None, :], other=0.0).to(tl.float32)
        sums += s[:, None, :] * z[None, :, :]
        V += V_j
        S_at += S_j
    w_at = w + (rows[None, :, None] * b1 + i[:, None, None]) * r + ranks[None, None, :]
    inside_w = in_i[:, None, None] & in_rows[None, :, None] & in_rank[None, None, :]
    tl.store(w_at, sums.to(w.dtype.element_ty), mask=inside_w)


@tuned(_EXPAND, ["m", "r", "p", "b1"], accumulators=("BT", "BP"))
@triton.jit(do_not_specialize=["tokens"])
def _expand(
    w, U, y, tokens, m, r, p, b1, U_i, U_p, U_r, y_t, y_m,
    BT: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y_i = U_i w_i`` for ``BT`` tokens and ``BP`` rows of one block row.

    Has not run on a GPU yet; checked with Triton's interpreter only.
    """
    i = tl.program_id(1)
    row_tiles = tl.cdiv(p, BP)
    local = tl.program_id(0) % row_tiles * BP + tl.arange(0, BP)
    rows = (tl.program_id(0) // row_tiles).to(tl.int64) * BT + tl.arange(0, BT)
    out = i * p + local
    inside, in_rows = (local < p) & (out < m), rows < tokens
    U += i.to(tl.int64) * U_i
    sums = tl.zeros((BT, BP), tl.float32)
    for start in range(0, r, BR):
        ranks = start + tl.arange(0, BR)
        in_rank = ranks < r
        w_at = w + (rows[:, None] * b1 + i) * r + ranks[None, :]
        w_tile = tl.load(w_at, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        U_at = U + local[:, None] * U_p + ranks[None, :] * U_r
        U_tile = tl.load(U_at, mask=inside[:, None] & in_rank[None, :], other=0.0)
        sums = tl.dot(w_tile, tl.trans(U_tile), sums, input_precision=PRECISION)
    y_at = y + rows[:, None] * y_t + out[None, :] * y_m
    tl.store(y_at, sums.to(y.dtype.element_ty), mask=in_rows[:, None] & inside[None, :])


def prefill(x: Tensor, U: Tensor, S: Tensor, V: Tensor, y: Tensor) -> None:
    """Write ``x @ A.T`` into ``y`` for any number of tokens.

    Args:
        x: ``(T, n)``; any strides, as all arguments.
        U, S, V: the factors ``(b1, p, r)``, ``(b1, b2, r)``, ``(b2, q, r)``.
        y: ``(T, m)``, overwritten.
    """
    (tokens, n), m = x.shape, y.shape[1]
    (b1, p, r), (b2, q) = U.shape, V.shape[:2]
    w = torch.empty(tokens, b1, r, dtype=x.dtype, device=x.device)
    group, how = next_power_of_two(b1, at_most=MOST_BLOCK_ROWS), precision(x.dtype)
    _project_and_couple[
        lambda sizes: (
            triton.cdiv(r, sizes["BR"]) * triton.cdiv(tokens, sizes["BT"]),
            triton.cdiv(b1, group),
        )
    ](
        x, S, V, w, tokens, n, r, q, b1, b2, *x.stride(), *S.stride(), *V.stride(),
        BI=group, PRECISION=how,
    )  # fmt: skip
    _expand[lambda sizes: (triton.cdiv(p, sizes["BP"]) * triton.cdiv(tokens, sizes["BT"]), b1)](
        w, U, y, tokens, m, r, p, b1, *U.stride(), *y.stride(), PRECISION=how
    )
