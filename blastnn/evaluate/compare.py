"""Dense and compressed side by side, in a process of its own.

``python -m blastnn.evaluate.compare REQUEST RESULT`` reads and writes JSON; the compression job
starts it, so that its own memory stays that of one block. The dense model is scored first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from blastnn.evaluate.generate import continue_text
from blastnn.evaluate.perplexity import PROTOCOL, cosine_agreement, perplexity
from blastnn.evaluate.probe import digest, probe
from blastnn.evaluate.speed import compare_speed
from blastnn.evaluate.text import first_windows, read_text
from blastnn.files import read_json, write_json
from blastnn.integrations.transformers import is_causal, load_model
from blastnn.models.source import load_tokenizer

SAMPLE_PROMPT = "The most important thing about the ocean is"


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what the report shows.

    Args:
        request: ``dense`` and ``compressed`` (folders), ``texts``, ``tokens``, ``window``, and
            ``probe`` (the ids and digest that the job computed), each possibly empty.
    """
    compressed = load_model(Path(request["compressed"]))
    result: dict[str, Any] = {"verified": _verify(compressed, request.get("probe") or {})}
    if not request["texts"]:
        return result
    dense = load_model(Path(request["dense"]))
    tokenizer = load_tokenizer(Path(request["dense"]))
    texts = [read_text(name) for name in request["texts"]]
    cut = [first_windows(t, tokenizer, request["window"], request["tokens"]) for t in texts]
    result |= {
        "protocol": PROTOCOL,
        "perplexity": [],
        "cosine": None,
        "speed": None,
        "sample": None,
    }
    if not is_causal(dense):
        mean = cosine_agreement(dense, compressed, cut[0])
        tokens = cut[0].ids.numel()
        result["cosine"] = {"text": texts[0].name, "mean": mean, "tokens": tokens}
        return result
    for text, windows in zip(texts, cut, strict=True):
        scores = [perplexity(model, windows) for model in (dense, compressed)]
        result["perplexity"].append(
            {
                "text": text.name,
                "sha256": text.sha256,
                "tokens": scores[0].tokens,
                "window": scores[0].window,
                "dense": scores[0].perplexity,
                "compressed": scores[1].perplexity,
            }
        )
    result["speed"] = compare_speed(dense, compressed, cut[0].ids[:1])
    samples = [continue_text(model, tokenizer, SAMPLE_PROMPT) for model in (dense, compressed)]
    result["sample"] = {"prompt": SAMPLE_PROMPT, "dense": samples[0], "compressed": samples[1]}
    return result


def _verify(model: torch.nn.Module, expected: dict[str, Any]) -> bool | None:
    """Whether the loaded model's output has the very bits that the job computed."""
    if not expected:
        return None
    return digest(probe(model, torch.tensor([expected["ids"]]))) == expected["logits_sha256"]


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), compare(read_json(Path(sys.argv[1]))))
