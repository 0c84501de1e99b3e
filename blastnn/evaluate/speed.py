"""Tokens per second of two models for the report: the race of ``blastnn bench``, not compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from blastnn.evaluate.race import race

PROTOCOL = (
    "batch 1, static cache, eager PyTorch (blastnn bench compiles), both models in turn, median of "
    "{rounds} rounds, logits checked against the plain model"
)
DECODE_TOKENS = 16


def compare_speed(
    dense: PreTrainedModel, compressed: PreTrainedModel, ids: Tensor, rounds: int = 3
) -> dict[str, Any]:
    """Tokens per second for a prompt ``ids (1, window)`` and for decoding behind 32 of its tokens.

    Raises:
        MeasurementError: the engine's logits are not those of the plain model.
    """
    models = {"dense": dense, "compressed": compressed}
    found: dict[str, Any] = {"protocol": PROTOCOL.format(rounds=rounds)}
    # No step behind the whole window: it may be all the positions that the model has.
    for phase, prompt, steps in (("prefill", ids, 0), ("decode", ids[:, :32], DECODE_TOKENS)):
        racers = race(models, prompt, steps, rounds, compiled=False)
        tokens = prompt.shape[1] if phase == "prefill" else steps
        rates = {name: tokens / getattr(racer, phase).median for name, racer in racers.items()}
        ratio = rates["compressed"] / rates["dense"]
        dense_runs, runs = (getattr(racers[name], phase).seconds for name in models)
        each = [there / here for there, here in zip(dense_runs, runs, strict=True)]
        spread = {"least": min(each), "most": max(each)}  # of the rounds one by one
        found[phase] = {"tokens": tokens, **rates, "ratio": ratio, **spread}
    return found
