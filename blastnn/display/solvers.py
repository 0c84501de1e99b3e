"""The solvers that there are."""

from __future__ import annotations

from blastnn.display.table import print_json, table, wide_console
from blastnn.factorize import SOLVERS, automatic_table, fitting_solvers
from blastnn.structures import STRUCTURES


def print_solvers(as_json: bool) -> None:
    """Which solver each structure gets and which others fit it; then why one takes each solver."""
    if as_json:
        reasons = {name: module.WHY for name, module in SOLVERS.items()}
        print_json({"auto": automatic_table(), "solvers": list(SOLVERS), "why": reasons})
        return
    console = wide_console()
    rows = []
    for name, structure in STRUCTURES.items():
        chosen, *others = fitting_solvers(structure)
        rows.append([name, chosen, ", ".join(others) or "-"])
    console.print(table(["structure", "auto", "also fit"], rows, words=3))
    console.print("\nauto is the first in this list that fits:\n")
    for name, module in SOLVERS.items():
        data = "" if module.USES_SECOND_MOMENT else " (without data alone)"
        console.print(f"{name} {module.WHY}{data}", highlight=False)
