"""What every test process needs before torch is imported, and before the first test runs."""

import gc
import os

import pytest

# Two processes share the cores (make test). Threads that wait for each other on busy cores stand
# still for whole scheduler slices; what a product owes to its number of threads is tested by name.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl
def pytest_collection_finish() -> None:
    """A job collects garbage behind each block: let it pass over thousands of collected tests."""
    gc.collect()
    gc.freeze()
