"""Heads and MLP channels removed whole: which, how many, and that the model is what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import blastnn
from blastnn.compress.in_memory import CompressionResult
from blastnn.compress.options import Options
from blastnn.compress.plan import WHOLE
from blastnn.compress.planning import make_plan
from blastnn.compress.pruning import choose_kept, prune_plan
from blastnn.errors import PlanError
from blastnn.linear import StructuredLinear
from blastnn.models.skeleton import find_blocks
from tests.made_up import make_folder, make_model
from tests.test_end_to_end import Interruption, compress, loaded_digest, weights_digest

COUPLED = {"structure": "channels", "inputs": "dense", "allocation": "uniform", "coupled": True}
COUPLED |= {"allow_slower": True}
IDS = torch.arange(4 * 64).view(4, 64) * 7 % 250


def prune(model: PreTrainedModel, keep: float = 0.7, **choices: Any) -> CompressionResult:
    return blastnn.compress(model, keep, list(IDS.split(1)), **{**COUPLED, **choices})


def kept_of(layer: StructuredLinear) -> list[int]:
    return layer.spec.channels(layer.factors["places"]).tolist()


READERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("mlp.c_proj",),
    "bert": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
}


@pytest.mark.parametrize("family", sorted(READERS))
@torch.no_grad()
def test_the_model_is_the_dense_one_without_what_was_removed(family: str) -> None:
    """The oracle removes only what the readers read: if anything else went, it would differ."""
    model = make_model(family)
    result = prune(model)
    expected = make_model(family)
    for block in find_blocks(expected):
        for kind in READERS[family]:
            name = f"{block.name}.{kind}"
            kept = kept_of(result.model.get_submodule(name))
            weight = expected.get_submodule(name).weight
            inputs = weight if family == "gpt2" else weight.T  # GPT-2 stores the transpose
            removed = [c for c in range(len(inputs)) if c not in kept]
            assert removed
            inputs[removed] = 0
    found, wanted = (m(IDS)[0] for m in (result.model, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_writers_lose_what_readers_do_not_read() -> None:
    layers = prune(make_model("opt")).model.model.decoder.layers
    for layer in layers:
        attention = layer.self_attn
        heads = kept_of(attention.out_proj)
        assert all(h // 6 * 6 in heads for h in heads)  # 4 heads of 6 features
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert part.spec.axis == "rows" and kept_of(part) == heads
        assert kept_of(layer.fc1) == kept_of(layer.fc2)
        assert torch.equal(layer.fc2.factors["W"], layer.fc2.to_dense()[:, kept_of(layer.fc2)])


@torch.no_grad()
def test_what_contributes_most_stays() -> None:
    """Energies summed token by token, from what hooks saw."""
    model = make_model("llama")
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        layer = model.model.layers[1].get_submodule(name)
        hooks += [layer.register_forward_pre_hook(lambda _, a, n=name: seen.update({n: a[0]}))]
    model(IDS)
    for hook in hooks:
        hook.remove()
    block = prune(model, outputs="equal").model.model.layers[1]
    for name, group in (("mlp.down_proj", 1), ("self_attn.o_proj", 6)):
        weight = model.model.layers[1].get_submodule(name).weight
        x = seen[name].flatten(0, 1).view(256, -1, group)
        parts = torch.einsum("thg,mhg->htm", x, weight.view(24, -1, group))
        energy = parts.square().sum((1, 2))
        places = block.get_submodule(name).factors["places"]
        assert places.tolist() == sorted(energy.topk(len(places)).indices.tolist())


@torch.no_grad()
def test_outputs_without_a_gradient_do_not_count() -> None:
    """Channel 7 writes to feature 3 alone, much, and nothing behind reads that."""
    model = make_model("llama", num_hidden_layers=1)
    plans = prune(model, 0.8).plan.of_block(0)
    block = model.model.layers[0]
    block.mlp.down_proj.weight[:, 7] = 0
    block.mlp.down_proj.weight[3, 7] = 10.0
    behind = torch.eye(24)
    behind[3, 3] = 0
    assert 7 in choose_kept(block, plans, {}, {})["mlp.up_proj"]
    weighted = choose_kept(block, plans, {}, {"mlp.down_proj": behind[None]})
    assert 7 not in weighted["mlp.up_proj"]


@torch.no_grad()
def test_gradients_of_low_rank_are_no_obstacle() -> None:
    """Their moment, a sum of float32 products, is a little indefinite."""
    sizes = {"hidden_size": 200, "intermediate_size": 240, "num_hidden_layers": 1}
    model = make_model("llama", **sizes)
    plans = prune(model, 0.8).plan.of_block(0)
    gradients = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    gradients = gradients @ torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    behind = gradients.mT @ gradients / 2000
    block = model.model.layers[0]
    worth = (gradients @ block.mlp.down_proj.weight).square().sum(0)
    kept = choose_kept(block, plans, {}, {"mlp.down_proj": behind[None]})["mlp.up_proj"]
    assert kept.tolist() == sorted(worth.topk(len(kept)).indices.tolist())


def planned(keep: float, config: LlamaConfig, **choices: Any) -> tuple[Any, int, int]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = [block.name for block in find_blocks(model)]
    options = Options(keep=keep, **{**COUPLED, **choices})
    plan = prune_plan(make_plan(model, names, options, None, []), model.config)
    return plan, *plan.target_params


def llama(layers: int = 32, kv: int = 8) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv,
    )


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("kv", [8, 2])
def test_the_budget_is_kept_and_used(keep: float, kv: int) -> None:
    plan, before, after = planned(keep, llama(kv=kv))
    assert before == 32 * (2 * 64 * 64 + 2 * 64 * 8 * kv + 3 * 64 * 176)
    assert keep - 0.01 < after / before <= keep
    dense = {
        la.block
        for la in plan.layers
        if la.block is not None and la.kind == "mlp.down_proj" and la.spec is None
    }
    assert dense == {0, 1, 2, 3, 30, 31}
    reasons = {la.reason for la in plan.layers if la.block is not None and la.spec is None}
    assert reasons == {WHOLE}
    kept = {la.kind: la.spec.kept for la in plan.of_block(10) if la.spec is not None}
    assert ("self_attn.k_proj" in kept) == (kv == 8)
    assert kept["self_attn.q_proj"] == kept["self_attn.o_proj"]
    assert kept["mlp.up_proj"] == kept["mlp.gate_proj"] == kept["mlp.down_proj"]


def test_few_blocks_are_all_pruned_and_one_part_can_be_targeted() -> None:
    plan, before, after = planned(0.6, llama(layers=2), targets=("mlp.*",))
    assert {la.kind for la in plan.compressed} == {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert before == 2 * 3 * 64 * 176
    (kept,) = {la.spec.kept for la in plan.compressed}
    assert int(0.6 * 176) - 1 <= kept and after <= 0.6 * before


def test_what_cannot_be_planned() -> None:
    with pytest.raises(PlanError, match="cannot be met by pruning"):
        planned(0.15, llama())
    with pytest.raises(PlanError, match="target both or neither"):
        planned(0.6, llama(), targets=("*down_proj", "*up_proj"))
    with pytest.raises(PlanError, match="nothing is known"):
        planned(0.6, llama(), targets=("*up_proj",))
    with pytest.raises(PlanError, match="nothing is known"):
        blastnn.compress(nn.Linear(8, 8), 0.6, [torch.randn(9, 8)], **COUPLED)
    for name, value in (("structure", "blast"), ("inputs", "compressed"), ("allow_slower", False)):
        with pytest.raises(PlanError, match=f"coupled goes with {name}"):
            Options(**{**COUPLED, name: value})


def test_a_job_measures_prunes_and_resumes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    choices = {**COUPLED, "blocks": None, "keep": 0.7}
    outcome = compress(source, tmp_path / "whole", **choices)
    assert loaded_digest(tmp_path / "whole", outcome) == outcome.journal.probe["logits_sha256"]
    reasons = {r.name: r.reason for r in outcome.journal.records if r.status == "kept"}
    assert reasons["model.layers.0.self_attn.k_proj"] == WHOLE
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "parts", progress=Interruption(8), **choices)
    compress(source, tmp_path / "parts", resume=True, **choices)
    assert weights_digest(tmp_path / "parts") == weights_digest(tmp_path / "whole")


def test_without_data_the_largest_weights_stay() -> None:
    model = make_model("llama")
    layers = blastnn.compress(model, 0.7, None, **COUPLED).model.model.layers
    weight = model.model.layers[2].mlp.down_proj.weight
    places = layers[2].mlp.down_proj.factors["places"]
    largest = weight.square().sum(0).topk(len(places)).indices
    assert places.tolist() == sorted(largest.tolist())
