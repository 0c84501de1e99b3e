"""What was chosen and why: the dispatch table asked, measured, and written beside a model.

``kernels.json`` holds the measured winner for every structured matrix of a model on one machine.
Loading the model there again makes the same choices, so that its outputs repeat bit for bit;
on another machine the file is passed over, and ``fix_choices`` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from blastnn.dtypes import name_of
from blastnn.errors import CheckpointError
from blastnn.kernels import processor
from blastnn.kernels.dispatch import choose, prefer
from blastnn.kernels.measure import DENSE, measure
from blastnn.kernels.worth import predicted_speedup
from blastnn.quantization import Quantization
from blastnn.structures import Structure, spec_from_json

FILE = "kernels.json"
FORMAT = "blastnn-kernels/1"
Weight = tuple[Structure, Quantization | None]


def machine() -> dict[str, Any]:
    """What a choice of kernels depends on."""
    return {
        "processor": processor.model_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def explain(
    weights: Iterable[Weight],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """One row for each distinct weight: the kernel, why others do not serve, what to expect.

    Args:
        weights: specs with their quantisation.
        device, dtype: of the inputs.
        tokens: numbers of tokens for which to measure, with weights from memory; none by default.
            Quantised weights are not measured.
    """
    counts: dict[Weight, int] = {}
    for weight in weights:
        counts[weight] = counts.get(weight, 0) + 1
    rows = []
    for (spec, quantization), count in counts.items():
        choice = choose(spec, device, dtype, quantization)
        row: dict[str, Any] = {
            "spec": spec.to_json(),
            "layers": count,
            "quantized": None if quantization is None else vars(quantization),
            "device": device,
            "dtype": name_of(dtype),
            "kernel": choice.name,
            "passed_over": choice.passed_over,
            "predicted_speedup": predicted_speedup(spec),
            "measured": {},
        }
        if quantization is None:
            for number in tokens:
                timing = measure(spec, device, dtype, number, cold=True)
                row["measured"][str(number)] = {
                    name: timing.speedup(name) for name in timing.seconds if name != DENSE
                }
        rows.append(row)
    return rows


def winners(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``kernels.json``: for every measured weight the kernel that is never the
    slowest choice, that is whose least speed-up over the measured token counts is greatest."""
    choices = []
    for row in rows:
        if row["measured"]:
            names = next(iter(row["measured"].values()))
            least = {name: min(found[name] for found in row["measured"].values()) for name in names}
            kept = {key: row[key] for key in ("spec", "device", "dtype", "measured")}
            choices.append({**kept, "kernel": max(least, key=lambda name: least[name])})
    return {"format": FORMAT, "machine": machine(), "choices": choices}


def fix_choices(values: Mapping[str, Any]) -> str | None:
    """Make the choices of a ``kernels.json``; or say why they are not for this machine.

    Raises:
        CheckpointError: another format.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(f"{FILE} is not of the format {FORMAT}; delete it or measure again")
    if values["machine"] != machine():
        return f"{FILE} was measured on {values['machine']}, not on {machine()}"
    for choice in values["choices"]:
        dtype = getattr(torch, choice["dtype"])
        prefer(spec_from_json(choice["spec"]), choice["device"], dtype, choice["kernel"])
    return None
