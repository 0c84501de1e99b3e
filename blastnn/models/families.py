"""Where the blocks of each model family are; all that is known about families.

A family is one line: the transformers ``model_type`` and the path of its list of blocks below the
base model. Everything else (order of layers, arguments of a block, return type) is observed; which
layers read the same input too, but a plan, made before anything runs, goes by their names.
"""

from __future__ import annotations

FAMILIES: dict[str, str] = {
    "albert": "encoder.albert_layer_groups",
    "bert": "encoder.layer",
    "distilbert": "transformer.layer",
    "gpt2": "h",
    "llama": "layers",
    "mistral": "layers",
    "olmo2": "layers",
    "opt": "decoder.layers",
    "phi3": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
    "roberta": "encoder.layer",
    "smollm3": "layers",
}
# The last parts of the names of layers beside each other that read the same input.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
)
# Which layers of a block have channels in common, by their names in it: the first reads what the
# others write, channel by channel, and nothing else reads it. Where it says so, channels come in
# attention heads.
COUPLED: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("self_attn.o_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True),
    ("self_attn.out_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True),
    ("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"), False),
    ("fc2", ("fc1",), False),
    ("mlp.c_proj", ("mlp.c_fc",), False),
    (
        "attention.output.dense",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        True,
    ),
    ("output.dense", ("intermediate.dense",), False),
    ("attention.out_lin", ("attention.q_lin", "attention.k_lin", "attention.v_lin"), True),
    ("ffn.lin2", ("ffn.lin1",), False),
)
