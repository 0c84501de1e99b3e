"""Which kernel serves which kind of layer."""

from __future__ import annotations

from typing import Any

from blastnn.display.table import print_json
from blastnn.structures import spec_from_json


def print_kernels(rows: list[dict[str, Any]], as_json: bool) -> None:
    """For each kind of layer the kernel that serves it, why, and how fast it is beside dense."""
    if as_json:
        print_json(rows)
        return
    for row in rows:
        spec = spec_from_json(row["spec"])
        bits = f", {row['quantized']['bits']} bits" if row["quantized"] else ""
        print(f"{spec}{bits}: {row['layers']} layers, {row['dtype']} on {row['device']}")
        for name, reason in row["passed_over"].items():
            print(f"  not {name}: {reason}")
        expected = row["predicted_speedup"]
        told = "" if expected is None else f"; expected to be {expected:.2f} times as fast as dense"
        print(f"  {row['kernel']}{told if row['kernel'] == 'native' and not bits else ''}")
        for tokens, found in row["measured"].items():
            speeds = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found.items())
            print(f"    {tokens} tokens: {speeds} of dense's speed")
