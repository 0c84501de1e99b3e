"""How much anonymous memory this process really holds, sampled from the operating system."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


def give_memory_back() -> None:
    """Free what is no longer used, down to the operating system.

    Copied blocks and stopped forward passes are reference cycles, and too few objects are made for
    Python's collector to start by itself; and glibc keeps freed pieces between those in use until
    it is told to trim. Without this, memory grows with the number of blocks.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


@contextmanager
def objects_at_rest() -> Iterator[None]:
    """Python's collector passes over the objects that there are already while the context is open.

    The libraries alone make some hundred thousand, and looking through them all takes a fifth of a
    second each time that ``give_memory_back`` is called.
    """
    if gc.get_freeze_count():  # the caller has done so, and will undo it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
