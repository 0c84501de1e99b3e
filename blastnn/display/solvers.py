"""The solvers that there are."""

from __future__ import annotations

from blastnn.display.table import print_json, wide_console
from blastnn.factorize import SOLVERS, automatic_table, explain_solver
from blastnn.structures import STRUCTURES


def print_solvers(as_json: bool) -> None:
    """The structures with their automatic solvers, then all solvers in order of preference."""
    if as_json:
        print_json({"auto": automatic_table(), "solvers": list(SOLVERS)})
        return
    console = wide_console()
    for name, structure in STRUCTURES.items():
        console.print(f"{name}: {explain_solver(structure)}", highlight=False)
    console.print()
    for name, module in SOLVERS.items():
        console.print(f"{name}: {(module.__doc__ or '').splitlines()[0]}", highlight=False)
