"""The spectra of all layers of a model on disk, from one pass up and one pass down.

Memory holds one block: hidden states go to the disk on the way up, and gradients come back down.
What a spectrum is: ``spectrum.py``; its ``measure_whole`` computes the same for a model in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blastnn.compress.looks import run_calls
from blastnn.compress.memory_use import give_memory_back
from blastnn.compress.spectrum import GradientSum, LayerSum, Spectra, fisher_loss
from blastnn.compress.walker import Walker
from blastnn.errors import CalibrationError
from blastnn.files import read_json, write_json, write_tensors
from blastnn.models.tensors import read_tensors
from blastnn.models.walk import Call, Trace

SPECTRA = "spectra.json"


@dataclass
class SensitivityPass:
    """One pass up and one down through a model on disk; can be stopped anywhere and goes on.

    Attributes:
        walker: loads and releases blocks.
        ids: windows of token ids ``(windows, window)``.
        layers: by block, the names of the layers wanted, and how many blocks of ``G`` to gather of
            each (None for none); they are left in ``outputs_file``.
        blocks: whether to gather ``G`` of what leaves each block, too; left in ``block_file``.
        folder: for the hidden states, the gradients and what is known already.
        seed: of the labels drawn.
        step: told after each block, on the way up and on the way down, how many of how many
            steps are done.
        seconds: after ``run``, how long the measurement took, whoever made it and when; of a
            stopped one, from the last time that it went on.
    """

    walker: Walker
    ids: Tensor
    layers: Sequence[Mapping[str, int | None]]
    folder: Path
    seed: int
    blocks: bool = False
    step: Callable[[int, int], None] = lambda done, total: None
    seconds: float = field(default=0.0, init=False)

    def run(self) -> Spectra:
        """The spectrum of every wanted layer that the windows reach."""
        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self._known()
        if known["next"] < 0:
            self.seconds = known.get("seconds", 0.0)
            return dict(known["spectra"])
        trace, hidden = self.walker.enter(self.ids.split(1), torch.float32)
        self._up(trace, hidden)
        del hidden
        top = len(self.walker.blocks)
        if known["next"] == top - 1 and not self._file("gradient", top).exists():
            write_tensors(self._file("gradient", top), _named(self._top(trace)))
        for index in range(known["next"], -1, -1):
            self._down(index, trace, known)
            known["seconds"] = self.seconds = time.perf_counter() - started
            self._note(index, known)
            self.step(2 * top - index, 2 * top)
        return dict(known["spectra"])

    def _known(self) -> dict[str, Any]:
        """The next block on the way down, and the spectra of those above it."""
        path = self.folder / SPECTRA
        if path.is_file():
            return dict(read_json(path))
        return {"next": len(self.walker.blocks) - 1, "spectra": {}}

    def _file(self, kind: str, index: int) -> Path:
        """The tensors that enter block ``index``, or the gradients there."""
        return self.folder / f"{kind}-{index:05d}.safetensors"

    def _read(self, kind: str, index: int) -> list[Tensor]:
        return list(read_tensors(self._file(kind, index)).values())

    @torch.no_grad()
    def _up(self, trace: Trace, hidden: list[Tensor]) -> None:
        """Hidden states before every block, and behind the last one, on the disk."""
        top = len(self.walker.blocks)
        if any(self._file("gradient", index).exists() for index in range(top + 1)):
            return  # all are there, or no longer needed
        done = [index for index in range(1, top + 1) if self._file("hidden", index).exists()]
        if done:
            hidden = self._read("hidden", done[-1])
        else:
            write_tensors(self._file("hidden", 0), _named(hidden))
        for index in range(done[-1] if done else 0, top):
            block = self.walker.load_block(index)
            hidden = [run_calls(block, trace.of_block(index), each) for each in hidden]
            if not all(bool(torch.isfinite(each).all()) for each in hidden):
                raise CalibrationError(
                    f"what leaves {self.walker.blocks[index].name} in the dense model is not all "
                    "finite: its weights, or those of a block before it, are damaged"
                )
            self.walker.release_block(index)
            write_tensors(self._file("hidden", index + 1), _named(hidden))
            give_memory_back()
            self.step(index + 1, 2 * top)

    def _top(self, trace: Trace) -> list[Tensor]:
        """Gradients of the loss of each window at what leaves the last block."""
        hidden, found = self._read("hidden", len(self.walker.blocks)), []
        with self.walker.tail(trace) as tail:
            for index, (states, ids) in enumerate(zip(hidden, self.ids.split(1), strict=True)):
                with torch.enable_grad():
                    leaf = states.requires_grad_()
                    output = tail(leaf, ids)
                    loss = fisher_loss(output, self.walker.head is not None, self.seed + index)
                    found.append(torch.autograd.grad(loss, leaf)[0])
        return found

    def _down(self, index: int, trace: Trace, known: dict[str, Any]) -> None:
        """Carry the gradients past one block and note the spectra of its layers."""
        calls, prefix = trace.of_block(index), f"{self.walker.blocks[index].name}."
        block = self.walker.load_block(index)
        kinds = [name.removeprefix(prefix) for name in self.layers[index]]
        sums = {
            kind: LayerSum(block.get_submodule(kind), self.layers[index][prefix + kind])
            for kind in kinds
        }
        above = zip(self._read("hidden", index), self._read("gradient", index + 1), strict=True)
        below, leaving = [], GradientSum()
        with ExitStack() as stack, torch.enable_grad():
            for total in sums.values():
                stack.enter_context(total)
            for hidden, gradient in above:
                leaving.add(gradient)
                below.append(_pulled_back(block, calls, hidden, gradient))
        moments = {}
        for kind, total in sums.items():
            if total.reached:
                known["spectra"][prefix + kind] = total.spectrum()
                moments[kind] = total.outputs()
        write_tensors(
            outputs_file(self.folder, index),
            {kind: moment for kind, moment in moments.items() if moment is not None},
        )
        if self.blocks:
            write_tensors(block_file(self.folder, index), {"G": leaving.moment()})
        self.walker.release_block(index)
        known["next"] = index - 1
        write_tensors(self._file("gradient", index), _named(below))
        give_memory_back()

    def _note(self, index: int, known: dict[str, Any]) -> None:
        """What is known when block ``index`` is done; what led there is no longer needed."""
        write_json(self.folder / SPECTRA, known)
        for kind, gone in (("gradient", index + 1), ("hidden", index + 1)):
            self._file(kind, gone).unlink(missing_ok=True)


def is_measured(folder: Path) -> bool:
    """Whether a pass in ``folder`` has come to its end."""
    path = folder / SPECTRA
    return path.is_file() and read_json(path)["next"] < 0


def outputs_file(folder: Path, index: int) -> Path:
    """Where a pass in ``folder`` leaves the ``G`` of one block's layers, by their kinds."""
    return folder / f"outputs-{index:05d}.safetensors"


def block_file(folder: Path, index: int) -> Path:
    """Where a pass in ``folder`` leaves the ``G`` of what leaves one block."""
    return folder / f"block-{index:05d}.safetensors"


def _pulled_back(
    block: nn.Module, calls: Sequence[Call], hidden: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient at a block's input from the one at its output."""
    leaf = hidden.requires_grad_()
    output = run_calls(block, calls, leaf)
    return torch.autograd.grad(output, leaf, gradient)[0]


def _named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{index:06d}": tensor for index, tensor in enumerate(tensors)}
