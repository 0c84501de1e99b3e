"""What ``blastnn bench`` measures: a compressed model beside the dense one, and what is possible.

The dense and the compressed model go through the same engine, compiled with the same options. For
each batch and prompt the report has both speeds, their quotient, the quotient that the bytes (for
decoding) or the multiplications (for prefill) of the two models would allow, and the share of the
machine's measured ceiling that each reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blastnn.dtypes import name_of
from blastnn.evaluate import peak
from blastnn.evaluate.bench_options import BenchOptions
from blastnn.evaluate.energy import EnergyMeter
from blastnn.evaluate.engine import check_length
from blastnn.evaluate.machine import ceilings, describe
from blastnn.evaluate.race import Racer, Timing, race
from blastnn.evaluate.score import open_any
from blastnn.evaluate.work import decode_bytes, prefill_products
from blastnn.integrations.transformers import load_model, require_causal

FORMAT = "blastnn bench 1"
PROTOCOL = (
    "both models in turn, {rounds} counted rounds behind a check of the logits against the plain "
    "model and one round of warming up; medians; static cache of the prompt and the new tokens, "
    "greedy, logits of the last position only; prefill and step {how}; random prompts of equal "
    "length; a decoding run is {new_tokens} steps"
)
Say = Callable[[str], None]


def bench(
    model: str, against: str, options: BenchOptions, say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure ``model`` beside the dense model ``against``.

    Raises:
        ModelError: one of them does not predict the next token, or has too few positions.
        MeasurementError: a check failed; nothing is reported.
    """
    folders = {"dense": open_any(against), "compressed": open_any(model)}
    models = {name: _load(str(folder), options.device) for name, folder in folders.items()}
    for model_of in models.values():
        check_length(model_of, max(options.prompts) + options.new_tokens)
    say("peak memory, each model in a process of its own")
    memory = {
        name: peak.peak_bytes(folder, options.shapes, options.new_tokens, options.device)
        for name, folder in folders.items()
    }
    dense = models["dense"]
    limits = ceilings(dense.device, dense.dtype)
    meter = EnergyMeter(dense.device)
    settings = []
    for index, (batch, prompt) in enumerate(options.shapes):
        say(f"batch {batch}, prompt {prompt}")
        ids = random_prompts(dense, batch, prompt)
        racers = race(models, ids, options.new_tokens, options.rounds, options.compiled, meter)
        found = compare(models, racers, ids, options.new_tokens, limits)
        found["peak_bytes"] = {name: peaks[index] for name, peaks in memory.items()}
        settings.append(found)
    how = "compiled by torch.compile" if options.compiled else "eager"
    return {
        "format": FORMAT,
        "models": {"dense": against, "compressed": model},
        "dtype": name_of(dense.dtype),
        "machine": describe(),
        "ceilings": limits,
        "energy": {"source": meter.source, "not_measured": meter.reason},
        "memory": peak.HOW,
        "options": asdict(options),
        "protocol": PROTOCOL.format(rounds=options.rounds, new_tokens=options.new_tokens, how=how),
        "settings": settings,
    }


def random_prompts(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """Ids ``(batch, tokens)`` from the vocabulary, the same at every call."""
    source = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    return torch.randint(vocabulary, (batch, tokens), generator=source).to(model.device)


def compare(
    models: dict[str, PreTrainedModel],
    racers: dict[str, Racer],
    ids: Tensor,
    new_tokens: int,
    limits: dict[str, Any],
) -> dict[str, Any]:
    """One setting: both phases of both models, with the arithmetic of what is possible."""
    batch, prompt = ids.shape
    # The mean length of the filled cache over the steps, the token itself included.
    context = prompt + (new_tokens + 1) / 2
    read = {name: decode_bytes(model, batch, context) for name, model in models.items()}
    products = {name: prefill_products(model, batch, prompt) for name, model in models.items()}
    return {
        "batch": batch,
        "prompt": prompt,
        "check": {name: racer.check for name, racer in racers.items()},
        "compile": {name: racer.compiled() for name, racer in racers.items()},
        "attention": {name: racer.engine.attention for name, racer in racers.items()},
        "prefill": _phase(
            {name: racer.prefill for name, racer in racers.items()},
            batch * prompt,
            1,
            {name: value.to_json() for name, value in products.items()},
            ("multiplications", limits["multiplications_per_second"]),
        ),
        "decode": _phase(
            {name: racer.decode for name, racer in racers.items()},
            batch * new_tokens,
            new_tokens,
            {name: value.to_json() for name, value in read.items()},
            ("bytes", limits["bytes_per_second"]),
        ),
    }


def _phase(
    timings: dict[str, Timing],
    tokens: int,
    passes: int,
    work: dict[str, dict[str, int]],
    ceiling: tuple[str, float],
) -> dict[str, Any]:
    """``work`` is what one of ``passes`` forward passes needs, of the ceiling's unit."""
    unit, most = ceiling
    sides: dict[str, Any] = {}
    for name, timing in timings.items():
        rate = passes * work[name]["total"] / timing.median
        sides[name] = {
            **timing.to_json(tokens),
            unit: work[name],
            f"{unit}_per_second": rate,
            "share_of_machine": rate / most,
        }
    speedup = timings["dense"].median / timings["compressed"].median
    allowed = work["dense"]["total"] / work["compressed"]["total"]
    return {
        "tokens": tokens,
        **sides,
        "speedup": speedup,
        "speedup_allowed": allowed,
        "share_of_allowed": speedup / allowed,
        "allowed_by": unit,
    }


def _load(folder: str, device: str) -> PreTrainedModel:
    model = load_model(open_any(folder))
    require_causal(model, folder, "decoding speed")
    return model.to(device)
