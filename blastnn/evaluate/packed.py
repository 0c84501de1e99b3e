"""Log-likelihoods of continuations: many short sequences in one row, without padding.

A question with four answers is one context with four continuations, each a few tokens long. Its
context is computed once, its continuations beside each other: a token attends to its context and to
its own continuation, and has the position that it would have alone. Several questions stand in one
row, blind to each other, and logits are computed only where they are needed. Against one padded
sequence for each answer that is a third of the multiplications for ARC, half for HellaSwag.

``alone`` is the same without any of that: one sequence at a time. ``obstacle`` compares both.

Shape letters: ``T`` tokens of a row, ``K`` places whose logits are needed, ``C`` vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blastnn.errors import ModelError

# Tokens in a row. Of 128, 256 and 512 none is much faster; longer ones need more memory.
ROW = 256
NEEDED = ("attention_mask", "logits_to_keep", "position_ids")
# Of a log-likelihood, between ways that round differently.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
COARSE_TOLERANCE = 3e-2


class Request(NamedTuple):
    """Token ids of a context, never empty, and of what may follow it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def clipped(self, length: int) -> Request:
        """The last ``length`` tokens that the model reads; the very last one is only predicted."""
        surplus = len(self.context) + len(self.continuation) - (length + 1)
        return self if surplus <= 0 else Request(self.context[surplus:], self.continuation)


Answer = tuple[
    float, bool
]  # log-likelihood of a continuation; whether each token was the likeliest


@dataclass
class Row:
    """What one forward pass computes.

    Attributes:
        ids, positions: of the ``T`` tokens.
        context: for each token the number of its context, which nothing outside of it sees.
        branch: for each token the number of its continuation; 0 in the context itself.
        places: for each request the indices of the tokens that predict its continuation.
        wanted: for each request its continuation.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    wanted: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, context: tuple[int, ...], continuations: Sequence[tuple[int, ...]]) -> None:
        """A context with everything that may follow it."""
        number, last = len(self.places), len(self.ids) + len(context) - 1
        self._append(context, 0, number, 0)
        for branch, continuation in enumerate(continuations, start=1):
            start = len(self.ids)
            self._append(continuation[:-1], len(context), number, branch)
            self.places.append([last, *range(start, len(self.ids))])
            self.wanted.append(continuation)

    def _append(self, ids: Sequence[int], position: int, context: int, branch: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.context += [context] * len(ids)
        self.branch += [branch] * len(ids)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Added to the attention scores, ``(T, T)``: 0 where a token may look, else the least."""
        context, branch = torch.tensor(self.context), torch.tensor(self.branch)
        own = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
        seen = own & (context[None, :] == context[:, None])
        least = torch.finfo(dtype).min
        return torch.full(seen.shape, least, dtype=dtype).masked_fill_(seen.tril_(), 0)


@torch.no_grad()
def packed(
    model: PreTrainedModel, requests: Sequence[Request], step: Callable[[int], None]
) -> list[Answer]:
    """An answer for each request, in order; ``step`` is told how many are done.

    Requests share their context with their neighbours only. No context may be empty.

    Raises:
        ModelError: a logit is not finite.
    """
    answers: list[Answer] = []
    for row in _rows(requests):
        answers += _answers(row, *_forward(model, row))
        step(len(answers))
    return answers


def _rows(requests: Sequence[Request]) -> Iterator[Row]:
    """Contexts in order, as many in a row as it holds; a longer one has a row of its own."""
    row = Row()
    for context, group in groupby(requests, key=lambda request: request.context):
        continuations = [request.continuation for request in group]
        size = len(context) + sum(len(each) - 1 for each in continuations)
        if row.ids and len(row.ids) + size > ROW:
            yield row
            row = Row()
        row.add(context, continuations)
    if row.ids:
        yield row


def _forward(model: PreTrainedModel, row: Row) -> tuple[Tensor, Tensor]:
    """The places ``(K)`` and the logits there ``(K, C)``."""
    places = torch.tensor(sorted({place for each in row.places for place in each}))
    device = model.device
    output = model(
        input_ids=torch.tensor(row.ids, device=device)[None],
        position_ids=torch.tensor(row.positions, device=device)[None],
        attention_mask=row.mask(model.dtype).to(device)[None, None],
        logits_to_keep=places.to(device),
        use_cache=False,
    )
    return places, output.logits[0].float()


def _answers(row: Row, places: Tensor, logits: Tensor) -> Iterator[Answer]:
    normaliser = logits.logsumexp(dim=-1)  # (K)
    likeliest = logits.argmax(dim=-1)
    for each, wanted in zip(row.places, row.wanted, strict=True):
        rows = torch.searchsorted(places, torch.tensor(each)).to(logits.device)
        ids = torch.tensor(wanted, device=logits.device)
        total = float((logits[rows, ids] - normaliser[rows]).sum())
        if not math.isfinite(total):
            raise ModelError("the model gave a non-finite logit; its weights are damaged")
        yield total, bool((likeliest[rows] == ids).all())


@torch.no_grad()
def alone(
    model: PreTrainedModel, requests: Sequence[Request], step: Callable[[int], None]
) -> list[Answer]:
    """What ``packed`` computes, one sequence at a time: slow, and simple enough to be believed.

    Raises:
        ModelError: a logit is not finite.
    """
    answers: list[Answer] = []
    for request in requests:
        row = Row()
        row.add(request.context, [request.continuation])
        ids = torch.tensor(row.ids, device=model.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        answers += _answers(row, torch.arange(len(row.ids)), logits)
        step(len(answers))
    return answers


def obstacle(model: PreTrainedModel, requests: Sequence[Request]) -> str | None:
    """Why ``packed`` cannot serve this model; None where its answers are those of ``alone``.

    Both are compared on the first two contexts and on the longest one, which is where a window of
    attention would tell.
    """
    parameters = inspect.signature(model.forward).parameters
    missing = [name for name in NEEDED if name not in parameters]
    if missing:
        return f"{type(model).__name__} takes no {' and no '.join(missing)}"
    longest = max(requests, key=lambda request: len(request.context)).context
    chosen = {longest} | set(list(dict.fromkeys(each.context for each in requests))[:2])
    sample = [request for request in requests if request.context in chosen]
    tolerance = TOLERANCE.get(model.dtype, COARSE_TOLERANCE)
    pairs = zip(packed(model, sample, _nobody), alone(model, sample, _nobody), strict=True)
    worst = max(abs(one - other) / max(abs(other), 1.0) for (one, _), (other, _) in pairs)
    if worst > tolerance:
        return f"log-likelihoods in one row differ by {worst:.1e} of those alone"
    return None


def _nobody(_: int) -> None:
    return None
