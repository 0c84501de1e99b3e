"""The whole path on made-up checkpoints of every family: compress, load, compare, resume."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import blastnn
from blastnn import cli
from blastnn.compress.job import Progress, prepare_job
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan
from blastnn.compress.run import RunOutcome, run_job
from blastnn.evaluate.probe import digest, probe
from blastnn.linear import StructuredLinear
from blastnn.models.families import FAMILIES
from blastnn.structures import STRUCTURES
from tests.made_up import TEXT, make_folder, make_model

SMALL = {"keep": 0.6, "blocks": (2, 2), "tokens": 512, "window": 64, "sweeps": 4}


def compress(source: Path, output: Path, resume: bool = False, **choices: object) -> RunOutcome:
    """Run the job without the report."""
    calibration = choices.pop("calibration", [str(TEXT)])
    progress = choices.pop("progress", None)
    options = Options(**{**SMALL, **choices})
    return run_job(prepare_job(source, options, calibration, None, progress), output, resume)


def weights_digest(folder: Path) -> dict[str, str]:
    """Digests of all that a loader reads."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("*.safetensors", "config.json", "*.index.json")
        for path in sorted(folder.glob(pattern))
    }


def loaded_digest(folder: Path, outcome: RunOutcome) -> str:
    """Digest of the loaded model's output on the job's own window."""
    ids = torch.tensor([outcome.journal.probe["ids"]])
    return digest(probe(blastnn.load_model(folder), ids))


def test_every_family_has_a_made_up_checkpoint() -> None:
    from tests import made_up

    assert set(made_up.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loaded_model_computes_what_the_job_computed(family: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense", family)
    outcome = compress(source, tmp_path / "out")
    compressed = [r for r in outcome.journal.records if r.status == "compressed"]
    assert compressed
    assert all(0 < record.relative_error < 1 for record in compressed)
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_nearly_everything_kept_is_nearly_the_dense_model(family: str, tmp_path: Path) -> None:
    """An oracle that shares nothing with the walk: transformers' own forward on the dense model."""
    source = make_folder(tmp_path / "dense", family)
    compress(source, tmp_path / "out", structure="lowrank", blocks=None, keep=1.0)
    ids = torch.arange(64)[None] * 3 % 250
    dense, kept = (probe(blastnn.load_model(tmp_path / d), ids) for d in ("dense", "out"))
    assert torch.equal(dense, kept)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("calibration", [[str(TEXT)], []])
def test_structures_with_and_without_data(
    structure: str, calibration: list[str], tmp_path: Path
) -> None:
    source = make_folder(tmp_path / "dense")
    choices = {"structure": structure, "blocks": None, "sweeps": 2}
    outcome = compress(source, tmp_path / "out", calibration=calibration, **choices)
    assert {r.status for r in outcome.journal.records if r.reason is None} == {"compressed"}
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]


def test_the_check_window_without_a_text_fits_the_positions(tmp_path: Path) -> None:
    """GPT-2 looks positions up in a table, here of 64 rows."""
    source = make_folder(tmp_path / "dense", "gpt2")
    outcome = compress(source, tmp_path / "out", calibration=[])
    assert len(outcome.journal.probe["ids"]) == 64
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]


def test_bfloat16_output(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    outcome = compress(source, tmp_path / "out", dtype="bfloat16")
    model = blastnn.load_model(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]


def test_tied_head_can_be_compressed_when_asked(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    outcome = compress(source, tmp_path / "out", targets=("lm_head", "mlp.*"))
    names = {r.name for r in outcome.journal.records if r.status == "compressed"}
    assert "lm_head" in names
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.0.self_attn.q_proj" not in names
    model = blastnn.load_model(tmp_path / "out")
    assert isinstance(model.lm_head, StructuredLinear)
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]


def test_auto_class_loads_and_saves_again(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    outcome = compress(source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model.model.layers[0].mlp.up_proj, StructuredLinear)
    model.save_pretrained(tmp_path / "again")
    assert loaded_digest(tmp_path / "again", outcome) == outcome.journal.probe["logits_sha256"]


class Interruption(Progress):
    """Raises after a given number of layers."""

    def __init__(self, layers: int) -> None:
        self.left = layers

    def layer(self, plan: LayerPlan, record: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_stopped_anywhere_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    compress(source, tmp_path / "whole")
    for layers in (3, 7, 9, 5):
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "parts", resume=True, progress=Interruption(layers))
    outcome = compress(source, tmp_path / "parts", resume=True)
    assert outcome.journal.sittings > 1
    assert weights_digest(tmp_path / "parts") == weights_digest(tmp_path / "whole")


def arguments(source: Path, output: Path, *extra: str) -> list[str]:
    """The arguments of a small job."""
    return [
        *["compress", str(source), "--output", str(output)],
        *["--keep", "0.6", "--blocks", "2", "--calibration", str(TEXT), "--window", "64"],
        *["--calibration-tokens", "2048", "--sweeps", "20", "--resume", *extra],
    ]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL, ten times; the last run ends what the first began."""
    source = make_folder(tmp_path / "dense", num_hidden_layers=24, hidden_size=96)
    command = [sys.executable, "-m", "blastnn"]
    whole_job, parts_job = (
        [*command, *arguments(source, tmp_path / name)] for name in ("whole", "parts")
    )
    start = time.monotonic()
    subprocess.run(whole_job, check=True, capture_output=True)
    whole = time.monotonic() - start
    moments = random.Random(time.time_ns())
    for _ in range(10):
        process = subprocess.Popen(
            parts_job,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(moments.uniform(0.3, 1.0) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(parts_job, check=True, capture_output=True)
    assert weights_digest(tmp_path / "parts") == weights_digest(tmp_path / "whole")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints; it must succeed."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    captured = capsys.readouterr()
    assert stopped.value.code == 0, captured.err
    return captured.out


def test_command_line_from_start_to_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """compress with a report, again (finished), inspect."""
    source = make_folder(tmp_path / "dense")
    output = tmp_path / "out"
    job = arguments(source, output, "--text", str(TEXT), "--scored-tokens", "512")
    assert "equal, bit for bit" in run(capsys, *job)
    report = json.loads((output / "report.json").read_text())
    assert report["keep"]["targets"]["params"]["kept"] <= 0.6
    assert report["self_check"]["verified"] is True
    assert len(report["coverage"]) == 3 * 7 + 1
    assert (output / "report.html").read_text().startswith("<!")
    before = weights_digest(output)
    assert "finished before" in run(capsys, *job)
    assert weights_digest(output) == before
    assert "equal, bit for bit" in run(capsys, "inspect", str(output), "--verify")


def test_in_memory_of_any_module_and_of_a_known_family() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    x = torch.randn(200, 32)
    choices = {"blocks": (2, 2), "allocation": "uniform"}
    result = blastnn.compress(plain, keep=0.9, calibration=[x], **choices)
    error = (result.model(x) - plain(x)).norm() / plain(x).norm()
    assert [record.status for record in result.records] == ["compressed", "compressed"]
    assert error < 0.5
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    model = make_model("llama")
    ids = torch.randint(0, 256, (4, 64))
    walked = blastnn.compress(model, keep=0.6, calibration=list(ids.split(1)), **choices)
    assert isinstance(walked.model.model.layers[2].mlp.down_proj, StructuredLinear)
    assert type(model.model.layers[2].mlp.down_proj) is torch.nn.Linear
