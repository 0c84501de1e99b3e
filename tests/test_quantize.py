"""Factors in 8 and 4 bits: the layout, its rounding, and the layer, for every structure."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from blastnn.errors import StructureError
from blastnn.kernels import TABLE, choose, reference
from blastnn.kernels.dispatch import UNQUANTIZED_ONLY
from blastnn.linear import StructuredLinear
from blastnn.quantization import (
    QUANTIZATIONS,
    SCALE,
    SCALE_DTYPE,
    Quantization,
    dequantize_factors,
    dequantize_tensor,
    quantize_factors,
    quantize_tensor,
    stored_bytes,
)
from blastnn.structures import STRUCTURES, Blast, LowRank, Structure

EVERY = [structure.for_budget(22, 27, 22 * 27 // 2) for structure in STRUCTURES.values()]
SPECS = [spec for spec in EVERY if spec.large_factors()]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
both = pytest.mark.parametrize("name", sorted(QUANTIZATIONS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(spec: Structure, name: str) -> tuple[StructuredLinear, StructuredLinear]:
    """A layer, and the same one quantised."""
    torch.manual_seed(0)
    layer = StructuredLinear(spec)
    nn.init.normal_(layer.bias)
    return layer, layer.quantized(name)


def unpacked_by_hand(packed: Tensor, scales: Tensor, how: Quantization, shape: tuple) -> Tensor:
    """The documented layout, number by number; shares nothing with the code."""
    b, q, r = shape
    numbers = torch.zeros(shape, dtype=torch.float64)
    for i in range(b):
        for row in range(q):
            for column in range(r):
                if how.bits == 8:
                    whole = int(packed[i, row, column])
                else:
                    byte = int(packed[i, row, column // 2])
                    whole = (byte >> 4 if column % 2 else byte & 15) - 8
                numbers[i, row, column] = whole * float(scales[i, row // how.group, column])
    return numbers


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 9, 4), (3, 1, 1), (1, 3, 6)])
@pytest.mark.parametrize("how", [Quantization(8, 3), Quantization(4, 3), Quantization(4, 64)])
def test_the_layout_is_the_documented_one(shape, how):
    factor = normal(*shape)
    packed, scales = quantize_tensor(factor, how)
    columns = shape[2] if how.bits == 8 else -(-shape[2] // 2)
    assert packed.shape == (*shape[:2], columns)
    assert packed.dtype == (torch.int8 if how.bits == 8 else torch.uint8)
    assert scales.shape == (shape[0], -(-shape[1] // how.group), shape[2])
    assert scales.dtype == torch.bfloat16
    assert packed.is_contiguous() and scales.is_contiguous()
    if how.bits == 4 and shape[2] % 2:
        assert bool((packed[..., -1] >> 4 == 8).all())
    found = dequantize_tensor(packed, scales, how, shape[2])
    assert torch.equal(found.double(), unpacked_by_hand(packed, scales, how, shape))
    # Half a step of the coarsest grid that clips nothing.
    step = factor.abs().amax(1, keepdim=True) / (2 ** (how.bits - 1) - 1)
    assert (found - factor).norm() < 0.51 * (step * torch.ones(shape)).norm()


@both
def test_numbers_on_the_grid_come_back_exactly(name):
    how = QUANTIZATIONS[name]
    half = 2 ** (how.bits - 1)
    whole = torch.randint(-half, half, (2, 40, 5), generator=torch.Generator().manual_seed(0))
    whole[:, ::8] = -half
    factor = whole * torch.tensor([0.5, -2.0, 1.0, 2.0**-40, 2.0**60])
    found = dequantize_tensor(*quantize_tensor(factor, how), how, 5)
    assert torch.equal(found, factor)


@both
def test_the_search_is_no_worse_than_the_largest_number(name):
    how = QUANTIZATIONS[name]
    factor = normal(3, 64, 50).pow(3)
    groups = factor.unflatten(1, (-1, how.group))
    scales = groups.abs().amax(2, keepdim=True) / (2 ** (how.bits - 1) - 1)
    plain = ((groups / scales).round() * scales - groups).square().sum()
    found = dequantize_tensor(*quantize_tensor(factor, how), how, 50)
    assert (found - factor).square().sum() < plain


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e30, 3e38])
@both
def test_extreme_and_zero_numbers(name, size):
    how = QUANTIZATIONS[name]
    factor = (normal(2, 10, 3).clamp(-1, 1) * size).float()
    found = dequantize_tensor(*quantize_tensor(factor, how), how, 3)
    assert found.isfinite().all()
    assert (found - factor).abs().max() <= factor.abs().max() * 0.1 + 1e-38


@every_spec
@both
def test_forward_is_that_of_the_dense_matrix(spec, name):
    layer, small = layer_of(spec, name)
    for x in (normal(2, 5, 27), normal(30, 27), normal(0, 27), normal(27, 3).T):
        expected = nn.functional.linear(x, small.to_dense(), layer.bias)
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
    limit = {"int8": 0.02, "int4": 0.3}[name]
    error = (small.to_dense() - layer.to_dense()).norm() / layer.to_dense().norm()
    assert 0 < float(error.detach()) < limit


@pytest.mark.parametrize("spec", EVERY, ids=[spec.name for spec in EVERY])
def test_a_structure_of_vectors_alone_is_refused(spec):
    layer = StructuredLinear(spec)
    if spec.large_factors():
        assert layer.quantized("int8").quantization == QUANTIZATIONS["int8"]
        return
    with pytest.raises(StructureError, match=f"{type(spec).__name__}.*no factor.*large enough"):
        layer.quantized("int8")


@every_spec
@both
def test_names_and_bytes(spec, name):
    layer, small = layer_of(spec, name)
    large = set(spec.large_factors())
    assert set(small.factors) == set(spec.tensor_shapes()) | {factor + SCALE for factor in large}
    assert large <= set(spec.factor_shapes())
    for factor in set(spec.tensor_shapes()) - large:
        assert torch.equal(small.factors[factor], layer.factors[factor])
    held = [f for key, f in small.factors.items() if key not in spec.index_shapes()]
    assert stored_bytes(spec, small.quantization, torch.float32) == sum(f.nbytes for f in held)
    assert str(small.quantization) in repr(small)


@every_spec
@both
def test_copies_pickles_and_state_dicts(spec, name):
    _, small = layer_of(spec, name)
    x = normal(4, 27)
    other = StructuredLinear(spec, quantization=small.quantization)
    empty = StructuredLinear(spec, device="meta", quantization=small.quantization)
    other.load_state_dict(small.state_dict())
    empty.load_state_dict(small.state_dict(), assign=True)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), other, empty):
        assert torch.equal(twin(x), small(x))


@every_spec
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_casts_leave_the_stored_numbers_alone(spec, name, dtype):
    _, small = layer_of(spec, name)
    cast = copy.deepcopy(small).to(dtype)
    assert cast(normal(3, 27).to(dtype)).dtype == dtype
    for factor in spec.large_factors():
        assert torch.equal(cast.factors[factor], small.factors[factor])
        assert cast.factors[factor + SCALE].dtype == SCALE_DTYPE
        assert torch.equal(cast.factors[factor + SCALE], small.factors[factor + SCALE])
    if set(spec.factor_shapes()) - set(spec.large_factors()):
        with pytest.raises(StructureError, match="float32"):
            cast(normal(3, 27))


@every_spec
def test_compiles_without_a_graph_break(spec):
    torch._dynamo.reset()
    _, small = layer_of(spec, "int4")
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(normal(21, 27)), small(normal(21, 27)))


@both
def test_gradients_pass_through_but_nothing_is_trained(name):
    _, small = layer_of(SPECS[0], name)
    x = normal(3, 27).requires_grad_()
    small(x).sum().backward()
    torch.testing.assert_close(x.grad, small.to_dense().sum(0).expand(3, -1))
    assert list(small.parameters()) == []
    small.requires_grad_(False)
    with pytest.raises(StructureError, match="cannot be trained"):
        small.requires_grad_()


def test_bad_input():
    layer, small = layer_of(SPECS[0], "int8")
    with pytest.raises(StructureError, match="already"):
        small.quantized("int4")
    with pytest.raises(StructureError, match="int3.*int4, int8"):
        layer.quantized("int3")
    for bits, group in ((3, 32), ("4", 32), (True, 32), (4.0, 32), (4, 0), (4, 1.5), (8, True)):
        with pytest.raises(StructureError):
            Quantization(bits, group)
    for values in ({"bits": 4}, {"bits": 4, "group": 32, "zero": 1}, [4, 32], None):
        with pytest.raises(StructureError, match="bits"):
            Quantization.from_json(values)
    assert Quantization.from_json(Quantization(4, 7).to_json()) == Quantization(4, 7)
    factors = SPECS[0].init()
    factors["V"][0, 0, 0] = float("nan")
    with pytest.raises(StructureError, match="factor V .*NaN"):
        quantize_factors(SPECS[0], factors, Quantization(4, 32))


def test_from_factors_refuses_what_is_not_stored_like_that():
    spec, how = SPECS[0], QUANTIZATIONS["int4"]
    stored = quantize_factors(spec, spec.init(), how)
    StructuredLinear.from_factors(spec, stored, quantization=how)
    for wrong, words in (
        ({k: v for k, v in stored.items() if k != "U_scale"}, "U_scale is missing"),
        ({**stored, "extra": stored["S"]}, "extra does not belong"),
        ({**stored, "U": stored["U"].to(torch.int8)}, "U must be torch.uint8"),
        ({**stored, "U_scale": stored["U_scale"].float()}, "U_scale must be torch.bfloat16"),
        ({**stored, "S": stored["S"].to(torch.int8)}, "S must be floating"),
        ({**stored, "V": stored["V"][..., :-1]}, "V must be"),
    ):
        with pytest.raises(StructureError, match=words):
            StructuredLinear.from_factors(spec, wrong, quantization=how)
    with pytest.raises(StructureError):
        StructuredLinear.from_factors(spec, stored)
    with pytest.raises(StructureError):
        StructuredLinear.from_factors(spec, stored, quantization=QUANTIZATIONS["int8"])


def test_kernels_without_quantised_factors_are_passed_over(monkeypatch):
    plain = ModuleType("plain")
    plain.NAME, plain.obstacle, plain.matmul = "plain", reference.obstacle, reference.matmul
    monkeypatch.setitem(TABLE, "cpu", (plain, reference))
    spec = Blast(10, 14, 3, (2, 2))  # of no other test: choices are kept for the session
    assert choose(spec, "cpu", torch.float32).kernel is plain
    quantised = choose(spec, "cpu", torch.float32, QUANTIZATIONS["int4"])
    assert quantised.kernel is reference
    assert quantised.passed_over == {"plain": UNQUANTIZED_ONLY}


@both
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_mend_each_other(name, weighted):
    """Feedback lowers the error that it is meant to lower, against rounding alone."""
    for spec in (Blast(60, 70, 20, (2, 3)), LowRank(60, 70, 20)):
        factors = spec.init(seed=1)
        mixed = normal(20, 20)  # columns that nearly repeat each other
        factors["U"] = factors["U"] @ mixed
        factors["V"] = factors["V"] @ mixed
        x = normal(300, 70) * torch.logspace(0, -2, 70)
        moment = (x.T @ x / 300).double() if weighted else None
        how = QUANTIZATIONS[name]
        mended = quantize_factors(spec, factors, how, moment)
        alone = dict(factors)
        for key in "UV":
            packed, scales = quantize_tensor(factors[key], how)
            alone[key] = dequantize_tensor(packed, scales, how, 20)
        dense = spec.to_dense(factors)
        root = torch.eye(70) if moment is None else torch.linalg.cholesky(moment.float())
        errors = [
            ((spec.to_dense(found) - dense) @ root).norm()
            for found in (dequantize_factors(spec, mended, how), alone)
        ]
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("key", ["U", "V"])
def test_gram_is_the_curvature_of_the_output(key):
    """Against autograd: the mean squared output under an error of one factor."""
    for spec in (Blast(7, 11, 3, (2, 3)), LowRank(7, 11, 3)):
        factors = {k: f.double() for k, f in spec.init(seed=2).items()}
        moment = torch.eye(11, dtype=torch.float64)
        if key == "U":
            x = normal(40, 11).double()
            moment = x.T @ x / 40
        change = normal(*factors[key].shape, seed=3).double()
        dense = spec.to_dense({**factors, key: change})
        gram = spec.gram(key, factors, moment).double()
        inside = change
        if key == "V":  # rows behind the last input are padding, which no output shows
            inside = change.flatten(0, -2)[:11]
            rows = change.shape[-2]
            inside = torch.nn.functional.pad(inside, (0, 0, 0, change.numel() // 3 - 11))
            inside = inside.view(-1, rows, 3).view(change.shape)
        else:
            inside = torch.nn.functional.pad(
                change.flatten(0, -2)[:7], (0, 0, 0, change.numel() // 3 - 7)
            ).view(change.shape)
        expected = ((dense @ moment) * dense).sum()
        if key == "V" and spec.name == "blast":  # U's own padding rows count in the gram
            factors["U"][-1, -1] = 0.0
            gram = spec.gram(key, factors, moment).double()
        found = (inside @ gram * inside).sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
