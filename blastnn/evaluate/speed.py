"""Tokens per second of two models in turn: prefill and decode apart, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PROTOCOL = "batch 1, eager PyTorch, both models in turn, median of {rounds} rounds"
DECODE_TOKENS = 16


@torch.no_grad()
def compare_speed(
    dense: PreTrainedModel, compressed: PreTrainedModel, ids: Tensor, rounds: int = 5
) -> dict[str, Any]:
    """Tokens per second for a prompt ``ids (1, window)`` and for decoding behind it."""
    models = {"dense": dense, "compressed": compressed}
    prefill = _rates(models, lambda model: _prefill(model, ids), ids.shape[1], rounds)
    decode = _rates(models, lambda model: _decode(model, ids[:, :32]), DECODE_TOKENS, rounds)
    protocol = PROTOCOL.format(rounds=rounds)
    return {"prefill": prefill, "decode": decode, "protocol": protocol}


def _rates(
    models: dict[str, PreTrainedModel],
    seconds: Callable[[PreTrainedModel], float],
    tokens: int,
    rounds: int,
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            times[name].append(seconds(model))
    # The first round warms up and is not counted.
    rates = {name: tokens / statistics.median(values[1:]) for name, values in times.items()}
    return {"tokens": tokens, **rates, "ratio": rates["compressed"] / rates["dense"]}


def _prefill(model: PreTrainedModel, ids: Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def _decode(model: PreTrainedModel, prompt: Tensor) -> float:
    """Seconds for ``DECODE_TOKENS`` greedy steps behind a short prompt, the prompt not counted."""
    out = model(input_ids=prompt, use_cache=True)
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return time.perf_counter() - start
