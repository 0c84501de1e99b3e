"""Perplexities."""

from __future__ import annotations

from typing import Any

from blastnn.display.table import print_json


def print_scores(scores: dict[str, Any], as_json: bool) -> None:
    """Perplexities, the dense model's first."""
    if as_json:
        print_json(scores)
        return
    for row in scores["perplexity"]:
        values = ", ".join(
            f"{key} {scores['models'][key]}: {row[key]:.4f}" for key in scores["models"]
        )
        print(f"{row['text']} ({row['tokens']} tokens, windows of {row['window']}): {values}")
    print(f"protocol: {scores['protocol']}")
