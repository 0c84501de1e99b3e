"""Dense and compressed side by side, in a process of its own.

``python -m blastnn.evaluate.compare REQUEST RESULT`` reads and writes JSON; the compression job
starts it, so that its own memory stays that of one block. The dense model is scored first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blastnn.allocator import keep_freed_memory
from blastnn.evaluate.generate import continue_text
from blastnn.evaluate.perplexity import PROTOCOL, cosine_agreement, perplexity
from blastnn.evaluate.probe import matches
from blastnn.evaluate.speed import compare_speed
from blastnn.evaluate.text import Text, Windows, first_windows, read_text
from blastnn.files import read_json, write_json
from blastnn.integrations.transformers import is_causal, load_model
from blastnn.models.source import load_tokenizer

SAMPLE_PROMPT = "The most important thing about the ocean is"
Models = tuple[PreTrainedModel, PreTrainedModel]  # the dense one first


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what the report shows.

    Args:
        request: ``dense`` and ``compressed`` (folders), ``texts``, ``tokens``, ``window``, and
            ``probe`` (the ids and digest that the job computed), each possibly empty.
    """
    compressed = load_model(Path(request["compressed"]))
    expected = request.get("probe")
    result: dict[str, Any] = {"verified": matches(compressed, expected) if expected else None}
    if not request["texts"]:
        return result
    dense = load_model(Path(request["dense"]))
    tokenizer = load_tokenizer(Path(request["dense"]))
    texts = [read_text(name) for name in request["texts"]]
    cut = [first_windows(t, tokenizer, request["window"], request["tokens"]) for t in texts]
    result |= {
        "protocol": PROTOCOL,
        "perplexity": [],
        "cosine": [],
        "speed": None,
        "sample": None,
    }
    pairs = [*zip(texts, cut, strict=True)]
    if not is_causal(dense):
        return result | {"cosine": [_cosine(dense, compressed, *pair) for pair in pairs]}
    models = (dense, compressed)
    return result | {
        "perplexity": [_perplexities(models, text, windows) for text, windows in pairs],
        "speed": compare_speed(dense, compressed, cut[0].ids[:1]),
        "sample": _sample(models, tokenizer),
    }


def _cosine(
    dense: PreTrainedModel, compressed: PreTrainedModel, text: Text, windows: Windows
) -> dict[str, Any]:
    found = cosine_agreement(dense, compressed, windows)
    cosines = {"mean": found.tokens, "vectors": found.vectors}
    return {"text": text.name, **cosines, "tokens": windows.ids.numel()}


def _perplexities(models: Models, text: Text, windows: Windows) -> dict[str, Any]:
    dense, compressed = (perplexity(model, windows) for model in models)
    return {
        "text": text.name,
        "sha256": text.sha256,
        "tokens": dense.tokens,
        "window": dense.window,
        "dense": dense.perplexity,
        "compressed": compressed.perplexity,
    }


def _sample(models: Models, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    dense, compressed = (continue_text(model, tokenizer, SAMPLE_PROMPT) for model in models)
    return {"prompt": SAMPLE_PROMPT, "dense": dense, "compressed": compressed}


if __name__ == "__main__":
    keep_freed_memory()
    write_json(Path(sys.argv[2]), compare(read_json(Path(sys.argv[1]))))
