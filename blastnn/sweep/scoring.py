"""One model's scores on all texts: perplexity, or for encoders the agreement with the dense model.

What is lost on a text is ``ln(ppl) - ln(ppl dense)``, the excess in nats a token; of an encoder
``1 - cos``, with the mean cosine between its hidden states and the dense model's. Both are zero for
the dense model. A further kind of score is one more entry in what ``Scorer.score`` returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blastnn.compress.memory_use import give_memory_back
from blastnn.evaluate.perplexity import PROTOCOL, cosine_agreement, perplexity
from blastnn.evaluate.probe import matches
from blastnn.evaluate.text import Windows
from blastnn.integrations.transformers import is_causal, load_model
from blastnn.sweep.zero_shot import ZeroShot

COSINE_PROTOCOL = (
    "cosine: mean between the last hidden states of both models, token by token, over the same "
    "windows of the text; vectors: between the means of the hidden states of each window"
)
Scores = list[dict[str, Any]]  # one entry a text


@dataclass(frozen=True)
class Scored:
    """A compressed model's ``scores``, whether its output is what the job computed (``verified``),
    and its zero-shot ``tasks``, if there are any.
    """

    scores: Scores
    verified: bool
    tasks: dict[str, Any] | None


class Scorer:
    """Scores models by one protocol, the dense one's scores given or found first."""

    def __init__(
        self, dense: Path, texts: list[Windows], known: Scores | None, zero_shot: ZeroShot
    ) -> None:
        self.texts, self._folder, self.zero_shot = texts, dense, zero_shot
        self.dense = known if known is not None else self._dense_scores()

    @property
    def causal(self) -> bool:
        """Whether there are perplexities."""
        return "perplexity" in self.dense[0]

    @property
    def protocol(self) -> str:
        """How the scores are found, in words."""
        return PROTOCOL if self.causal else COSINE_PROTOCOL

    def score(self, folder: Path, probe: dict[str, Any]) -> Scored:
        """Score a compressed folder.

        Args:
            folder: the model.
            probe: of the job's journal.
        """
        model, dense = load_model(folder), None if self.causal else load_model(self._folder)
        try:
            same = matches(model, probe)
            scores = [self._score(model, dense, at) for at in range(len(self.texts))]
            return Scored(scores, same, self.zero_shot.score(model))
        finally:
            del model, dense
            give_memory_back()

    def _dense_scores(self) -> Scores:
        model = load_model(self._folder)
        if not is_causal(model):
            return [_entry(windows, 0.0, cosine=1.0, vectors=1.0) for windows in self.texts]
        return [
            _entry(windows, 0.0, perplexity=perplexity(model, windows).perplexity)
            for windows in self.texts
        ]

    def _score(
        self, model: PreTrainedModel, dense: PreTrainedModel | None, at: int
    ) -> dict[str, Any]:
        """``dense`` is what an encoder is compared with; None where there are perplexities."""
        windows = self.texts[at]
        if dense is None:
            found = perplexity(model, windows).perplexity
            excess = math.log(found) - math.log(self.dense[at]["perplexity"])
            return _entry(windows, excess, perplexity=found)
        cosines = cosine_agreement(dense, model, windows)
        lost = 1.0 - cosines.tokens
        return _entry(windows, lost, cosine=cosines.tokens, vectors=cosines.vectors)


def _entry(windows: Windows, excess: float, **score: float) -> dict[str, Any]:
    source = windows.sources[0]
    count, window = windows.ids.shape
    return {
        "text": source["name"],
        "sha256": source["sha256"],
        "tokens": count * window,
        "window": window,
        **score,
        "excess": excess,
    }
