"""Factors in 8 and 4 bits: the layout, its rounding, and the layer, for every structure."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import blastnn
from blastnn.compress.options import Options
from blastnn.compress.run import RunOutcome
from blastnn.errors import CheckpointError, ResumeError, StructureError
from blastnn.evaluate.probe import probe
from blastnn.evaluate.score import inspect_folder
from blastnn.kernels import TABLE, choose, reference
from blastnn.kernels.dispatch import UNQUANTIZED_ONLY
from blastnn.linear import StructuredLinear
from blastnn.models.tensors import TensorFolder
from blastnn.quantization import (
    QUANTIZATIONS,
    SCALE,
    SCALE_DTYPE,
    Quantization,
    dequantize_tensor,
    quantize_factors,
    quantize_tensor,
    stored_bytes,
)
from blastnn.structures import STRUCTURES, Blast, Structure
from tests.made_up import make_folder
from tests.test_end_to_end import Interruption, compress, loaded_digest, weights_digest

SPECS = [structure.for_budget(22, 27, 22 * 27 // 2) for structure in STRUCTURES.values()]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
both = pytest.mark.parametrize("name", sorted(QUANTIZATIONS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(spec: Structure, name: str) -> tuple[StructuredLinear, StructuredLinear]:
    """A layer, and the same one quantised."""
    torch.manual_seed(0)
    layer = StructuredLinear(spec)
    nn.init.normal_(layer.bias)
    return layer, layer.quantized(name)


def unpacked_by_hand(packed: Tensor, scales: Tensor, how: Quantization, shape: tuple) -> Tensor:
    """The documented layout, number by number; shares nothing with the code."""
    b, q, r = shape
    numbers = torch.zeros(shape, dtype=torch.float64)
    for i in range(b):
        for row in range(q):
            for column in range(r):
                if how.bits == 8:
                    whole = int(packed[i, row, column])
                else:
                    byte = int(packed[i, row, column // 2])
                    whole = (byte >> 4 if column % 2 else byte & 15) - 8
                numbers[i, row, column] = whole * float(scales[i, row // how.group, column])
    return numbers


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 9, 4), (3, 1, 1), (1, 3, 6)])
@pytest.mark.parametrize("how", [Quantization(8, 3), Quantization(4, 3), Quantization(4, 64)])
def test_the_layout_is_the_documented_one(shape, how):
    factor = normal(*shape)
    packed, scales = quantize_tensor(factor, how)
    columns = shape[2] if how.bits == 8 else -(-shape[2] // 2)
    assert packed.shape == (*shape[:2], columns)
    assert packed.dtype == (torch.int8 if how.bits == 8 else torch.uint8)
    assert scales.shape == (shape[0], -(-shape[1] // how.group), shape[2])
    assert scales.dtype == torch.bfloat16
    assert packed.is_contiguous() and scales.is_contiguous()
    if how.bits == 4 and shape[2] % 2:
        assert bool((packed[..., -1] >> 4 == 8).all())
    found = dequantize_tensor(packed, scales, how, shape[2])
    assert torch.equal(found.double(), unpacked_by_hand(packed, scales, how, shape))
    # Half a step of the coarsest grid that clips nothing.
    step = factor.abs().amax(1, keepdim=True) / (2 ** (how.bits - 1) - 1)
    assert (found - factor).norm() < 0.51 * (step * torch.ones(shape)).norm()


@both
def test_numbers_on_the_grid_come_back_exactly(name):
    how = QUANTIZATIONS[name]
    half = 2 ** (how.bits - 1)
    whole = torch.randint(-half, half, (2, 40, 5), generator=torch.Generator().manual_seed(0))
    whole[:, ::8] = -half
    factor = whole * torch.tensor([0.5, -2.0, 1.0, 2.0**-40, 2.0**60])
    found = dequantize_tensor(*quantize_tensor(factor, how), how, 5)
    assert torch.equal(found, factor)


@both
def test_the_search_is_no_worse_than_the_largest_number(name):
    how = QUANTIZATIONS[name]
    factor = normal(3, 64, 50).pow(3)
    groups = factor.unflatten(1, (-1, how.group))
    scales = groups.abs().amax(2, keepdim=True) / (2 ** (how.bits - 1) - 1)
    plain = ((groups / scales).round() * scales - groups).square().sum()
    found = dequantize_tensor(*quantize_tensor(factor, how), how, 50)
    assert (found - factor).square().sum() < plain


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e30, 3e38])
@both
def test_extreme_and_zero_numbers(name, size):
    how = QUANTIZATIONS[name]
    factor = (normal(2, 10, 3).clamp(-1, 1) * size).float()
    found = dequantize_tensor(*quantize_tensor(factor, how), how, 3)
    assert found.isfinite().all()
    assert (found - factor).abs().max() <= factor.abs().max() * 0.1 + 1e-38


@every_spec
@both
def test_forward_is_that_of_the_dense_matrix(spec, name):
    layer, small = layer_of(spec, name)
    for x in (normal(2, 5, 27), normal(30, 27), normal(0, 27), normal(27, 3).T):
        expected = nn.functional.linear(x, small.to_dense(), layer.bias)
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
    limit = {"int8": 0.02, "int4": 0.3}[name]
    error = (small.to_dense() - layer.to_dense()).norm() / layer.to_dense().norm()
    assert 0 < float(error.detach()) < limit


@every_spec
@both
def test_names_and_bytes(spec, name):
    layer, small = layer_of(spec, name)
    large = set(spec.large_factors())
    assert set(small.factors) == set(spec.tensor_shapes()) | {factor + SCALE for factor in large}
    assert large <= set(spec.factor_shapes())
    for factor in set(spec.tensor_shapes()) - large:
        assert torch.equal(small.factors[factor], layer.factors[factor])
    held = [f for key, f in small.factors.items() if key not in spec.index_shapes()]
    assert stored_bytes(spec, small.quantization, torch.float32) == sum(f.nbytes for f in held)
    assert str(small.quantization) in repr(small)


@every_spec
@both
def test_copies_pickles_and_state_dicts(spec, name):
    _, small = layer_of(spec, name)
    x = normal(4, 27)
    other = StructuredLinear(spec, quantization=small.quantization)
    empty = StructuredLinear(spec, device="meta", quantization=small.quantization)
    other.load_state_dict(small.state_dict())
    empty.load_state_dict(small.state_dict(), assign=True)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), other, empty):
        assert torch.equal(twin(x), small(x))


@every_spec
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_casts_leave_the_stored_numbers_alone(spec, name, dtype):
    _, small = layer_of(spec, name)
    cast = copy.deepcopy(small).to(dtype)
    assert cast(normal(3, 27).to(dtype)).dtype == dtype
    for factor in spec.large_factors():
        assert torch.equal(cast.factors[factor], small.factors[factor])
        assert cast.factors[factor + SCALE].dtype == SCALE_DTYPE
        assert torch.equal(cast.factors[factor + SCALE], small.factors[factor + SCALE])
    if set(spec.factor_shapes()) - set(spec.large_factors()):
        with pytest.raises(StructureError, match="float32"):
            cast(normal(3, 27))


@every_spec
def test_compiles_without_a_graph_break(spec):
    torch._dynamo.reset()
    _, small = layer_of(spec, "int4")
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(normal(21, 27)), small(normal(21, 27)))


@both
def test_gradients_pass_through_but_nothing_is_trained(name):
    _, small = layer_of(SPECS[0], name)
    x = normal(3, 27).requires_grad_()
    small(x).sum().backward()
    torch.testing.assert_close(x.grad, small.to_dense().sum(0).expand(3, -1))
    assert list(small.parameters()) == []
    small.requires_grad_(False)
    with pytest.raises(StructureError, match="cannot be trained"):
        small.requires_grad_()


def test_bad_input():
    layer, small = layer_of(SPECS[0], "int8")
    with pytest.raises(StructureError, match="already"):
        small.quantized("int4")
    with pytest.raises(StructureError, match="int3.*int4, int8"):
        layer.quantized("int3")
    for bits, group in ((3, 32), ("4", 32), (True, 32), (4.0, 32), (4, 0), (4, 1.5), (8, True)):
        with pytest.raises(StructureError):
            Quantization(bits, group)
    for values in ({"bits": 4}, {"bits": 4, "group": 32, "zero": 1}, [4, 32], None):
        with pytest.raises(StructureError, match="bits"):
            Quantization.from_json(values)
    assert Quantization.from_json(Quantization(4, 7).to_json()) == Quantization(4, 7)
    factors = SPECS[0].init()
    factors["V"][0, 0, 0] = float("nan")
    with pytest.raises(StructureError, match="factor V .*NaN"):
        quantize_factors(SPECS[0], factors, Quantization(4, 32))


def test_from_factors_refuses_what_is_not_stored_like_that():
    spec, how = SPECS[0], QUANTIZATIONS["int4"]
    stored = quantize_factors(spec, spec.init(), how)
    StructuredLinear.from_factors(spec, stored, quantization=how)
    for wrong, words in (
        ({k: v for k, v in stored.items() if k != "U_scale"}, "U_scale is missing"),
        ({**stored, "extra": stored["S"]}, "extra does not belong"),
        ({**stored, "U": stored["U"].to(torch.int8)}, "U must be torch.uint8"),
        ({**stored, "U_scale": stored["U_scale"].float()}, "U_scale must be torch.bfloat16"),
        ({**stored, "S": stored["S"].to(torch.int8)}, "S must be floating"),
        ({**stored, "V": stored["V"][..., :-1]}, "V must be"),
    ):
        with pytest.raises(StructureError, match=words):
            StructuredLinear.from_factors(spec, wrong, quantization=how)
    with pytest.raises(StructureError):
        StructuredLinear.from_factors(spec, stored)
    with pytest.raises(StructureError):
        StructuredLinear.from_factors(spec, stored, quantization=QUANTIZATIONS["int8"])


def test_kernels_without_quantised_factors_are_passed_over(monkeypatch):
    plain = ModuleType("plain")
    plain.NAME, plain.obstacle, plain.matmul = "plain", reference.obstacle, reference.matmul
    monkeypatch.setitem(TABLE, "cpu", (plain, reference))
    spec = Blast(10, 14, 3, (2, 2))  # of no other test: choices are kept for the session
    assert choose(spec, "cpu", torch.float32).kernel is plain
    quantised = choose(spec, "cpu", torch.float32, QUANTIZATIONS["int4"])
    assert quantised.kernel is reference
    assert quantised.passed_over == {"plain": UNQUANTIZED_ONLY}


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
    x = normal(200, 32)
    result = blastnn.compress(plain, keep=0.9, calibration=[x], blocks=(2, 2), quantize="int8")
    assert [layer.quantization for layer in (result.model[0], result.model[2])] == [
        QUANTIZATIONS["int8"]
    ] * 2
    assert (result.model(x) - plain(x)).norm() < 0.5 * plain(x).norm()
    with pytest.raises(StructureError, match="int5"):
        Options(quantize="int5")
