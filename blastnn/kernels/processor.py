"""Which processor this is: what compiled code and measured choices depend on."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def model_name() -> str:
    """The model name that Linux gives, or what Python knows."""
    return _told("model name") or platform.processor() or platform.machine()


def abilities() -> str:
    """The processor's own list of abilities, where the system tells it."""
    return _told("flags|Features") or platform.processor() or platform.machine()


def _told(field: str) -> str | None:
    """A field of the first processor in ``/proc/cpuinfo``; None where there is no such thing."""
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^(?:{field})\s*:(.*)$", said, re.MULTILINE)
    return found[1].strip() if found else None
