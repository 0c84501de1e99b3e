"""``sweep.json``: what is known so far, written after every cell; and what must not change.

It holds the sweep's identity, the dense model's scores, and an entry for each cell that came to an
end: ``finished`` with its figures, or ``failed`` with its error in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from blastnn.compress.journal import FOLDER, JOURNAL, refuse_changes
from blastnn.errors import ResumeError
from blastnn.files import read_json, remove_parts, write_json

FILE = "sweep.json"
FORMAT = "blastnn-sweep/1"
KEPT = ("dense", "dense_tasks")  # of ``about``: what is not found anew in every sitting
FINISHED, FAILED = "finished", "failed"


@dataclass
class Ledger:
    """The state of a sweep on disk.

    ``about`` is what the table says of all cells, among it the dense model's scores; ``cells`` has
    an entry for each cell by name.
    """

    output: Path
    identity: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, **derived: Any) -> dict[str, Any]:
        """Write all durably, with what is ``derived`` from it; returns what was written."""
        values = {
            "format": FORMAT,
            "identity": self.identity,
            **self.about,
            **derived,
            "cells": self.cells,
        }
        write_json(self.output / FILE, values)
        return values

    def finished(self, name: str) -> bool:
        """Whether there are figures for a cell."""
        return name in self.cells and self.cells[name]["status"] == FINISHED

    @classmethod
    def open(cls, output: Path, identity: dict[str, Any]) -> Self:
        """Start in a new or empty folder, or go on with the sweep in it.

        Raises:
            ResumeError: the folder holds something else, another sweep, or cannot be written to.
        """
        path = output / FILE
        if path.is_file():
            values = read_json(path)
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise ResumeError(f"{path} is not a sweep of this version of blastnn")
            refuse_changes(output, values["identity"], identity, "sweep")
            remove_parts(output)
            return cls(output, identity, {key: values.get(key) for key in KEPT}, values["cells"])
        _require_empty(output)
        return cls(output, identity)


def _require_empty(output: Path) -> None:
    """Nothing but the folder of the lock may be there."""
    if (
        any(path.name != FOLDER for path in output.iterdir())
        or (output / FOLDER / JOURNAL).exists()
    ):
        raise ResumeError(
            f"the output folder {output} is not empty and holds no sweep; choose another one"
        )
