"""Freed memory: kept by the process, and found by the collector."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from blastnn.allocator import CHOSEN_BY_USER
from blastnn.compress.memory_use import give_memory_back, objects_at_rest

# Activations of 6 MiB, four at a time, as in a model's layers; prints how many MiB of them the C
# library still holds. (Page faults would say it more directly, but some sandboxes count none.)
LAYERS = """
import ctypes, torch
from blastnn.allocator import keep_freed_memory
class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
kept = keep_freed_memory()
for _ in range(5):
    [torch.ones(6 * 2**20 // 4) for _ in range(4)]
print(kept, mallinfo2().fordblks / 2**20)
"""


def run(**environment: str) -> tuple[str, float]:
    """What ``keep_freed_memory`` said, and the MiB held although they are free."""
    inherited = {name: v for name, v in os.environ.items() if name not in CHOSEN_BY_USER}
    command = [sys.executable, "-c", LAYERS]
    done = subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=True
    )
    said, held = done.stdout.split()
    return said, float(held)


def has_mallinfo2() -> bool:
    """Whether the C library can say what it holds: glibc from 2.33 on."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


@pytest.mark.skipif(not has_mallinfo2(), reason="only glibc gives memory back so soon")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    layer = 4 * 6
    said, kept = run()
    assert said == "True"
    # With a threshold of one's own, blocks above it always go back. Without any, glibc moves its
    # own, and what it gives back depends on what happens to lie at the end of the heap.
    said, given_back = run(MALLOC_MMAP_THRESHOLD_="131072")
    assert said == "False"
    assert given_back < layer <= kept
    said, _ = run(MALLOC_TRIM_THRESHOLD_="1000000")
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
