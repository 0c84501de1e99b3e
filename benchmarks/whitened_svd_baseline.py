"""The baseline: whitened SVD, layers independent, on the demo model.

Same targets, same kept parameters, same calibration tokens and same evaluation as the demo's
default; every layer is fitted on the dense model's inputs, as the SVD-LLM family does.

    python benchmarks/whitened_svd_baseline.py [--keep 0.8]
"""

from __future__ import annotations

import argparse
import time

import blastnn
from blastnn.compress.job import calibration_windows
from blastnn.compress.options import Options
from blastnn.evaluate.perplexity import perplexity
from blastnn.evaluate.text import first_windows, read_text
from blastnn.models.demo import TEST
from blastnn.models.source import open_model


def main() -> None:
    """Print kept parameters and perplexities."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, default=0.8)
    keep = parser.parse_args().keep
    folder = open_model("demo", print)
    model = blastnn.load_model(folder.path)
    windows = calibration_windows(folder, Options(), None)
    assert windows is not None
    start = time.perf_counter()
    result = blastnn.compress(
        model.base_model,
        keep=keep,
        # Batches as dicts: the model counts as one block and layers are fitted independently.
        calibration=[{"input_ids": ids, "use_cache": False} for ids in windows.ids.split(1)],
        structure="lowrank",
        blocks=None,
    )
    model.model = result.model
    before, after = result.plan.target_params
    print(f"{windows.ids.numel()} calibration tokens, {time.perf_counter() - start:.0f} s")
    print(f"kept {after:,} of {before:,} parameters of the linear layers ({after / before:.2%})")
    for name in TEST:
        cut = first_windows(read_text(name), folder.tokenizer(), 1024, 16384)
        print(f"{name}: perplexity {perplexity(model, cut).perplexity:.2f}", flush=True)


if __name__ == "__main__":
    main()
