"""ONNX files of models with structured layers, and sessions of ONNX Runtime.

The graph is that of ``export_program``. What is stored is what the model has: each factor once, in
its own dtype. onnx, onnxruntime and onnxscript are the extra ``blastnn[onnx]``; importing this
module needs none of them.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from blastnn.dtypes import dtype_named
from blastnn.errors import ExportError, first_line
from blastnn.integrations.export import export_program as export_program
from blastnn.integrations.export import quietly

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
DTYPES = {name: dtype_named(name) for name in ("float32", "float16")}
# One protobuf file holds at most 2 GiB; larger weights go into a file of their own beside it.
EXTERNAL_ABOVE = 2**30


@dataclass(frozen=True)
class OnnxFile:
    """What ``export_onnx`` wrote.

    Attributes:
        path: of the graph.
        files: all files that belong to it, the graph first.
        num_bytes: of all files together.
        tensor_bytes: of the model's own parameters and buffers, shared ones counted once.
        inputs, outputs: names, in the graph's order.
    """

    path: Path
    files: tuple[Path, ...]
    num_bytes: int
    tensor_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example: Sequence[Tensor] | None = None,
    dynamic: Sequence[int] | None = None,
    external_data: bool | None = None,
    overwrite: bool = False,
) -> OnnxFile:
    """Write the model as an ONNX file, whole or not at all.

    Args:
        model, example, dynamic: as for ``export_program``.
        path: of the file; a second one, ``NAME.data``, holds external data.
        external_data: weights in a file of their own; None means from 1 GiB on.
        overwrite: replace an existing file.

    Raises:
        ExportError: missing packages, a file that exists or cannot be written, a dtype or an
            operator that ONNX Runtime does not know.
    """
    target = check_target(path, overwrite)
    _check_dtype(model)
    program = export_program(model, example=example, dynamic=dynamic)
    size = _tensor_bytes(model)
    external = size > EXTERNAL_ABOVE if external_data is None else external_data
    graph = _translated(program, type(model).__name__, _output_names(model, program))
    files = _save(graph, target, external)
    inputs, outputs = graph.model.graph.inputs, graph.model.graph.outputs
    return OnnxFile(
        target,
        files,
        sum(file.stat().st_size for file in files),
        size,
        tuple(str(value.name) for value in inputs),
        tuple(str(value.name) for value in outputs),
    )


def check_target(path: str | Path, overwrite: bool = False) -> Path:
    """The path, if an ONNX file can be written there; needs the packages of the extra.

    Raises:
        ExportError: packages are missing; the file exists; the folder is missing or closed.
    """
    require_packages()
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the name of the file to write")
    if target.exists() and not overwrite:
        raise ExportError(f"{target} exists; give another name, or --force (overwrite=True)")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".blastnn-"):
            return target
    except OSError as error:
        raise ExportError(f"cannot write to {target.parent}: {error.strerror}") from error


def require_packages() -> None:
    """Raise ExportError unless onnx, onnxruntime and onnxscript are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{', '.join(missing)} not installed; ONNX needs pip install 'blastnn[onnx]'"
        )


def open_session(path: Path, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Its threads sleep between runs: those of an idle session would otherwise spin on the cores of
    the session that is measured.

    Raises:
        ExportError: ONNX Runtime refuses the file.
    """
    require_packages()
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (states.Fail, states.InvalidGraph, states.NotImplemented, states.RuntimeException) as e:
        raise ExportError(f"ONNX Runtime does not take {path}: {first_line(e)}") from e


def _check_dtype(model: nn.Module) -> None:
    found = {value.dtype for value in model.parameters()} - set(DTYPES.values())
    if found:
        raise ExportError(
            f"the model has weights in {found.pop()}; ONNX Runtime has no products for that on a "
            "CPU. Export a float32 or float16 model (model.float(), model.half(), or --dtype)"
        )


def _output_names(model: nn.Module, program: ExportedProgram) -> list[str]:
    if isinstance(model, PreTrainedModel):
        headless = model.get_output_embeddings() is None
        return ["last_hidden_state" if headless else "logits"]
    return [f"output_{index}" for index in range(len(program.graph_signature.user_outputs))]


def _translated(program: ExportedProgram, name: str, outputs: list[str]) -> torch.onnx.ONNXProgram:
    try:
        with quietly():
            graph = torch.onnx.export(program, (), dynamo=True, verbose=False, output_names=outputs)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"{name} has an operator that ONNX does not: {first_line(error.__cause__ or error)}"
        ) from error
    assert graph is not None  # it is only where a file is given at once
    # Stack traces: as large as a small model, and full of paths of this machine.
    for node in graph.model.graph.all_nodes():
        node.metadata_props.clear()
    return graph


def _save(graph: torch.onnx.ONNXProgram, target: Path, external: bool) -> tuple[Path, ...]:
    """Written in a folder beside the target, then moved: weights first, so no graph lacks them."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".blastnn-") as folder:
        graph.save(Path(folder) / target.name, external_data=external)
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)
        moved = [file.replace(target.parent / file.name) for file in written]
    return tuple(reversed(moved))


def _tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; modules already count a shared tensor once."""
    return sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
