r"""The gradients of a BLAST product in plain PyTorch: what every hand-written BLAST kernel shares.

Forward, with ``x_j`` and ``y_i`` the input's and the output's blocks (Algorithm 1 of arXiv
2410.21262): ``z_j = V_j^T x_j``, ``w_i = sum_j s_ij * z_j``, ``y_i = U_i w_i``. Backward, with
``h`` for the gradient of the loss by ``w`` and ``k`` for that by ``z``::

    h_i = U_i^T gy_i                gU_i  = gy_i w_i^T         gS_ij = sum over tokens of h_i * z_j
    k_j = sum_i s_ij * h_i          gV_j  = x_j k_j^T          gx_j  = V_j k_j

The backward product is a BLAST product itself, of the transposed matrix. Couplings and their
gradient are ``r`` small products ``(b1, b2) x (b2, T)``, so the largest tensors are ``(b, r, T)``;
the ``(b1, b2, T, r)`` tensor that autograd keeps of a broadcast coupling is never built. ``z`` and
``w`` are computed again rather than saved: that costs about half a forward product, and saves
``r (b1 + b2)`` numbers a token, more than the input itself for the ranks of Table 9.

Shape letters: ``m`` out_features, ``n`` in_features, ``r`` rank, ``T`` tokens, ``b1 x b2`` blocks
of ``p x q``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blastnn.structures.grid import pad_last

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def blast_backward(
    grad_y: Tensor,
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    needed: Sequence[bool] = (True, True, True, True),
) -> Gradients:
    """``(gx, gU, gS, gV)`` of ``y = x @ A.T``, each of its input's shape and dtype.

    Padding gets a gradient of zero, and no number in the padding of a factor changes any result.
    Differentiable itself.

    Args:
        grad_y: ``(T, m)``, the gradient of the loss by the output.
        x: ``(T, n)``, the forward input; ``n`` may be less than ``b2 q``, and ``m`` than ``b1 p``.
        U, S, V: the factors ``(b1, p, r)``, ``(b1, b2, r)``, ``(b2, q, r)``.
        needed: which of the four to compute; the others are None. What ``ctx.needs_input_grad``
            says of the inputs in this order.
    """
    want_x, want_U, want_S, want_V = needed
    inputs = _blocks(x, V)  # (b2, q, T)
    grads = _blocks(grad_y, U)  # (b1, p, T)
    by_rank = S.permute(2, 0, 1).contiguous()  # (r, b1, b2)
    # Contiguous: a batch of products with strides on both sides is run one by one.
    h = torch.bmm(U.mT, grads).transpose(0, 1).contiguous()  # (r, b1, T)
    k = torch.bmm(by_rank.mT, h).transpose(0, 1)  # (b2, r, T)
    gx = torch.bmm(V, k).flatten(0, 1)[: x.shape[1]].mT if want_x else None  # (T, n)
    gV = torch.bmm(inputs, k.mT) if want_V else None  # (b2, q, r)
    if not (want_U or want_S):
        return gx, None, None, gV
    z = torch.bmm(V.mT, inputs).transpose(0, 1)  # (r, b2, T)
    w = torch.bmm(by_rank, z)  # (r, b1, T)
    gU = torch.bmm(grads, w.permute(1, 2, 0)) if want_U else None  # (b1, p, r)
    gS = torch.bmm(h, z.mT).permute(1, 2, 0) if want_S else None  # (b1, b2, r)
    return gx, gU, gS, gV


def _blocks(rows: Tensor, factor: Tensor) -> Tensor:
    """``(T, size)`` cut as a factor ``(b, l, r)`` cuts it: ``(b, l, T)``, zero-padded."""
    b, length = factor.shape[:2]
    return pad_last(rows, b * length).mT.unflatten(0, (b, length))
