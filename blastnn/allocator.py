"""Memory that was freed and is wanted again soon, kept by the process.

glibc gives freed blocks of some megabytes back to the system, which maps and clears fresh pages for
the next one. A model that makes an activation of that size in every layer pays for it each time: a
prompt of 1,024 tokens takes a quarter longer for a compressed SmolLM2-135M (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os

# Of ``mallopt(3)``.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20  # a block, in bytes: what glibc allows at most
KEPT_IN_ALL = 256 * 2**20  # at the end of the heap, in bytes
CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 32 MiB, up to 256 MiB; whether it does.

    For programs, not for libraries: it holds for the whole process. Where another C library or the
    user (by glibc's environment variables) decides, nothing is changed.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; TypeError: not POSIX
        return False
    wanted = {M_MMAP_THRESHOLD: LARGEST_KEPT, M_TRIM_THRESHOLD: KEPT_IN_ALL}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
