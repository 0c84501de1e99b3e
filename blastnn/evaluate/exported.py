"""What ``blastnn export`` does: write ONNX, compare its outputs with PyTorch's, measure its speed.

Both models are exported in the same way and run in turn in one process; a model's outputs are
compared with those of the very module that was exported, in its own dtype.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from blastnn.dtypes import dtype_named
from blastnn.errors import ExportError
from blastnn.evaluate.score import open_any
from blastnn.integrations.export import as_function, example_inputs
from blastnn.integrations.onnx import DTYPES, OnnxFile, check_target, export_onnx, open_session
from blastnn.integrations.transformers import load_model
from blastnn.models.context import window_length

SHAPES = ((1, 1), (2, 7), (1, 33), (3, 16))
PREFILL, ROUNDS = 128, 11
# Largest difference allowed, as a share of the largest output: rounding, in other orders.
TOLERANCES = {"float32": 1e-3, "float16": 5e-2}
PROTOCOL = "ONNX Runtime on the CPU, batch 1, no cache, models in turn, median of {rounds} rounds"


@dataclass(frozen=True)
class Agreement:
    """Outputs of ONNX Runtime and of PyTorch for one shape of the input.

    Attributes:
        shape: batch and length.
        max_difference: the largest absolute difference.
        relative: the same as a share of the largest absolute output of PyTorch.
    """

    shape: tuple[int, int]
    max_difference: float
    relative: float


def export_folder(
    folder: str,
    output: Path,
    *,
    against: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Export a model folder, check the file, and measure it, beside a second model if one is given.

    Args:
        folder: a model folder, compressed or dense, or ``demo``.
        output: the ONNX file to write.
        against: a model to measure beside it, exported alike into a temporary file.
        dtype: of all weights in the graph, whatever they are on disk.
        overwrite: replace an existing file.
        threads: of ONNX Runtime; None means as many as torch has.

    Raises:
        DtypeError: a dtype that ONNX Runtime has no products for.
        ExportError: what cannot be exported or written; outputs that differ (the file is removed).
    """
    dtype_named(dtype, among=DTYPES)
    check_target(output, overwrite)
    count = threads or torch.get_num_threads()
    written, rows, longest = _checked_export(folder, output, dtype, overwrite)
    result = {
        "model": folder,
        "files": [str(file) for file in written.files],
        "bytes": written.num_bytes,
        "tensor_bytes": written.tensor_bytes,
        "dtype": dtype,
        "inputs": list(written.inputs),
        "outputs": list(written.outputs),
        "agreement": [vars(row) for row in rows],
    }
    with tempfile.TemporaryDirectory() as spare:
        files = {"model": written}
        if against is not None:
            other = Path(spare) / "against.onnx"
            beside, _, length = _checked_export(against, other, dtype, True)
            files, longest = {"against": beside, **files}, min(longest, length)
            result["against"] = {"model": against, "bytes": files["against"].num_bytes}
        paths = {key: file.path for key, file in files.items()}
        result["speed"] = compare_files(paths, count, prefill=longest)
    return result


def _checked_export(
    folder: str, output: Path, dtype: str, overwrite: bool
) -> tuple[OnnxFile, list[Agreement], int]:
    """The file, how its outputs agree, and the length of prompt to time: of as many positions."""
    model = load_model(open_any(folder), dtype=dtype_named(dtype, among=DTYPES))
    written = export_onnx(model, output, overwrite=overwrite)
    shapes = tuple((batch, window_length(model.config, length)) for batch, length in SHAPES)
    rows = check_agreement(model, written, shapes)
    worst = max(rows, key=lambda row: row.relative)
    if not worst.relative <= TOLERANCES[dtype]:  # NaN is no agreement either
        for file in written.files:
            file.unlink()
        raise ExportError(
            f"{output} was removed: for ids of shape {worst.shape} ONNX Runtime's output differs "
            f"from PyTorch's by {worst.relative:.2g} of its size"
        )
    return written, rows, window_length(model.config, PREFILL)


@torch.no_grad()
def check_agreement(
    model: PreTrainedModel, written: OnnxFile, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> list[Agreement]:
    """Compare the file's outputs with the model's on random ids of several shapes."""
    session, function = open_session(written.path, torch.get_num_threads()), as_function(model)
    return [_agreement(session, function, model, shape) for shape in shapes]


def _agreement(
    session: Any, function: nn.Module, model: PreTrainedModel, shape: tuple[int, int]
) -> Agreement:
    inputs = example_inputs(model, shape, seed=shape[0] * shape[1])
    expected = function(**inputs).double()
    (found,) = session.run(None, {name: ids.numpy() for name, ids in inputs.items()})
    difference = float((torch.from_numpy(found).double() - expected).abs().max())
    return Agreement(shape, difference, difference / float(expected.abs().max()))


def compare_files(
    files: dict[str, Path], threads: int, rounds: int = ROUNDS, prefill: int = PREFILL
) -> dict[str, Any]:
    """Seconds a forward pass of each file takes, for ``prefill`` tokens and for one.

    The first round warms up and is not counted.
    """
    sessions = {name: open_session(path, threads) for name, path in files.items()}
    result: dict[str, Any] = {
        "protocol": PROTOCOL.format(rounds=rounds),
        "threads": threads,
    }
    for phase, tokens in (("prefill", prefill), ("single", 1)):
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(rounds + 1):
            for name, session in sessions.items():
                times[name].append(_seconds(session, tokens))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        result[phase] = {"tokens": tokens, "seconds": medians}
        if "against" in medians:
            result[phase]["ratio"] = medians["against"] / medians["model"]
    return result


def _seconds(session: Any, tokens: int) -> float:
    ids = torch.arange(tokens)[None] % 97 + 2  # ids that every vocabulary has
    feeds = {value.name: ids.numpy() for value in session.get_inputs()}
    if "attention_mask" in feeds:
        feeds["attention_mask"] = torch.ones_like(ids).numpy()
    start = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - start
