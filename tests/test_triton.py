"""Triton's kernels: when they are chosen, and their own tests, in processes of their own.

Whether Triton interprets is decided once a process, when it is first imported; so the kernels'
tests (tests/triton_kernels.py) run in another one, and no other test notices.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blastnn.kernels import choose, dispatch, reference, triton_blast
from blastnn.structures import Blast, LowRank

ROOT = Path(__file__).parents[1]
SPEC = Blast(13, 11, rank=3, blocks=(2, 3))

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "BLASTNN"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )


def run_kernel_tests(marks: str, **variables: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-m", marks]
    done = python("-m", "pytest", *options, "tests/triton_kernels.py", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert re.search(r"\d+ passed", summary), done.stdout
    assert "skipped" not in summary, done.stdout


@needs_triton
def test_kernels_in_the_interpreter():
    run_kernel_tests("not slow", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_kernels_in_the_interpreter_at_length():
    run_kernel_tests("slow", TRITON_INTERPRET="1")


@needs_triton
@needs_gpu
@pytest.mark.slow
def test_kernels_on_the_gpu():
    run_kernel_tests("slow or not slow")


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    done = python("-m", "tests.triton_compile", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert all("STACK:0 LOCAL:0" in line for line in lines), "registers are spilled to memory"


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import blastnn, torch;"
        "from blastnn.kernels import choose; from blastnn.structures import Blast;"
        "choice = choose(Blast(8, 8, rank=2, blocks=2), 'cuda', torch.float32);"
        "print(choice.name, choice.passed_over)"
    )
    done = python("-c", code, BLASTNN_KERNELS="triton")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference")
    assert "Triton, which is not installed" in done.stdout


@pytest.fixture
def new_choices(monkeypatch):
    """Choices are made once a session: forget those of this test."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.delenv(triton_blast.VARIABLE, raising=False)


@needs_triton
def test_a_gpu_gets_plain_pytorch_unless_asked(new_choices):
    choice = choose(SPEC, "cuda", torch.bfloat16)
    assert choice.kernel is reference
    assert "BLASTNN_KERNELS=triton" in choice.passed_over["triton"]


@needs_triton
@pytest.mark.parametrize("dtype", triton_blast.DTYPES, ids=str)
def test_a_gpu_gets_triton_when_asked(new_choices, monkeypatch, dtype):
    monkeypatch.setenv(triton_blast.VARIABLE, "triton")
    choice = choose(SPEC, "cuda", dtype)
    assert choice.kernel is triton_blast
    assert choice.passed_over == {}


@pytest.mark.parametrize(
    ("spec", "device", "dtype", "words"),
    [
        (LowRank(13, 11, rank=3), "cuda", torch.float32, "lowrank"),
        (SPEC, "cpu", torch.float32, "cpu"),
        (SPEC, "cuda", torch.float64, "float64"),
        (Blast(70_000, 8, rank=1, blocks=(70_000, 1)), "cuda", torch.float32, "70000"),
    ],
)
def test_what_it_does_not_serve(monkeypatch, spec, device, dtype, words):
    monkeypatch.setenv(triton_blast.VARIABLE, "triton")
    reason = triton_blast.obstacle(spec, device, dtype)
    assert words in reason
    assert "\n" not in reason
