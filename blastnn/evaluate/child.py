"""Measuring in a process of its own, whose memory is that of the models it holds and no more."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from blastnn.errors import MeasurementError
from blastnn.files import read_json, write_json


def ask(module: str, request: dict[str, Any]) -> Any:
    """What ``python -m module REQUEST RESULT`` answers, both files of JSON.

    Raises:
        MeasurementError: the last line that it wrote on its standard error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "request.json", Path(scratch) / "result.json"
        write_json(asked, request)
        command = [sys.executable, "-m", module, str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise MeasurementError(lines[-1])
        return read_json(answered)
