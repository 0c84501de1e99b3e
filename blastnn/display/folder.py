"""Compressed folders: what is in one, and what quantising one saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blastnn.display.table import SAME, print_json, table, wide_console


def print_inspection(found: dict[str, Any], as_json: bool) -> None:
    """The structured layers of a folder."""
    if as_json:
        print_json(found)
        return
    rows = [
        (
            name,
            layer["structure"],
            f"{layer['out_features']}x{layer['in_features']}",
            str(layer.get("rank", "-")),
            str(layer.get("blocks", "-")),
            f"{layer['params']:,}",
            f"{layer['bytes']:,}",
            f"{layer['bits_per_weight']:.2f}",
        )
        for name, layer in found["layers"].items()
    ]
    console = wide_console()
    console.print(
        table(
            ("layer", "structure", "shape", "rank", "blocks", "parameters", "bytes", "bits"), rows
        )
    )
    sizes = found["targets"]
    console.print(
        f"{len(rows)} compressed layers, {sizes['before']:,} -> {sizes['after']:,} parameters "
        f"({sizes['kept']:.2%}, those that stayed dense not counted); all factors present and "
        "well shaped, "
        f"{sizes['bytes']:,} bytes at {sizes['bits_per_weight']:.2f} bits a weight; "
        f"{found['bytes']:,} bytes in all"
    )
    if "verified" in found:
        words = SAME[found["verified"]]
        console.print(f"output of the loaded model and of the job that wrote it: {words}")


def print_quantized(report: dict[str, Any], output: Path, as_json: bool) -> None:
    """What quantising a compressed folder saved, and the error that it added."""
    if as_json:
        print_json(report)
        return
    console = wide_console()
    for part in ("targets", "model"):
        sizes = report[part]["bytes"]
        console.print(
            f"{part:8}bytes {sizes['before']:>13,} -> {sizes['after']:>13,}  "
            f"kept {sizes['after'] / sizes['before']:.2%}"
        )
    error = report["error_added"]
    console.print(
        f"{len(report['layers'])} layers at {report['bits_per_weight']:.2f} bits a weight, scales "
        f"included; relative error added: mean {error['mean']:.4f}, largest {error['largest']:.4f}"
    )
    words = SAME[report["self_check"]["verified"]]
    console.print(f"logits of the source with these factors and of the folder loaded: {words}")
    console.print(f"{output / 'report.json'}; measure it with blastnn evaluate")
