"""What a finished job achieved: sizes, error, speed and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from blastnn.display.table import MIB, SAME, print_json, wide_console


def print_summary(report: dict[str, Any], output: Path, fresh: bool, as_json: bool) -> None:
    """What a finished job achieved."""
    if as_json:
        print_json(report)
        return
    console = wide_console()
    if not fresh:
        console.print(f"{output} was finished before; nothing to do")
    _print_sizes(console, report["keep"])
    _print_ingredients(console, report)
    measured = report["measured"]
    if measured is None:
        console.print(f"not measured: {report['not_measured']}")
    else:
        _print_measured(console, measured)
    _print_costs(console, report["timing"], report["memory"])
    state = SAME[report["self_check"]["verified"]]
    console.print(f"logits of the model loaded in a fresh process and of the job: {state}")
    for warning in report["warnings"]:
        console.print(f"warning: {warning}")
    console.print(f"{output / 'report.html'}")


def _print_sizes(console: Console, keep: dict[str, Any]) -> None:
    for part in ("targets", "model"):
        for unit in ("params", "bytes"):
            share = keep[part][unit]
            asked = (
                f" (asked {keep['asked']:.1%})" if part == keep["of"] and unit == "params" else ""
            )
            console.print(
                f"{part:8}{unit:7}{share['before']:>13,} -> {share['after']:>13,}  "
                f"kept {share['kept']:.2%}{asked}"
            )


def _print_ingredients(console: Console, report: dict[str, Any]) -> None:
    measured_first = report["sensitivity"]
    if measured_first["why_not_allocated"] is None:
        console.print(
            f"budget shared out by measurement on {measured_first['windows']} windows; "
            f"{measured_first['kept_dense']} layers stay dense for it"
        )
    if measured_first["refitted_layers"]:
        console.print(
            f"{measured_first['refitted_layers']} layers that stay dense got weights that repair "
            "what the layers before them got wrong"
        )
    if report.get("refinement"):
        refinement = report["refinement"]
        console.print(
            f"factors refined block by block, {refinement['epochs']} passes of the text; "
            f"held-out error of a block {refinement['mean_ratio']:.3f} of what it was"
        )
    if report.get("quantization"):
        how = report["quantization"]
        error = how["error_added"]
        console.print(
            f"factors in {how['bits']} bits, {how['bits_per_weight']:.2f} a weight with scales; "
            f"relative error added: mean {error['mean']:.4f}, largest {error['largest']:.4f}"
        )


def _print_costs(console: Console, timing: dict[str, Any], memory: dict[str, Any]) -> None:
    console.print(
        f"{timing['total']:.0f} s: measuring {timing['measure']:.0f}, factorisation "
        f"{timing['factorise']:.0f}, refinement {timing['refine']:.0f}, forward passes "
        f"{timing['forward']:.0f}, other {timing['other']:.0f} ({timing['other_share']:.1%})"
    )
    peak = memory["peak_anonymous_bytes"]
    if peak is not None:
        console.print(f"peak anonymous memory {peak / MIB:.0f} MiB")


def _print_measured(console: Console, measured: dict[str, Any]) -> None:
    for row in measured["perplexity"]:
        console.print(
            f"perplexity {row['text']}: dense {row['dense']:.2f}, compressed "
            f"{row['compressed']:.2f} ({row['tokens']} tokens)"
        )
    for row in measured["cosine"]:
        console.print(
            f"mean cosine of the hidden states on {row['text']}: {row['mean']:.4f}, of their "
            f"means: {row['vectors']:.4f} ({row['tokens']} tokens)"
        )
    for phase in ("prefill", "decode"):
        if measured["speed"]:
            speed = measured["speed"][phase]
            spread = ""
            if "least" in speed:  # reports of former versions do not have it
                spread = f", {speed['least']:.2f}x to {speed['most']:.2f}x in single rounds"
            console.print(
                f"{phase}: dense {speed['dense']:.1f} tokens/s, compressed "
                f"{speed['compressed']:.1f} ({speed['ratio']:.2f}x{spread})"
            )
