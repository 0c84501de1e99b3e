"""How benchmarks and the paper's experiments save their plots."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of ``path``'s suffix; folders are made.

    An SVG is small, since its text stays text, and has the same bytes for the same curves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, dpi=120, metadata=metadata)
