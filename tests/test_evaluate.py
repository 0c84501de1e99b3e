"""What ``evaluate`` prints, against transformers' own loss; the self-check tells a changed bit."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, LlamaConfig, PreTrainedConfig, RobertaConfig

from blastnn.evaluate import score
from blastnn.evaluate.perplexity import perplexity
from blastnn.evaluate.probe import digest, matches, probe
from blastnn.evaluate.text import Windows
from blastnn.integrations.transformers import load_model
from blastnn.models.context import positions, window_length
from tests.made_up import TEXT, byte_tokenizer, make_folder, make_model


def test_perplexities_of_two_models_on_two_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_folder(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text()[500:900])
    loaded = []
    load = score.load_tokenizer
    monkeypatch.setattr(score, "load_tokenizer", lambda path: loaded.append(path) or load(path))
    dense, model = map(str, folders)
    found = score.score_models(model, dense, [str(TEXT), str(other)], tokens=128, window=64)
    assert loaded == [folders[0]]
    for row, path in zip(found["perplexity"], (TEXT, other), strict=True):
        ids = torch.tensor(byte_tokenizer()(path.read_text())["input_ids"][:128]).view(2, 64)
        for key, folder in (("dense", folders[0]), ("model", folders[1])):
            with torch.no_grad():
                loss = load_model(folder)(input_ids=ids, labels=ids).loss
            assert row[key] == pytest.approx(math.exp(float(loss)), rel=1e-5)
        assert (row["tokens"], row["window"]) == (128, 64)


@pytest.mark.parametrize("window", [2, 65, 66, 150])
def test_perplexity_is_that_of_the_models_own_loss(window: int) -> None:
    """Also where a window has more rows than are scored together."""
    model = make_model("llama", max_position_embeddings=256)
    ids = torch.arange(2 * window).view(2, window) * 7 % 250
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row).loss) for row in ids.split(1)]
    found = perplexity(model, Windows(ids, []))
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_self_check_tells_the_last_bit() -> None:
    model, ids = make_model("llama"), torch.arange(16)[None]
    expected = {"ids": ids[0].tolist(), "logits_sha256": digest(probe(model, ids))}
    assert matches(model, expected)
    weight = model.model.norm.weight.data
    weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert not matches(model, expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (RobertaConfig(max_position_embeddings=66), 64),
        (LlamaConfig(max_position_embeddings=-1), sys.maxsize),
        (BloomConfig(), sys.maxsize),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_a_model_reads_as_many_tokens_as_it_has_positions(
    config: PreTrainedConfig, expected: int
) -> None:
    assert positions(config) == expected
    assert window_length(config, 1024) == min(1024, expected)
