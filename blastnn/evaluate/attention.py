"""Attention for decoding over a static cache: transformers' own, without its copies.

Registered under ``NAME`` as an attention function and its mask. Two things differ from the
``sdpa`` of transformers. While ``torch.compile`` traces, that one repeats keys and values for every
query head, so that each token copies the whole cache once a group; here the query heads of a group
become rows of one product. And a prompt that starts an empty cache is plainly causal, which a
static cache whose length is a tensor cannot tell; ``Engine`` never asks for anything else. Such a
prompt's attention is computed by a kernel of ours where that serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from blastnn.kernels.attention import attend_causally, serves

NAME = "blastnn_static"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """``(B, H, T, D)`` queries over ``(B, H_kv, L, D)`` keys and values to ``(B, T, H, D)``."""
    batch, heads, tokens, _ = query.shape
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    plain = attention_mask is None and tokens > 1 and getattr(module, "is_causal", True)
    if plain and _asks_for_no_more(rest) and serves(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_causally(query, key, value, scale), None
    if tokens > 1 or not shared_mask or rest.get("position_bias") is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
        return found
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[3])
    y = scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return y.reshape(batch, 1, heads, value.shape[3]), None


def _asks_for_no_more(options: dict[str, Any]) -> bool:
    """Whether nothing is wanted that changes the scores, the weights or what is seen."""
    given = (
        options.get(name) for name in ("dropout", "position_bias", "softcap", "sliding_window")
    )
    return options.get("s_aux") is None and all(
        each is None or (isinstance(each, int | float) and each == 0) for each in given
    )


def mask(
    *,
    q_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **rest: Any,
) -> Tensor | None:
    """No mask for a plainly causal prompt; transformers' boolean mask for anything else."""
    plain = mask_function is causal_mask_function and local_size is None
    if q_length > 1 and plain and attention_mask is None:
        return None
    made: Tensor | None = sdpa_mask(
        q_length=q_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **rest,
    )
    return made


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


@contextmanager
def static_attention(model: PreTrainedModel) -> Iterator[str]:
    """The model with this attention while the context is open; yields the name of what it uses.

    Models that do not take their attention from transformers' table keep their own.
    """
    before = model.config._attn_implementation
    if before == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)
    try:
        yield str(model.config._attn_implementation)
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
