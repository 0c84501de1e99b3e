"""Layers that read the same input and share their right factor: planned, fitted, stored, loaded."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import blastnn
from blastnn.compress.job import prepare_job
from blastnn.compress.options import Options
from blastnn.compress.quantize import quantize_checkpoint
from blastnn.compress.run import run_job
from blastnn.errors import BlastnnError, CheckpointError, PlanError, StructureError
from blastnn.evaluate.score import inspect_folder
from blastnn.factorize import joint_low_rank
from blastnn.files import write_json
from blastnn.linear import StructuredLinear
from blastnn.structures import BlockDiagonal, LowRank
from tests.made_up import TEXT, make_folder, make_model
from tests.test_end_to_end import Interruption, compress, loaded_digest, weights_digest

JOINT = {
    "structure": "lowrank",
    "allocation": "uniform",
    "outputs": "equal",
    "allow_slower": True,
    "joint": True,
}
DISK = {**JOINT, "blocks": None}
IDS = torch.arange(4 * 64).view(4, 64) * 7 % 250
QKV = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]


def pair(**dtype: Any) -> nn.Sequential:
    """Two layers with one ``V``; the second is the user."""
    torch.manual_seed(0)
    owner, user = (StructuredLinear(LowRank(m, 6, 3), **dtype) for m in (4, 5))
    user.share(owner)
    return nn.Sequential(owner, user)


def names_of(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


# The module.


def test_a_shared_factor_is_one_tensor():
    owner, user = pair()
    assert user.factors["V"] is owner.V
    assert {name for name, _ in user.named_parameters()} == {"U", "bias"}
    assert torch.equal(user.to_dense(), user.U @ owner.V.T)
    x = torch.randn(2, 6)
    user(x).sum().backward()
    assert owner.V.grad is not None


def test_it_stays_one_when_copied_cast_and_loaded():
    first = pair()
    copied = copy.deepcopy(first)
    assert copied[1].factors["V"] is copied[0].V is not first[0].V
    copied.to(torch.bfloat16)
    assert copied[1](torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    other = pair()
    with torch.no_grad():
        other[0].V.zero_()
    other.load_state_dict(first.state_dict())
    assert torch.equal(other[1].to_dense(), first[1].to_dense())


def test_it_can_be_traced():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = pair()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x) for layer in self.layers], -1)

    model, x = Both().eval(), torch.randn(3, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_what_does_not_match_cannot_be_shared():
    layer = StructuredLinear(LowRank(4, 6, 3))
    others = [LowRank(4, 6, 2), LowRank(4, 7, 3), BlockDiagonal(4, 6, 2)]
    for spec in others:
        with pytest.raises(StructureError, match="cannot use the factor V"):
            layer.share(StructuredLinear(spec))


# The fit.


def test_the_factors_are_those_of_the_stack():
    """Against ``joint_low_rank`` on inputs that a hook saw in the dense model."""
    model = make_model("llama")
    seen: list[Tensor] = []
    hook = model.get_submodule(QKV[0]).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    x = seen[0].reshape(-1, 24).double()
    result = blastnn.compress(model, 0.6, list(IDS.split(1)), inputs="dense", damping=0.0, **JOINT)
    layers = [result.model.get_submodule(name) for name in QKV]
    rank = layers[0].spec.rank
    # q 24 x 24, k and v 12 x 24: apart they may keep as much as their ranks take, no more.
    apart = sum(int(0.6 * m * 24) // (m + 24) * (m + 24) for m in (24, 12, 12))
    assert rank == apart // (24 + 12 + 12 + 24)
    weights = [model.get_submodule(name).weight for name in QKV]
    expected = joint_low_rank(weights, rank, x.T @ x / len(x))
    for layer, factors, error in zip(layers, expected.factors, expected.errors, strict=True):
        dense = factors["U"] @ factors["V"].T
        torch.testing.assert_close(layer.to_dense(), dense, rtol=1e-3, atol=1e-3)
        record = next(r for r in result.records if result.model.get_submodule(r.name) is layer)
        assert record.relative_error == pytest.approx(error, rel=1e-3)
    own = sum(p.numel() for layer in layers for p in layer.parameters())
    assert own == rank * (24 + 12 + 12 + 24)
    assert result.plan.target_params[1] == sum(
        p.numel()
        for module in result.model.modules()
        if isinstance(module, StructuredLinear)
        for p in module.parameters()
    )


@pytest.mark.parametrize("calibration", [list(IDS.split(1)), None])
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_other_families_and_no_data(family: str, calibration: list[Tensor] | None) -> None:
    result = blastnn.compress(make_model(family), 0.6, calibration, **JOINT)
    shared = [layer for layer in result.plan.layers if layer.shared is not None]
    assert len(shared) == 2 * len({layer.block for layer in result.plan.layers} - {None})
    assert all(0 < r.relative_error < 1 for r in result.records if r.status == "compressed")


def test_a_job_writes_it_once_and_resumes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    outcome = compress(source, tmp_path / "whole", **DISK)
    assert loaded_digest(tmp_path / "whole", outcome) == outcome.journal.probe["logits_sha256"]
    names = names_of(tmp_path / "whole")
    assert f"{QKV[0]}.V" in names and f"{QKV[1]}.U" in names
    assert not {f"{QKV[1]}.V", f"{QKV[2]}.V", "model.layers.1.mlp.up_proj.V"} & names
    found = inspect_folder(tmp_path / "whole")
    tensors = {
        n: v for p in (tmp_path / "whole").glob("*.safetensors") for n, v in load_file(p).items()
    }
    sizes = [math.prod(v.shape) for n, v in tensors.items() if n.endswith((".U", ".V"))]
    assert found["targets"]["after"] == sum(sizes)
    assert sum(entry["bytes"] for entry in found["layers"].values()) == 4 * sum(sizes)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "parts", progress=Interruption(9), **DISK)
    compress(source, tmp_path / "parts", resume=True, **DISK)
    assert weights_digest(tmp_path / "parts") == weights_digest(tmp_path / "whole")
    model = blastnn.load_model(tmp_path / "whole")
    assert model.get_submodule(QKV[1]).factors["V"] is model.get_submodule(QKV[0]).V
    model.save_pretrained(tmp_path / "again")
    assert loaded_digest(tmp_path / "again", outcome) == outcome.journal.probe["logits_sha256"]


def test_bfloat16_and_a_plan_file(tmp_path: Path) -> None:

    source = make_folder(tmp_path / "dense")
    options = Options(tokens=256, window=64, dtype="bfloat16", **DISK)
    job = prepare_job(source, options, [TEXT])
    write_json(tmp_path / "plan.json", job.plan.to_json())
    plain = Options(tokens=256, window=64, dtype="bfloat16", allow_slower=True)
    again = prepare_job(source, plain, [TEXT], tmp_path / "plan.json")
    assert again.plan.layers == job.plan.layers
    outcome = run_job(again, tmp_path / "out")
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]
    values = json.loads((tmp_path / "plan.json").read_text())
    values["layers"][QKV[1]]["shared"] = QKV[2]
    write_json(tmp_path / "plan.json", values)
    with pytest.raises(PlanError, match=r"plan\.json.*k_proj uses the factor V of.*v_proj"):
        prepare_job(source, plain, [TEXT], tmp_path / "plan.json")


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"structure": "blr"}, "structure lowrank or blast alone, but structure is blr"),
        ({"quantize": "int8"}, "quantize None"),
        ({"allocation": "measured"}, "allocation uniform"),
        ({"allow_slower": False}, "allow_slower True"),
    ],
)
def test_choices_that_do_not_go_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Options(**{**JOINT, **changes})


def test_models_without_such_layers() -> None:
    with pytest.raises(PlanError, match="nothing to share"):
        blastnn.compress(make_model("gpt2"), 0.6, **JOINT)
    with pytest.raises(PlanError, match="which layers of this module"):
        blastnn.compress(nn.Linear(8, 8), 0.6, [torch.randn(9, 8)], **JOINT)


def test_a_factor_of_another_input_is_not_shared(tmp_path: Path) -> None:

    job = prepare_job(
        make_folder(tmp_path / "dense"), Options(tokens=256, window=64, **DISK), [TEXT]
    )
    other = "model.layers.0.self_attn.o_proj"
    spec = next(la.spec for la in job.plan.layers if la.name == QKV[0])
    layers = tuple(
        replace(la, spec=spec, shared=QKV[0]) if la.name == other else la for la in job.plan.layers
    )
    job.plan = replace(job.plan, layers=layers)
    with pytest.raises(BlastnnError, match="o_proj cannot share a factor with.*q_proj"):
        run_job(job, tmp_path / "out")


def test_folders_are_checked_and_not_quantised(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense", num_hidden_layers=1)
    compress(source, tmp_path / "out", **DISK)
    with pytest.raises(CheckpointError, match="share factors"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "small", "int8")
    path = tmp_path / "out" / "config.json"
    whole = json.loads(path.read_text())
    for changed in ({"shared": "model.layers.0.mlp.up_proj"}, {"shared": "nowhere"}):
        config = copy.deepcopy(whole)
        config["quantization_config"]["layers"][QKV[1]] |= changed
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"k_proj uses the factor V of"):
            blastnn.load_model(tmp_path / "out")
