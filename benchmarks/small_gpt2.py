"""Train a small GPT-2, for no package that we know of ships one: what a sweep of that layout needs.

    python benchmarks/small_gpt2.py runs/gpt2 --minutes 10
    blastnn sweep runs/gpt2 --output runs/sweep-gpt2 --method blast --method whitened-svd \
        --keep 0.8 --window 256 --calibration demo:wiki-calibration --text demo:wiki-test

Six layers of 256, 4,096 byte pairs, windows of 256 tokens; trained on the first 60% of the demo's
``wiki`` and ``c4``, with a token between documents. It is a model to measure on, not to use.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from blastnn.models.demo import CALIBRATION, demo_documents

VOCABULARY, WINDOW, BATCH, RATE, WARM_UP = 4096, 256, 8, 2e-3, 20
END = "<|endoftext|>"


def make_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Byte pairs learned from the texts, saved in ``folder``."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, eos_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train(model: GPT2LMHeadModel, ids: torch.Tensor, minutes: float) -> None:
    """AdamW, a short warm-up, then a cosine to zero over the given time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start, step, done = time.perf_counter(), 0, 0.0
    while done < 1.0:
        rate = RATE * min(1.0, (step + 1) / WARM_UP) * (1.0 + math.cos(math.pi * done)) / 2.0
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([ids[at : at + WINDOW] for at in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, done = step + 1, (time.perf_counter() - start) / (60.0 * minutes)
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {100 * done:.0f}% of the time", flush=True)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    documents = [document for name in CALIBRATION for document in demo_documents(name)]
    tokenizer = make_tokenizer(documents, arguments.folder)
    ids = torch.tensor(tokenizer(END.join(documents))["input_ids"])
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=WINDOW,
        n_embd=256,
        n_layer=6,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    train(model, ids, arguments.minutes)
    model.save_pretrained(arguments.folder)
    print(f"written to {arguments.folder}")


if __name__ == "__main__":
    main()
