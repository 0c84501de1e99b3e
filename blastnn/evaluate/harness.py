"""lm-eval: its task definitions, prompts, tokens and metrics; our rows, and our forward passes.

Importing this module needs the extra ``blastnn[tasks]``. lm-eval is told where its rows are by its
own ``custom_dataset`` hook, and only the definitions of the tasks at hand are indexed, because to
index all of them takes it twenty seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blastnn.errors import MeasurementError, first_line
from blastnn.evaluate.packed import Answer, Request, alone, obstacle, packed
from blastnn.evaluate.task_rows import SPLIT, TASKS, RowSource, digest

Step = Callable[[int, int], None]  # requests that are done, and all of them
VERSION = version("lm_eval")


class Scorer(HFLM):
    """lm-eval's model for transformers, with ``packed`` in place of padded batches.

    Attributes:
        step: told how far the task is.
        clipped: requests so far that were longer than the model's context; they lost their start.
        fallback: why each sequence runs alone; None where ``packed`` serves.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        with _no_remarks():
            super().__init__(pretrained=model, tokenizer=tokenizer)
        self.step: Step = lambda done, total: None
        self.clipped = 0
        self.fallback: str | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """As lm-eval's own, without its bars."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        given = [Request(tuple(context), tuple(following)) for _, context, following in requests]
        asked = [request.clipped(self.max_length) for request in given]
        self.clipped = sum(one != other for one, other in zip(given, asked, strict=True))
        self.fallback = obstacle(self.model, asked)
        run = packed if self.fallback is None else alone
        return run(self.model, asked, lambda done: self.step(done, len(asked)))


def run_task(name: str, scorer: Scorer, source: RowSource | None, limit: int | None) -> Any:
    """Score one task without examples in the prompt.

    Args:
        name: of the task.
        scorer: the model.
        source: of the rows; None for those that lm-eval finds on the hub.
        limit: rows to score, from the first on; None for all.

    Returns:
        For each metric its ``value``, ``stderr`` and ``hits``, one character a row (1 right, 0
        wrong); and the ``rows`` scored, their ``split`` and digest, ``seconds``, the requests that
        were ``clipped``, and the ``fallback`` of the scorer.

    Raises:
        MeasurementError: rows that cannot be had.
        ModelError: a logit is not finite.
    """
    start = time.perf_counter()
    with _no_bars():
        task = _load(name, source, limit)
        found = lm_eval.evaluate(scorer, {"tasks": {name: task}}, limit=limit)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    values = found["results"][name]
    metrics = [key.removesuffix(",none") for key in values if key in ("acc,none", "acc_norm,none")]
    return {
        "metrics": {
            metric: {
                "value": float(values[f"{metric},none"]),
                "stderr": float(values[f"{metric}_stderr,none"]),
                "hits": "".join(str(int(sample[metric])) for sample in samples),
            }
            for metric in metrics
        },
        "rows": len(samples),
        "rows_sha256": digest(sample["doc"] for sample in samples),
        "split": task.config.test_split or task.config.validation_split,
        "seconds": time.perf_counter() - start,
        "clipped": scorer.clipped,
        "fallback": scorer.fallback,
    }


def _load(name: str, source: RowSource | None, limit: int | None) -> Any:
    """lm-eval's task; a group of one is how lm-eval lets a definition be changed."""
    changes: dict[str, Any] = {"task": name, "num_fewshot": 0}
    if source is not None:
        rows = {SPLIT: source.load(name, limit)}
        # The other splits are not there, and without examples nothing needs them.
        changes |= {"custom_dataset": lambda **_: rows, "training_split": None, "test_split": None}
    folder = Path(lm_eval.__file__).parent / "tasks" / TASKS[name].definition
    with _no_remarks():
        manager = TaskManager(include_defaults=False, include_path=folder)
        try:
            return manager.load({"group": "blastnn", "task": [changes]})["tasks"][name]
        except (OSError, ValueError) as error:
            raise MeasurementError(
                f"lm-eval could not load {name}: {first_line(error)}; rows from the hub need a "
                "connection, and --rows package needs none"
            ) from error


@contextmanager
def _no_remarks() -> Iterator[None]:
    """lm-eval remarks at loading on defaults that are meant here; later remarks do appear."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Bars of the datasets library; and one of lm-eval, for building requests, without a switch."""
    shown, drawn = not datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = _bare
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = drawn
        if shown:
            datasets.enable_progress_bars()


def _bare(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items
