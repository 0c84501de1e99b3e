"""Does the memory of ``compress`` grow with the model? The demo model, and one four times as deep.

The deep checkpoint repeats the demo's 30 blocks four times. Both are compressed with the same
options; printed is the largest anonymous resident memory of each job, as its report has it.

    python benchmarks/memory_against_depth.py [--times 4] [--folder runs/memory]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from blastnn.models.demo import prepare_model

OPTIONS = ["--calibration-tokens", "1024", "--sweeps", "1"]
TEXTS = ["--calibration", "demo:wiki-calibration"]


def deepen(source: Path, target: Path, times: int) -> Path:
    """A copy of a model folder whose blocks are repeated ``times`` times."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    depth = config["num_hidden_layers"]
    deep = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        found = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        if found is None:
            deep[name] = tensor
            continue
        for repeat in range(times):
            index = int(found.group(2)) + repeat * depth
            deep[f"{found.group(1)}{index}{found.group(3)}"] = tensor.clone()
    save_file(deep, target / "model.safetensors", metadata={"format": "pt"})
    config["num_hidden_layers"] = depth * times
    (target / "config.json").write_text(json.dumps(config))
    return target


def peak(model: Path, output: Path) -> int:
    """Bytes at the peak of one compression."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "blastnn", "compress", str(model), "--output", str(output)]
    subprocess.run([*command, *TEXTS, *OPTIONS], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((output / "report.json").read_text())
    return int(report["memory"]["peak_anonymous_bytes"])


def main() -> None:
    """Print both peaks and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/memory"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    model = prepare_model(print)
    first = peak(model, given.folder / "once")
    print(f"demo model:            {first / 2**20:.0f} MiB", flush=True)
    deep = deepen(model, given.folder / "deep-model", given.times)
    second = peak(deep, given.folder / "deep")
    print(
        f"{given.times} times the layers:    {second / 2**20:.0f} MiB ({second / first - 1:+.1%})"
    )


if __name__ == "__main__":
    main()
