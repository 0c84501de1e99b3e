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
from blastnn.checkpoint import own_params
from blastnn.compress.fit import fit_layers
from blastnn.compress.job import prepare_job
from blastnn.compress.moments import Moments
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan
from blastnn.compress.planning import make_plan
from blastnn.compress.quantize import quantize_checkpoint
from blastnn.compress.run import run_job
from blastnn.compress.sharing import share_inputs
from blastnn.errors import BlastnnError, CheckpointError, PlanError, StructureError
from blastnn.evaluate.score import inspect_folder
from blastnn.factorize import factorize, joint_low_rank, prepare
from blastnn.files import write_json
from blastnn.linear import StructuredLinear
from blastnn.structures import Blast, BlockDiagonal, BlockLowRank, LowRank, Structure
from blastnn.structures.stack import stacked, unstacked
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


def test_users_of_users_use_one_tensor():
    """In whatever order they were told to; nobody ends as a user of nothing."""
    x, order = torch.randn(2, 6), [(1, 0), (2, 1)]
    for steps in (order, order[::-1], [*order, *order]):
        layers = [StructuredLinear(LowRank(m, 6, 3)) for m in (4, 5, 3)]
        for user, owner in steps:
            layers[user].share(layers[owner])
        assert all(layer.factors["V"] is layers[0].V for layer in layers)
        assert [layer(x).shape[-1] for layer in layers] == [4, 5, 3]
        assert [len(list(layer.parameters())) for layer in layers] == [3, 2, 2]
        for owner in layers:
            with pytest.raises(StructureError, match="itself"):
                layers[0].share(owner)


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_factors_of_another_dtype_or_device_cannot_be_shared(other):
    layer = StructuredLinear(LowRank(4, 6, 3))
    with pytest.raises(StructureError, match="move or cast"):
        layer.share(StructuredLinear(LowRank(4, 6, 3), **other))
    assert layer(torch.randn(2, 6)).shape == (2, 4)


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


# The same as BLAST.

BLAST = {**JOINT, "structure": "blast", "blocks": (4, 3)}


def random_factors(spec: Structure) -> dict[str, Tensor]:
    return {key: torch.randn(shape) for key, shape in spec.factor_shapes().items()}


@pytest.mark.parametrize(
    "specs",
    [
        [LowRank(4, 6, 3), LowRank(5, 6, 3), LowRank(1, 6, 3)],
        [Blast(12, 7, 3, (4, 2)), Blast(3, 7, 3, (1, 2)), Blast(8, 7, 3, (3, 2))],
        [Blast(5, 7, 2, (2, 3))],
    ],
)
def test_a_stack_is_its_parts_one_below_the_other(specs: list[Structure]) -> None:
    whole = stacked(specs)
    factors = random_factors(whole)
    parts = unstacked(specs, factors)
    dense = [spec.to_dense(part) for spec, part in zip(specs, parts, strict=True)]
    torch.testing.assert_close(torch.cat(dense), whole.to_dense(factors))
    assert all(part["V"] is factors["V"] for part in parts)
    own = sum(own_params(spec, index > 0) for index, spec in enumerate(specs))
    assert own == whole.num_params


@pytest.mark.parametrize(
    "specs",
    [
        [LowRank(4, 6, 3), LowRank(4, 6, 2)],
        [LowRank(4, 6, 3), Blast(4, 6, 3, (1, 1))],
        [Blast(8, 6, 3, (2, 2)), Blast(8, 6, 3, (4, 2))],  # blocks of 4 and of 2 rows
        [Blast(5, 6, 3, (2, 2)), Blast(6, 6, 3, (2, 2))],  # the first has a row of padding
        [BlockDiagonal(4, 6, 2), BlockDiagonal(4, 6, 2)],
        [BlockLowRank(4, 6, 2, (2, 2)), BlockLowRank(4, 6, 2, (2, 2))],
    ],
)
def test_what_does_not_stack_is_refused(specs: list[Structure]) -> None:
    with pytest.raises(StructureError, match="cannot share a right factor"):
        stacked(specs)


def test_a_blast_stack_is_fitted_as_one_matrix() -> None:
    """Against ``factorize`` of the stack."""
    model = make_model("llama")
    result = blastnn.compress(model, 0.6, list(IDS.split(1)), inputs="dense", **BLAST)
    layers = [result.model.get_submodule(name) for name in QKV]
    # q 24 x 24 was to be cut into 4 block rows of 6, which divides the 12 of k and v.
    assert [layer.spec.blocks for layer in layers] == [(4, 3), (2, 3), (2, 3)]
    assert layers[1].factors["V"] is layers[0].V and len(list(layers[1].parameters())) == 2
    apart = sum(
        Blast.for_budget(m, 24, int(0.6 * m * 24), blocks=(4, 3)).num_params for m in (24, 12, 12)
    )
    own = sum(p.numel() for layer in layers for p in layer.parameters())
    per_rank = 24 + 24 + 12 + 12 + 8 * 3
    assert own == apart // per_rank * per_rank
    seen: list[Tensor] = []
    hook = model.get_submodule(QKV[0]).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    x = seen[0].reshape(-1, 24).double()
    moment = x.T @ x / len(x)
    moment.diagonal().add_(Options().damping * moment.diagonal().mean())
    whole = stacked([layer.spec for layer in layers])
    weight = torch.cat([model.get_submodule(name).weight.detach() for name in QKV])
    sweeps = Options().sweeps
    expected = factorize(weight, whole, moment, sweeps=sweeps)
    found = torch.cat([layer.to_dense() for layer in layers])
    problem = prepare(weight, moment)
    error = problem.relative_error(found.detach().double() / problem.scale)
    assert error == pytest.approx(expected.relative_error, rel=0.02)


@torch.no_grad()
def test_weighted_outputs_go_with_a_stack() -> None:
    """Each layer's rows by its own weights, and between the layers by what theirs weigh."""
    torch.manual_seed(0)
    specs = [Blast(24, 16, 6, (4, 2)), Blast(12, 16, 6, (2, 2))]
    olds = [nn.Linear(16, spec.out_features, bias=False) for spec in specs]
    scales = [torch.logspace(-2, 1, 24), torch.logspace(1, -2, 12)]
    outputs = [scale.diag()[None] for scale in scales]
    x = torch.randn(500, 16)
    moments = Moments((x.mT @ x / 500).double(), None, 500)
    plans = [
        LayerPlan(name, name, 0, spec.out_features, 16, spec, None, shared)
        for name, spec, shared in zip("ab", specs, (None, "a"), strict=True)
    ]
    errors = []
    for given in ([None, None], outputs):
        fitted = fit_layers(olds, plans, moments, given, [None, None], Options(), torch.float32)
        gaps = [
            (layer.to_dense() - old.weight) @ x.mT
            for (layer, _), old in zip(fitted, olds, strict=True)
        ]
        loss = [(s[:, None] * gap.square()).sum() for s, gap in zip(scales, gaps, strict=True)]
        errors.append(float(sum(loss)))
        for (_, fields), gap, old in zip(fitted, gaps, olds, strict=True):
            assert fields["weighted_outputs"] is (given[0] is not None)
            plain = float(gap.norm() / (old.weight @ x.mT).norm())
            assert fields["relative_error"] == pytest.approx(plain, rel=2e-2)
    assert errors[1] < 0.8 * errors[0]


def test_a_blast_stack_is_written_once_and_resumes(tmp_path: Path) -> None:
    source, choices = make_folder(tmp_path / "dense"), {**BLAST, "outputs": "weighted"}
    outcome = compress(source, tmp_path / "whole", **choices)
    assert loaded_digest(tmp_path / "whole", outcome) == outcome.journal.probe["logits_sha256"]
    assert f"{QKV[1]}.S" in names_of(tmp_path / "whole")
    assert f"{QKV[1]}.V" not in names_of(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "parts", progress=Interruption(9), **choices)
    compress(source, tmp_path / "parts", resume=True, **choices)
    assert weights_digest(tmp_path / "parts") == weights_digest(tmp_path / "whole")


def test_a_budget_below_one_right_factor_is_refused() -> None:
    """13 and 7 rows have no height in common but 1, and so many blocks take their couplings."""
    specs = [("q_proj", Blast(13, 24, 1, (4, 12))), ("k_proj", Blast(7, 24, 1, (2, 12)))]
    layers = tuple(
        LayerPlan(f"0.{leaf}", leaf, 0, spec.out_features, 24, spec, None) for leaf, spec in specs
    )
    plan = make_plan(make_model("llama"), ["model.layers.0"], Options(), None, [])
    with pytest.raises(PlanError, match=r"from 0\.q_proj on may take 144 .* at least 284"):
        share_inputs(replace(plan, layers=layers))


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


@pytest.mark.parametrize("name", ["joint", "coupled"])
def test_a_preset_brings_what_goes_with_it_along(name: str) -> None:
    """On the command line, where ``plan`` has no option for it."""
    options = Options.from_preset("default", **{name: True})
    assert (options.allocation, options.allow_slower) == ("uniform", True)
    assert options.structure == ("channels" if name == "coupled" else "blast")
    with pytest.raises(PlanError, match=f"{name} goes with allocation uniform alone"):
        Options.from_preset("default", **{name: True, "allocation": "measured"})
    assert Options.from_preset("default", joint=False) == Options.from_preset("default")


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
