"""Freed memory: kept by the process, and found by the collector."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from blastnn.allocator import CHOSEN_BY_USER
from blastnn.compress.memory_use import give_memory_back, objects_at_rest

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


class Cycle:
    """Garbage that only the collector sees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def nothing_at_rest() -> Iterator[None]:
    """As in a program: what is said in conftest.py holds again afterwards."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("nothing_at_rest")
def test_garbage_made_while_objects_are_at_rest_is_collected() -> None:
    older = Cycle()
    before = weakref.ref(older)
    with objects_at_rest():
        del older
        meanwhile = weakref.ref(Cycle())
        give_memory_back()
        assert before() is not None
        assert meanwhile() is None
    give_memory_back()
    assert before() is None
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_put_to_rest_stays_so() -> None:
    assert gc.get_freeze_count() > 0  # conftest.py
    with objects_at_rest():
        pass
    assert gc.get_freeze_count() > 0
