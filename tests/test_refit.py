"""Layers that stay dense repair what the layers before them got wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blastnn.compress.job import Job, prepare_job
from blastnn.compress.options import Options
from blastnn.compress.plan import ALLOCATED, UNTARGETED
from blastnn.compress.refit import RIDGE
from blastnn.compress.report import build_report
from blastnn.compress.run import RunOutcome, run_job
from blastnn.files import write_json
from blastnn.integrations.transformers import load_model
from blastnn.models.linears import dense_weight
from tests.made_up import TEXT, inputs_of, make_folder

CHOICES = {"keep": 0.5, "structure": "lowrank", "tokens": 512, "window": 64, "allow_slower": True}
# Of a block: a layer, and the module whose input its output is added up to, if any.
WHERE = {
    "llama": {
        "model.layers.1.self_attn.k_proj": None,
        "model.layers.1.self_attn.o_proj": "model.layers.1.post_attention_layernorm",
        "model.layers.1.mlp.up_proj": None,
        "model.layers.1.mlp.down_proj": "model.layers.2.input_layernorm",
    },
    "gpt2": {
        "transformer.h.1.attn.c_attn": None,
        "transformer.h.1.attn.c_proj": "transformer.h.1.ln_2",
        "transformer.h.1.mlp.c_proj": "transformer.h.2.ln_1",
    },
}


def compressed(folder: Path, family: str, reason: str, **choices: object) -> tuple[Job, RunOutcome]:
    """A job in whose second block all layers stay dense for a reason, and what it left."""
    dense = make_folder(folder / "dense", family)
    options = Options(**{**CHOICES, **choices})  # type: ignore[arg-type]
    plan = prepare_job(dense, options, [str(TEXT)]).plan.to_json()
    for name in plan["layers"]:
        if ".1." in name:
            plan["layers"][name] = {"keep": reason}
    write_json(folder / "plan.json", plan)
    job = prepare_job(dense, options, [str(TEXT)], folder / "plan.json")
    return job, run_job(job, folder / "small")


@torch.no_grad()
@pytest.mark.parametrize("drift", [0.0, 0.5])
@pytest.mark.parametrize("family", WHERE)
def test_a_dense_layer_gets_the_nearest_weight(family: str, drift: float, tmp_path: Path) -> None:
    """The oracle runs whole models, and never looks into the middle of a block."""
    job, _ = compressed(tmp_path, family, ALLOCATED, drift=drift)
    assert job.windows is not None
    ids = job.windows.ids
    model, small = load_model(tmp_path / "dense"), load_model(tmp_path / "small")
    for layer, behind in WHERE[family].items():
        old = dense_weight(model.get_submodule(layer)).double()
        found = dense_weight(small.get_submodule(layer)).double()
        x, now = inputs_of(model, layer, ids), inputs_of(small, layer, ids)
        wanted = x @ old.T
        if behind is not None:
            stream = inputs_of(model, behind, ids) - x @ old.T
            stream_now = inputs_of(small, behind, ids) - now @ found.T
            wanted = wanted + drift * (stream - stream_now)
        moment = now.T @ now / len(now)
        ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(moment)).double()
        right = wanted.T @ now / len(now) + old @ ridge
        expected = torch.linalg.solve(moment + ridge, right.T).T
        assert (expected - old).norm() > 1e-3 * old.norm()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_it_is_reported_and_takes_no_parameter(tmp_path: Path) -> None:
    job, outcome = compressed(tmp_path, "llama", ALLOCATED)
    report = build_report(job, outcome, {"verified": None})
    rows = [row for row in report["coverage"] if row["block"] == 1]
    assert rows
    for row in rows:
        assert (row["status"], row["refitted"], row["reason"]) == ("kept", True, ALLOCATED)
        assert row["params_after"] == row["params_before"]
        assert row["tokens"] == 512
    assert report["sensitivity"]["refitted_layers"] == len(rows)


@pytest.mark.parametrize(
    ("reason", "choices"),
    [
        (ALLOCATED, {"refit": False}),
        (ALLOCATED, {"inputs": "dense"}),
        (ALLOCATED, {"moment": "diagonal"}),
        (UNTARGETED, {}),
        ("the user's own reason", {}),
    ],
    ids=str,
)
def test_other_layers_stay_as_they_are(reason: str, choices: dict, tmp_path: Path) -> None:
    _, outcome = compressed(tmp_path, "llama", reason, **choices)
    old, new = load_model(tmp_path / "dense"), load_model(tmp_path / "small")
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        weights = [model.model.layers[1].get_submodule(name).weight for model in (old, new)]
        assert torch.equal(*weights)
    assert not any(record.refitted for record in outcome.journal.records)
