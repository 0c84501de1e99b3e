"""Greedy or sampled continuation of a prompt, token by token through the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blastnn.errors import ModelError
from blastnn.evaluate.engine import Choose, open_engine
from blastnn.integrations.transformers import require_causal
from blastnn.models.context import positions
from blastnn.structures.base import LARGEST_SEED, is_seed

LEAST_TEMPERATURE = 1e-3  # far below, logits divided by it overflow; here it is greedy already


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    compiled: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """The text that follows ``prompt``; greedy where ``temperature`` is 0.

    Ends at the model's end-of-text tokens, after ``max_tokens``, or where the model has no more
    positions. ``say`` is told of the last, and if the step was to be compiled and could not be.

    Raises:
        ModelError: the model predicts no token; the prompt has none or leaves no position for a
            new one; ``max_tokens``, ``temperature`` or ``seed`` makes no sense; a logit is not
            finite.
    """
    require_causal(model, type(model).__name__, "text to continue")
    if not is_seed(seed):
        raise ModelError(f"seed must be from 0 to {LARGEST_SEED}, but is {seed!r}")
    if max_tokens < 1:
        raise ModelError(f"max_tokens must be at least 1, but is {max_tokens}")
    if not (temperature == 0.0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise ModelError(
            f"temperature must be 0 (greedy) or from {LEAST_TEMPERATURE:g} on, but is {temperature}"
        )
    encoded = tokenizer(prompt)["input_ids"]
    if not encoded:
        raise ModelError("the prompt is empty, and the model has no token to start a text with")
    ids = torch.tensor([encoded], device=model.device)
    choose = _checked(_sampler(temperature, seed, model.device) if temperature else _likeliest)
    room = positions(model.config) - ids.shape[1]
    if 0 < room < max_tokens:
        say(f"at most {room} new tokens instead of {max_tokens}: the model has no more positions")
        max_tokens = room
    ends, made = _end_tokens(model, tokenizer), []
    with open_engine(model, ids.shape[1] + max_tokens, compiled) as engine:
        for token in engine.tokens(ids, max_tokens, choose):
            if int(token) in ends:
                break
            made.append(int(token))
        if engine.fallback is not None:
            say(f"not compiled, the text was made eagerly: {engine.fallback}")
    return str(tokenizer.decode(made, skip_special_tokens=True))


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a text, by the model's own settings, else by its tokenizer's."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else {ends}


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def _checked(choose: Choose) -> Choose:
    """The same, of finite logits alone."""

    def checked(logits: Tensor) -> Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("the model gave a non-finite logit; its weights are damaged")
        return choose(logits)

    return checked


def _sampler(temperature: float, seed: int, device: torch.device) -> Choose:
    source = torch.Generator(device).manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        shares = torch.softmax(logits.float() / temperature, -1)
        return torch.multinomial(shares, 1, generator=source)

    return sample
