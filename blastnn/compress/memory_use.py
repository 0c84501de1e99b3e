"""How much anonymous memory this process really holds, sampled from the operating system."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Self

HOW = "largest RssAnon of /proc/self/status, sampled every 20 ms"
STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """Resident anonymous memory in bytes; None where the system does not tell."""
    if not STATUS.exists():
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


class PeakMemory:
    """Samples ``anonymous_bytes`` in a thread while the context is open."""

    def __init__(self, interval: float = 0.02) -> None:
        self.peak = anonymous_bytes()
        self._interval, self._stop = interval, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            now = anonymous_bytes()
            if now is not None:
                self.peak = max(self.peak or 0, now)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
