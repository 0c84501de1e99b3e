"""Attention of a prompt, against torch's in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blastnn.kernels.attention import attend_causally, serves

# Heads, heads of keys, tokens, length of the cache, width: with and without groups, odd and whole.
ATTENTIONS = [(4, 4, 37, 40, 24), (9, 3, 130, 160, 64), (2, 1, 1, 3, 5), (6, 2, 65, 65, 17)]


@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "length", "width"), ATTENTIONS, ids=str)
def test_attention_of_a_prompt_is_as_exact_as_torchs(
    heads: int, kv_heads: int, tokens: int, length: int, width: int
) -> None:
    q = torch.randn(2, tokens, heads, width).transpose(1, 2)
    k, v = torch.randn(2, 2, kv_heads, length, width)
    scale = width**-0.5
    assert serves(q, k, v)
    group = heads // kv_heads
    keys, values = (x[:, :, :tokens].repeat_interleave(group, 1) for x in (k, v))

    def plain(dtype: torch.dtype) -> Tensor:
        given = [x.to(dtype) for x in (q, keys, values)]
        seen = scaled_dot_product_attention(*given, is_causal=True, scale=scale)
        return seen.transpose(1, 2)

    exact = plain(torch.float64)
    found = attend_causally(q, k, v, scale)
    assert found.shape == (2, tokens, heads, width)
    allowed = 2.0 * (plain(torch.float32) - exact).norm() + 1e-7 * exact.norm()
    assert (found - exact).norm() <= allowed


def test_attention_sees_nothing_that_comes_later_and_stands_large_scores() -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 16)
    found = attend_causally(q, k, v, 0.25)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, 30:], later_v[:, :, 30:] = 1e4, 1e4
    later = attend_causally(q, later_k, later_v, 0.25)
    assert torch.equal(later[:, :30], found[:, :30])
    assert not torch.equal(later[:, 30:], found[:, 30:])
    sharp = attend_causally(q * 1e4, k, v, 1.0)
    one_hot = scaled_dot_product_attention(
        q.double() * 1e4, k.double(), v.double(), is_causal=True, scale=1.0
    ).transpose(1, 2)
    torch.testing.assert_close(sharp.double(), one_hot, rtol=1e-3, atol=1e-3)
    q[0, 1, 20, 3] = float("nan")
    spoilt = attend_causally(q, k, v, 0.25)
    assert spoilt[0, 20, 1].isnan().all()
    assert spoilt.isnan().sum() == 16


def test_attention_is_left_to_torch_where_gradients_are_wanted() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    assert serves(q, k, v)
    assert not serves(q.requires_grad_(), k, v)
    assert not serves(q.detach().double(), k.double(), v.double())
    assert not serves(torch.randn(1, 3, 5, 4), k, v)


def test_attention_does_not_depend_on_the_number_of_threads() -> None:
    q, k, v = torch.randn(3, 2, 6, 90, 24)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attend_causally(q, k, v, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
