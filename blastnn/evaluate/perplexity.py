"""Perplexity: contiguous windows, each scored on its own, the same call for every model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from blastnn.errors import ModelError
from blastnn.evaluate.text import Windows

PROTOCOL = (
    "the text is tokenised once, the documents of a .jsonl file with the token that ends one "
    "between them; its first tokens are cut into contiguous windows that do not overlap, framed by "
    "the tokenizer's own special tokens if it has any; each window is scored on its own, from its "
    "second token on; what does not fill a window is dropped; perplexity is exp of the mean "
    "negative log-likelihood per token, in natural logarithms"
)

# Whose logarithms of probabilities are made together: of all of a window they would be as large as
# its logits once more, in memory that is fetched anew each time.
ROWS = 64


@dataclass(frozen=True)
class Score:
    """Perplexity of a text, with the tokens scored and the window length."""

    perplexity: float
    tokens: int
    window: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Windows, step: Callable[[], None] = lambda: None
) -> Score:
    """Score every window; ``step`` is called after each.

    Raises:
        ModelError: a logit is not finite; nothing is skipped.
    """
    total, count = 0.0, 0
    for ids in windows.ids.split(1):
        loss, scored = _window_loss(model, ids)
        if not math.isfinite(loss):
            raise ModelError("the model gave a non-finite logit; its weights are damaged")
        total, count = total + loss, count + scored
        step()
    return Score(math.exp(total / count), windows.ids.numel(), windows.ids.shape[1])


def _window_loss(model: PreTrainedModel, ids: Tensor) -> tuple[float, int]:
    """Summed negative log-likelihood of a window, and the number of tokens predicted."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    pairs = zip(logits.split(ROWS), ids[0, 1:].split(ROWS), strict=True)
    losses = [cross_entropy(rows.float(), after, reduction="sum") for rows, after in pairs]
    return sum(float(loss) for loss in losses), ids.shape[1] - 1


@dataclass(frozen=True)
class Agreement:
    """Mean cosines between two encoders: ``tokens`` of the last hidden states, token by token;
    ``vectors`` of their means over each window, which is how sentence vectors are made.
    """

    tokens: float
    vectors: float


@torch.no_grad()
def cosine_agreement(
    dense: PreTrainedModel, compressed: PreTrainedModel, windows: Windows
) -> Agreement:
    """How alike both models' last hidden states are; for encoders."""
    tokens, vectors = [], []
    for ids in windows.ids.split(1):
        x, y = (model.base_model(input_ids=ids)[0][0].float() for model in (dense, compressed))
        tokens.append(torch.cosine_similarity(x, y, dim=-1).mean())
        vectors.append(torch.cosine_similarity(x.mean(0), y.mean(0), dim=-1))
    return Agreement(*(float(torch.stack(found).mean()) for found in (tokens, vectors)))
