"""Quantised models on disk: the job, loading, saving again, and folders that are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import blastnn
from blastnn import cli, files
from blastnn.compress.options import Options
from blastnn.compress.quantize import quantize_checkpoint
from blastnn.compress.run import RunOutcome
from blastnn.errors import CheckpointError, ResumeError, StructureError
from blastnn.evaluate.probe import digest, probe
from blastnn.evaluate.score import inspect_folder
from blastnn.linear import StructuredLinear
from blastnn.models.tensors import TensorFolder
from blastnn.quantization import QUANTIZATIONS, SCALE, SCALE_DTYPE, Quantization
from blastnn.structures import STRUCTURES
from tests.made_up import TEXT, make_folder
from tests.test_end_to_end import Interruption, compress, loaded_digest, weights_digest

FACTOR = "model.layers.1.mlp.up_proj.U"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model folder."""
    return make_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module", params=sorted(QUANTIZATIONS))
def job(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunOutcome]:
    """A model compressed and quantised, and what the job knows of it."""
    output = tmp_path_factory.mktemp(request.param) / "out"
    return output, compress(source, output, quantize=request.param)


def test_loaded_model_computes_what_the_job_computed(job, tmp_path):
    output, outcome = job
    expected = outcome.journal.probe["logits_sha256"]
    assert loaded_digest(output, outcome) == expected
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    layer = model.model.layers[1].mlp.up_proj
    assert layer.quantization == QUANTIZATIONS[output.parent.name[:4]]
    model.save_pretrained(tmp_path / "again")
    assert loaded_digest(tmp_path / "again", outcome) == expected
    before, after = TensorFolder(output), TensorFolder(tmp_path / "again")
    assert torch.equal(before.read(FACTOR), after.read(FACTOR))
    assert after.dtype(FACTOR + SCALE) == SCALE_DTYPE
    assert not model.hf_quantizer.is_trainable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype_leaves_whole_numbers_and_scales(job, dtype):
    output, outcome = job
    ids = torch.tensor([outcome.journal.probe["ids"]])
    exact = blastnn.load_model(output)
    for model in (
        AutoModelForCausalLM.from_pretrained(output, dtype=dtype).eval(),
        blastnn.load_model(output, dtype),
        blastnn.load_model(output).to(dtype),
    ):
        small, same = (m.model.layers[1].mlp.up_proj for m in (model, exact))
        for name, value in same.factors.items():
            kept = value.dtype != torch.float32
            assert small.factors[name].dtype == (value.dtype if kept else dtype)
            assert torch.equal(small.factors[name], value if kept else value.to(dtype))
        off = probe(model, ids).float() - probe(exact, ids)
        assert off.norm() < 0.05 * probe(exact, ids).norm()


def test_records_tell_what_quantisation_adds(job):
    output, outcome = job
    records = [r for r in outcome.journal.records if r.status == "compressed"]
    assert records
    for record in records:
        added = record.relative_error - record.error_before_quantization
        assert -0.01 < added < (0.05 if "int8" in str(output) else 0.5)
        assert added != 0.0


def test_stopped_and_resumed_gives_the_same_bytes(source, job, tmp_path):
    output, _ = job
    name = output.parent.name[:4]
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", quantize=name, progress=Interruption(9))
    with pytest.raises(ResumeError, match="quantize"):
        compress(source, tmp_path / "out", resume=True)
    compress(source, tmp_path / "out", resume=True, quantize=name)
    assert weights_digest(tmp_path / "out") == weights_digest(output)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_every_structure_from_disk_to_disk(source, structure, tmp_path):
    choices = {"structure": structure, "blocks": None, "sweeps": 2, "dtype": "bfloat16"}
    choices |= {"calibration": [], "quantize": "int4", "targets": ("mlp.*", "lm_head")}
    if not STRUCTURES[structure].for_budget(64, 48, 1000).large_factors():
        with pytest.raises(StructureError, match="large enough to be quantised"):
            compress(source, tmp_path / "out", **choices)
        assert not (tmp_path / "out").exists()
        return
    outcome = compress(source, tmp_path / "out", **choices)
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_families_with_biases(family, tmp_path):
    source = make_folder(tmp_path / "dense", family)
    outcome = compress(source, tmp_path / "out", quantize="int8", calibration=[])
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]
    shard = shard_of(tmp_path / "out", "bias")
    change_shard(shard, lambda tensors: tensors.pop(next(k for k in tensors if "bias" in k)))
    with pytest.raises(CheckpointError, match="bias"):
        blastnn.load_model(tmp_path / "out")


def shard_of(folder: Path, word: str) -> Path:
    """The first shard with a tensor whose name contains the word."""
    shards = sorted(folder.glob("*.safetensors"))
    return next(path for path in shards if any(word in name for name in load_file(path)))


def change_shard(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a shard with its tensors changed in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        (SCALE, None, "lacks"),
        (SCALE, lambda t: t.float(), "is torch.float32"),
        (SCALE, lambda t: t[..., :-1].clone(), "has the shape"),
        ("", None, "lacks"),
        ("", lambda t: t.float(), "is torch.float32"),
        ("", lambda t: t.to(torch.int16), "is torch.int16"),
    ],
)
def test_tampered_factors_are_refused(job, tmp_path, suffix, change, words):
    folder = tmp_path / "out"
    shutil.copytree(job[0], folder)
    name = FACTOR + suffix
    path = shard_of(folder, name)
    change_shard(path, lambda ts: ts.update({name: change(ts[name])}) if change else ts.pop(name))
    if change is None:
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        del values["weight_map"][name]
        index.write_text(json.dumps(values))
    for read in (blastnn.load_model, inspect_folder):
        with pytest.raises(CheckpointError, match=f"{FACTOR}{suffix} ?.*{words}|{words}.*{FACTOR}"):
            read(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"bits": 3, "group": 32},
        {"bits": 4},
        {"bits": 8, "group": 0},
        4,
        None,
        {"bits": 4, "group": 1},
    ],
)
def test_tampered_config_is_refused(job, tmp_path, entry):
    folder = tmp_path / "out"
    shutil.copytree(job[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.1.mlp.up_proj"]["quantized"] = entry
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        blastnn.load_model(folder)


def test_inspect_counts_the_bytes_that_are_there(job):
    output, _ = job
    found, tensors = inspect_folder(output), TensorFolder(output)
    layers = found["layers"]
    names = [n for n in tensors.names if any(n.startswith(f"{layer}.") for layer in layers)]
    assert found["targets"]["bytes"] == sum(tensors.shape_bytes(name) for name in names)
    entry = layers["model.layers.1.mlp.up_proj"]
    assert entry["quantized"] == QUANTIZATIONS[output.parent.name[:4]].to_json()
    assert entry["bits_per_weight"] == 8 * entry["bytes"] / entry["params"]


def test_in_memory():
    plain = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    choices = {"blocks": (2, 2), "allocation": "uniform", "quantize": "int8"}
    result = blastnn.compress(plain, keep=0.9, calibration=[x], **choices)
    assert [layer.quantization for layer in (result.model[0], result.model[2])] == [
        QUANTIZATIONS["int8"]
    ] * 2
    assert (result.model(x) - plain(x)).norm() < 0.5 * plain(x).norm()
    with pytest.raises(StructureError, match="int5"):
        Options(quantize="int5")


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder that is not quantised."""
    output = tmp_path_factory.mktemp("plain") / "out"
    compress(source, output)
    return output


@pytest.mark.parametrize("bits", sorted(QUANTIZATIONS))
def test_quantize_from_folder_to_folder(plain, tmp_path, bits):
    report = quantize_checkpoint(plain, tmp_path / "small", bits)
    found, before = blastnn.load_model(tmp_path / "small"), blastnn.load_model(plain)
    layer, original = (m.model.layers[1].mlp.up_proj for m in (found, before))
    expected = original.quantized(bits)
    assert all(torch.equal(layer.factors[n], f) for n, f in expected.factors.items())
    assert torch.equal(found.model.norm.weight, before.model.norm.weight)
    dense, rounded = original.to_dense().detach(), layer.to_dense()
    row = report["layers"]["model.layers.1.mlp.up_proj"]
    assert row["error_added"] == pytest.approx(float((rounded - dense).norm() / dense.norm()))
    assert row["bytes"]["after"] == sum(f.nbytes for f in layer.factors.values())
    size = inspect_folder(tmp_path / "small")
    assert report["targets"]["bytes"]["after"] == size["targets"]["bytes"]
    assert report["model"]["bytes"]["after"] == size["bytes"] == report_size(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "report.json").read_text()) == report
    quantize_checkpoint(plain, tmp_path / "again", bits)
    assert weights_digest(tmp_path / "again") == weights_digest(tmp_path / "small")


def test_what_quantize_wrote_can_be_verified(plain, tmp_path):
    """Against the source with the rounded factors in it, on the window that its own job used."""
    blastnn.load_model(plain).save_pretrained(tmp_path / "no_report")
    shutil.copytree(plain, tmp_path / "reported")
    window = {"self_check": {"ids": list(range(9))}}
    (tmp_path / "reported" / "report.json").write_text(json.dumps(window))
    for name in ("no_report", "reported"):
        output = tmp_path / f"{name}-small"
        check = quantize_checkpoint(tmp_path / name, output, "int4")["self_check"]
        assert check["verified"] is True
        assert (check["ids"] == window["self_check"]["ids"]) == (name == "reported")
        expected = blastnn.load_model(plain)
        for part, layer in list(expected.named_modules()):
            if isinstance(layer, StructuredLinear):
                expected.set_submodule(part, layer.quantized("int4"))
        assert digest(probe(expected, torch.tensor([check["ids"]]))) == check["logits_sha256"]
        assert inspect_folder(output, verify=True)["verified"] is True
    change_shard(shard_of(output, FACTOR), lambda tensors: tensors[FACTOR].bitwise_not_())
    assert inspect_folder(output, verify=True)["verified"] is False


def test_a_group_of_ones_own(plain, tmp_path, capsys):
    for bits, group, width in (("int4", 16, 5.0), ("int8", 32, 8.5)):
        output = tmp_path / f"{bits}-{group}"
        words = ["quantize", str(plain), "--output", str(output), "--bits", bits]
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, "--group", str(group)])
        assert stopped.value.code == 0
        assert "equal, bit for bit" in capsys.readouterr().out
        layer = blastnn.load_model(output).model.layers[1].mlp.up_proj
        assert layer.quantization == Quantization(int(bits[3:]), group)
        entry = inspect_folder(output)["layers"]["model.layers.1.mlp.up_proj"]
        assert entry["bits_per_weight"] > width
    with pytest.raises(StructureError, match="group"):
        quantize_checkpoint(plain, tmp_path / "out", "int4", group=0)
    assert not (tmp_path / "out").exists()


def report_size(folder: Path) -> int:
    """Bytes of all tensors, by the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return index["metadata"]["total_size"]


def test_quantize_layers_whose_factors_lie_in_different_files(plain, tmp_path):
    blastnn.load_model(plain).save_pretrained(tmp_path / "cut", max_shard_size="3KB")
    files = TensorFolder(tmp_path / "cut").files
    assert len({f for f, names in files.items() for n in names if "1.mlp.up_proj" in n}) > 1
    quantize_checkpoint(tmp_path / "cut", tmp_path / "small", "int8")
    quantize_checkpoint(plain, tmp_path / "other", "int8")
    ids = torch.arange(40)[None]
    models = (blastnn.load_model(tmp_path / folder) for folder in ("small", "other"))
    assert torch.equal(*(probe(model, ids) for model in models))


def test_quantize_refuses(source, plain, job, tmp_path):
    with pytest.raises(CheckpointError, match="already"):
        quantize_checkpoint(job[0], tmp_path / "out", "int4")
    with pytest.raises(CheckpointError, match="not compressed by blastnn"):
        quantize_checkpoint(source, tmp_path / "out", "int4")
    with pytest.raises(StructureError, match="int2"):
        quantize_checkpoint(plain, tmp_path / "out", "int2")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ResumeError, match="not empty"):
        quantize_checkpoint(plain, plain, "int4")
    broken = tmp_path / "broken"
    shutil.copytree(plain, broken)
    change_shard(shard_of(broken, FACTOR), lambda tensors: tensors[FACTOR].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"up_proj.*factor U.*infinite"):
        quantize_checkpoint(broken, tmp_path / "out", "int4")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_says_how_to_go_on(plain, tmp_path, monkeypatch):
    """``quantize`` begins anew: it has no ``--resume``."""

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left.*empty .*out") as caught:
            quantize_checkpoint(plain, tmp_path / "out", "int4")
    assert "--resume" not in str(caught.value)
    for left in (tmp_path / "out").iterdir():
        left.unlink()
    quantize_checkpoint(plain, tmp_path / "out", "int4")


@pytest.mark.slow
def test_command_line(source, tmp_path):
    """compress --quantize with its report, quantize, inspect."""
    blastnn_command = [sys.executable, "-m", "blastnn"]
    small = ["--keep", "0.6", "--blocks", "2", "--calibration", "none", "--sweeps", "2"]
    small += ["--targets", "mlp.*", "--text", str(TEXT), "--scored-tokens", "128"]
    done = subprocess.run(
        [*blastnn_command, "compress", str(source), "--output", str(tmp_path / "out"), *small]
        + ["--quantize", "int4"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "equal, bit for bit" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = inspect_folder(tmp_path / "out", verify=True)
    assert found["verified"] is True
    assert report["keep"]["targets"]["bytes"]["after"] == found["targets"]["bytes"]
    assert report["keep"]["model"]["bytes"]["after"] == found["bytes"]
    assert report["quantization"]["bits_per_weight"] == found["targets"]["bits_per_weight"]
    rows = [row for row in report["coverage"] if row["status"] == "compressed"]
    assert all(row["quantized"] == QUANTIZATIONS["int4"].to_json() for row in rows)
    assert sum(row["bytes_after"] for row in rows) == found["targets"]["bytes"]
    assert all(row["quantization_error"] > 0 for row in rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bits a weight" in page
    assert "Added by quantisation" in page
