r"""BLAST (arXiv 2410.21262, Section 2): ``A_ij = U_i diag(s_ij) V_j^T``.

Layout: ``U (b1, p, r)``, ``S (b1, b2, r)``, ``V (b2, q, r)`` with ``p = ceil(m / b1)`` and
``q = ceil(n / b2)``, zero-padded where that does not divide (see ``grid.py``).
Parameters and multiplications per token: ``r (b1 p + b2 q + b1 b2)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from blastnn.arithmetic import DRAWN
from blastnn.structures.base import (
    Factors,
    generator,
    seeded_normal,
)
from blastnn.structures.grid import BlockGrid, pad_last
from blastnn.structures.registry import register

# Up to this many tokens the coupling is a broadcast product; beyond it, a batched product over
# the rank, which never builds the (b1, b2, tokens, r) tensor. Measured in benchmarks/.
FEW_TOKENS = 16


@register
@dataclass(frozen=True)
class Blast(BlockGrid):
    """A ``b1 x b2`` block matrix with factors shared along block rows and block columns."""

    name: ClassVar[str] = "blast"

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """``U (b1, p, r)``, ``S (b1, b2, r)``, ``V (b2, q, r)``."""
        (b1, b2), (p, q), r = self.blocks, self.block_shape, self.rank
        return {"U": (b1, p, r), "S": (b1, b2, r), "V": (b2, q, r)}

    def row_blocks(self) -> int:
        """``b1``: the rows of ``U_i`` are those of block row ``i``."""
        return self.blocks[0]

    def large_factors(self) -> tuple[str, ...]:
        """``V``, ``U``; a coupling scales ``p + q`` numbers of theirs."""
        return ("V", "U")

    def gram(self, name: str, factors: Factors, second_moment: Tensor | None) -> Tensor:
        """``sum_i s_ij s_ij^T * U_i^T U_i`` for ``V_j``; for ``U_i``, with ``C`` the moment,
        ``sum_jk s_ij s_ik^T * V_j^T C_jk V_k``.
        """
        U, S, V = (factors[key].float() for key in "USV")
        if name == "V":
            return torch.einsum("ijr,irs,ijs->jrs", S, U.mT @ U, S)
        if second_moment is None:
            return torch.einsum("ijr,jrs,ijs->irs", S, V.mT @ V, S)
        missing = self.padded_shape[1] - self.in_features
        moment = pad(second_moment.float(), (0, missing, 0, missing))
        rows = [(couplings[:, None] * V).flatten(0, 1) for couplings in S]  # (b2 q, r) for each i
        return torch.stack([row.mT @ moment @ row for row in rows])

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """Algorithm 1: ``z_j = V_j^T x_j``, ``w_i = sum_j s_ij z_j``, ``y_i = U_i w_i``."""
        self.check_input(x)
        U, S, V = factors["U"], factors["S"], factors["V"]
        b2, q = self.blocks[1], self.block_shape[1]
        tokens = x.reshape(-1, self.in_features)
        columns = pad_last(tokens, b2 * q).view(-1, b2, q)  # (T, b2, q)
        multiply = _few_tokens if columns.shape[0] <= FEW_TOKENS else _many_tokens
        y = multiply(columns, U, S, V)  # (T, b1 p)
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def to_dense(self, factors: Factors) -> Tensor:
        """Every block ``U_i diag(s_ij) V_j^T`` in its place; padding cut off."""
        U, S, V = factors["U"], factors["S"], factors["V"]
        rows = [
            left @ (couplings[:, None] * V).flatten(0, 1).mT
            for left, couplings in zip(U, S, strict=True)
        ]
        return torch.cat(rows)[: self.out_features, : self.in_features]

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        r"""``s ~ Unif(0, 2)`` as in Appendix C.2, ``U, V`` normal with the scale that it means.

        An entry is ``sum_r u s v`` with ``E[s^2] = 4/3``, so its variance is ``r 4/3 std^4``;
        ``std`` is chosen to make that ``1/n``.
        """
        shapes = self.factor_shapes()
        std = (3.0 / (4.0 * self.rank * self.in_features)) ** 0.25
        return {
            "U": std * seeded_normal(shapes["U"], seed, 0, dtype, device),
            "S": _uniform(shapes["S"], seed, 1, dtype, device),
            "V": std * seeded_normal(shapes["V"], seed, 2, dtype, device),
        }


def _few_tokens(columns: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Algorithm 1 as in the paper's Figure 8: the coupling by broadcasting. ``(T, b2, q)`` in."""
    z = torch.bmm(columns.transpose(0, 1), V)  # (b2, T, r)
    w = (z.unsqueeze(0) * S.unsqueeze(2)).sum(1)  # (b1, T, r)
    return torch.bmm(w, U.mT).transpose(0, 1).reshape(columns.shape[0], U.shape[0] * U.shape[1])


def _many_tokens(columns: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Algorithm 1 with the coupling as ``r`` small products ``(b1, b2) x (b2, T)``."""
    z = torch.bmm(V.mT, columns.permute(1, 2, 0))  # (b2, r, T)
    # Contiguous: a batch of products with strides on both sides is run one by one, up to 3x slower.
    w = torch.bmm(S.permute(2, 0, 1).contiguous(), z.transpose(0, 1))  # (r, b1, T)
    y = torch.bmm(U, w.transpose(0, 1))  # (b1, p, T)
    return y.reshape(U.shape[0] * U.shape[1], columns.shape[0]).T


def _uniform(
    shape: tuple[int, ...], seed: int, stream: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Uniform numbers on (0, 2) that depend on the seed alone."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    drawn = 2 * torch.rand(shape, generator=generator(seed, stream), **DRAWN)
    return drawn.to(device=device, dtype=dtype)
