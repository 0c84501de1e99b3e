"""Perplexities."""

from __future__ import annotations

from typing import Any


def print_scores(scores: dict[str, Any]) -> None:
    """Perplexities, the dense model's first."""
    for row in scores["perplexity"]:
        values = ", ".join(
            f"{key} {scores['models'][key]}: {row[key]:.4f}" for key in scores["models"]
        )
        print(f"{row['text']} ({row['tokens']} tokens, windows of {row['window']}): {values}")
    print(f"protocol: {scores['protocol']}")
