"""Files for other runtimes."""

from __future__ import annotations

from typing import Any

from blastnn.display.table import print_json


def print_export(result: dict[str, Any], as_json: bool) -> None:
    """The files, how well their outputs agree with PyTorch's, and how long a forward pass takes."""
    if as_json:
        print_json(result)
        return
    print(
        f"{', '.join(result['files'])}: {result['bytes']:,} bytes, {result['dtype']} (the model's "
        f"tensors: {result['tensor_bytes']:,})"
    )
    print(f"{', '.join(result['inputs'])} -> {', '.join(result['outputs'])}")
    for row in result["agreement"]:
        print(
            f"{row['shape'][0]} x {row['shape'][1]} tokens: differs from PyTorch by at most "
            f"{row['max_difference']:.2g}, {row['relative']:.1e} of the largest output"
        )
    speed = result["speed"]
    for phase in ("prefill", "single"):
        seconds = speed[phase]["seconds"]
        line = f"{speed[phase]['tokens']} tokens: {1e3 * seconds['model']:.1f} ms"
        if "against" in seconds:
            name = result["against"]["model"]
            line += f"; {name} {1e3 * seconds['against']:.1f} ms ({speed[phase]['ratio']:.2f}x)"
        print(line)
    print(f"{speed['protocol']}, {speed['threads']} threads")
