"""Gated MLPs in one pass, against torch's in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blastnn.evaluate.gates import fused_gates, is_gated
from blastnn.kernels import native
from blastnn.kernels.gated import serves, silu_times
from blastnn.linear import StructuredLinear
from blastnn.structures import Blast, BlockDiagonal, Monarch, Structure
from tests.made_up import make_model

needs_kernel = pytest.mark.skipif(native.failure() is not None, reason="no C++ compiler")


@needs_kernel
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 40, 1536), (0, 4)], ids=str)
def test_a_gate_is_as_exact_as_torchs(shape: tuple[int, ...]) -> None:
    gate, up = 4.0 * torch.randn(shape), torch.randn(shape)
    exact = nn.functional.silu(gate.double()) * up.double()
    plain = nn.functional.silu(gate) * up
    found = gate.clone()
    silu_times(found, up)
    assert (found - exact).norm() <= 2.0 * (plain - exact).norm() + 1e-7 * exact.norm()


@needs_kernel
def test_a_gate_stands_any_number() -> None:
    gate = torch.tensor([0.0, -0.0, 100.0, -100.0, 3e38, -3e38, float("inf"), float("nan")])
    found = gate.clone()
    silu_times(found, torch.ones(8))
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2] == 100.0
    assert abs(float(found[3])) < 1e-30
    assert found[4] == gate[4]
    assert found[5] == 0.0
    assert found[6] == float("inf")
    assert found[7].isnan()
    with pytest.raises(RuntimeError, match="do not fit together"):
        silu_times(torch.ones(3), torch.ones(4))
    with pytest.raises(RuntimeError, match="do not fit together"):
        silu_times(torch.ones(4, 4).mT, torch.ones(4, 4))


@needs_kernel
def test_a_gate_is_left_to_torch_where_gradients_are_wanted() -> None:
    assert not serves(torch.ones(2))
    with torch.no_grad():
        assert serves(torch.ones(2))
        assert not serves(torch.ones(2).double())


def test_only_what_does_as_llama_does_is_taken_and_it_is_given_back() -> None:
    """And gives what it gave before, to rounding."""
    model = make_model("llama").eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    gated = [module for module in model.modules() if is_gated(module)]
    with torch.no_grad():
        before = model(ids).logits
        with fused_gates(model) as count:
            assert count == len(gated) == model.config.num_hidden_layers
            inside = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(module) for module in gated)
    handle = gated[1].act_fn.register_forward_hook(lambda *_: None)
    assert not is_gated(gated[1])
    handle.remove()
    gated[0].act_fn = nn.GELU()
    assert not is_gated(gated[0])
    assert not any(is_gated(module) for module in make_model("gpt2").modules())


@needs_kernel
@pytest.mark.parametrize(
    "spec",
    [
        Monarch.for_budget(40, 24, params=480, blocks=(2, 2)),
        BlockDiagonal(40, 24, blocks=3),
        Blast(40, 24, rank=4, blocks=(3, 3)),
    ],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize("quantized", [False, True])
def test_gates_that_are_views_and_gates_of_other_dtypes(spec: Structure, quantized: bool) -> None:
    """Some structures' plain products are views of larger tensors; autocast makes bfloat16."""
    model = make_model("llama").eval().requires_grad_(False)
    mlp = model.model.layers[0].mlp
    layer = StructuredLinear(spec, bias=False).requires_grad_(False)
    mlp.gate_proj = layer.quantized("int8") if quantized else layer
    ids = torch.randint(0, model.config.vocab_size, (1, 20))
    with torch.no_grad(), fused_gates(model):
        inside = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(inside, model(ids).logits, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(mixed, model(ids).logits)
