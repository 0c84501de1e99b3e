"""Calibration that tells nothing, too little or nonsense of a layer: refused, or told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blastnn
from blastnn.compress.job import prepare_job
from blastnn.compress.options import Options
from blastnn.compress.report import build_report
from blastnn.compress.run import run_job
from blastnn.errors import CalibrationError
from tests.made_up import TEXT, make_folder, make_model
from tests.test_bad_input import change_tensor
from tests.test_end_to_end import SMALL

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


NOT_MEASURED = {"verified": None, "perplexity": [], "speed": None, "sample": None, "cosine": []}


def compress(source: Path, output: Path, resume: bool = False, **choices: object) -> dict[str, Any]:
    """A job's report, nothing measured."""
    job = prepare_job(source, Options(**{**SMALL, **choices}), [TEXT])
    return build_report(job, run_job(job, output, resume), dict(NOT_MEASURED))


class Branches(nn.Module):
    """Two layers, of which only one is ever used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_nothing_reaches_is_refused_or_listed() -> None:
    batches = [torch.randn(64, 24, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(CalibrationError, match=r"unused: .* never reached it.*strict"):
        blastnn.compress(Branches(), calibration=batches, allow_slower=True, blocks=(2, 2))
    result = blastnn.compress(
        Branches(), calibration=batches, allow_slower=True, blocks=(2, 2), strict=False
    )
    status = {record.name: (record.status, record.reason) for record in result.records}
    assert status["used"][0] == "compressed"
    assert status["unused"] == ("kept", "the calibration text never reached it")
    assert isinstance(result.model.unused, nn.Linear)


def test_an_unused_branch_of_a_block(tmp_path: Path) -> None:
    """Block by block, too: a block whose attention output is a constant never calls its MLP."""
    model = make_model("llama")
    block = model.model.layers[1]
    block.mlp.forward = lambda x: x * 0.5  # never calls its three layers
    ids = [torch.arange(64)[None] % 256]
    choices = {"calibration": ids, "allow_slower": True, "blocks": (2, 2), "allocation": "uniform"}
    with pytest.raises(
        CalibrationError, match=r"mlp\.gate_proj and 2 more layers: .*never reached"
    ):
        blastnn.compress(model, **choices)
    result = blastnn.compress(model, **choices, strict=False)
    records = result.records
    kept = [r.name for r in records if r.reason == "the calibration text never reached it"]
    assert kept == [f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def test_inputs_that_are_all_zero_are_refused_or_noted(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    change_tensor(source, f"{UP}.weight", torch.zeros_like)
    with pytest.raises(CalibrationError, match=rf"{DOWN}: its inputs are zero.*--no-strict"):
        compress(source, tmp_path / "out", allocation="uniform")
    # What was refused goes on without: the blocks before it are not done again.
    report = compress(source, tmp_path / "out", allocation="uniform", strict=False, resume=True)
    row = next(row for row in report["coverage"] if row["name"] == DOWN)
    assert row["status"] == "compressed" and row["tokens"] is None
    assert any("fitted without data" in note for note in row["notes"])
    assert any("fallback" in warning and DOWN in warning for warning in report["warnings"])


@pytest.mark.parametrize("allocation", ["uniform", "measured"])
def test_activations_that_overflow_are_refused(tmp_path: Path, allocation: str) -> None:
    source = make_folder(tmp_path / "dense")
    for name in (UP, "model.layers.1.mlp.gate_proj"):
        change_tensor(source, f"{name}.weight", lambda weight: weight * 1e25)
    where = DOWN if allocation == "uniform" else "what leaves model.layers.1 "
    with pytest.raises(CalibrationError, match=f"{where}.*not all finite"):
        compress(source, tmp_path / "out", allocation=allocation, outputs="equal")


def test_fewer_tokens_than_inputs_are_counted(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    report = compress(source, tmp_path / "few", tokens=32, window=32)
    assert any("more inputs than tokens" in warning for warning in report["warnings"])
    assert {row["tokens"] for row in report["coverage"] if row["status"] == "compressed"} == {32}
    report = compress(source, tmp_path / "enough", tokens=256, window=32)
    assert not any("more inputs than tokens" in warning for warning in report["warnings"])


def test_sequences_longer_than_the_context(tmp_path: Path) -> None:
    """A text is cut shorter, and the report says so; batches in memory are the caller's to cut."""
    source = make_folder(tmp_path / "dense")
    report = compress(source, tmp_path / "out", window=1000)
    assert report["calibration"]["window"] == 64
    assert any("64 tokens" in w and "instead of 1000" in w for w in report["warnings"])
    with pytest.raises(CalibrationError, match="1000 tokens in a row.*positions for 64"):
        blastnn.compress(make_model("gpt2"), calibration=[torch.zeros(1, 1000, dtype=torch.long)])
