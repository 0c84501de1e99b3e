"""Layers whose output is added to a stream repair a part of what that has drifted off."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import blastnn
from blastnn.compress.looks import END
from blastnn.compress.options import Options
from blastnn.compress.residual import find_sums
from blastnn.errors import PlanError
from blastnn.evaluate.probe import probe_arguments
from blastnn.factorize import factorize
from blastnn.models.linears import find_linears
from blastnn.models.skeleton import find_blocks
from blastnn.models.walk import Call, capture_input, record_calls
from tests.made_up import inputs_of, make_model

IDS = torch.arange(4 * 64).view(4, 64) * 7 % 250


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": END},
        ),
        ("gpt2", {"attn.c_proj": "ln_2", "mlp.c_proj": END}),
        (
            "bert",
            {
                "attention.output.dense": "attention.output.LayerNorm",
                "output.dense": "output.LayerNorm",
            },
        ),
        ("olmo2", {}),  # normalised before they are added
        ("albert", {}),  # blocks that are called again
    ],
)
def test_sums_are_found_by_looking(family: str, expected: dict[str, str]) -> None:
    model = make_model(family)
    blocks, base = find_blocks(model), model.base_model
    run = partial(base, **probe_arguments(base, IDS[:1]))
    calls = record_calls(run, blocks).of_block(0)
    block = blocks[0].module
    names = [info.name for info in find_linears(block)]
    assert find_sums(block, calls, capture_input(run, blocks), names) == expected
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@torch.no_grad()
@pytest.mark.parametrize("drift", [0.0, 0.5, 1.0])
def test_a_layer_repairs_the_stream(drift: float) -> None:
    """The oracle runs whole models, and never looks into the middle of a block."""
    model = make_model("llama")
    layer, behind = "model.layers.1.self_attn.o_proj", "model.layers.1.post_attention_layernorm"
    choices = {"structure": "lowrank", "outputs": "equal", "allow_slower": True, "drift": drift}
    targets = ("model.layers.0.*", layer)
    small = blastnn.compress(
        model,
        0.5,
        list(IDS.split(1)),
        targets=targets,
        allocation="uniform",
        damping=1e-3,
        **choices,
    ).model
    fitted, weight = small.get_submodule(layer), model.get_submodule(layer).weight.double()
    x, now = inputs_of(model, layer, IDS), inputs_of(small, layer, IDS)
    stream = inputs_of(model, behind, IDS) - x @ weight.T
    stream_now = inputs_of(small, behind, IDS) - now @ fitted.to_dense().double().T
    wanted = x @ weight.T + drift * (stream - stream_now)
    moment = now.T @ now / len(now)
    amount = 1e-3 * moment.diagonal().mean() * torch.eye(len(moment)).double()
    damped = moment + amount
    target = torch.linalg.solve(damped, (wanted.T @ now / len(now) + weight @ amount).T).T
    expected = factorize(target.float(), fitted.spec, damped, "svd").factors
    torch.testing.assert_close(
        fitted.to_dense(), fitted.spec.to_dense(expected), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("drift", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(drift: float) -> None:
    with pytest.raises(PlanError, match=r"drift must be in \[0, 1\]"):
        Options(drift=drift)


def test_a_diagonal_moment_knows_no_drift() -> None:
    results = [
        blastnn.compress(
            make_model("llama"), 0.6, list(IDS.split(1)), moment="diagonal", drift=drift
        ).model.state_dict()
        for drift in (0.0, 1.0)
    ]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Strange(nn.Module):
    """A part of a block whose first argument is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.part = nn.Linear(8, 8), Pair()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.part((x, x)))


class Pair(nn.Module):
    """Takes a pair."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


def test_modules_may_take_what_they_like() -> None:
    found = find_sums(Strange(), [Call(0, (), {})], torch.randn(1, 5, 8), ["layer"])
    assert found == {"layer": END}
