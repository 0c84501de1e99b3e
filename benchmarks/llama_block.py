"""Table 4 of the paper: time to generate text with BLAST weights, here for one Llama-7B block.

A decoder block of Llama-7B's shape with random weights (its vocabulary cut to 256, so that the
block is what is timed), dense and with BLAST factors in all seven matrices, on the CPU: 10 and 100
tokens at batch 1 behind a prompt of 6, all in turn through the engine of ``blastnn bench``,
medians. 1,000 tokens are extrapolated from the time of one token in the run of 100. The paper timed
the whole model on an A100; ``--device cuda --blocks 32`` would do that here, and has not been run.

    python benchmarks/llama_block.py [--dtype bfloat16] [--rounds 5] [--no-compile]
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from blastnn import Blast, StructuredLinear
from blastnn.evaluate.bench import random_prompts
from blastnn.evaluate.machine import describe
from blastnn.evaluate.race import race

# Removed share and block count of each row, and the paper's seconds for 10, 100 and 1,000 tokens.
PAPER = {
    "dense": (0.41, 3.82, 41.23),
    "20% removed, b=2": (0.35, 3.30, 35.99),
    "20% removed, b=16": (0.36, 3.36, 36.48),
    "50% removed, b=16": (0.31, 2.86, 30.35),
}
ROWS = {
    "20% removed, b=2": (0.8, 2),
    "20% removed, b=16": (0.8, 16),
    "50% removed, b=16": (0.5, 16),
}
PROMPT, MEASURED = 6, (10, 100)


def dense_model(blocks: int, dtype: torch.dtype) -> PreTrainedModel:
    """Blocks of Llama-7B's shape with random weights."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=blocks,
        vocab_size=256,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def with_blast(model: PreTrainedModel, keep: float, b: int) -> PreTrainedModel:
    """The model with random BLAST factors in place of every matrix of its blocks."""
    # The dense matrices are shared with the memo, not copied, because they are thrown away.
    memo = {id(p): p for p in model.parameters()}
    changed = copy.deepcopy(model, memo)
    for block in changed.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, blast_layer(layer, keep, b))
    return changed


def blast_layer(linear: nn.Linear, keep: float, b: int) -> StructuredLinear:
    """A layer of the same shape and dtype with a share of the parameters."""
    m, n = linear.weight.shape
    spec = Blast.for_budget(m, n, int(keep * m * n), blocks=(b, b))
    return StructuredLinear(spec, bias=False, dtype=linear.weight.dtype)


def runtimes(
    models: dict[str, PreTrainedModel], rounds: int, compiled: bool
) -> dict[str, dict[str, float]]:
    """Median seconds of every model for each count of tokens."""
    ids = random_prompts(models["dense"], 1, PROMPT)
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for count in MEASURED:
        for name, racer in race(models, ids, count, rounds, compiled).items():
            found[name][str(count)] = racer.prefill.median + racer.decode.median
            found[name]["each"] = racer.decode.median / count
    for times in found.values():
        times["1000"] = times["100"] + 900 * times["each"]
    return found


def main() -> None:
    """Print the table, and the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    dense = dense_model(given.blocks, getattr(torch, given.dtype))
    models = {"dense": dense}
    models |= {name: with_blast(dense, keep, b) for name, (keep, b) in ROWS.items()}
    models = {name: model.to(given.device) for name, model in models.items()}
    found = runtimes(models, given.rounds, not given.no_compile)
    print("| | L=10, s | L=100, s | L=1000, s (extrapolated) | less time than dense | paper |")
    print("|---|---|---|---|---|---|")
    for name, times in found.items():
        cells = " | ".join(f"{times[count]:.2f}" for count in ("10", "100", "1000"))
        less = 1 - times["100"] / found["dense"]["100"]
        paper = 1 - PAPER[name][1] / PAPER["dense"][1]
        print(f"| {name} | {cells} | {less:.0%} | {paper:.0%} |")
    print(json.dumps({"machine": describe(), "options": vars(given), "seconds": found}))


if __name__ == "__main__":
    main()
