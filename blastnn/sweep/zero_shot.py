"""Zero-shot tasks in a sweep: every cell's accuracy beside the dense model's, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blastnn.evaluate.tasks import compare_scores, score_tasks

METRIC = "acc_norm"  # whose mean is shown: that of the paper's Table 12


@dataclass
class ZeroShot:
    """Scores models on the same rows, the dense model's scores given or found first.

    Attributes:
        tasks, limit: as for ``score_tasks``; no task scores nothing.
        folder: of the dense model.
        dense: what ``score_tasks`` gave for it.
    """

    tasks: tuple[str, ...]
    limit: int | None
    folder: Path
    dense: dict[str, Any] | None

    def __post_init__(self) -> None:
        if self.tasks and self.dense is None:
            self.dense = score_tasks(str(self.folder), self.tasks, self.limit)

    def score(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """The ``scores`` of a compressed model and their ``difference`` from the dense one's."""
        if self.dense is None:
            return None
        scores = score_tasks(model, self.tasks, self.limit)
        return {"scores": scores, "difference": compare_scores(self.dense, scores)}


def share_of(lost: float, reference: float | None) -> float | None:
    """What is lost as a share of what the reference method loses; None where that is nothing."""
    return lost / reference if reference is not None and reference > 0.0 else None


def accuracy(found: dict[str, Any] | None, reference: dict[str, Any] | None) -> dict[str, Any]:
    """What a row of the table has of a cell's result.

    Returns:
        ``mean`` accuracy, how much is ``lost`` against the dense model, the ``stderr`` of that, and
        the ``share`` of what the reference method loses, None where that is nothing.
    """
    if not found:
        return {}
    change = found["difference"]["mean"][METRIC]
    against = -reference["difference"]["mean"][METRIC]["value"] if reference else None
    return {
        "mean": found["scores"]["mean"][METRIC]["value"],
        "lost": 0.0 - change["value"],
        "stderr": change["stderr"],
        "share": share_of(-change["value"], against),
    }
