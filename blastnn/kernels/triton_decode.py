r"""BLAST times 1 to 16 tokens in Triton: two launches.

Launch 1 computes ``z_j = V_j^T x_j``; launch 2 couples, ``w_i = sum_j s_ij * z_j``, and expands,
``y_i = U_i w_i``. With so few tokens the time goes into reading ``V`` and ``U``, which each launch
reads once, and there is little else to share: ``z`` is a few hundred kilobytes at most and stays in
the cache. So launch 2 may couple again in every program, which keeps the number of programs high;
were the coupling in launch 1, a program would have to walk all block columns and there would be too
few of them to keep the memory busy.

``z`` is kept in float32 and ``w`` rounded once, to the dtype of ``U``. Every size may be anything:
tiles are masked, ``x`` is never padded.

Shape letters: ``m`` out_features, ``n`` in_features, ``r`` rank, ``T`` tokens, ``b1 x b2`` blocks
of ``p x q``; ``BT, BR, BP, BQ, BJ`` the sides of tiles of tokens, ranks, rows, columns and block
columns. An argument like ``x_t`` is the stride of ``x`` along ``t``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blastnn.kernels.triton_tuning import SMALLEST, config, next_power_of_two, precision, tuned

MOST_TOKENS = SMALLEST

_PROJECT = [
    config(4, 3, BR=32, BQ=64),
    config(4, 4, BR=32, BQ=128),
    config(4, 3, BR=64, BQ=64),
    config(8, 3, BR=64, BQ=128),
    config(4, 4, BR=16, BQ=256),
    config(8, 3, BR=128, BQ=64),
]
_EXPAND = [
    config(4, 2, BR=32, BP=16),
    config(8, 2, BR=32, BP=16),
    config(4, 3, BR=32, BP=32),
    config(4, 2, BR=64, BP=16),
    config(8, 2, BR=64, BP=32),
    config(8, 3, BR=64, BP=64),
    config(8, 2, BR=128, BP=16),
]


@tuned(_PROJECT, ["n", "r", "q", "b2"])
@triton.jit(do_not_specialize=["tokens"])
def _project(
    x, V, z, tokens, n, r, q, b2, x_t, x_n, V_j, V_q, V_r,
    BT: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``z[t, j] = V_j^T x_j``; one program makes ``BR`` ranks of one block column.

    Has not run on a GPU yet; checked with Triton's interpreter only.
    """
    j = tl.program_id(1)
    ranks = tl.program_id(0) * BR + tl.arange(0, BR)
    rows = tl.arange(0, BT)
    in_rank, in_rows = ranks < r, rows < tokens
    V += j.to(tl.int64) * V_j
    sums = tl.zeros((BT, BR), tl.float32)
    for start in range(0, q, BQ):
        local = start + tl.arange(0, BQ)
        columns = j * q + local
        inside = (local < q) & (columns < n)
        x_at = x + rows[:, None] * x_t + columns[None, :] * x_n
        x_tile = tl.load(x_at, mask=in_rows[:, None] & inside[None, :], other=0.0)
        V_at = V + local[:, None] * V_q + ranks[None, :] * V_r
        V_tile = tl.load(V_at, mask=inside[:, None] & in_rank[None, :], other=0.0)
        sums = tl.dot(x_tile, V_tile, sums, input_precision=PRECISION)
    z_at = z + (rows[:, None] * b2 + j) * r + ranks[None, :]
    tl.store(z_at, sums, mask=in_rows[:, None] & in_rank[None, :])


@tuned(_EXPAND, ["m", "r", "p", "b1", "b2", "CT"])
@triton.jit(do_not_specialize=["tokens"])
def _couple_and_expand(
    z, S, U, y, tokens, m, r, p, b1, b2, S_i, S_j, S_r, U_i, U_p, U_r, y_t, y_m,
    CT: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``y_i = U_i sum_j s_ij * z_j``; one program makes ``BP`` rows of one block row.

    ``CT`` is the tokens that are coupled: 1, or ``BT`` for any other number. With one token the
    other rows of the tile would be most of the work.

    Has not run on a GPU yet; checked with Triton's interpreter only.
    """
    i = tl.program_id(1)
    local = tl.program_id(0) * BP + tl.arange(0, BP)
    out = i * p + local
    inside = (local < p) & (out < m)
    rows, coupled = tl.arange(0, BT), tl.arange(0, CT)
    S += i * S_i
    U += i.to(tl.int64) * U_i
    sums = tl.zeros((BT, BP), tl.float32)
    for start in range(0, r, BR):
        ranks = start + tl.arange(0, BR)
        in_rank = ranks < r
        w = tl.zeros((CT, BR), tl.float32)
        for first in range(0, b2, BJ):
            # All block columns of a tile at once: their loads wait for one another otherwise.
            j = first + tl.arange(0, BJ)
            in_S = (j < b2)[:, None] & in_rank[None, :]
            s = tl.load(S + j[:, None] * S_j + ranks[None, :] * S_r, mask=in_S, other=0.0)
            z_at = z + (coupled[:, None, None] * b2 + j[None, :, None]) * r + ranks[None, None, :]
            in_z = (coupled < tokens)[:, None, None] & in_S[None, :, :]
            w += tl.sum(tl.load(z_at, mask=in_z, other=0.0) * s.to(tl.float32)[None, :, :], axis=1)
        U_at = U + local[:, None] * U_p + ranks[None, :] * U_r
        U_tile = tl.load(U_at, mask=inside[:, None] & in_rank[None, :], other=0.0)
        w_tile = tl.broadcast_to(w, (BT, BR)).to(U_tile.dtype)
        sums = tl.dot(w_tile, tl.trans(U_tile), sums, input_precision=PRECISION)
    y_at = y + rows[:, None] * y_t + out[None, :] * y_m
    tl.store(y_at, sums.to(y.dtype.element_ty), mask=(rows < tokens)[:, None] & inside[None, :])


def decode(x: Tensor, U: Tensor, S: Tensor, V: Tensor, y: Tensor) -> None:
    """Write ``x @ A.T`` into ``y`` for 1 to 16 tokens.

    Args:
        x: ``(T, n)``; any strides, as all arguments.
        U, S, V: the factors ``(b1, p, r)``, ``(b1, b2, r)``, ``(b2, q, r)``.
        y: ``(T, m)``, overwritten.
    """
    (tokens, n), m = x.shape, y.shape[1]
    (b1, p, r), (b2, q) = U.shape, V.shape[:2]
    z = torch.empty(tokens, b2, r, dtype=torch.float32, device=x.device)
    how = {"BT": MOST_TOKENS, "PRECISION": precision(x.dtype)}
    _project[lambda sizes: (triton.cdiv(r, sizes["BR"]), b2)](
        x, V, z, tokens, n, r, q, b2, *x.stride(), *V.stride(), **how
    )
    coupled, columns = 1 if tokens == 1 else MOST_TOKENS, next_power_of_two(b2, at_most=16)
    _couple_and_expand[lambda sizes: (triton.cdiv(p, sizes["BP"]), b1)](
        z, S, U, y, tokens, m, r, p, b1, b2, *S.stride(), *U.stride(), *y.stride(),
        CT=coupled, BJ=columns, **how,
    )  # fmt: skip
