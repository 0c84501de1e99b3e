"""What a job would do, before it does it."""

from __future__ import annotations

from blastnn.compress.draft import Draft
from blastnn.compress.job import Job
from blastnn.display.table import MIB, print_json, table, wide_console


def print_plan(draft: Draft, as_json: bool) -> None:
    """Ranks, sizes and the estimated memory of a draft."""
    before, after = draft.plan.target_params
    total = draft.plan.model_params
    sizes = {
        "target_params": {"before": before, "after": after},
        "model_params": {"before": total, "after": total - before + after},
        "output_bytes": draft.output_bytes(),
        "memory_bytes": draft.memory_bytes(),
    }
    if as_json:
        print_json({**draft.plan.to_json(), **sizes})
        return
    rows = []
    for layer in draft.plan.layers:
        what = layer.reason or str(layer.spec)
        shape = f"{layer.out_features}x{layer.in_features}"
        rows.append((layer.name, shape, f"{layer.planned_params:,}", what))
    console = wide_console()
    console.print(table(("layer", "shape", "parameters", "becomes"), rows))
    console.print(f"targets {before:,} -> {after:,} ({after / max(before, 1):.1%})")
    if draft.options.allocation == "measured" and not draft.plan_given:
        console.print(
            "shares  uniform here; a job measures what layers matter and shares this budget out "
            "anew, but keeps to a plan that it is given (--plan)"
        )
    console.print(f"model   {total:,} -> {total - before + after:,}")
    console.print(f"output  {draft.output_bytes() / MIB:.0f} MiB")
    for part, size in draft.memory_bytes().items():
        console.print(f"memory  {size / MIB:.0f} MiB for {part}")
    if not isinstance(draft, Job):
        console.print(f"        reckoned with {draft.tokens:,} tokens of calibration text")
