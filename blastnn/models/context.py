"""How many tokens a model can read in a row."""

from __future__ import annotations

from transformers import PreTrainedConfig


def window_length(config: PreTrainedConfig, wanted: int) -> int:
    """The window length, at most what the model's positions allow."""
    longest = getattr(config, "max_position_embeddings", None) or wanted
    if config.model_type == "roberta":
        longest -= 2  # positions start behind the padding index
    return min(wanted, longest)
