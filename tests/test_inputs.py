"""What layers are fitted on: whose inputs, and how much of their second moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import blastnn
from blastnn.linear import StructuredLinear
from tests.made_up import make_folder, make_model
from tests.test_end_to_end import Interruption, compress, loaded_digest, weights_digest

IDS = torch.arange(4 * 64).view(4, 64) * 7 % 250
INDEPENDENT = {"structure": "lowrank", "inputs": "dense"}


def layers_of(model: torch.nn.Module) -> dict[str, StructuredLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear)}


@pytest.mark.parametrize("moment", ["full", "diagonal"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_independent_layers_are_those_of_the_model_as_one_block(family, moment):
    """The oracle does not walk: hooks in one forward pass of the whole dense model."""
    model = make_model(family)
    choices = {**INDEPENDENT, "moment": moment, "keep": 0.6, "allocation": "uniform"}
    batches = [{"input_ids": ids} for ids in IDS.split(1)]
    whole = blastnn.compress(model, calibration=batches, **choices)
    walked = blastnn.compress(model, calibration=list(IDS.split(1)), **choices)
    expected, found = layers_of(whole.model), layers_of(walked.model)
    assert found and found.keys() <= expected.keys()  # the whole model has layers of no block
    for name, layer in found.items():
        torch.testing.assert_close(
            layer.to_dense(), expected[name].to_dense(), rtol=1e-4, atol=1e-4
        )
    errors = {record.name: record.relative_error for record in whole.records}
    for record in walked.records:
        if record.name in found:
            assert record.relative_error == pytest.approx(errors[record.name], rel=1e-4)


def test_batches_of_unlike_kinds_go_through_the_whole_model():
    batches = [IDS[:1], {"input_ids": IDS[1:2]}]
    model = make_model("llama")
    tied = blastnn.compress(model, 0.6, batches, structure="lowrank").model
    assert layers_of(tied) and tied.lm_head.weight is tied.model.embed_tokens.weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert "lm_head" in layers_of(blastnn.compress(model, 0.6, batches, structure="lowrank").model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_half_precision_model_is_fitted_in_float32(dtype, quantize):
    """And gets its dtypes back; the same numbers in float32 give the same factors, rounded."""
    half = make_model("llama").to(dtype)
    choices = {"quantize": quantize, "blocks": (2, 2), "allow_slower": True}
    found = blastnn.compress(half, 0.6, list(IDS.split(1)), **choices).model
    expected = blastnn.compress(half.float(), 0.6, list(IDS.split(1)), **choices).model
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert found.lm_head.weight is found.model.embed_tokens.weight
    layers, others = layers_of(found), layers_of(expected)
    assert layers.keys() == others.keys() != set()
    first = [name for name in layers if name.startswith("model.layers.0.self_attn")][:2]
    for name in first:  # later ones see rounded layers before them
        expected, rounded = others[name].to_dense(), layers[name].to_dense().float()
        assert (rounded - expected).norm() < 0.02 * expected.norm()
    assert bool(torch.isfinite(found(IDS[:1]).logits).all())


def test_sequential_layers_are_others():
    model = make_model("llama")
    both = [
        blastnn.compress(model, 0.6, list(IDS.split(1)), structure="lowrank", inputs=inputs)
        for inputs in ("dense", "compressed")
    ]
    first, last = (layers_of(result.model) for result in both)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    same = [torch.equal(first[n].to_dense(), last[n].to_dense()) for n in names]
    assert same == [True, False]


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
def test_a_diagonal_moment_scales_the_features(inputs):
    """By hand: the truncated SVD of the weight with each column times its feature's size."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 32, bias=False)
    x = torch.randn(500, 24) @ torch.randn(24, 24) * torch.logspace(-1, 1, 24)
    choices = {"structure": "lowrank", "moment": "diagonal", "inputs": inputs, "damping": 0.0}
    choices |= {"allocation": "uniform", "outputs": "equal"}
    result = blastnn.compress(torch.nn.Sequential(linear), 0.5, [x], **choices)
    size = x.square().mean(0).sqrt()
    left, values, right = torch.linalg.svd(linear.weight * size, full_matrices=False)
    rank = result.model[0].spec.rank
    expected = (left[:, :rank] * values[:rank]) @ right[:rank] / size
    torch.testing.assert_close(result.model[0].to_dense(), expected, rtol=1e-3, atol=1e-4)


def test_a_diagonal_moment_repairs_too(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    outcome = compress(
        source, tmp_path / "out", moment="diagonal", structure="lowrank", blocks=None
    )
    assert all(0 < r.relative_error < 1 for r in outcome.journal.records if r.reason is None)
    assert loaded_digest(tmp_path / "out", outcome) == outcome.journal.probe["logits_sha256"]


def test_an_independent_job_keeps_one_stream_and_resumes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    choices = {**INDEPENDENT, "blocks": None, "targets": ("lm_head", "*_proj")}
    whole = compress(source, tmp_path / "whole", **choices)
    assert "lm_head" in {r.name for r in whole.journal.records if r.status == "compressed"}
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "parts", progress=Interruption(9), **choices)
    (states,) = (tmp_path / "parts" / ".blastnn").glob("states-*")
    assert {name.partition(".")[0] for name in load_file(states)} == {"check", "dense"}
    outcome = compress(source, tmp_path / "parts", resume=True, **choices)
    assert weights_digest(tmp_path / "parts") == weights_digest(tmp_path / "whole")
    assert loaded_digest(tmp_path / "parts", outcome) == outcome.journal.probe["logits_sha256"]
