"""``sweep.md``: the table of a sweep with what must be known to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blastnn.sweep.methods import METHODS
from blastnn.sweep.picture import PICTURE
from blastnn.sweep.rows import notes, worded

PAGE = "sweep.md"


def render(values: Mapping[str, Any]) -> str:
    """The page of what ``sweep.json`` holds, as Markdown."""
    columns, rows = worded(values)
    used = dict.fromkeys(row["method"] for row in values["table"]["rows"])
    methods = [f"- `{name}`: {METHODS[name].what}" for name in used if name in METHODS]
    lines = [
        f"# {values['model']['name']}, compressed",
        "",
        _line(columns),
        _line(["---", *["---:"] * (len(columns) - 1)]),
        *map(_line, rows),
        "",
        f"![excess against parameters kept]({PICTURE})",
        "",
        *(f"- {note}" for note in notes(values)),
        "",
        "Methods:",
        "",
        *methods,
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    safe = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(safe)} |"
