"""Models in turn through the same engine: checked first, then timed, prefill and decode apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blastnn.errors import MeasurementError
from blastnn.evaluate.energy import EnergyMeter
from blastnn.evaluate.engine import Engine, open_engine
from blastnn.kernels.measure import seconds

CHECKED_STEPS = 3
# Largest difference of a logit, as a share of the largest logit; reordered sums in each precision.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-8}


@dataclass
class Timing:
    """Every counted run of one phase of one model."""

    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    def to_json(self, tokens: int) -> dict[str, Any]:
        """Medians, the spread and every run; ``tokens`` were made or read in each."""
        energy = statistics.median(self.joules) / tokens if self.joules else None
        return {
            "tokens_per_second": tokens / self.median,
            "seconds": {
                "median": self.median,
                "least": min(self.seconds),
                "most": max(self.seconds),
                "runs": self.seconds,
            },
            "joules_per_token": energy,
        }


@dataclass
class Racer:
    """One model's engine, what the check found, and its times."""

    engine: Engine
    check: dict[str, Any]
    prefill: Timing = field(default_factory=Timing)
    decode: Timing = field(default_factory=Timing)

    def compiled(self) -> dict[str, Any]:
        """Whether the step was compiled, and what it took or why not."""
        return {"seconds": self.engine.compile_seconds, "fallback": self.engine.fallback}


def race(
    models: Mapping[str, PreTrainedModel],
    ids: Tensor,
    new_tokens: int,
    rounds: int,
    compiled: bool,
    meter: EnergyMeter | None = None,
) -> dict[str, Racer]:
    """Time every model ``rounds`` times, in turn, on prompts ``ids (B, T)``.

    A run of decoding is ``new_tokens`` steps behind the prompt, and there may be none. The check,
    which compiles, and one further round warm up and are not counted.

    Raises:
        MeasurementError: the engine's logits are not those of the plain model.
    """
    meter = meter or EnergyMeter(ids.device)
    with _open(models, ids, new_tokens, compiled) as racers:
        for counted in [False, *[True] * rounds]:
            for racer in racers.values():
                _run(racer, ids, new_tokens, meter, counted)
    return racers


@contextmanager
def _open(
    models: Mapping[str, PreTrainedModel], ids: Tensor, new_tokens: int, compiled: bool
) -> Iterator[dict[str, Racer]]:
    length = ids.shape[1] + new_tokens
    with ExitStack() as stack:
        racers = {}
        for name, model in models.items():
            steps = min(CHECKED_STEPS, new_tokens)
            expected = plain_logits(model, ids, steps)
            engine = stack.enter_context(open_engine(model, length, compiled, compiled))
            racers[name] = Racer(engine, check(name, engine, ids, expected))
        yield racers


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and logits of the model as transformers runs it: eager, with a growing cache."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    answers = []
    for _ in range(steps):
        logits = out.logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        answers.append((token, logits))
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    answers.append((out.logits[:, -1].argmax(-1, keepdim=True), out.logits[:, -1]))
    return answers


def check(
    name: str, engine: Engine, ids: Tensor, expected: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Feed the plain model's tokens to the engine and compare all logits.

    Raises:
        MeasurementError: they differ by more than reordered sums explain.
    """
    _, logits = engine.prefill(ids)
    worst = _difference(logits, expected[0][1])
    for (token, _), (_, wanted) in zip(expected, expected[1:], strict=False):
        _, logits = engine.step(token)
        worst = max(worst, _difference(logits, wanted))
    allowed = TOLERANCE.get(engine.model.dtype, TOLERANCE[torch.float32])
    if not worst <= allowed:
        raise MeasurementError(
            f"{name}: the engine's logits differ from the plain model's by {worst:.2g} of the "
            f"largest logit, and {allowed:g} is allowed; no speed is reported"
        )
    return {"positions": len(expected), "largest_difference": worst, "allowed": allowed}


def _difference(logits: Tensor, wanted: Tensor) -> float:
    return float((logits - wanted).abs().max() / wanted.abs().max())


def _run(racer: Racer, ids: Tensor, new_tokens: int, meter: EnergyMeter, counted: bool) -> None:
    token = [ids[:, :1]]

    def prefill() -> None:
        token[0], _ = racer.engine.prefill(ids)

    def decode() -> None:
        for _ in range(new_tokens):
            token[0], _ = racer.engine.step(token[0])

    for run, timing in ((prefill, racer.prefill), (decode, racer.decode)):
        before = meter.read()
        spent = seconds(run, ids.device)
        used = meter.joules(before, meter.read())
        if counted:
            timing.seconds.append(spent)
            timing.joules += [] if used is None else [used]
