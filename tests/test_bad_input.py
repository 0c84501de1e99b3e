"""Bad input gives one clear error that names the culprit, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import blastnn
from blastnn import cli, files
from blastnn.compress.options import Options
from blastnn.errors import (
    BlastnnError,
    CheckpointError,
    DtypeError,
    ModelError,
    PlanError,
    ResumeError,
)
from tests.made_up import TEXT, make_folder, make_model
from tests.test_end_to_end import compress, weights_digest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good dense model folder."""
    return make_folder(tmp_path / "dense")


def change_tensor(folder: Path, name: str, value: object) -> None:
    """Rewrite the folder's weights with one tensor changed or, with None, removed."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = value(tensors[name]) if callable(value) else value
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj.weight"
NOBODY = 65534


def test_missing_empty_and_truncated_weights(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a tensor file at all"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            compress(source, tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match="neither"):
        compress(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_damaged_weight_is_named(source: Path, tmp_path: Path, poison: float) -> None:
    def damage(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = poison
        return weight

    change_tensor(source, LAYER, damage)
    with pytest.raises(CheckpointError, match=LAYER):
        compress(source, tmp_path / "out")


def test_missing_tensor_and_wrong_shape_are_named(source: Path, tmp_path: Path) -> None:
    change_tensor(source, LAYER, lambda weight: weight[:-1].clone())
    with pytest.raises(CheckpointError, match=LAYER):
        compress(source, tmp_path / "out")
    change_tensor(source, LAYER, None)
    with pytest.raises(CheckpointError, match=LAYER):
        compress(source, tmp_path / "other")


def test_zero_matrix_gives_zero_factors(source: Path, tmp_path: Path) -> None:
    change_tensor(source, LAYER, torch.zeros_like)
    compress(source, tmp_path / "out", strict=False)  # its output is the input of the next
    layer = blastnn.load_model(tmp_path / "out").model.layers[1].mlp.up_proj
    assert all(not bool(factor.any()) for factor in layer.factors.values())


def test_calibration_text(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    for content, words in (
        (b"", "empty"),
        (b"short", "fewer than one window"),
        (b"\xff\xfe", "UTF"),
    ):
        bad.write_bytes(content)
        with pytest.raises(BlastnnError, match=words):
            compress(source, tmp_path / "out", calibration=[str(bad)])
    with pytest.raises(BlastnnError, match="no text file"):
        compress(source, tmp_path / "out", calibration=[str(tmp_path / "absent.txt")])
    with pytest.raises(BlastnnError, match="--calibration"):
        compress(source, tmp_path / "out", calibration=None)


def test_unknown_architecture(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    for kind in ("martian", "mamba"):
        changed = {**config, "model_type": kind, "architectures": ["MambaForCausalLM"]}
        (source / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=kind):
            compress(source, tmp_path / "out")
    with pytest.raises(ModelError, match="no model"):
        compress(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_keep_outside_its_range(keep: float) -> None:
    with pytest.raises(PlanError, match="keep"):
        Options(keep=keep)


def test_too_many_blocks_names_the_layer(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BlastnnError, match="k_proj.*row blocks"):
        compress(source, tmp_path / "out", blocks=(20, 2), keep=0.9, targets=("*k_proj",))


def test_output_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("keep me")
    for resume in (False, True):
        with pytest.raises(ResumeError, match="not empty"):
            compress(source, taken, resume=resume)
    assert (taken / "precious.txt").read_text() == "keep me"
    with pytest.raises(ResumeError):
        compress(source, taken / "precious.txt")
    with pytest.raises(ResumeError):
        compress(source, taken / "precious.txt" / "below")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(ResumeError, match="free"):
        compress(source, tmp_path / "full")


@contextmanager
def permissions_that_bind() -> Iterator[None]:
    """For root, who may write anywhere, act as another user for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("below", ["", "new"])
def test_output_folder_that_is_not_writable(below: str) -> None:
    with tempfile.TemporaryDirectory() as public:  # pytest's own folders are closed to others
        Path(public).chmod(0o755)
        source, locked = make_folder(Path(public) / "dense"), Path(public) / "locked"
        for path in source.iterdir():
            path.chmod(0o644)
        locked.mkdir(mode=0o555)
        compress(source, Path(public) / "open" / below)  # all is well but for the folder
        with (
            permissions_that_bind(),
            pytest.raises(ResumeError, match="cannot write to .*locked.*: Permission denied"),
        ):
            compress(source, locked / below)
        assert list(locked.iterdir()) == []


def test_disk_full_in_the_middle_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(source, tmp_path / "whole")
    written = []

    def full_after_three(*arguments: object, **options: object) -> None:
        written.append(arguments)
        if len(written) == 4:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full_after_three)
        with pytest.raises(CheckpointError, match="No space left.*--resume"):
            compress(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    compress(source, tmp_path / "out", resume=True)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "whole")


def test_resume_with_changed_options_or_model(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out")
    with pytest.raises(ResumeError, match="seed"):
        compress(source, tmp_path / "out", resume=True, seed=1)
    with pytest.raises(ResumeError, match="calibration"):
        compress(source, tmp_path / "out", resume=True, calibration=[])
    change_tensor(source, LAYER, lambda weight: weight + 1)
    with pytest.raises(ResumeError, match="model"):
        compress(source, tmp_path / "out", resume=True)


def tamper(folder: Path, **changes: object) -> None:
    """Change fields of one spec in ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.1.mlp.up_proj"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 3},
        {"rank": -1},
        {"blocks": [1, 1]},
        {"structure": "x"},
        {"in_features": 7},
        {"a": 1},
    ],
)
def test_tampered_config_is_refused(
    source: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    compress(source, tmp_path / "out")
    tamper(tmp_path / "out", **changes)
    with pytest.raises(CheckpointError):
        blastnn.load_model(tmp_path / "out")


def test_missing_factor_is_refused_not_invented(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out")
    shard = next(
        path
        for path in sorted((tmp_path / "out").glob("*.safetensors"))
        if "model.layers.1.mlp.up_proj.S" in load_file(path)
    )
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.up_proj.S"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BlastnnError, match="up_proj"):
        blastnn.load_model(tmp_path / "out")


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    make_model("llama").config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match="pickles"):
        compress(folder, tmp_path / "out", calibration=[])


def test_the_command_line_prints_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["compress", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")],
        ["compress", "demo", "--output", str(tmp_path / "out"), "--keep", "2"],
        ["inspect", str(tmp_path)],
        ["plan", str(tmp_path), "--blocks", "many"],
        ["evaluate", str(tmp_path), "--text", str(TEXT)],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "names no model_type"),
        ({}, "names no model_type"),
        ({"model_type": "llama"}, "cannot be loaded"),
        ({"model_type": "llama", "architectures": [3]}, "cannot be loaded"),
        ({"model_type": "llama", "architectures": ["AutoConfig"]}, "cannot be loaded"),
        ({"model_type": "llama", "architectures": "LlamaModel"}, "cannot be loaded"),
    ],
    ids=["list", "empty", "no weights", "number", "no model", "text"],
)
def test_folders_that_are_no_model_are_not_loaded(
    tmp_path: Path, config: object, words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        blastnn.load_model(tmp_path)


def test_dense_weights_that_are_missing_are_not_made_up(source: Path, tmp_path: Path) -> None:
    model = blastnn.load_model(source)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[LAYER]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=LAYER):
        blastnn.load_model(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, 3])
def test_a_dtype_that_is_none(source: Path, dtype: object) -> None:
    with pytest.raises(DtypeError, match="floating-point"):
        blastnn.load_model(source, dtype=dtype)  # type: ignore[arg-type]


def test_a_folder_that_is_none() -> None:
    with pytest.raises(CheckpointError, match="None"):
        blastnn.load_model(None)  # type: ignore[arg-type]
