"""What all displays share: tables, JSON, and the unit of memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20
SAME = {True: "equal, bit for bit", False: "DIFFERENT", None: "not compared"}
WIDTH = 1000  # whatever the terminal's: what is cut off is lost, what wraps can be read


def wide_console() -> Console:
    """Standard output for tables and lines, none of which is cut off or wrapped."""
    return Console(soft_wrap=True, highlight=False, width=WIDTH)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    """A plain table; its first columns hold ``words``, the others numbers, to the right."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index < words else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=2))
