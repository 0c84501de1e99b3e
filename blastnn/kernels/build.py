"""The C++ kernels compiled for this very processor, once, on first use, into the user's cache.

No compiler runs when blastnn is installed, so a wheel stays the same everywhere; what is built is
found again by a digest of the sources, the compiler, its flags, torch's version and the processor.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from blastnn.files import cache_folder
from blastnn.kernels import processor

SOURCES = Path(__file__).parent / "csrc"
MAIN = "blast.cpp"
LIBRARY = "blastnn_kernels.so"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
COMPILERS = ("c++", "g++", "clang++")
log = logging.getLogger("blastnn")


class BuildError(Exception):
    """The kernels could not be compiled here; the message is the reason, in one line."""


def library() -> Path:
    """The compiled kernels of this machine; compiles them, about half a minute, if need be.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = find_compiler()
    target = cache_folder() / "kernels" / _digest(compiler) / LIBRARY
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):  # whoever comes second waits for the first
            if not target.is_file():
                log.warning(
                    "compiling blastnn's CPU kernels with %s, once; about half a minute", compiler
                )
                _compile(compiler, target)
    return target


def find_compiler() -> str:
    """``$CXX``, or the first C++ compiler on the path; BuildError where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"no C++ compiler ({' or '.join(names)}) was found")
    return found


def command(compiler: str, output: Path) -> list[str]:
    """What is run: torch's headers and libraries, and the OpenMP runtime that torch itself uses.

    A second OpenMP runtime would keep a second set of threads waiting on the same cores.
    """
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    openmp = sorted(
        [*(root / "lib").glob("libgomp*"), *(root.parent / "torch.libs").glob("libgomp*")]
    )
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    sources = [str(SOURCES / MAIN), "-o", str(output)]
    return [compiler, *FLAGS, *includes, *sources, *libraries, *map(str, openmp[:1])]


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / LIBRARY
        done = subprocess.run(command(compiler, built), capture_output=True, text=True, check=False)
        if done.returncode != 0 or not built.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            reason = (lines or done.stderr.splitlines() or ["no message"])[0].strip()
            raise BuildError(f"{compiler} failed: {reason}")
        built.replace(target)  # whole or not at all


def _digest(compiler: str) -> str:
    """All that decides what comes out of the compiler."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    parts = [said.stdout, torch.__version__, processor.abilities(), *FLAGS]
    parts += [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
