"""How many tokens a model can read in a row."""

from __future__ import annotations

import sys

from transformers import PreTrainedConfig


def positions(config: PreTrainedConfig) -> int:
    """How many positions the model was made for; ``sys.maxsize`` where it does not say."""
    most = getattr(config, "max_position_embeddings", None)
    if most is None or most < 1:
        return sys.maxsize
    # RoBERTa's positions start behind the padding index.
    return int(most) - 2 if config.model_type == "roberta" else int(most)


def window_length(config: PreTrainedConfig, wanted: int) -> int:
    """The window length, at most what the model's positions allow."""
    return min(wanted, positions(config))
