"""Made-up checkpoints and a byte tokenizer, for tests that need a whole model folder."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXT = Path(__file__).parents[1] / "LICENSE"
VOCABULARY = 257
SMALL = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
DECODER = {
    **SMALL,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
# One line a family: its class, its configuration class, and the small configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**DECODER, "embedding_size": 16}),
    "bert": ("BertModel", "BertConfig", DECODER),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            **SMALL,
            "dim": 24,
            "hidden_dim": 40,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**SMALL, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **SMALL,
            "hidden_size": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 24,
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "roberta": (
        "RobertaModel",
        "RobertaConfig",
        {**DECODER, "max_position_embeddings": 66, "pad_token_id": 1},
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )


def make_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A small random model of a family, with weights large enough to matter."""
    class_name, config_name, values = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**values, **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def make_folder(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A model folder as ``save_pretrained`` writes it, tokenizer included."""
    make_model(family, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def inputs_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """The inputs ``(tokens, n)`` of a module, float64, the whole model run window after window."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: found.append(x[0]))
    for window in ids.split(1):
        model(window)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found]).double()
