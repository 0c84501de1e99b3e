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
