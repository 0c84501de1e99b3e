"""Greedy or sampled continuation of a prompt."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that follows ``prompt``; greedy where ``temperature`` is 0."""
    torch.manual_seed(seed)
    encoded = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **(sampling or {"do_sample": False}),
    )
    continuation = output[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(continuation, skip_special_tokens=True))
