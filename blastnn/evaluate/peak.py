"""Peak memory of one model, in a process of its own.

``python -m blastnn.evaluate.peak REQUEST RESULT`` reads and writes JSON. The peak is that of all
resident pages, mapped weight files among them, and on a GPU also torch's own count. The step is
not compiled here, because the compiler's own memory would be counted.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from blastnn.allocator import keep_freed_memory
from blastnn.errors import MeasurementError
from blastnn.evaluate.child import ask
from blastnn.evaluate.engine import open_engine
from blastnn.files import read_json, write_json
from blastnn.integrations.transformers import load_model

HOW = (
    "largest resident set (VmHWM) of a process that holds this model alone and generates eagerly, "
    "Python and torch included; null where the system does not tell"
)
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_bytes(
    folder: Path, shapes: list[tuple[int, int]], new_tokens: int, device: str
) -> list[dict[str, int | None]]:
    """The peaks for every ``(batch, prompt)``, measured in a child process."""
    asked = {"folder": str(folder), "shapes": shapes, "new_tokens": new_tokens, "device": device}
    try:
        found: list[dict[str, int | None]] = ask(__name__, asked)
    except MeasurementError as error:
        raise MeasurementError(f"the memory of {folder} could not be measured: {error}") from error
    return found


def measure(request: dict[str, Any]) -> list[dict[str, int | None]]:
    """The peak of each shape, in this process."""
    device = torch.device(request["device"])
    model = load_model(Path(request["folder"])).to(device)
    peaks = []
    for batch, prompt in request["shapes"]:
        _forget_peak(device)
        ids = torch.zeros(batch, prompt, dtype=torch.int64, device=device)
        with open_engine(model, prompt + request["new_tokens"]) as engine:
            for _ in engine.tokens(ids, 3):
                pass
        gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        peaks.append({"resident": _peak_resident(), "gpu": gpu})
    return peaks


def _forget_peak(device: torch.device) -> None:
    if CLEAR.exists():
        CLEAR.write_text("5")  # sets VmHWM to what is resident now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_resident() -> int | None:
    if not STATUS.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


if __name__ == "__main__":
    keep_freed_memory()  # as the process does that generates
    write_json(Path(sys.argv[2]), measure(read_json(Path(sys.argv[1]))))
