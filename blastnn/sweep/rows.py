"""The table of a sweep: a row for the dense model and one for every cell, as numbers and as words.

``excess`` is what is lost on a text (see ``scoring``); ``share`` is the excess divided by that of
the reference method at the same ``keep``, where that lost anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blastnn.sweep.ledger import FINISHED, Ledger
from blastnn.sweep.zero_shot import METRIC, accuracy, share_of

WAITING = "waiting"
DASH = "-"
ACCURACY = ("accuracy", "accuracy lost", "share accuracy")  # the last one with a reference
LARGE = 1e5  # perplexities from here on are shown by their leading digits


def summarize(
    ledger: Ledger, wanted: Mapping[str, tuple[str, float]], reference: str | None
) -> dict[str, Any]:
    """The table: the ``reference``, a ``label`` for each text, and the ``rows``.

    Args:
        ledger: with the dense scores and the cells so far.
        wanted: method and share of every cell of this sitting, by the cell's name.
        reference: the method that others are divided by.
    """
    known = {name: (cell["method"], cell["keep"]) for name, cell in ledger.cells.items()}
    order = {**wanted, **known}
    keeps = list(dict.fromkeys(keep for _, keep in order.values()))
    names = sorted(order, key=lambda name: keeps.index(order[name][1]))  # stable: then by method
    found = {keep: ledger.cells.get(f"{reference}-{keep}", {}) for keep in keeps}
    dense = {"method": "dense", "keep": 1.0, "status": FINISHED, "scores": ledger.about["dense"]}
    dense["tasks"] = _of_dense(ledger.about.get("dense_tasks"))
    dense["params"] = {"after": ledger.about["targets"], "kept": 1.0}
    rows = [_row(dense, {})]
    for name in names:
        method, keep = order[name]
        cell = ledger.cells.get(name, {"method": method, "keep": keep, "status": WAITING})
        rows.append(_row(cell, found[keep]))
    texts = [entry["text"] for entry in ledger.about["dense"]]
    return {"reference": reference, "texts": labels(texts), "rows": rows}


def _row(cell: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    row = {key: cell.get(key) for key in ("method", "keep", "status", "error", "seconds")}
    scores, params = cell.get("scores", []), cell.get("params", {})
    against = [entry["excess"] for entry in reference.get("scores", [])]
    excess = [entry["excess"] for entry in scores]
    return {
        **row,
        "params": params.get("after"),
        "kept": params.get("kept"),
        "scores": [entry.get("perplexity", entry.get("cosine")) for entry in scores],
        "vectors": [entry["vectors"] for entry in scores if "vectors" in entry],
        "excess": excess,
        "share": [
            share_of(own, other)
            for own, other in zip(excess, against, strict=False)  # empty without a reference
        ],
        "accuracy": accuracy(cell.get("tasks"), reference.get("tasks")),
    }


def _of_dense(scores: dict[str, Any] | None) -> dict[str, Any] | None:
    """Its zero-shot tasks like those of a cell: it loses nothing."""
    nothing = {"mean": {METRIC: {"value": 0.0, "stderr": 0.0}}}
    return scores and {"scores": scores, "difference": nothing}


def labels(texts: list[str]) -> list[str]:
    """A short name for each text, the whole one where short ones are not unique."""
    short = [Path(text.rpartition(":")[2]).name for text in texts]
    return short if len(set(short)) == len(short) else texts


def worded(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows as they are shown.

    Args:
        values: what ``sweep.json`` holds.
    """
    table = values["table"]
    texts, score = table["texts"], "cosine" if "cosine" in values["dense"][0] else "ppl"
    vectors = ["vectors"] if score == "cosine" else []
    groups = [score, *vectors, "excess", *(["share"] if table["reference"] else [])]
    heads = [f"{group} {text}" for group in groups for text in texts]
    accuracies = ACCURACY[: 3 if table["reference"] else 2] if values.get("dense_tasks") else ()
    columns = ["method", "keep", "parameters", "kept", *heads, *accuracies, "seconds"]
    digits = 4 if score == "cosine" else 2
    rows = [_words(row, len(columns), digits, len(accuracies)) for row in table["rows"]]
    return columns, rows


def _words(row: dict[str, Any], columns: int, digits: int, accuracies: int) -> list[str]:
    first = [row["method"], f"{row['keep']:g}"]
    if row["status"] != FINISHED:
        return [*first, row["status"], *[DASH] * (columns - 3)]
    numbers = 2 * len(row["scores"]) + len(row["vectors"]) + accuracies
    missing = columns - 5 - numbers - len(row["share"])
    shares = [*row["share"], *[None] * missing]
    return [
        *first,
        f"{row['params']:,}",
        f"{row['kept']:.2%}",
        *(f"{score:.{digits}f}" if score < LARGE else f"{score:.3e}" for score in row["scores"]),
        *(f"{vectors:.4f}" for vectors in row["vectors"]),
        *(f"{excess:.4f}" for excess in row["excess"]),
        *map(_share, shares),
        *_accuracy(row["accuracy"])[:accuracies],
        DASH if row["seconds"] is None else f"{row['seconds']:.0f}",
    ]


def _share(share: float | None) -> str:
    return DASH if share is None else f"{share:.3f}"


def _accuracy(found: dict[str, Any]) -> list[str]:
    """Below the heads of ``ACCURACY``."""
    if not found:
        return [DASH] * len(ACCURACY)
    lost = f"{found['lost']:.4f} ± {found['stderr']:.4f}"
    return [f"{found['mean']:.4f}", lost, _share(found["share"])]


def notes(values: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, a line each; what went wrong comes first."""
    table, dense = values["table"], values["dense"]
    found = [
        f"{row['method']} at keep {row['keep']:g} failed: {row['error']}"
        for row in table["rows"]
        if row["error"]
    ]
    for name, cell in values["cells"].items():
        found += [f"{name}: {warning}" for warning in cell.get("warnings", ())]
        if cell.get("verified") is False:
            found.append(f"{name}: the loaded model does not give the very bits of the job")
        if (
            cell.get("params", {}).get("kept", 0.0) > cell["keep"]
            and cell["options"]["of"] == "targets"
        ):
            found.append(f"{name}: keeps more than asked, some targeted layers stay dense")
    lost = "1 - cosine" if "cosine" in dense[0] else "ln(ppl) - ln(ppl dense), nats a token"
    found.append(f"parameters: of the {values['targets']:,} in the targeted layers; excess: {lost}")
    if table["reference"]:
        found.append(f"share: of the excess of {table['reference']} at the same keep")
    found.append("seconds: of the compression alone")
    scored = ", ".join(f"{e['text']} ({e['tokens']:,} tokens)" for e in dense)
    found.append(f"scored on {scored}, windows of {dense[0]['window']}: {values['protocol']}")
    if tasks := values.get("dense_tasks"):
        rows = ", ".join(f"{name} ({task['rows']:,} rows)" for name, task in tasks["tasks"].items())
        found.append(f"accuracy: mean of {METRIC} over {rows}; {tasks['protocol']}")
    if values["calibration"]:
        sources = ", ".join(str(s["name"]) for s in values["calibration"]["sources"])
        found.append(f"calibrated with {values['calibration']['tokens']:,} tokens of {sources}")
    if values["model"]["note"]:
        found.append(values["model"]["note"])
    return found
