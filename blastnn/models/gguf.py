"""GGUF files: converted once to a safetensors folder by transformers, in a process of its own.

The conversion holds the whole model in memory, which the compression that follows must not; hence
the child process. ``python -m blastnn.models.gguf FILE FOLDER`` is that process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from blastnn.errors import ModelError
from blastnn.files import cache_folder, publish_folder, sha256_of

NOTE = "dense weights dequantised from a GGUF file: they were once stored in few bits"


def convert(file: Path, say: Callable[[str], None]) -> Path:
    """A cached float32 safetensors folder of a ``.gguf`` file, keyed by the file's digest.

    Raises:
        ModelError: transformers cannot read the file or its architecture.
    """
    target = cache_folder() / "gguf" / sha256_of(file)[:16]
    if (target / "config.json").is_file():
        return target
    say(f"converting {file.name} to safetensors, once")
    # A folder of its own for each process: two may convert the same file at the same time.
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        staged = Path(scratch) / "staged"
        command = [sys.executable, "-m", "blastnn.models.gguf", str(file.resolve()), str(staged)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"{file} could not be converted from GGUF: {reason}")
        publish_folder(staged, target)
    return target


def main(file: Path, folder: Path) -> None:
    """Load the GGUF file in float32 and save it as safetensors, tokenizer included."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    # The loaded model still says that it is a GGUF one, and would refuse to be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
