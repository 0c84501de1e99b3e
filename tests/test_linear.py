"""``StructuredLinear``: the one module, for every registered structure."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from blastnn.errors import FactorizationError, StructureError
from blastnn.factorize import factorize
from blastnn.linear import StructuredLinear
from blastnn.structures import STRUCTURES, Blast, Structure
from tests.matrices import describe, every_device, example_specs
from tests.memory import assert_alike_in_poisoned_memory, nothing_by_default

SPECS = [structure.for_budget(22, 26, 22 * 26 // 2) for structure in STRUCTURES.values()]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
EXAMPLES = example_specs([(22, 26)], (0.5,))
every_example = pytest.mark.parametrize("spec", EXAMPLES, ids=describe)
# torch's own forward-mode decompositions still use what it has deprecated itself.
old_decompositions = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def inputs(spec: Structure, tokens: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, tokens, spec.in_features, generator=generator).to(dtype)


def with_random_bias(layer: StructuredLinear) -> StructuredLinear:
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


@every_spec
@with_and_without_bias
def test_parameters_are_named_as_the_factors(spec, bias):
    layer = StructuredLinear(spec, bias=bias)
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    expected = spec.factor_shapes() | ({"bias": (spec.out_features,)} if bias else {})
    assert shapes == expected
    assert (layer.out_features, layer.in_features) == (spec.out_features, spec.in_features)
    assert all(layer.factors[name] is layer.get_parameter(name) for name in spec.factor_shapes())
    assert str(spec) in repr(layer)


@every_spec
@every_device
@with_and_without_bias
@pytest.mark.parametrize("tokens", [2, 30])
def test_forward_is_that_of_the_dense_layer(spec, bias, tokens, device):
    layer = with_random_bias(StructuredLinear(spec, bias=bias, device=device))
    x = inputs(spec, tokens).to(device)
    expected = nn.functional.linear(x, layer.to_dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@every_spec
@every_device
@pytest.mark.parametrize("tokens", [2, 30])
def test_gradients_reach_the_input_and_every_parameter(spec, tokens, device):
    layer = with_random_bias(StructuredLinear(spec, device=device))
    x = inputs(spec, tokens).to(device).requires_grad_()
    layer(x).square().sum().backward()
    for name, value in [("input", x), *layer.named_parameters()]:
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert (value.grad.abs().max() > 0) == (name not in spec.step_factors()), name


@every_example
@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_nothing_is_read_before_it_is_written(spec, dtype, device):
    def everything() -> list[Tensor]:
        torch.manual_seed(0)
        layer = with_random_bias(StructuredLinear(spec, dtype=dtype, device=device))
        found: list[Tensor] = []
        for tokens in (0, 2, 30):
            x = inputs(spec, tokens, dtype).to(device).requires_grad_()
            with torch.no_grad():
                found.append(layer(x))
            y = layer(x)
            trained = [x, *layer.parameters()]
            found += [y, *torch.autograd.grad(y.square().sum(), trained, materialize_grads=True)]
        return found

    assert_alike_in_poisoned_memory(everything)


@every_example
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_every_tensor_is_made_on_the_device_of_the_layer(spec, dtype):
    layer, x = StructuredLinear(spec, dtype=dtype), inputs(spec, 30, dtype).requires_grad_()
    trained = [x, *layer.parameters()]
    ones = torch.ones(2, 30, spec.out_features, dtype=dtype)
    expected = [layer(x[:, :2]), *torch.autograd.grad(layer(x), trained, ones)]
    with nothing_by_default():
        actual = [layer(x[:, :2]), *torch.autograd.grad(layer(x), trained, ones)]
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@every_spec
@old_decompositions
def test_function_transforms_and_forward_mode_see_the_dense_matrix(spec):
    layer, x = StructuredLinear(spec, bias=False), inputs(spec)[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    dense = layer.to_dense().detach()
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(jacobian(layer)(x[0]), dense, rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ dense.T, rtol=1e-5, atol=1e-5)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, value in layer.named_parameters():
        torch.testing.assert_close(each[name].sum(0), value.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@old_decompositions
def test_function_transforms_of_a_quantised_layer(bits):
    layer = StructuredLinear(Blast(22, 26, rank=6, blocks=(2, 2)), bias=False).quantized(bits)
    found = torch.func.jacfwd(layer)(torch.ones(26))
    torch.testing.assert_close(found, layer.to_dense(), rtol=1e-5, atol=1e-5)


@every_spec
def test_training_fits_a_target(spec):
    torch.manual_seed(0)
    layer, teacher = StructuredLinear(spec), StructuredLinear(spec)
    x = inputs(spec, 40)
    target = teacher(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_spec
def test_initialisation_follows_the_generator_of_torch(spec):
    layers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layers.append(StructuredLinear(spec))
    once, again, other = layers
    assert torch.equal(once.to_dense(), again.to_dense())
    assert not torch.equal(once.to_dense(), other.to_dense())
    assert not once.bias.any()
    torch.manual_seed(0)
    with nothing_by_default():
        elsewhere = StructuredLinear(spec, device="cpu")
    assert torch.equal(once.to_dense(), elsewhere.to_dense())


@every_spec
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(spec, dtype):
    layer = StructuredLinear(spec, dtype=dtype)
    assert {value.dtype for value in layer.parameters()} == {dtype}
    assert layer(inputs(spec, dtype=dtype)).dtype == dtype
    assert layer.float()(inputs(spec)).dtype == torch.float32


@every_spec
@with_and_without_bias
def test_meta_device_and_back(spec, bias):
    layer = StructuredLinear(spec, bias=bias, device="meta")
    assert all(value.is_meta for value in layer.parameters())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(inputs(spec)).isfinite().all()


@every_spec
@with_and_without_bias
def test_state_dict_round_trip(spec, bias):
    layer = with_random_bias(StructuredLinear(spec, bias=bias))
    other = StructuredLinear(spec, bias=bias)
    assert set(layer.state_dict()) == {*spec.tensor_shapes(), *(["bias"] if bias else [])}
    assert not torch.equal(other(inputs(spec)), layer(inputs(spec)))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(inputs(spec)), layer(inputs(spec)))
    empty = StructuredLinear(spec, bias=bias, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(inputs(spec)), layer(inputs(spec)))


@every_example
@pytest.mark.parametrize("tokens", [5, 21], ids=["few", "many"])
def test_compiles_without_a_graph_break(spec, tokens):
    """Few tokens take another way in some structures; gradients go through either."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = StructuredLinear(spec), torch.randn(tokens, spec.in_features, requires_grad=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    expected, y = layer(x), compiled(x)
    torch.testing.assert_close(y, expected)
    trained = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@every_spec
def test_a_copy_is_independent(spec):
    layer = StructuredLinear(spec)
    twin = copy.deepcopy(layer)
    before = layer.to_dense().clone()
    with torch.no_grad():
        for value in twin.parameters():
            value.add_(1.0)
    assert torch.equal(layer.to_dense(), before)


@every_spec
@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear(spec, bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(spec.in_features, spec.out_features, bias=bias, dtype=dtype)
    layer = StructuredLinear.from_linear(linear, spec)
    assert {value.dtype for value in layer.parameters()} == {dtype}
    assert all(value.requires_grad for value in layer.parameters())
    expected = factorize(linear.weight, spec)
    assert all(torch.equal(layer.factors[name], f) for name, f in expected.factors.items())
    # On a random matrix d numbers explain a share d / (m n) of the energy, if they are linear.
    share = spec.num_params / (spec.out_features * spec.in_features)
    assert expected.relative_error < math.sqrt(1.0 - 0.5 * min(share, 1.0))
    assert (layer.bias is None) == (not bias)
    if bias:
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias.data_ptr() != linear.bias.data_ptr()
    with torch.no_grad():
        nn.init.zeros_(linear.weight)
    assert layer.to_dense().any()


@every_spec
def test_from_linear_passes_options_on(spec):
    torch.manual_seed(0)
    linear = nn.Linear(spec.in_features, spec.out_features)
    x = torch.randn(100, spec.in_features) * torch.logspace(0, -2, spec.in_features)
    moment = (x.T @ x / 100).double()
    aware = StructuredLinear.from_linear(linear, spec, second_moment=moment)
    blind = StructuredLinear.from_linear(linear, spec)
    errors = [float((layer(x) - linear(x)).detach().norm()) for layer in (aware, blind)]
    assert errors[0] < errors[1]
    with pytest.raises(FactorizationError, match="none such"):
        StructuredLinear.from_linear(linear, spec, solver="none such")


@every_spec
def test_from_linear_of_another_size_is_refused(spec):
    with pytest.raises(FactorizationError, match=str(spec.in_features)):
        StructuredLinear.from_linear(nn.Linear(spec.in_features + 1, spec.out_features), spec)


@every_spec
@with_and_without_bias
def test_from_factors_holds_the_very_tensors(spec, bias):
    factors = spec.init(seed=3)
    offset = torch.randn(spec.out_features) if bias else None
    layer = StructuredLinear.from_factors(spec, factors, offset)
    assert all(layer.factors[name].data_ptr() == f.data_ptr() for name, f in factors.items())
    expected = nn.functional.linear(inputs(spec), spec.to_dense(factors), offset)
    torch.testing.assert_close(layer(inputs(spec)), expected, rtol=1e-5, atol=1e-5)
    assert not any(value.is_meta for value in layer.parameters())


@every_spec
def test_from_factors_refuses_other_names_or_shapes(spec):
    factors = spec.init()
    first = next(iter(factors))
    for wrong in (
        {},
        {key: f for key, f in factors.items() if key != first},
        {**factors, "extra": torch.ones(2)},
        {**factors, first: factors[first][..., :-1]},
        {**factors, first: factors[first][None]},
    ):
        with pytest.raises(StructureError, match=first):
            StructuredLinear.from_factors(spec, wrong)


@every_spec
def test_from_factors_refuses_other_dtypes_and_kinds(spec):
    factors = spec.init()
    first = next(iter(factors))
    for dtype in (torch.int64, torch.float64):
        wrong = {**factors, first: factors[first].to(dtype)}
        if dtype == torch.float64 and len(spec.factor_shapes()) == 1:
            continue  # all factors are of one dtype
        with pytest.raises(StructureError, match="one floating-point dtype"):
            StructuredLinear.from_factors(spec, wrong)
    for name in spec.index_shapes():
        with pytest.raises(StructureError, match=f"{name}.* must be torch.int64"):
            StructuredLinear.from_factors(spec, {**factors, name: factors[name].float()})
    for kind in (None, [1], {first: [1.0]}):
        with pytest.raises(StructureError, match="tensors by name"):
            StructuredLinear.from_factors(spec, kind)
    with pytest.raises(StructureError, match="bias"):
        StructuredLinear.from_factors(spec, factors, [0.0] * spec.out_features)
    with pytest.raises(StructureError, match="needs a spec"):
        StructuredLinear.from_factors(None, factors)


@every_spec
@pytest.mark.parametrize("size", [1, 21])
def test_from_factors_refuses_a_bias_of_another_size(spec, size):
    with pytest.raises(StructureError, match="bias"):
        StructuredLinear.from_factors(spec, spec.init(), torch.ones(size))


@every_spec
def test_input_of_another_width_is_refused(spec):
    with pytest.raises(StructureError, match=str(spec.in_features)):
        StructuredLinear(spec)(torch.ones(3, spec.in_features + 1))


def test_a_structures_name_is_not_a_spec() -> None:
    with pytest.raises(StructureError, match=r"needs a spec, such as .*, but was given 'blast'"):
        StructuredLinear("blast")  # type: ignore[arg-type]
