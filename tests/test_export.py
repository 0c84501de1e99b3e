"""Export: one graph without breaks for every structure, and ONNX files that ONNX Runtime agrees on.

Exporting is slow, so whatever can share a graph shares one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import blastnn
from blastnn import cli
from blastnn.errors import ExportError
from blastnn.evaluate import exported
from blastnn.integrations import onnx as integration
from blastnn.integrations.onnx import export_onnx, export_program, open_session
from blastnn.kernels import matmul, number_of, portable
from blastnn.linear import StructuredLinear
from blastnn.structures import STRUCTURES, Structure
from tests.made_up import make_folder, make_model

SPECS = [
    structure.for_budget(22, 26, 22 * 26 // 2, **options)
    for structure in STRUCTURES.values()
    for options in structure.example_options[1:2] or ({},)
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
BOTH_AXES = (0, 1)


def random_input(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Side(nn.Module):
    """One layer of every structure, side by side: one export for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StructuredLinear(spec) for spec in SPECS)
        for layer in self.layers:
            nn.init.normal_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@every_spec
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 20), (0, 3)])
def test_portable_product_is_that_of_the_dense_matrix(spec: Structure, shape) -> None:
    factors = spec.init(seed=3)
    x = random_input(*shape, 26)
    expected = x @ spec.to_dense(factors).T
    torch.testing.assert_close(portable.matmul(spec, x, factors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_every_structure_is_one_graph_for_any_token_count(strict: bool) -> None:
    torch.manual_seed(0)
    side = Side()
    program = export_program(
        side, example=(random_input(2, 5, 26),), dynamic=BOTH_AXES, strict=strict
    )
    for graph in (program.module(), program.run_decompositions().module()):
        for shape in ((2, 5), (1, 1), (3, 40)):
            x = random_input(*shape, 26)
            for spec, found, expected in zip(SPECS, graph(x), side(x), strict=True):
                torch.testing.assert_close(
                    found, expected, rtol=1e-5, atol=1e-5, msg=f"{spec}: {shape}"
                )


def test_eager_layers_do_not_take_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "matmul", None)
    spec = SPECS[0]
    matmul(spec, number_of(spec), random_input(3, 26), spec.init())


def test_every_structure_agrees_in_onnx_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    side = Side().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = export_onnx(
            side, tmp_path / "side.onnx", example=(random_input(2, 5, 26),), dynamic=BOTH_AXES
        )
    assert side.training  # left as it was
    assert written.inputs == ("x",)
    session = open_session(written.path, 1)
    for shape in ((2, 5), (1, 1), (3, 40)):
        x = random_input(*shape, 26)
        found = session.run(None, {"x": x.numpy()})
        for spec, y, expected in zip(SPECS, found, side(x), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(y), expected, rtol=1e-5, atol=1e-5, msg=f"{spec}: {shape}"
            )


def test_weights_are_stored_once_and_outside_when_asked(tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    spec = blastnn.Blast.for_budget(300, 200, 30_000)
    layer = StructuredLinear(spec).half()
    for external in (False, True):
        written = export_onnx(
            layer,
            tmp_path / "one.onnx",
            example=(random_input(2, 200).half(),),
            external_data=external,
            overwrite=external,
        )
        assert [file.name for file in written.files] == ["one.onnx", "one.onnx.data"][
            : 1 + external
        ]
        assert written.tensor_bytes == 2 * (spec.num_params + 300)
        assert written.num_bytes < 1.1 * written.tensor_bytes + 16_384
        assert str(Path.home()) not in written.path.read_bytes().decode("latin-1")
    onnx.checker.check_model(str(written.path), full_check=True)
    (found,) = open_session(written.path, 1).run(
        None, {"input": random_input(7, 200).half().numpy()}
    )
    assert found.dtype == numpy.float16


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense model folder."""
    return make_folder(tmp_path / "dense", num_hidden_layers=1)


@pytest.mark.slow
def test_a_compressed_causal_model_from_the_command_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, folder = tmp_path / "small", tmp_path / "exported"
    folder.mkdir()
    blastnn.compress_checkpoint(dense, small, calibration=[], keep=0.6, blocks=(2, 2))
    arguments = ["export", str(small), "--output", str(folder / "small.onnx"), "--json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--against", str(dense), "--threads", "1"])
    captured = capsys.readouterr()
    assert stopped.value.code == 0
    assert captured.err == ""
    result = json.loads(captured.out)
    assert (result["inputs"], result["outputs"]) == (["input_ids"], ["logits"])
    assert {tuple(row["shape"]) for row in result["agreement"]} == set(exported.SHAPES)
    assert all(row["relative"] < 1e-4 for row in result["agreement"])
    assert set(result["speed"]["prefill"]["seconds"]) == {"against", "model"}
    assert [file.name for file in folder.iterdir()] == ["small.onnx"]

    for extra in ([], ["--against", str(tmp_path / "nowhere"), "--force"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, *extra])
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2
        assert error.startswith("error: ") and len(error.splitlines()) == 1


def test_an_encoder_heeds_its_mask(tmp_path: Path) -> None:
    model = make_model("bert", num_hidden_layers=1)
    written = export_onnx(model, tmp_path / "bert.onnx")
    assert written.inputs == ("input_ids", "attention_mask")
    assert written.outputs == ("last_hidden_state",)
    assert all(row.relative < 1e-4 for row in exported.check_agreement(model, written))
    ids, mask = torch.arange(10).reshape(2, 5), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    (found,) = open_session(written.path, 1).run(
        None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    )
    with torch.no_grad():
        alone = model(input_ids=ids[1:, :3])[0]
    torch.testing.assert_close(torch.from_numpy(found[1:, :3]), alone, rtol=1e-4, atol=1e-4)


def test_outputs_that_differ_are_an_error_and_leave_no_file(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exported, "check_agreement", lambda *_: [exported.Agreement((1, 1), 1.0, float("nan"))]
    )

    def write(model: nn.Module, path: Path, **_: object) -> integration.OnnxFile:
        path.write_bytes(b"a graph")
        return integration.OnnxFile(path, (path,), 7, 7, ("input_ids",), ("logits",))

    monkeypatch.setattr(exported, "export_onnx", write)
    with pytest.raises(ExportError, match="differs"):
        exported.export_folder(str(dense), tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == [dense]


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    taken = tmp_path / "taken.onnx"
    taken.write_text("precious")
    for path, words in (
        (taken, "exists"),
        (tmp_path, "is a folder"),
        (tmp_path / "absent" / "x.onnx", "cannot write to .*absent"),
        (taken / "x.onnx", "cannot write to .*taken"),
    ):
        with pytest.raises(ExportError, match=words):
            export_onnx(model, path, example=(torch.ones(2, 2),))
    assert taken.read_text() == "precious"


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(ExportError, match=r"bfloat16.*float32"):
        export_onnx(nn.Linear(2, 2, dtype=torch.bfloat16), path, example=(torch.ones(2, 2),))
    with pytest.raises(ExportError, match="example"):
        export_onnx(nn.Linear(2, 2), path)

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(ExportError, match=r"torch\.export cannot trace Branching"):
        export_program(Branching(), example=(torch.ones(2, 2),))
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_a_counterpart_is_named(tmp_path: Path) -> None:
    class Special(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.airy_ai(x)

    with pytest.raises(ExportError, match="Special .*airy_ai"):
        export_onnx(Special(), tmp_path / "x.onnx", example=(torch.ones(2, 2),))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ExportError, match=r"no_such_package .*blastnn\[onnx\]"):
        export_onnx(nn.Linear(2, 2), tmp_path / "x.onnx", example=(torch.ones(2, 2),))
