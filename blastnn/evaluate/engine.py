"""Decoding over a static cache, eager or compiled: the one way in which blastnn makes tokens.

A step is the whole model for one token of every sequence, with the choice of the next token inside,
so that a compiled step is one call. The cache has exactly the length that was asked for, because
attention reads all of it. Sequences of a batch are equally long; there is no padding.

Shape letters: ``B`` sequences, ``T`` tokens of the prompt, ``C`` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from blastnn.errors import ModelError
from blastnn.evaluate.attention import static_attention
from blastnn.evaluate.gates import fused_gates
from blastnn.models.context import positions

Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # ids (B, T) -> next token (B, 1), logits (B, C)
# Nothing that torch guards changes while an engine lives: model, cache and shapes are its own. To
# look at every module before each token took 3% of a step of the demo model.
COMPILE_OPTIONS: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
Choose = Callable[[Tensor], Tensor]  # logits (B, C) -> next token (B, 1)


class Forward:
    """The model as a function of ids, compiled for the first shape that it sees if that is wanted.

    Attributes:
        seconds: what compiling took; None where nothing was compiled.
        fallback: why it runs eagerly although it should have been compiled; None if it does not.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache, compiled: bool) -> None:
        self.seconds: float | None = None
        self.fallback: str | None = None
        self._eager = _make_step(model, cache)
        self._compiled: Step | None = None
        self._shape: torch.Size | None = None
        self._untried = compiled

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compiled code guards nothing, so other shapes than its own run eagerly."""
        if self._untried:
            return self._compile(ids)
        if self._compiled is not None and ids.shape == self._shape:
            return self._compiled(ids)
        return self._eager(ids)

    def _compile(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first call: compiles, or notes why that cannot be and goes on eagerly."""
        self._untried, start = False, time.perf_counter()
        try:
            compiled: Step = torch.compile(
                self._eager, fullgraph=True, dynamic=False, options=COMPILE_OPTIONS
            )
            answer = compiled(ids)
        except RuntimeError as error:  # what torch raises for an unsupported graph or no compiler
            self.fallback = _first_line(error)
            return self._eager(ids)
        self._compiled, self._shape = compiled, ids.shape
        self.seconds = time.perf_counter() - start
        return answer


class Engine:
    """A model with a cache for ``length`` tokens; made by ``open_engine``.

    Attributes:
        attention: the name of the attention in use.
        batch: how many sequences the cache holds; None before the first prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        length: int,
        attention: str,
        compiled: bool,
        compiled_prefill: bool,
    ) -> None:
        check_length(model, length)
        self.model, self.length, self.attention = model, length, attention
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.batch: int | None = None
        self._prefill = Forward(model, self.cache, compiled_prefill)
        self._step = Forward(model, self.cache, compiled)

    @property
    def compile_seconds(self) -> float | None:
        """What compiling took; None where nothing was compiled."""
        spent = [f.seconds for f in (self._prefill, self._step) if f.seconds is not None]
        return sum(spent) if spent else None

    @property
    def fallback(self) -> str | None:
        """Why something runs eagerly although it should have been compiled; None if all is well."""
        return self._step.fallback or self._prefill.fallback

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Forget all, read prompts ``(B, T)``: the next token ``(B, 1)`` and logits ``(B, C)``."""
        self.cache.reset()
        self.batch = len(ids) if self.batch is None else self.batch
        if len(ids) != self.batch:
            raise ModelError(
                f"this engine holds {self.batch} sequences, not {len(ids)}; open another one"
            )
        return self._prefill(ids)

    @torch.inference_mode()
    def step(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """One token of every sequence, ``(B, 1)``: the next one, and the logits ``(B, C)``."""
        assert token.shape == (self.batch, 1), "a step takes the batch of its prefill"
        return self._step(token)

    def tokens(self, ids: Tensor, count: int, choose: Choose | None = None) -> Iterator[Tensor]:
        """``count`` tokens ``(B, 1)`` behind prompts ``(B, T)``: the likeliest, or chosen."""
        token, logits = self.prefill(ids)
        for made in range(count):
            chosen = token if choose is None else choose(logits)
            yield chosen
            if made + 1 < count:
                token, logits = self.step(chosen)


@contextmanager
def open_engine(
    model: PreTrainedModel, length: int, compiled: bool = False, compiled_prefill: bool = False
) -> Iterator[Engine]:
    """An engine for prompts and new tokens of together ``length`` tokens.

    ``compiled`` compiles the step, ``compiled_prefill`` the reading of prompts, for the shape of
    the first one; each takes about a minute for a model of 30 layers. The model computes attention
    and gated MLPs in the engine's way while the context is open.

    Raises:
        ModelError: the model was made for fewer positions.
    """
    with static_attention(model) as attention, fused_gates(model):
        yield Engine(model, length, attention, compiled, compiled_prefill)


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise ModelError where the model has fewer than ``length`` positions."""
    most = positions(model.config)
    if length > most:
        raise ModelError(
            f"prompt and new tokens take {length} positions, but the model was made for {most}; "
            "ask for fewer"
        )


def _make_step(model: PreTrainedModel, cache: StaticCache) -> Step:
    def step(ids: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
        return logits.argmax(-1, keepdim=True), logits

    # torch keeps compiled code by code object, and few versions of each; engines share nothing.
    made: Any = FunctionType(
        step.__code__.replace(), step.__globals__, "step", None, step.__closure__
    )
    return made


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
