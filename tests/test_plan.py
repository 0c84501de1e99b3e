"""Plans: the budget is met and used, targets mean what they say, plan files are checked."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from blastnn.compress.options import PRESETS, SCORED_TOKENS, Options
from blastnn.compress.plan import OUTSIDE, UNTARGETED, LayerPlan, Plan, count_params
from blastnn.compress.plan_file import plan_from_file
from blastnn.compress.planning import make_plan
from blastnn.errors import BlastnnError, DtypeError, PlanError, StructureError
from blastnn.files import write_json
from blastnn.models.skeleton import find_blocks
from blastnn.structures import STRUCTURES, Blast, Structure


def llama(tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tied_llama() -> PreTrainedModel:
    return llama(tied=True)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config)


def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertModel(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "tied_llama": tied_llama,
    "gpt2": gpt2,
    "bert": bert,
}
every_model = pytest.mark.parametrize("model", MODELS)
every_structure = pytest.mark.parametrize("structure", sorted(STRUCTURES))


@cache
def built(model: str) -> PreTrainedModel:
    with torch.device("meta"):
        return MODELS[model]()


def tied_names(model: PreTrainedModel) -> list[str]:
    return list(model.all_tied_weights_keys or {})


def plan_of(model: str, head: str | None = None, **chosen: Any) -> Plan:
    module = built(model)
    structure = STRUCTURES[chosen.get("structure", "blast")]
    small = {"blocks": (2, 2)} if "blocks" in structure.__dataclass_fields__ else {}
    options = Options(**(small | chosen))
    blocks = [block.name for block in find_blocks(module)]
    return make_plan(module, blocks, options, head, tied_names(module))


def one_step_more(spec: Structure) -> float:
    """The parameters that the next larger spec adds; without end where there is none."""
    following = spec.larger()
    return math.inf if following is None else following.num_params - spec.num_params


@every_model
@every_structure
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.99])
def test_the_share_of_the_targets_is_kept_and_used(model, structure, keep):
    plan = plan_of(model, structure=structure, keep=keep)
    before, after = plan.target_params
    assert plan.compressed
    assert after <= keep * before
    for layer in plan.compressed:
        budget = keep * layer.dense_params
        assert layer.planned_params <= budget
        assert layer.planned_params + one_step_more(layer.spec) > budget - 1
    slack = sum(one_step_more(layer.spec) + 1 for layer in plan.compressed)
    assert after > keep * before - slack


@every_model
@every_structure
@pytest.mark.parametrize("keep", [0.7, 0.9])
def test_the_share_of_the_model_is_kept_and_used(model, structure, keep):
    plan = plan_of(model, structure=structure, keep=keep, of="model")
    module = built(model)
    total = sum(p.numel() for p in module.parameters())  # a tied weight is one parameter
    assert plan.model_params == total
    before, after = plan.target_params
    achieved = total - before + after
    assert achieved <= keep * total
    slack = sum(one_step_more(layer.spec) + 1 for layer in plan.compressed)
    assert achieved > keep * total - slack


def test_tied_weights_count_once():
    module = llama(tied=True)
    expected = sum(p.numel() for p in module.parameters())
    assert count_params(module, tied_names(module)) == expected
    untied = llama(tied=False)
    assert count_params(untied, tied_names(untied)) == expected + 96 * 32


def test_a_share_of_the_model_that_the_rest_exceeds_is_refused():
    with pytest.raises(PlanError, match=r"keep 0\.2 of the model cannot be met"):
        plan_of("llama", keep=0.2, of="model")


@every_model
def test_keeping_everything_compresses_nothing(model):
    for of in ("targets", "model"):
        plan = plan_of(model, keep=1.0, of=of)
        assert plan.compressed == ()
        assert all(layer.reason for layer in plan.layers)


@every_model
def test_real_and_meta_weights_give_the_same_plan(model):
    module = MODELS[model]()
    blocks = [block.name for block in find_blocks(module)]
    real = make_plan(module, blocks, Options(blocks=(2, 2)), None, tied_names(module))
    assert real == plan_of(model)


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (
            "llama",
            {
                "self_attn.q_proj": (32, 32),
                "self_attn.k_proj": (16, 32),
                "self_attn.v_proj": (16, 32),
                "self_attn.o_proj": (32, 32),
                "mlp.gate_proj": (56, 32),
                "mlp.up_proj": (56, 32),
                "mlp.down_proj": (32, 56),
            },
        ),
        (
            "gpt2",
            {
                "attn.c_attn": (96, 32),
                "attn.c_proj": (32, 32),
                "mlp.c_fc": (128, 32),
                "mlp.c_proj": (32, 128),
            },
        ),
        (
            "bert",
            {
                "attention.self.query": (32, 32),
                "attention.self.key": (32, 32),
                "attention.self.value": (32, 32),
                "attention.output.dense": (32, 32),
                "intermediate.dense": (64, 32),
                "output.dense": (32, 64),
            },
        ),
    ],
)
def test_every_linear_layer_of_every_block_is_compressed(model, kinds):
    plan = plan_of(model)
    for index in range(2):
        layers = {layer.kind: layer for layer in plan.of_block(index)}
        assert {k: (v.out_features, v.in_features) for k, v in layers.items()} == kinds
        assert all(layer.spec is not None and layer.reason is None for layer in layers.values())
        for layer in layers.values():
            assert (layer.spec.out_features, layer.spec.in_features) == kinds[layer.kind]
    outside = [layer for layer in plan.layers if layer.block is None]
    assert [layer.reason for layer in outside] == [OUTSIDE]


def test_a_whole_model_can_be_one_block():
    plan = make_plan(built("llama"), [""], Options(blocks=(2, 2)), None, [])
    assert all(layer.block == 0 and layer.spec is not None for layer in plan.layers)
    assert "lm_head" in {layer.kind for layer in plan.layers}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("mlp.*",), {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (("self_attn.q_proj",), {"self_attn.q_proj"}),
        (("*.q_proj", "mlp.up_proj"), {"self_attn.q_proj", "mlp.up_proj"}),
        (("self_attn.[qk]_proj",), {"self_attn.q_proj", "self_attn.k_proj"}),
    ],
)
def test_targets_choose_kinds(targets, expected):
    plan = plan_of("llama", targets=targets)
    assert {layer.kind for layer in plan.compressed} == expected
    assert len(plan.compressed) == 2 * len(expected)
    others = [layer for layer in plan.layers if layer.kind not in expected]
    assert {layer.reason for layer in others} == {UNTARGETED}


def test_targets_choose_full_names():
    plan = plan_of("llama", targets=("model.layers.1.mlp.*",))
    assert {layer.block for layer in plan.compressed} == {1}
    assert len(plan.compressed) == 3


def test_targets_tell_upper_from_lower_case():
    with pytest.raises(PlanError):
        plan_of("llama", targets=("MLP.*",))


@pytest.mark.parametrize("targets", [("nothing",), ("mlp.*", "nothing"), ("mlp",)])
def test_a_pattern_that_matches_nothing_is_named(targets):
    with pytest.raises(PlanError, match=rf"{targets[-1]}.*mlp\.up_proj"):
        plan_of("llama", targets=targets)


def test_the_head_can_be_targeted():
    plan = plan_of("llama", head="lm_head", targets=("lm_head",))
    assert [layer.name for layer in plan.compressed] == ["lm_head"]
    assert plan.compressed[0].block is None
    both = plan_of("llama", head="lm_head", targets=("lm_head", "mlp.*"))
    assert len(both.compressed) == 7


def test_the_head_is_left_alone_unless_targeted():
    plan = plan_of("llama", head="lm_head")
    assert "lm_head" not in {layer.name for layer in plan.compressed}


def test_other_layers_outside_the_blocks_cannot_be_targeted():
    plan = plan_of("bert", targets=("pooler.dense", "*.dense"))
    pooler = next(layer for layer in plan.layers if layer.name == "pooler.dense")
    assert pooler.spec is None
    assert "output layer" in pooler.reason
    with pytest.raises(PlanError):
        plan_of("bert", targets=("pooler.dense",))


@pytest.mark.parametrize("blocks", [(40, 2), (2, 33)])
def test_more_blocks_than_rows_or_columns_names_the_layer(blocks):
    with pytest.raises(PlanError, match=r"layer model\.layers\.0\.self_attn\.\w_proj"):
        plan_of("llama", blocks=blocks)


def test_a_budget_below_one_rank_names_the_layer():
    with pytest.raises(PlanError, match=r"layer model\.layers\.0\.self_attn\.q_proj"):
        plan_of("llama", keep=0.01)


def test_layers_can_be_kept_after_all():
    plan = plan_of("llama")
    name = plan.compressed[0].name
    changed = plan.keeping({name: "too bad a fit"})
    assert len(changed.compressed) == len(plan.compressed) - 1
    layer = next(layer for layer in changed.layers if layer.name == name)
    assert (layer.spec, layer.reason) == (None, "too bad a fit")


# Options.


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, 80, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(keep):
    with pytest.raises(PlanError, match="keep"):
        Options(keep=keep)


@pytest.mark.parametrize(
    "chosen",
    [
        {"of": "layers"},
        {"inputs": "mine"},
        {"moment": "third"},
        {"sweeps": 0},
        {"tokens": 0},
        {"window": -1},
    ],
)
def test_other_choices_out_of_range_are_refused(chosen):
    with pytest.raises(PlanError, match=next(iter(chosen))):
        Options(**chosen)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(DtypeError, match="float32.*int8"):
        Options(dtype="int8")


def test_an_unknown_structure_is_refused():
    with pytest.raises(StructureError, match="none such.*blast"):
        Options(structure="none such")


def test_every_preset_says_how_much_text_is_scored():
    assert set(SCORED_TOKENS) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_yield_to_choices(preset):
    assert Options.from_preset(preset, keep=None) == Options(**PRESETS[preset])
    chosen = Options.from_preset(preset, keep=0.4, sweeps=3, blocks=(2, 2))
    assert (chosen.keep, chosen.sweeps, chosen.blocks) == (0.4, 3, (2, 2))


@pytest.mark.parametrize(
    ("model", "pattern", "name"),
    [
        ("tied_llama", "embed_tokens", r"model\.embed_tokens"),
        ("llama", "model.embed_tokens", r"model\.embed_tokens"),
        ("gpt2", "*wte", r"transformer\.wte"),
        ("bert", "*embeddings*", r"embeddings\.word_embeddings"),
    ],
)
def test_an_embedding_as_target_is_refused_as_what_it_is(model, pattern, name):
    with pytest.raises(PlanError, match=f"the embedding {name}, .* only linear layers"):
        plan_of(model, targets=(pattern,))


def test_unchosen_blocks_are_the_default_of_the_structure():
    assert plan_of("llama", blocks=None) == plan_of("llama", blocks=(4, 4))
    assert plan_of("llama", blocks=None) != plan_of("llama", blocks=(2, 2))


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_the_blocks_of_a_preset_are_for_its_own_structure(structure):
    chosen = Options.from_preset("best", structure=structure)
    assert chosen.blocks == (PRESETS["best"]["blocks"] if structure == "blast" else None)
    if "blocks" in STRUCTURES[structure].__dataclass_fields__:
        assert Options.from_preset("best", structure=structure, blocks=(2, 3)).blocks == (2, 3)
    else:
        with pytest.raises(PlanError, match="has no blocks"):
            Options.from_preset("best", structure=structure, blocks=(2, 3))


def test_an_unknown_preset_is_refused():
    with pytest.raises(PlanError, match="fastest.*fast"):
        Options.from_preset("fastest")


# Plan files.


@every_model
@every_structure
def test_a_plan_file_gives_the_plan_back(model, structure, tmp_path):
    plan = plan_of(model, structure=structure, keep=0.6)
    write_json(tmp_path / "plan.json", plan.to_json())
    uniform = plan_of(model, keep=0.9)
    assert plan_from_file(uniform, tmp_path / "plan.json") == plan


def test_a_plan_file_can_give_every_layer_its_own_rank(tmp_path):
    plan = plan_of("llama", keep=0.6)
    values = plan.to_json()
    first, second = (layer.name for layer in plan.compressed[:2])
    values["layers"][first]["rank"] = 1
    values["layers"][second] = {"keep": "by hand"}
    write_json(tmp_path / "plan.json", values)
    read = {layer.name: layer for layer in plan_from_file(plan, tmp_path / "plan.json").layers}
    assert read[first].spec.rank == 1
    assert (read[second].spec, read[second].reason) == (None, "by hand")


LAYER = "model.layers.0.mlp.up_proj"


def without_a_layer(values: dict[str, Any]) -> None:
    del values["layers"][LAYER]


def with_another_layer(values: dict[str, Any]) -> None:
    values["layers"]["model.layers.9.mlp.up_proj"] = values["layers"][LAYER]


def with_another_shape(values: dict[str, Any]) -> None:
    values["layers"][LAYER] = Blast(8, 8, rank=1, blocks=(2, 2)).to_json()


def with_swapped_shape(values: dict[str, Any]) -> None:
    values["layers"][LAYER] = Blast(32, 56, rank=1, blocks=(2, 2)).to_json()


def entry(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values["layers"][LAYER] = value

    return change


def field(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values["layers"][LAYER][key] = value

    return change


def top(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values[key] = value

    return change


TAMPERINGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "other format": top("format", "blastnn-plan/2"),
    "no format": lambda values: values.pop("format"),
    "no layers": lambda values: values.pop("layers"),
    "layers null": top("layers", None),
    "layers number": top("layers", 3),
    "layers list": top("layers", [LAYER]),
    "layer missing": without_a_layer,
    "layer added": with_another_layer,
    "other shape": with_another_shape,
    "swapped shape": with_swapped_shape,
    "entry null": entry(None),
    "entry number": entry(5),
    "entry empty": entry({}),
    "entry list": entry([]),
    "keep without a reason": entry({"keep": 7}),
    "unknown structure": field("structure", "none such"),
    "zero rank": field("rank", 0),
    "rank in words": field("rank", "three"),
    "too many blocks": field("blocks", [99, 2]),
    "blocks number": field("blocks", 2.5),
    "blocks null": field("blocks", None),
    "unknown field": field("depth", 3),
}


@pytest.mark.parametrize(
    "tampering",
    list(TAMPERINGS),
)
def test_a_tampered_plan_file_is_refused(tampering, tmp_path):
    plan = plan_of("llama")
    values = copy.deepcopy(plan.to_json())
    TAMPERINGS[tampering](values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(BlastnnError):
        plan_from_file(plan, path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null"])
def test_a_file_that_is_no_plan_is_refused(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(BlastnnError, match=r"plan\.json"):
        plan_from_file(plan_of("llama"), path)


def test_a_plan_file_of_another_model_is_refused(tmp_path):
    write_json(tmp_path / "plan.json", plan_of("gpt2").to_json())
    with pytest.raises(PlanError, match="another model"):
        plan_from_file(plan_of("llama"), tmp_path / "plan.json")


def test_a_plan_file_cannot_compress_a_layer_outside_the_blocks(tmp_path):
    """Only the output layer may be compressed outside the blocks; a pooler is none."""
    plan = plan_of("bert")
    values = plan.to_json()
    values["layers"]["pooler.dense"] = Blast(32, 32, rank=2, blocks=(2, 2)).to_json()
    write_json(tmp_path / "plan.json", values)
    with pytest.raises(PlanError, match=r"pooler\.dense"):
        plan_from_file(plan, tmp_path / "plan.json")


def test_what_would_be_slower_gets_fewer_blocks_or_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(512, 512, device="meta"), nn.Linear(200, 200, device="meta"))

    def planned(**choices: object) -> list[LayerPlan]:
        return list(make_plan(model, [""], Options(**choices), None, []).layers)

    large, small = planned(keep=0.97)
    assert large.spec is None
    assert large.reason is not None and "slower than dense" in large.reason
    assert small.spec is not None, "too small to matter"
    assert planned(keep=0.97, allow_slower=True)[0].spec is not None
    spec = planned(keep=0.8, blocks=(32, 32))[0].spec
    assert isinstance(spec, Blast) and 1 < spec.blocks[0] < 32
    assert spec.num_params <= 0.8 * 512 * 512 < spec.larger().num_params
    assert planned(keep=0.8, blocks=(32, 32), allow_slower=True)[0].spec.blocks == (32, 32)
    assert planned(keep=0.5)[0].spec.blocks == (4, 4)


def test_a_share_of_the_model_is_kept_by_the_layers_that_remain() -> None:
    layers = [nn.Linear(512, 512, bias=False, device="meta") for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(1024, 1024, bias=False, device="meta"))
    plan = make_plan(model, [""], Options(keep=0.9, of="model", blocks=(16, 16)), None, [])
    before, after = plan.target_params
    total = plan.model_params
    assert total - before + after == pytest.approx(0.9 * total, rel=4e-3)
