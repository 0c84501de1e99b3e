"""The section of the report page that accounts for every linear layer of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from blastnn.compress import charts
from blastnn.compress.html_page import (
    DASH,
    TIMES,
    Html,
    count,
    element,
    finite,
    folded,
    join,
    note,
    number,
    percent,
    plain,
    section,
    table,
)

_NAMES_SHOWN = 3
_HEAD = (
    "Layer", "Status", "Error#", "Added by quantisation#", "Kept#", "Parameters before#", "After#",
    "Out \N{MULTIPLICATION SIGN} in#", "Structure", "Rank#", "Seconds#", "Solver", "Notes",
)  # fmt: skip

Layer = dict[str, Any]


def unusable_errors(layers: Sequence[Layer]) -> list[str]:
    """Return a warning if layers report an error that is not a finite number from 0 up."""
    names = [
        charts.name_of(layer)
        for layer in layers
        if layer.get("relative_error") is not None and charts.error_of(layer) is None
    ]
    if not names:
        return []
    what = "layer has" if len(names) == 1 else "layers have"
    return [
        f"{count(len(names))} {what} a relative error that is not a usable number, and cannot be "
        f"drawn: {_some(names)}."
    ]


def coverage_section(layers: Sequence[Layer]) -> Html:
    """Return why layers were kept, and a table of every linear layer."""
    if not layers:
        return section("Coverage", note("No linear layers are listed."))
    compressed = sum(layer.get("status") == "compressed" for layer in layers)
    summary = (
        f"{count(compressed)} of {count(len(layers))} linear layers compressed, "
        f"{count(len(layers) - compressed)} kept."
    )
    # Bars behind the errors share one scale, so that the eye can run down the column.
    worst = max((charts.error_of(layer) or 0.0 for layer in layers), default=0.0)
    rows = [_cells(layer, worst) for layer in layers]
    return section(
        "Coverage",
        note(summary),
        _kept_reasons(layers),
        folded(f"All {count(len(layers))} linear layers", table(_HEAD, rows, "coverage tall")),
    )


def _kept_reasons(layers: Sequence[Layer]) -> Html:
    kept: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer.get("status") != "compressed":
            kept[str(layer.get("reason") or "no reason given")].append(charts.name_of(layer))
    if not kept:
        return Html()
    most_first = sorted(kept.items(), key=lambda entry: -len(entry[1]))
    rows = [(reason, count(len(names)), _some(names)) for reason, names in most_first]
    return table(("Why layers were kept", "Layers#", "Which"), rows)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {count(more)} more" if more > 0 else "")


def _cells(layer: Layer, worst: float) -> list[object]:
    before, after = layer.get("params_before"), layer.get("params_after")
    return [
        element("code", charts.name_of(layer)),
        _status(layer),
        _error(layer, worst),
        number(layer.get("quantization_error"), 3),
        _kept_share(before, after),
        count(before),
        count(after),
        _dimensions(layer.get("shape")),
        _structure(layer),
        count(layer.get("rank")),
        number(layer.get("seconds"), 3),
        _solver(layer),
        _notes(layer),
    ]


def _status(layer: Layer) -> Html:
    status = plain(layer.get("status") or "unknown")
    mark = "status" if status == "compressed" else "status kept"
    if layer.get("refitted"):
        status = join((status, ", refitted"))
    reason = layer.get("reason")
    why = element("small", plain(reason)) if reason else ""
    return join((element("span", status, class_=mark), why))


def _dimensions(sizes: object) -> str:
    if not isinstance(sizes, list | tuple):
        return DASH
    return f" {TIMES} ".join(count(size) for size in sizes)


def _structure(layer: Layer) -> str:
    structure = plain(layer.get("structure") or DASH)
    blocks = _dimensions(layer.get("blocks"))
    return structure if blocks == DASH else f"{structure} {blocks}"


def _kept_share(before: object, after: object) -> str:
    start, end = finite(before), finite(after)
    return percent(end / start) if start and end is not None else DASH


def _error(layer: Layer, worst: float) -> Html:
    error = charts.error_of(layer)
    length = error / worst if error and worst else 0.0
    words = number(layer.get("relative_error"), 3)
    return element("span", words, class_="cell-bar", style=f"--w:{length:.3f}")


def _solver(layer: Layer) -> str:
    said = [plain(layer[key]) for key in ("solver", "solver_status") if layer.get(key)]
    return ", ".join(said) or DASH


def _notes(layer: Layer) -> Html:
    notes = layer.get("notes")
    if not isinstance(notes, list) or not notes:
        return Html(DASH)
    return join(element("div", plain(words)) for words in notes)
