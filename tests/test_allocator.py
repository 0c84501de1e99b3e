"""Freed memory that is kept: fewer pages are mapped anew, and what the user chose stays."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from blastnn.allocator import CHOSEN_BY_USER

# Activations of 6 MiB, four at a time, as in a model's layers; prints the pages mapped meanwhile.
LAYERS = """
import resource, sys, torch
from blastnn.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def layers(count):
    for _ in range(count):
        [torch.ones(6 * 2**20 // 4) for _ in range(4)]
layers(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers(20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str, **environment: str) -> tuple[str, int]:
    """What ``keep_freed_memory`` said, and the page faults of twenty layers."""
    inherited = {name: v for name, v in os.environ.items() if name not in CHOSEN_BY_USER}
    command = [sys.executable, "-c", LAYERS, how]
    done = subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=True
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives pages back so soon")
def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    _, usual = run("leave")
    said, kept = run("keep")
    assert said == "True"
    assert kept < usual / 10
    said, _ = run("keep", MALLOC_TRIM_THRESHOLD_="1000000")
    assert said == "False"
