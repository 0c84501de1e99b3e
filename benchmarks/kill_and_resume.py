"""SIGKILL the demo job at ten random moments, resume it, and compare the output's bytes.

python benchmarks/kill_and_resume.py [--kills 10] [--folder runs/kill]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

OPTIONS = ["--calibration-tokens", "2048", "--sweeps", "1", "--resume", "--keep", "0.8"]
TEXTS = ["--calibration", "demo:wiki-calibration", "--calibration", "demo:c4-calibration"]


def command(output: Path) -> list[str]:
    """A small compression of the demo model, always the same."""
    start = [sys.executable, "-m", "blastnn", "compress", "demo", "--output", str(output)]
    return [*start, *OPTIONS, *TEXTS, "--text", "demo:tiny", "--scored-tokens", "1024"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the reports and the journal, which hold times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith("report.")
    }


def main() -> None:
    """Run once undisturbed, once killed again and again; print what was compared."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill"))
    given = parser.parse_args()
    whole, parts = given.folder / "whole", given.folder / "parts"
    for folder in (whole, parts):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    length = time.monotonic() - started
    print(f"undisturbed: {length:.0f} s", flush=True)
    moments = random.Random(time.time_ns())
    for kill in range(given.kills):
        wait = moments.uniform(0.05, 0.25) * length
        process = subprocess.Popen(
            command(parts), stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shards = len(list(parts.glob("*.safetensors"))) if parts.exists() else 0
        print(f"kill {kill + 1} after {wait:.1f} s: {shards} shards written", flush=True)
    subprocess.run(command(parts), check=True, stdout=subprocess.DEVNULL)
    same = digests(whole) == digests(parts)
    print(f"{len(digests(whole))} files, equal: {same}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
