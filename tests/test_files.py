"""Model files: damaged ones are named, foreign ones refused, our own appear whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blastnn.errors import CheckpointError
from blastnn.files import PART, read_json, remove_parts, write_json, write_tensors, write_text
from blastnn.models import gguf, packages
from blastnn.models.tensors import INDEX, SINGLE, TensorFolder, find_name

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "b.ids": torch.arange(3),
}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shards(folder: Path) -> None:
    for prefix in ("a", "b"):
        part = {name: value for name, value in TENSORS.items() if name.startswith(prefix)}
        save_file(part, folder / f"{prefix}.safetensors")
    write_index(folder, {name: f"{name[0]}.safetensors" for name in TENSORS})


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_read(tmp_path, sharded):
    if sharded:
        write_shards(tmp_path)
    else:
        save_file(TENSORS, tmp_path / SINGLE)
    folder = TensorFolder(tmp_path)
    assert set(folder.names) == set(TENSORS)
    assert "a.weight" in folder
    assert "c.weight" not in folder
    for name, value in TENSORS.items():
        assert folder.shape(name) == tuple(value.shape)
        assert folder.dtype(name) == value.dtype
        assert torch.equal(folder.read(name), value)
    assert folder.num_bytes == sum(value.nbytes for value in TENSORS.values())


def test_what_was_read_outlives_the_file(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    folder = TensorFolder(tmp_path)
    value = folder.read("a.weight")
    folder.close()
    (tmp_path / SINGLE).write_bytes(b"\0" * (tmp_path / SINGLE).stat().st_size)
    assert torch.equal(value, TENSORS["a.weight"])


def test_the_digest_tells_models_apart(tmp_path):
    digests = []
    for number, value in enumerate((1.0, 1.0, 2.0)):
        path = tmp_path / str(number)
        path.mkdir()
        save_file({"a": torch.full((2,), value)}, path / SINGLE)
        digests.append(TensorFolder(path).sha256())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("use", ["read", "shape", "dtype"])
def test_an_unknown_tensor_is_named(tmp_path, use):
    save_file(TENSORS, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="no tensor named c.weight"):
        getattr(TensorFolder(tmp_path), use)("c.weight")


def test_a_quantised_tensor_is_refused(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="tensor a has the unsupported dtype"):
        TensorFolder(tmp_path).dtype("a")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=SINGLE):
        TensorFolder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        TensorFolder(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 40, -1, -20])
def test_a_truncated_file_is_named(tmp_path, kept):
    save_file(TENSORS, tmp_path / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=f"{SINGLE} is not a complete safetensors file"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html><html></html>",
        b"\xff" * 100,
        (8).to_bytes(8, "little") + b"not json" + b"\0" * 50,
        (2).to_bytes(8, "little") + b"[]",
    ],
    ids=["lfs-pointer", "html", "ones", "no-json", "list-header"],
)
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{SINGLE} is not a complete safetensors file"):
        TensorFolder(tmp_path)


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError):
        TensorFolder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        TensorFolder(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"b\.safetensors is not a complete"):
        TensorFolder(tmp_path)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path):
    write_shards(tmp_path)
    listed = {name: f"{name[0]}.safetensors" for name in TENSORS}
    write_index(tmp_path, {**listed, "a.bias": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"a\.bias"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    "target", ["../other/{0}", "{1}/other/{0}", "sub/{0}", "./../other/{0}", "..", ".", ""]
)
def test_an_index_that_points_outside_is_refused(tmp_path, target):
    folder, other = tmp_path / "model", tmp_path / "other"
    for path in (folder, other, folder / "sub"):
        path.mkdir()
    for path in (other, folder / "sub"):
        save_file(TENSORS, path / SINGLE)
    write_index(folder, {"a.weight": target.format(SINGLE, tmp_path)})
    with pytest.raises(CheckpointError):
        TensorFolder(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        *("[]", "null", '"text"'),
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, content):
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        TensorFolder(tmp_path)


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"]
)
def test_pickles_are_refused_unread(tmp_path, name):
    marker = tmp_path / "executed"
    content = pickle.dumps(Exploit(marker))
    pickle.loads(content)
    assert marker.exists()  # the trap works
    marker.unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"pickles.*{name}.*never loaded"):
        TensorFolder(tmp_path)
    assert not marker.exists()


def test_pickles_beside_safetensors_do_no_harm(tmp_path):
    marker = tmp_path / "executed"
    save_file(TENSORS, tmp_path / SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(marker)))
    assert set(TensorFolder(tmp_path).names) == set(TENSORS)
    assert not marker.exists()


# What we write.


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_tensors_are_whole(tmp_path):
    tensors = {**TENSORS, "transposed": TENSORS["a.weight"].T, "parameter": torch.ones(2)}
    tensors["parameter"] = torch.nn.Parameter(tensors["parameter"])
    write_tensors(tmp_path / SINGLE, {k: v for k, v in tensors.items() if k != "a.weight"})
    assert names_in(tmp_path) == [SINGLE]
    folder = TensorFolder(tmp_path)
    assert torch.equal(folder.read("transposed"), TENSORS["a.weight"].T)
    assert torch.equal(folder.read("parameter"), torch.ones(2))


def test_written_json_is_whole(tmp_path):
    value = {"name": "Größe", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert names_in(tmp_path) == ["value.json"]
    write_text(tmp_path / "text.md", "Größe\n")
    assert (tmp_path / "text.md").read_text(encoding="utf-8") == "Größe\n"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_json_without_numbers_is_refused_and_the_old_file_stays(tmp_path, bad):
    write_json(tmp_path / "value.json", {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"error": [bad]})
    assert read_json(tmp_path / "value.json") == {"old": 1}
    assert names_in(tmp_path) == ["value.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "value.json", {"old": 1})
    write_tensors(tmp_path / SINGLE, {"old": torch.ones(1)})

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blastnn.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "value.json", {"new": 1})
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / SINGLE, {"new": torch.ones(1)})
    monkeypatch.undo()
    assert read_json(tmp_path / "value.json") == {"old": 1}
    assert TensorFolder(tmp_path).names == ["old"]
    remove_parts(tmp_path)
    assert names_in(tmp_path) == [SINGLE, "value.json"]


def test_removing_parts_removes_nothing_else(tmp_path):
    for name in ("a.safetensors", f"a.safetensors{PART}", f"b.json{PART}", "partial.txt"):
        (tmp_path / name).write_text("x")
    remove_parts(tmp_path)
    assert names_in(tmp_path) == ["a.safetensors", "partial.txt"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "value.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"value\.json"):
        read_json(tmp_path / "value.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"value\.json is missing"):
        read_json(tmp_path / "value.json")
    with pytest.raises(CheckpointError):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"model.a", "a"}, "model.a"),
        ({"a"}, "a"),
        ({"model.model.a"}, "model.model.a"),
        ({"b", "model.b"}, None),
    ],
)
def test_a_name_is_found_with_and_without_the_prefix(known: set[str], found: str | None) -> None:
    assert find_name("model.a", "model.", known) == found


def test_a_folder_that_two_processes_make_at_once_is_there_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BLASTNN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    made = []

    def convert_slowly(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        staged = Path(command[-1])
        made.append(staged)
        staged.mkdir()
        (staged / "config.json").write_text(str(len(made)))
        if len(made) == 1:  # another process starts, and is done, before this one is
            gguf.convert(file, lambda _: None)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf.subprocess, "run", convert_slowly)
    folder = gguf.convert(file, lambda _: None)
    assert len(made) == 2
    assert (folder / "config.json").read_text() == "2"
    assert not any(staged.exists() for staged in made)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gguf"]


def test_files_of_a_package_join_those_unpacked_before(tmp_path, monkeypatch):
    monkeypatch.setenv("BLASTNN_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("first", "second"):
            archive.writestr(f"made_up/{name}.txt", name)
    fetched = []

    def download(package: packages.Package, folder: Path, _: Any) -> Path:
        fetched.append(package.name)
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(packages, "_download", download)
    package = packages.Package("made-up", "1.0", "", "MIT")
    for name in ("first", "second", "first"):
        folder = packages.unpack(package, [f"made_up/{name}.txt"], lambda _: None)
        assert (folder / f"made_up/{name}.txt").read_text() == name
    assert len(fetched) == 2
