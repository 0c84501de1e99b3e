"""The factors of a block refined together."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blastnn
from blastnn.compress import refine as module
from blastnn.compress.job import prepare_job
from blastnn.compress.options import Options
from blastnn.compress.refine import BlockError, refine, split_windows
from blastnn.compress.run import run_job
from blastnn.compress.spectrum import GradientSum
from blastnn.errors import PlanError
from blastnn.linear import StructuredLinear
from blastnn.models.walk import Call
from blastnn.structures import LowRank
from tests.made_up import TEXT, make_folder, make_model
from tests.test_end_to_end import (
    SMALL,
    Interruption,
    compress,
    loaded_digest,
    weights_digest,
)

IDS = torch.arange(8 * 64).view(8, 64) * 7 % 250
CALL = [Call(0, (), {})]
WINDOWS = 9


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Gated(nn.Module):
    """What no layer by itself is to blame for: a product of two."""

    def __init__(self) -> None:
        super().__init__()
        spec = LowRank(12, 12, rank=6)
        self.left, self.right = (StructuredLinear(spec, bias=False) for _ in range(2))
        self.kept = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kept(self.left(x) * self.right(x))


@pytest.fixture
def block() -> Gated:
    torch.manual_seed(0)
    return Gated().requires_grad_(False)


def error_of(block: nn.Module, weight: Tensor | None = None) -> BlockError:
    """Towards the same block with factors a little off."""
    inputs = [normal(1, 40, 12, seed=seed) for seed in range(WINDOWS)]
    with torch.no_grad():
        targets = [block(x) for x in inputs]
        for index, layer in enumerate((block.left, block.right)):
            for factor in layer.factors.values():
                factor += 0.02 * normal(*factor.shape, seed=index) * factor.square().mean().sqrt()
    return BlockError(CALL, inputs, targets, torch.eye(12) if weight is None else weight)


def loss(block: nn.Module, error: BlockError, windows: list[int]) -> float:
    """The mean of ``(h - h^)^T (G + ridge) (h - h^)`` over tokens; no factorisation, no root."""
    total = 0.0
    for window in windows:
        wrong = (block(error.inputs[window]) - error.targets[window])[0].double()
        total += float(torch.einsum("ti,ij,tj->t", wrong, GIVEN, wrong).mean())
    return total / len(windows)


ROOT = normal(12, 12, seed=5)
WEIGHT = ROOT @ ROOT.mT
GIVEN = WEIGHT.double() + module.RIDGE * WEIGHT.double().diagonal().mean() * torch.eye(12)


def test_the_held_out_error_falls_and_is_what_it_says(block: Gated) -> None:
    error = error_of(block, WEIGHT)
    held, train = split_windows(WINDOWS)
    before = loss(block, error, held)
    kept = block.kept.weight.clone()
    seen: list[tuple[int, int]] = []
    found = refine(block, error, 20, 0, torch.float32, lambda *step: seen.append(step))
    assert found is not None and found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(loss(block, error, held), rel=1e-4)
    assert found.after < 0.7 * found.before
    assert loss(block, error, train) < loss(block, error, held)
    assert seen == [(done, 20 * len(train)) for done in range(1, found.steps + 1)]
    assert torch.equal(block.kept.weight, kept)
    assert not any(p.requires_grad or p.grad is not None for p in block.parameters())


def test_what_does_not_help_is_undone(block: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps far too large: it gives up early, and every bit is as before."""
    monkeypatch.setattr(module, "RATE", 3.0)
    error = error_of(block)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    found = refine(block, error, 20, 0, torch.float32)
    assert found is not None and found.after == found.before and found.kept_step == 0
    assert found.steps == 20 * (WINDOWS - 1) // 2
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_rounded_factors_are_judged_as_they_are_written(block: Gated) -> None:
    error = error_of(block, WEIGHT)
    with torch.no_grad():
        for factor in module.trainable(block):
            factor.copy_(factor.bfloat16())
    found = refine(block, error, 20, 0, torch.bfloat16)
    for factor in (*block.left.factors.values(), *block.right.factors.values()):
        assert torch.equal(factor, factor.bfloat16().float())
    assert found is not None and found.kept_step > 0
    assert found.after == pytest.approx(loss(block, error, split_windows(WINDOWS)[0]), rel=1e-4)


def test_nothing_to_train_or_too_few_windows(block: Gated) -> None:
    error = error_of(block)
    few = BlockError(CALL, error.inputs[:1], error.targets[:1], torch.eye(12))
    assert refine(block, few, 2, 0, torch.float32) is None
    assert refine(nn.Linear(12, 12), error, 2, 0, torch.float32) is None


def test_a_weight_of_zeros_changes_nothing(block: Gated) -> None:
    error = error_of(block, torch.zeros(12, 12))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    found = refine(block, error, 1, 0, torch.float32)
    assert found is not None and (found.before, found.after, found.kept_step) == (0.0, 0.0, 0)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 32])
def test_windows_held_out_are_spread_and_few(count: int) -> None:
    held, train = split_windows(count)
    assert sorted(held + train) == list(range(count))
    assert len(held) == max(1, count // module.HELD_OUT)


@pytest.mark.parametrize(("family", "blocks"), [("llama", 3), ("gpt2", 3), ("albert", 1)])
def test_a_job_refines_every_block_and_resumes(family: str, blocks: int, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense", family)
    more: dict[str, Any] = {"tokens": 1024}  # with fewer no held-out window gains
    refined = {**more, "refine": 3}
    plain = compress(source, tmp_path / "plain", **more)
    whole = compress(source, tmp_path / "whole", **refined)
    done = whole.journal.refined
    assert len(done) == blocks
    assert any(entry["after"] < entry["before"] for entry in done.values())
    assert weights_digest(tmp_path / "whole") != weights_digest(tmp_path / "plain")
    assert plain.journal.refined == {}
    for layers in (3, 9)[:blocks]:
        with pytest.raises(KeyboardInterrupt):
            compress(
                source, tmp_path / "parts", resume=True, progress=Interruption(layers), **refined
            )
    outcome = compress(source, tmp_path / "parts", resume=True, **refined)
    assert outcome.journal.refined == done
    assert weights_digest(tmp_path / "parts") == weights_digest(tmp_path / "whole")
    assert loaded_digest(tmp_path / "parts", outcome) == outcome.journal.probe["logits_sha256"]


def test_in_memory_gives_what_a_job_gives(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    choices = {**SMALL, "tokens": 1024, "refine": 3}
    job = prepare_job(source, Options(**choices), [TEXT])
    assert job.windows is not None
    run_job(job, tmp_path / "out")
    expected = blastnn.load_model(tmp_path / "out").state_dict()
    ids = list(job.windows.ids.split(1))
    model = blastnn.load_model(source)
    assert all(parameter.requires_grad for parameter in model.parameters())
    result = blastnn.compress(model, calibration=ids, **choices)
    found = result.model.state_dict()
    plain = blastnn.compress(model, calibration=ids, **{**choices, "refine": 0})
    fitted = plain.model.state_dict()
    changed = [name for name in found if not torch.equal(found[name], fitted[name])]
    assert changed and all(name.rpartition(".")[2] in ("U", "S", "V") for name in changed)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_nothing_is_left_behind_in_memory() -> None:
    """Hooks on tensors that hold those tensors would never be freed."""
    for choices in ({}, {"targets": ("model.layers.2.*",)}):
        blastnn.compress(
            make_model("llama"),
            calibration=list(IDS.split(1)),
            refine=1,
            blocks=(2, 2),
            allow_slower=True,
            **choices,
        )
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, GradientSum)]


def test_wrong_choices_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for choices, words in (
        ({"refine": -1}, "at least 0"),
        ({"refine": 1, "inputs": "dense"}, "does not go with inputs dense"),
        ({"refine": 1, "quantize": "int8"}, "blastnn quantize"),
    ):
        with pytest.raises(PlanError, match=words):
            Options(**choices)
    source = make_folder(tmp_path / "dense")
    with pytest.raises(PlanError, match="at least 2 windows.*there are 0"):
        compress(source, tmp_path / "out", refine=1, calibration=[])
    with pytest.raises(PlanError, match="at least 2 windows.*there are 1"):
        compress(source, tmp_path / "out", refine=1, tokens=64)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlanError, match="at least 2 windows"):
        blastnn.compress(make_model("llama"), refine=1)
    batches = [torch.randn(4, 24), torch.randn(4, 24)]
    with pytest.raises(PlanError, match="walked block by block"):
        blastnn.compress(nn.Sequential(nn.Linear(24, 24)), calibration=batches, refine=1)


def test_nothing_removed_is_nothing_refined(tmp_path: Path) -> None:
    outcome = compress(make_folder(tmp_path / "dense"), tmp_path / "out", refine=1, keep=1.0)
    assert outcome.journal.refined == {}
