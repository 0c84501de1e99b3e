"""Speeds beside what the hardware allows."""

from __future__ import annotations

from typing import Any

from blastnn.display.table import MIB, print_json, table, wide_console

BENCH_COLUMNS = (
    "phase",
    "batch",
    "prompt",
    "tokens/s",
    "dense",
    "speed-up",
    "allowed",
    "reached",
)


def print_bench(report: dict[str, Any], as_json: bool) -> None:
    """Speeds of both models, what is allowed and what is reached."""
    if as_json:
        print_json(report)
        return
    console = wide_console()
    rows = [
        _bench_row(phase, setting)
        for phase in ("decode", "prefill")
        for setting in report["settings"]
    ]
    console.print(table(BENCH_COLUMNS, rows))
    machine, limits, energy = report["machine"], report["ceilings"], report["energy"]
    console.print(
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, "
        f"{report['dtype']}; reads {limits['bytes_per_second'] / 1e9:.1f} GB/s, multiplies "
        f"{limits['multiplications_per_second'] / 1e9:.1f} G/s at most"
    )
    console.print(f"energy: {energy['source'] or energy['not_measured']}")
    peak = report["settings"][-1]["peak_bytes"]
    for name in ("dense", "compressed"):
        size = peak[name]["resident"]
        shown = "not known" if size is None else f"{size / MIB:.0f} MiB"
        console.print(f"peak memory of {name}, last row's batch and prompt: {shown}")
    for setting in report["settings"]:
        for name, state in setting["compile"].items():
            if state["fallback"] is not None:
                console.print(f"{name} was not compiled: {state['fallback']}")
    console.print(f"protocol: {report['protocol']}")


def _bench_row(phase: str, setting: dict[str, Any]) -> tuple[str, ...]:
    found = setting[phase]
    return (
        phase,
        str(setting["batch"]),
        str(setting["prompt"]),
        *(f"{found[name]['tokens_per_second']:.1f}" for name in ("compressed", "dense")),
        f"{found['speedup']:.2f}x",
        f"{found['speedup_allowed']:.2f}x",
        f"{found['share_of_allowed']:.0%}",
    )
