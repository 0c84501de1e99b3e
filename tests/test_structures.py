"""The laws that every registered structure keeps, and what is particular to BLAST."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blastnn.errors import StructureError
from blastnn.structures import (
    STRUCTURES,
    Blast,
    LowRank,
    Structure,
    cast_factors,
    spec_from_json,
)
from blastnn.structures.blast import FEW_TOKENS
from tests.matrices import (
    describe,
    every_device,
    example_specs,
    normal,
    on,
    random_factors,
    specs_of,
)
from tests.memory import (
    assert_alike_in_poisoned_memory,
    float64_by_default,
    hidden_entries,
    nothing_by_default,
)

SHAPES = [(7, 7), (12, 20), (13, 11), (31, 9), (8, 37)]
MANY_TOKENS = FEW_TOKENS + 7


every_spec = pytest.mark.parametrize("spec", example_specs(SHAPES), ids=describe)
few_specs = pytest.mark.parametrize("spec", example_specs([(13, 11)]), ids=describe)
every_structure = pytest.mark.parametrize("name", sorted(STRUCTURES))
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"]
)


def dense_product(spec: Structure, x: Tensor, factors: dict[str, Tensor]) -> Tensor:
    return x @ spec.to_dense(factors).T


def assert_product(spec: Structure, x: Tensor, factors: dict[str, Tensor]) -> None:
    expected = dense_product(spec, x, factors)
    actual = spec.matmul(x, factors)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@every_structure
def test_every_registered_structure_is_tested(name):
    assert name == STRUCTURES[name].name
    assert any(spec.name == name for spec in example_specs([(13, 11)]))
    assert specs_of(name, 1, 20, 2.0), "the first example options must fit any matrix"


@every_spec
@every_device
@pytest.mark.parametrize("tokens", [1, 5, FEW_TOKENS, FEW_TOKENS + 1, MANY_TOKENS])
def test_matmul_is_the_dense_product(spec, tokens, device):
    x = normal(tokens, spec.in_features).to(device)
    assert_product(spec, x, on(device, random_factors(spec)))


@every_structure
@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens", [8, 64])
def test_matmul_is_as_accurate_as_the_dense_product(name, dtype, tokens, device):
    # Summed over shapes and draws: which order of summation is luckier differs for each of them.
    squared_error = squared_dense_error = 0.0
    specs = [spec for spec in example_specs(SHAPES) if spec.name == name]
    for seed, spec in enumerate(specs * 2):
        x = normal(tokens, spec.in_features, seed=seed, dtype=dtype).to(device)
        factors = on(device, random_factors(spec, seed=100 + 10 * seed, dtype=dtype))
        exact = dense_product(spec, x.double(), cast_factors(factors, torch.float64))
        actual = spec.matmul(x, factors)
        assert actual.dtype == dtype
        energy = float(exact.square().sum())
        squared_error += float((actual.double() - exact).square().sum()) / energy
        dense = dense_product(spec, x, factors).double()
        squared_dense_error += float((dense - exact).square().sum()) / energy
    assert squared_error**0.5 <= 2 * squared_dense_error**0.5


@few_specs
@pytest.mark.parametrize(
    "leading",
    [
        (),
        (1,),
        (2, 3),
        (4, 9),
        (2, 1, 3),
        *[(0,), (2, 0), (0, 3)],
    ],
)
def test_leading_dimensions_are_kept(spec, leading):
    x = normal(*leading, spec.in_features) if leading else normal(spec.in_features)
    y = spec.matmul(x, random_factors(spec))
    assert y.shape == (*leading, spec.out_features)
    torch.testing.assert_close(y, dense_product(spec, x, random_factors(spec)))


@few_specs
@pytest.mark.parametrize("tokens", [6, MANY_TOKENS])
def test_memory_layout_of_the_input_does_not_matter(spec, tokens):
    n = spec.in_features
    factors = random_factors(spec)
    transposed = normal(n, tokens).T
    strided = normal(2 * tokens, 2 * n)[::2, ::2]
    expanded = normal(1, n).expand(tokens, n)
    permuted = normal(n, 2, tokens).permute(1, 2, 0)
    for x in (transposed, strided, expanded, permuted):
        assert not x.is_contiguous()
        assert_product(spec, x, factors)


@few_specs
@pytest.mark.parametrize("tokens", [6, MANY_TOKENS])
def test_memory_layout_of_the_factors_does_not_matter(spec, tokens):
    factors = {
        key: f.transpose(-1, -2).contiguous().transpose(-1, -2) if f.ndim > 1 else f
        for key, f in random_factors(spec).items()
    }
    assert_product(spec, normal(tokens, spec.in_features), factors)


@few_specs
def test_matmul_leaves_its_arguments_alone(spec):
    x, factors = normal(MANY_TOKENS, spec.in_features), random_factors(spec)
    spec.matmul(x, factors)
    spec.to_dense(factors)
    assert torch.equal(x, normal(MANY_TOKENS, spec.in_features))
    assert all(torch.equal(f, random_factors(spec)[key]) for key, f in factors.items())


@few_specs
@every_device
@pytest.mark.parametrize("tokens", [2, MANY_TOKENS])
def test_gradients_of_matmul(spec, tokens, device):
    x = normal(tokens, spec.in_features).to(device).requires_grad_()
    factors = on(device, random_factors(spec))
    names = list(spec.factor_shapes())
    values = [factors[name].requires_grad_() for name in names]

    def product(x: Tensor, *values: Tensor) -> Tensor:
        return spec.matmul(x, {**factors, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(product, (x, *values), fast_mode=tokens > 2)


@few_specs
def test_gradients_of_to_dense(spec):
    factors = random_factors(spec)
    names = list(spec.factor_shapes())
    values = [factors[name].requires_grad_() for name in names]

    def dense(*values: Tensor) -> Tensor:
        return spec.to_dense({**factors, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(dense, tuple(values))


@every_spec
def test_num_params_counts_the_factors(spec):
    factors = spec.init()
    assert {key: tuple(f.shape) for key, f in factors.items()} == spec.tensor_shapes()
    assert all(factors[key].is_floating_point() for key in spec.factor_shapes())
    assert all(factors[key].dtype == torch.int64 for key in spec.index_shapes())
    assert spec.num_params == sum(factors[key].numel() for key in spec.factor_shapes())
    assert spec.to_dense(factors).shape == (spec.out_features, spec.in_features)


@every_spec
def test_num_multiplications_counts_the_product_of_many_tokens(spec):
    """Few tokens may multiply element by element, which torch's counter does not see."""
    x, factors = normal(40, spec.in_features), random_factors(spec)
    with FlopCounterMode(display=False) as counter:
        spec.matmul(x, factors)
    assert counter.get_total_flops() == 2 * 40 * spec.num_multiplications


@every_spec
def test_json_round_trip(spec):
    read = spec_from_json(json.loads(json.dumps(spec.to_json())))
    assert read == spec
    assert type(read) is type(spec)
    assert hash(read) == hash(spec)


@every_structure
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_budget_is_kept_and_used(name, data):
    structure = STRUCTURES[name]
    options = data.draw(st.sampled_from(structure.example_options))
    m, n = data.draw(st.integers(7, 90)), data.draw(st.integers(7, 90))
    step = data.draw(st.integers(1, 9))
    params = data.draw(st.integers(-1, 3 * m * n))
    try:
        spec = structure.for_budget(m, n, params, step=step, **options)
    except StructureError as error:
        assert str(params) in str(error)
        # A budget that is refused is refused for its size: some larger one is taken.
        smallest = structure.for_budget(m, n, 100 * m * n, step=step, **options)
        assert smallest.num_params > params or params < 0
        return
    assert (spec.out_features, spec.in_features) == (m, n)
    assert spec.num_params <= params
    following = spec.larger(step)
    assert following is None or following.num_params > params


@few_specs
@every_device
@pytest.mark.parametrize("exponent", [-9, -1, 0, 1, 2, 7])
def test_scaled_factors_scale_the_matrix(spec, exponent, device):
    factors = on(device, random_factors(spec))
    scaled = spec.scaled(factors, exponent)
    spec.check(scaled)
    assert torch.equal(spec.to_dense(scaled), spec.to_dense(factors) * 2.0**exponent)


@every_structure
def test_budget_needs_no_options(name):
    spec = STRUCTURES[name].for_budget(64, 48, 64 * 48 // 2)
    assert 0 < spec.num_params <= 64 * 48 // 2


@every_structure
@pytest.mark.parametrize("step", [0, -1, 1.5, True])
def test_budget_refuses_a_bad_step(name, step):
    with pytest.raises(StructureError, match="step"):
        STRUCTURES[name].for_budget(64, 48, 1000, step=step)


@few_specs
@every_device
@every_dtype
def test_init_is_seeded_and_typed(spec, dtype, device):
    once, again, other = (spec.init(seed=seed, dtype=dtype, device=device) for seed in (3, 3, 4))
    assert all(once[key].dtype == dtype for key in spec.factor_shapes())
    assert {f.device.type for f in once.values()} == {device}
    # The numbers are the seed's on every device.
    assert all(torch.equal(f.cpu(), spec.init(seed=3, dtype=dtype)[key]) for key, f in once.items())
    with float64_by_default():
        by_default = spec.init(seed=3, dtype=dtype)
    assert all(torch.equal(f.cpu(), by_default[key]) for key, f in once.items())
    assert all(torch.equal(f, again[key]) for key, f in once.items())
    assert not all(torch.equal(f, other[key]) for key, f in once.items())


@few_specs
def test_init_ignores_the_global_generator(spec):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    spec.init(seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@every_structure
@pytest.mark.parametrize("params", [math.nan, math.inf, "1000", None, True])
def test_a_budget_that_is_no_number_is_refused(name: str, params: object) -> None:
    with pytest.raises(StructureError, match="params must be a number of parameters, but is"):
        STRUCTURES[name].for_budget(64, 48, params)  # type: ignore[arg-type]


@every_structure
@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize(("m", "n"), [(48, 64), (64, 30)])
def test_init_has_the_scale_of_a_linear_layer(name, share, m, n):
    for spec in specs_of(name, m, n, share):
        seeds = range(0, 500, 5)
        squares = [spec.to_dense(spec.init(seed=seed)).square().mean() for seed in seeds]
        std = math.sqrt(sum(map(float, squares)) / len(squares))
        assert std * math.sqrt(n) == pytest.approx(1.0, rel=0.08)


@few_specs
@pytest.mark.parametrize("tokens", [4, MANY_TOKENS])
def test_meta_device(spec, tokens):
    factors = spec.init(device="meta", dtype=torch.bfloat16)
    assert all(f.is_meta for f in factors.values())
    assert all(factors[key].dtype == torch.bfloat16 for key in spec.factor_shapes())
    assert {key: tuple(f.shape) for key, f in factors.items()} == spec.tensor_shapes()
    x = torch.empty(2, tokens, spec.in_features, device="meta", dtype=torch.bfloat16)
    assert spec.matmul(x, factors).shape == (2, tokens, spec.out_features)
    assert spec.to_dense(factors).shape == (spec.out_features, spec.in_features)
    assert spec.to_dense(factors).is_meta


@few_specs
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "2", None])
@pytest.mark.parametrize("field", ["out_features", "in_features", "rank"])
def test_sizes_must_be_positive_whole_numbers(spec, field, value):
    types = {f.name: f.type for f in dataclasses.fields(spec)}
    # A field that may be None says so in its type.
    if field in types and not (value is None and "None" in str(types[field])):
        with pytest.raises(StructureError, match=field):
            dataclasses.replace(spec, **{field: value})


@few_specs
@pytest.mark.parametrize("change", [-1, 1])
def test_input_width_is_checked(spec, change):
    width = spec.in_features + change
    with pytest.raises(StructureError, match=str(spec.in_features)):
        spec.matmul(normal(3, width), random_factors(spec))
    with pytest.raises(StructureError):
        spec.matmul(torch.tensor(1.0, dtype=torch.float64), random_factors(spec))


@few_specs
def test_factors_are_checked(spec):
    factors = random_factors(spec)
    spec.check(factors)
    first = next(iter(factors))
    wrong_shape = {**factors, first: factors[first][..., :-1]}
    missing = {key: f for key, f in factors.items() if key != first}
    extra = {**factors, "extra": normal(2, 2)}
    for wrong in (wrong_shape, missing, extra, {}):
        with pytest.raises(StructureError, match=first):
            spec.check(wrong)


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        "blast",
        {},
        {"structure": 3},
        {"structure": "none such"},
        {"structure": "lowrank"},
        {"structure": "lowrank", "out_features": 4, "in_features": 4},
        {"structure": "lowrank", "out_features": 4, "in_features": 4, "rank": 0},
        {"structure": "lowrank", "out_features": 4, "in_features": 4, "rank": 1, "more": 1},
        {"structure": "blast", "out_features": 4, "in_features": 4, "rank": 1},
        {"structure": "blast", "out_features": 4, "in_features": 4, "rank": 1, "blocks": None},
        {"structure": "blast", "out_features": 4, "in_features": 4, "rank": 1, "blocks": [2]},
        {"structure": "blast", "out_features": 4, "in_features": 4, "rank": 1, "blocks": [2, 5]},
        {"structure": "blast", "out_features": 4, "in_features": 4, "rank": 1, "blocks": [2, 2.0]},
        {"structure": "blast", "out_features": 4, "in_features": 4, "rank": 1, "blocks": "22"},
    ],
)
def test_json_that_describes_no_matrix_is_refused(values):
    with pytest.raises(StructureError):
        spec_from_json(values)


# Memory.


@every_spec
def test_nothing_is_read_before_it_is_written(spec):
    def everything() -> list[Tensor]:
        factors = {
            key: f.requires_grad_(f.is_floating_point()) for key, f in random_factors(spec).items()
        }
        found = [*spec.init(seed=2).values(), spec.to_dense(factors)]
        for tokens in (0, 3, MANY_TOKENS):
            x = normal(tokens, spec.in_features).requires_grad_()
            trained = [x, *(factors[key] for key in spec.factor_shapes())]
            y = spec.matmul(x, factors)
            found += [y, *torch.autograd.grad(y.square().sum(), trained, materialize_grads=True)]
        return found

    assert_alike_in_poisoned_memory(everything, rtol=1e-12, atol=1e-12)


@few_specs
def test_every_tensor_is_made_on_the_device_of_the_factors(spec):
    x, factors = normal(MANY_TOKENS, spec.in_features), random_factors(spec)

    def everything() -> list[Tensor]:
        products = [spec.matmul(x[:tokens], factors) for tokens in (3, MANY_TOKENS)]
        zeros = spec.zeros(dtype=torch.float32, device="cpu")
        return [*products, spec.to_dense(factors), *spec.init(seed=2).values(), *zeros.values()]

    expected = everything()
    with nothing_by_default():
        actual = everything()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@every_structure
@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
def test_what_lies_outside_the_matrix_never_shows_and_gets_no_gradient(name, tokens):
    for spec in example_specs(SHAPES):
        if spec.name != name:
            continue
        clean, x = random_factors(spec), normal(tokens, spec.in_features)
        hidden = hidden_entries(spec, clean)
        for poison in (1e30, -1e300):
            poisoned = {
                key: f.masked_fill(hidden[key], poison) if key in hidden else f
                for key, f in clean.items()
            }
            assert torch.equal(spec.to_dense(poisoned), spec.to_dense(clean)), spec
            assert torch.equal(spec.matmul(x, poisoned), spec.matmul(x, clean)), spec
        trained = {key: clean[key].requires_grad_() for key in hidden}
        spec.matmul(x, {**clean, **trained}).square().sum().backward()
        assert not any(f.grad[hidden[key]].any() for key, f in trained.items()), spec


# 9 rows in 5 blocks of 2 leave half a block over; 9 rows in 7 blocks of 2 leave whole blocks over.
@pytest.mark.parametrize("blocks", [(5, 4), (7, 7)])
def test_what_lies_outside_the_matrix_is_found(blocks):
    spec = Blast(9, 11, rank=3, blocks=blocks)
    (b1, b2), (p, q) = spec.blocks, spec.block_shape
    outside = {
        "U": torch.arange(b1 * p).view(b1, p, 1) >= 9,
        "V": torch.arange(b2 * q).view(b2, q, 1) >= 11,
        "S": torch.tensor([i * p >= 9 or j * q >= 11 for i in range(b1) for j in range(b2)]),
    }
    outside["S"] = outside["S"].view(b1, b2, 1)
    hidden = hidden_entries(spec, random_factors(spec))
    assert outside["U"].any() and outside["V"].any()
    for key, mask in outside.items():
        assert torch.equal(hidden[key], mask.expand_as(hidden[key])), key


# What is particular to BLAST.


@pytest.mark.parametrize("blocks", [(14, 1), (1, 12), (99, 99)])
def test_blast_refuses_more_blocks_than_rows_or_columns(blocks):
    with pytest.raises(StructureError, match="at most"):
        Blast(13, 11, rank=2, blocks=blocks)
    with pytest.raises(StructureError, match="at most"):
        Blast.for_budget(13, 11, 1000, blocks=blocks)


@pytest.mark.parametrize(
    "blocks",
    [
        0,
        -1,
        (0, 1),
        (1, -1),
        (1, 2, 3),
        (2,),
        (),
        True,
        *(2.5, None),
    ],
)
def test_blast_refuses_bad_blocks(blocks):
    with pytest.raises(StructureError, match="blocks"):
        Blast(13, 11, rank=2, blocks=blocks)


def test_blast_takes_one_number_for_square_blocks():
    assert Blast(13, 11, rank=2, blocks=3) == Blast(13, 11, rank=2, blocks=(3, 3))


def test_blast_takes_as_many_blocks_as_rows_and_columns():
    spec = Blast(13, 11, rank=2, blocks=(13, 11))
    assert spec.block_shape == (1, 1)
    assert_product(spec, normal(MANY_TOKENS, 11), random_factors(spec))


def padded_rows(matrix: Tensor, blocks: int, rows: int) -> Tensor:
    missing = blocks * rows - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing)).view(blocks, rows, -1)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (5, 7)])
def test_low_rank_is_blast_with_couplings_of_one(blocks):
    low_rank = LowRank(13, 11, rank=4)
    blast = Blast(13, 11, rank=4, blocks=blocks)
    factors = random_factors(low_rank)
    (b1, b2), (p, q) = blast.blocks, blast.block_shape
    same = {
        "U": padded_rows(factors["U"], b1, p),
        "S": torch.ones(b1, b2, 4, dtype=torch.float64),
        "V": padded_rows(factors["V"], b2, q),
    }
    torch.testing.assert_close(blast.to_dense(same), low_rank.to_dense(factors))
    for tokens in (3, MANY_TOKENS):
        x = normal(tokens, 11)
        torch.testing.assert_close(blast.matmul(x, same), low_rank.matmul(x, factors))


@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
def test_block_diagonal_is_blast_with_identity_couplings(tokens):
    blast = Blast(12, 20, rank=3, blocks=(4, 4))
    factors = random_factors(blast)
    factors["S"] = torch.eye(4, dtype=torch.float64)[:, :, None].expand(4, 4, 3)
    expected = torch.block_diag(*(factors["U"] @ factors["V"].mT))
    torch.testing.assert_close(blast.to_dense(factors), expected)
    x = normal(tokens, 20)
    torch.testing.assert_close(blast.matmul(x, factors), x @ expected.T)
