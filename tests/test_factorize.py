"""What every solver promises, and what each of them promises beyond that."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize import (
    COUNTS,
    SOLVERS,
    FactorizationResult,
    automatic_table,
    choose_solver,
    explain_solver,
    factorize,
    factorize_many,
    shifted_target,
    solver_options,
)
from blastnn.structures import GBLR, STRUCTURES, Blast, Channels, LowRank, Structure, Sum
from tests.matrices import (
    every_device,
    independent_error,
    is_full,
    moment_of,
    normal,
    small_spec,
    specs_of,
)
from tests.memory import CONTEXTS, nothing_by_default, poisoned_memory

FITTING = [
    (solver, name)
    for (solver, module), (name, structure) in itertools.product(
        SOLVERS.items(), STRUCTURES.items()
    )
    if issubclass(structure, module.STRUCTURES)
]
every_pair = pytest.mark.parametrize(("solver", "structure"), FITTING)
data_aware_pair = pytest.mark.parametrize(
    ("solver", "structure"), [pair for pair in FITTING if SOLVERS[pair[0]].USES_SECOND_MOMENT]
)
# Each of them without data, and with data where the solver uses them.
with_and_without_data = pytest.mark.parametrize(
    ("solver", "structure", "weighted"),
    [
        (solver, structure, weighted)
        for solver, structure in FITTING
        for weighted in sorted({False, SOLVERS[solver].USES_SECOND_MOMENT})
    ],
)
# Algorithm 2 is kept as the paper has it, which promises no descent.
MAY_RISE = {"precgd"}
# als leaves its start, tells how its sweeps went, and returns the start if none was better.
MAY_RETURN_ITS_START = {"als"}
# Enough for a solver that iterates to get somewhere on a tiny matrix.
QUICK = {
    "als": {"sweeps": 8},
    "gd": {"steps": 40},
    "precgd": {"steps": 40},
    "sparse": {"sweeps": 8},
    "fit": {"steps": 15},
}


def quick(
    weight: Tensor,
    spec: Structure,
    moment: Tensor | None = None,
    solver: str = "auto",
    seed: int = 0,
) -> FactorizationResult:
    name = choose_solver(spec, solver)
    return factorize(weight, spec, moment, solver=solver, seed=seed, **QUICK.get(name, {}))


# Sizes that nothing divides, blocks that are not square, rows fewer than columns and the reverse.
ODD_SHAPES = [(23, 17), (11, 29)]


@with_and_without_data
@every_device
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_sizes_and_every_example_option(solver, structure, shape, weighted, device):
    """The error is that of the factors, no worse than the start or a zero matrix."""
    weight = normal(*shape, dtype=torch.float32).to(device)
    moment = moment_of(shape[1], 100, decay=1.0).to(device) if weighted else None
    specs = specs_of(structure, *shape, 0.5)
    assert specs
    for spec in specs:
        result = quick(weight, spec, moment, solver=solver)
        spec.check(result.factors)
        expected = independent_error(weight, spec, result.factors, moment)
        assert result.relative_error == pytest.approx(expected, rel=1e-6), spec
        assert all(math.isfinite(error) for _, error in result.history)
        if solver not in MAY_RISE:
            # What is returned was solved in float32, whose rounding both may differ by.
            assert result.relative_error <= result.history[0][1] * (1 + 1e-5), spec
            assert result.relative_error <= 1.0 + 1e-6, spec


@with_and_without_data
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_solver_stopped_early_is_not_worse_than_its_start(solver, structure, weighted, count):
    """An almost low-rank matrix, from which whatever moves boldly comes off worse at first."""
    low, noise = normal(24, 2, seed=1) @ normal(2, 20, seed=2), normal(24, 20, seed=3)
    moment = moment_of(20, 100, decay=1.0) if weighted else None
    options = {name: count for name in solver_options(solver) if name in COUNTS}
    for spec in specs_of(structure, 24, 20, 0.5):
        result = factorize(low + 1e-3 * noise, spec, moment, solver=solver, **options)
        start, end = result.history[0][1], result.history[-1][1]
        if solver not in MAY_RETURN_ITS_START:
            assert result.relative_error == pytest.approx(end, rel=1e-5, abs=1e-7), spec
        if solver not in MAY_RISE:
            assert result.relative_error <= start * (1 + 1e-5) + 1e-7, spec


def test_every_structure_has_a_solver():
    assert {name for _, name in FITTING} == set(STRUCTURES)
    assert set(automatic_table()) == set(STRUCTURES)
    assert all((solver, name) in FITTING for name, solver in automatic_table().items())


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_the_choice_of_a_solver_is_the_tables_and_says_why(name):
    chosen = automatic_table()[name]
    others = [solver for solver, structure in FITTING if structure == name and solver != chosen]
    explained = explain_solver(STRUCTURES[name])
    first, _, rest = explained.partition(". Passed over: ")
    assert first == f"{chosen} {SOLVERS[chosen].WHY}; it uses data"
    assert rest == "; ".join(f"{other} {SOLVERS[other].WHY}" for other in others)
    for spec in specs_of(name, 24, 20, 0.5):
        assert explain_solver(spec) == explained
        assert choose_solver(spec) == choose_solver(spec, weighted=True) == chosen
        assert all(choose_solver(spec, other) == other for other in others)
        assert factorize(torch.zeros(24, 20), spec).solver == chosen


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver_has_a_reason_of_its_own(solver):
    reasons = [module.WHY for module in SOLVERS.values()]
    assert reasons.count(SOLVERS[solver].WHY) == 1
    assert 10 < len(SOLVERS[solver].WHY) < 100
    assert "\n" not in SOLVERS[solver].WHY


def test_a_choice_that_ignores_data_says_so(monkeypatch):
    monkeypatch.setattr(SOLVERS["als"], "USES_SECOND_MOMENT", False)
    assert "; it cannot use data. Passed over: precgd" in explain_solver(Blast)


@every_pair
@every_device
def test_same_seed_same_bits(solver, structure, device):
    weight, spec = normal(24, 20, dtype=torch.float32).to(device), small_spec(structure, 24, 20)
    once, again = (quick(weight, spec, solver=solver, seed=3) for _ in range(2))
    assert all(torch.equal(f, again.factors[key]) for key, f in once.factors.items())
    assert once.relative_error == again.relative_error
    assert [error for _, error in once.history] == [error for _, error in again.history]


@every_pair
def test_the_global_generator_plays_no_part(solver, structure):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    torch.manual_seed(1)
    once, state = quick(weight, spec, solver=solver), torch.get_rng_state()
    torch.manual_seed(2)
    again = quick(weight, spec, solver=solver)
    assert all(torch.equal(f, again.factors[key]) for key, f in once.factors.items())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@every_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_nothing_is_read_before_it_is_written(solver, structure, dtype):
    weight, spec = normal(23, 17, dtype=dtype), small_spec(structure, 23, 17)
    moment = moment_of(17, 100) if SOLVERS[solver].USES_SECOND_MOMENT else None
    expected = quick(weight, spec, moment, solver=solver)
    with poisoned_memory():
        actual = quick(weight, spec, moment, solver=solver)
    assert all(torch.equal(f, actual.factors[key]) for key, f in expected.factors.items())
    assert [e for _, e in actual.history] == [e for _, e in expected.history]


@with_and_without_data
def test_every_tensor_is_made_on_the_device_of_the_weight(solver, structure, weighted):
    weight, spec = normal(23, 17, dtype=torch.float32), small_spec(structure, 23, 17)
    moment = moment_of(17, 100) if weighted else None
    expected = quick(weight, spec, moment, solver=solver)
    with nothing_by_default():
        actual = quick(weight, spec, moment, solver=solver)
    assert all(torch.equal(f, actual.factors[key]) for key, f in expected.factors.items())


@with_and_without_data
@pytest.mark.parametrize("context", sorted(CONTEXTS))
def test_the_context_of_the_caller_changes_nothing(solver, structure, weighted, context):
    spec = small_spec(structure, 33, 29)
    weight = normal(33, 29, dtype=torch.float32)
    moment = moment_of(29, 100) if weighted else None
    expected = quick(weight, spec, moment, solver=solver)
    with CONTEXTS[context]():
        actual = quick(weight.clone(), spec, moment, solver=solver)
    assert all(torch.equal(f, actual.factors[key]) for key, f in expected.factors.items())


@data_aware_pair
@pytest.mark.parametrize(
    "exponent",
    [
        -6,
        12,
        *(-40, -1, 1, 2, 3, 41),
    ],
)
def test_a_weight_scaled_by_a_power_of_two_gives_the_scaled_answer(solver, structure, exponent):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    plain = quick(weight, spec, solver=solver)
    scaled = quick(weight * 2.0**exponent, spec, solver=solver)
    assert [e for _, e in plain.history] == [e for _, e in scaled.history]
    assert torch.equal(spec.to_dense(plain.factors) * 2.0**exponent, spec.to_dense(scaled.factors))


@data_aware_pair
@pytest.mark.parametrize("exponent", [-20, 3, 20])
def test_the_scale_of_the_second_moment_does_not_matter(solver, structure, exponent):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    moment = moment_of(20, 100)
    plain = quick(weight, spec, moment, solver=solver)
    scaled = quick(weight, spec, moment * 2.0**exponent, solver=solver)
    assert all(torch.equal(f, scaled.factors[key]) for key, f in plain.factors.items())


@every_pair
@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relative_error_is_that_of_the_factors(solver, structure, dtype, device):
    weight, spec = normal(24, 20, dtype=dtype).to(device), small_spec(structure, 24, 20)
    result = quick(weight, spec, solver=solver)
    assert {f.device.type for f in result.factors.values()} == {device}
    expected = independent_error(weight, spec, result.factors)
    assert result.relative_error == pytest.approx(expected, rel=1e-9)
    assert result.solver == solver
    assert result.seconds > 0
    spec.check(result.factors)


@data_aware_pair
@pytest.mark.parametrize("samples", [200, 12], ids=["full", "singular"])
def test_relative_error_is_weighted_by_the_second_moment(solver, structure, samples):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20, 0.4)
    moment = moment_of(20, samples, decay=1.0)
    result = quick(weight, spec, moment, solver=solver)
    expected = independent_error(weight, spec, result.factors, moment)
    assert result.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert all(f.isfinite().all() for f in result.factors.values())


@data_aware_pair
def test_the_second_moment_is_worth_something(solver, structure):
    weight, spec = normal(24, 20), small_spec(structure, 24, 20, 0.4)
    # Features of different size that also depend on each other: blocks can use either.
    mixing = torch.linalg.qr(normal(20, 20, seed=5)).Q
    moment = mixing @ moment_of(20, 200, decay=1.5) @ mixing.T
    aware = quick(weight, spec, moment, solver=solver).relative_error
    blind = quick(weight, spec, solver=solver)
    # What has numbers to spare takes them to where the inputs are; a few numbers cannot go far.
    flexible = spec.num_params > 0.3 * 24 * 20
    factor = 0.8 if flexible else 1 + 1e-6
    assert aware <= factor * independent_error(weight, spec, blind.factors, moment)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_factors_have_the_dtype_of_the_weight(solver, structure, dtype):
    weight, spec = normal(24, 20, dtype=dtype), small_spec(structure, 24, 20)
    result = quick(weight, spec, solver=solver)
    assert {result.factors[key].dtype for key in spec.factor_shapes()} == {dtype}
    assert all(f.is_contiguous() for f in result.factors.values())
    assert not any(f.requires_grad for f in result.factors.values())


@every_pair
def test_factors_can_be_asked_for_in_another_dtype(solver, structure):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    options = QUICK.get(solver, {})
    result = factorize(weight, spec, solver=solver, dtype=torch.bfloat16, **options)
    assert {result.factors[key].dtype for key in spec.factor_shapes()} == {torch.bfloat16}
    expected = independent_error(weight, spec, result.factors)
    assert result.relative_error == pytest.approx(expected, rel=1e-9)


@every_pair
@pytest.mark.parametrize("layout", ["transposed", "parameter"])
def test_any_layout_of_the_weight_is_taken(solver, structure, layout):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    given_weight = weight.T.contiguous().T if layout == "transposed" else torch.nn.Parameter(weight)
    kept = weight.clone()
    result, expected = quick(given_weight, spec, solver=solver), quick(weight, spec, solver=solver)
    assert result.relative_error == pytest.approx(expected.relative_error, rel=1e-5)
    assert torch.equal(given_weight, kept)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_matrix_has_zero_factors(solver, structure, dtype):
    spec = small_spec(structure, 24, 20)
    result = quick(torch.zeros(24, 20, dtype=dtype), spec, solver=solver)
    spec.check(result.factors)
    assert all(result.factors[key].dtype == dtype for key in spec.factor_shapes())
    assert not spec.to_dense(result.factors).any()
    assert result.relative_error == 0.0


@every_pair
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_entries_are_solved_alike(solver, structure, size):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    plain, scaled = (quick(w, spec, solver=solver) for w in (weight, weight * size))
    assert all(f.isfinite().all() for f in scaled.factors.values())
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-3)
    dense = spec.to_dense(scaled.factors)
    assert float((dense - weight * size).double().norm()) == pytest.approx(
        scaled.relative_error * float((weight * size).double().norm()), rel=1e-3
    )


@every_pair
@pytest.mark.parametrize("large", [1e15, 1e30])
def test_tiny_and_huge_entries_side_by_side(solver, structure, large):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    weight[::2] *= 1e-30
    weight[1::4] *= large
    result = quick(weight, spec, solver=solver)
    assert all(f.isfinite().all() for f in result.factors.values())
    assert result.relative_error < 1


# Structures that hold every matrix of rank one.
HOLD_RANK_ONE = {
    *("blast", "lowrank", "blr", "monarch", "blr2", "gblr", "pixelfly", "sparse_lowrank", "sum")
}


@with_and_without_data
def test_a_constant_matrix(solver, structure, weighted):
    """Rank one, and every block of it the same: every normal matrix is singular."""
    weight, spec = torch.full((24, 20), 3.0), small_spec(structure, 24, 20)
    moment = moment_of(20, 100) if weighted else None
    result = quick(weight, spec, moment, solver=solver)
    assert all(f.isfinite().all() for f in result.factors.values())
    assert result.relative_error <= 1.0
    if structure in HOLD_RANK_ONE and solver not in ITERATIVE:
        assert result.relative_error < 1e-5


# Step-limited solvers promise no result after a few steps.
ITERATIVE = {"precgd", "gd", "fit"}


@every_pair
@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (1, 1), (2, 3)])
def test_thin_matrices(solver, structure, shape):
    weight = normal(*shape, dtype=torch.float32)
    for spec in specs_of(structure, *shape, 8.0):
        result = quick(weight, spec, solver=solver)
        spec.check(result.factors)
        assert all(f.isfinite().all() for f in result.factors.values())
        assert result.relative_error <= 1.0 or solver in ITERATIVE


# Specs that hold any matrix of 9 x 13. Not every structure has one: few numbers stay few.
UNIVERSAL = {
    name: [spec for share in (8.0, 12.0) for spec in specs_of(name, 9, 13, share) if is_full(spec)]
    for name in STRUCTURES
}


def test_low_rank_and_blast_can_hold_any_matrix():
    assert UNIVERSAL["lowrank"] and UNIVERSAL["blast"]


@data_aware_pair
@pytest.mark.parametrize("weighted", [False, True])
def test_a_rank_larger_than_the_matrix_is_exact(solver, structure, weighted):
    moment = moment_of(13, 60) if weighted else None
    weight = normal(9, 13, dtype=torch.float32)
    for spec in UNIVERSAL[structure]:
        result = quick(weight, spec, moment, solver=solver)
        assert result.relative_error < (0.7 if solver in ITERATIVE else 1e-5)
        assert all(f.isfinite().all() for f in result.factors.values())


@data_aware_pair
def test_a_weight_that_no_input_reaches_is_zero(solver, structure):
    """Columns of features that are never on: any answer is right, and zero is the cheapest."""
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    weight[:, :5] = 0.0
    moment = torch.diag(torch.tensor([1.0] * 5 + [0.0] * 15))
    result = quick(weight, spec, moment, solver=solver)
    assert result.relative_error == 0.0
    assert not spec.to_dense(result.factors).any()


@pytest.mark.parametrize("size", [1e308, 1e-300])
def test_second_moments_of_any_size(size):
    weight, moment = normal(24, 20), moment_of(20, 100)
    plain, scaled = (factorize(weight, LowRank(24, 20, 5), m) for m in (moment, moment * size / 9))
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-9)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "blast"}, "spec must be a structure"),
        ({"weight": [[1.0]]}, "must be a torch.Tensor"),
        ({"weight": torch.ones(24, 20, device="meta")}, "ordinary tensor"),
        ({"dtype": torch.int32}, "floating-point"),
        ({"dtype": "float16"}, "floating-point"),
        (
            {"weight": 1e300 * normal(24, 20), "dtype": torch.float32},
            "overflow",
        ),
        ({"sweeps": -1}, "sweeps must be"),
        ({"sweeps": 2.5}, "sweeps must be"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments, message):
    given = {"weight": normal(24, 20), "spec": Blast(24, 20, rank=2, blocks=2)} | arguments
    with pytest.raises(FactorizationError, match=message):
        factorize(**given)


@every_pair
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_damaged_weight_is_refused(solver, structure, bad):
    weight = normal(24, 20, dtype=torch.float32)
    weight[3, 4] = bad
    with pytest.raises(FactorizationError, match="weight.*1 NaN or infinite"):
        quick(weight, small_spec(structure, 24, 20), solver=solver)


@every_pair
@pytest.mark.parametrize("shape", [(20, 24), (24, 21), (24,), (1, 24, 20), (0, 20)])
def test_a_weight_of_another_shape_is_refused(solver, structure, shape):
    with pytest.raises(FactorizationError, match="24 x 20"):
        quick(torch.ones(shape), small_spec(structure, 24, 20), solver=solver)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_weight_that_is_not_floating_point_is_refused(dtype):
    with pytest.raises(FactorizationError, match="floating point"):
        factorize(torch.ones(24, 20, dtype=dtype), LowRank(24, 20, rank=2))


def damaged_moment(value: float) -> Tensor:
    moment = moment_of(20, 100)
    moment[2, 3] = value
    return moment


@data_aware_pair
@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(20, 20), "second moment.*zero"),
        (-torch.eye(20), "second moment.*negative"),
        (torch.diag(torch.tensor([-0.5] + [1.0] * 19)), "eigenvalue"),
        (torch.eye(19), "second moment.*20 x 20"),
        (torch.ones(20), "second moment"),
        (torch.ones(20, 24), "second moment"),
        (torch.eye(20, dtype=torch.int64), "second moment.*floating point"),
        (damaged_moment(math.nan), "second moment.*NaN"),
        (damaged_moment(math.inf), "second moment.*NaN or infinite"),
    ],
    ids=["zero", "negative", "indefinite", "small", "1-D", "wide", "integer", "nan", "inf"],
)
def test_a_bad_second_moment_is_refused(solver, structure, moment, message):
    with pytest.raises(FactorizationError, match=message):
        quick(normal(24, 20), small_spec(structure, 24, 20), moment, solver=solver)


@data_aware_pair
@pytest.mark.parametrize("rank_of_inputs", [1, 5, 19])
def test_a_singular_second_moment_is_taken(solver, structure, rank_of_inputs):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    moment = moment_of(20, rank_of_inputs)
    result = quick(weight, spec, moment, solver=solver)
    assert all(f.isfinite().all() for f in result.factors.values())
    assert result.relative_error < 1


@data_aware_pair
def test_tiny_and_huge_features_side_by_side(solver, structure):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    sizes = torch.ones(20, dtype=torch.float64)
    sizes[::2], sizes[1::4] = 1e-15, 1e15
    moment = sizes[:, None] * moment_of(20, 100) * sizes
    result = quick(weight, spec, moment, solver=solver)
    assert all(f.isfinite().all() for f in result.factors.values())
    expected = independent_error(weight, spec, result.factors, moment)
    assert result.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert result.relative_error < 1


@data_aware_pair
def test_features_without_input_are_taken(solver, structure):
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec(structure, 24, 20)
    moment = moment_of(20, 100)
    moment[5:9] = 0
    moment[:, 5:9] = 0
    result = quick(weight, spec, moment, solver=solver)
    assert all(f.isfinite().all() for f in result.factors.values())
    assert result.relative_error < 1


@pytest.mark.parametrize(
    "pair", [p for p in FITTING if not SOLVERS[p[0]].USES_SECOND_MOMENT], ids="-".join
)
def test_a_data_free_solver_refuses_a_second_moment(pair):
    solver, structure = pair
    with pytest.raises(FactorizationError, match="data-free"):
        quick(normal(24, 20), small_spec(structure, 24, 20), moment_of(20, 50), solver=solver)


def test_an_unknown_solver_is_refused():
    with pytest.raises(FactorizationError, match="none such.*als"):
        factorize(normal(4, 4), LowRank(4, 4, rank=1), solver="none such")


@pytest.mark.parametrize(
    "pair", sorted(set(itertools.product(SOLVERS, STRUCTURES)) - set(FITTING)), ids="-".join
)
def test_a_solver_for_other_structures_is_refused(pair):
    solver, structure = pair
    with pytest.raises(FactorizationError, match=f"{solver}.*does not fit"):
        factorize(normal(24, 20), small_spec(structure, 24, 20), solver=solver)


# svd: the optimum.


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (17, 13)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_is_the_truncated_svd(shape, rank):
    weight = normal(*shape)
    spec = LowRank(*shape, rank=rank)
    result = factorize(weight, spec)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    optimum = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(spec.to_dense(result.factors), optimum)
    error = float(values[rank:].norm() / values.norm())
    assert result.relative_error == pytest.approx(error, rel=1e-9)
    assert result.history[-1][1] == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (17, 13)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_weighted_svd_is_the_weighted_optimum(shape, rank):
    weight, moment = normal(*shape), moment_of(shape[1], 150, decay=0.5)
    spec = LowRank(*shape, rank=rank)
    result = factorize(weight, spec, moment)
    eigenvalues, vectors = np.linalg.eigh(moment.numpy())
    root = (vectors * np.sqrt(eigenvalues)) @ vectors.T
    left, values, right = np.linalg.svd(weight.numpy() @ root, full_matrices=False)
    optimum = (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(root)
    error = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
    assert error * (1 - 1e-9) <= result.relative_error <= error * (1 + 1e-6)
    dense = spec.to_dense(result.factors).numpy()
    assert np.linalg.norm(dense - optimum) <= 1e-3 * np.linalg.norm(optimum)


# als: at least as good as where it starts, and better than the reference.


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(3, 24),
    n=st.integers(3, 24),
    rank=st.integers(1, 8),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    decay=st.floats(0, 2),
    weighted=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_als_is_never_worse_than_its_start(m, n, rank, blocks, decay, weighted, double, seed):
    dtype = torch.float64 if double else torch.float32
    columns = torch.logspace(0, -decay, n, dtype=torch.float64)
    weight = (normal(m, n, seed=seed) * columns).to(dtype)
    moment = moment_of(n, 5 * n, seed=seed + 1, decay=decay / 2) if weighted else None
    result = factorize(
        weight, Blast(m, n, rank=rank, blocks=blocks), moment, solver="als", seed=seed, sweeps=6
    )
    low_rank = factorize(weight, LowRank(m, n, rank=rank), moment)
    start = result.history[0][1]
    assert start == pytest.approx(low_rank.relative_error, rel=1e-3, abs=1e-3)
    assert all(math.isfinite(error) for _, error in result.history)
    assert result.relative_error <= start * (1 + 1e-4) + 1e-6
    assert result.relative_error <= low_rank.relative_error * (1 + 1e-4) + 1e-5


@pytest.mark.parametrize("blocks", [(1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_als_is_optimal_for_one_row_or_column_of_blocks(blocks, weighted):
    """Such a BLAST matrix is any matrix of its rank, so that nothing is below the SVD."""
    # Large enough for a solver that iterates to stop above it.
    weight, spec = normal(160, 140), Blast(160, 140, rank=20, blocks=blocks)
    moment = moment_of(140, 600) if weighted else None
    result, best = (factorize(weight, s, moment) for s in (spec, LowRank(160, 140, rank=20)))
    assert result.relative_error == pytest.approx(best.relative_error, rel=1e-12)
    optimum = best.factors["U"] @ best.factors["V"].mT
    torch.testing.assert_close(spec.to_dense(result.factors), optimum)
    assert "optimal" in result.status


def test_als_history_never_rises_after_its_first_sweep():
    weight = normal(32, 24, dtype=torch.float32)
    result = factorize(weight, Blast(32, 24, rank=5, blocks=(4, 3)), moment_of(24, 100))
    errors = [error for _, error in result.history[1:]]
    seconds = [second for second, _ in result.history]
    assert errors == sorted(errors, reverse=True)
    assert seconds == sorted(seconds)
    assert errors[-1] < result.history[0][1]


def test_als_beats_low_rank_at_the_same_number_of_parameters():
    truth = Blast(48, 40, rank=6, blocks=(4, 4))
    weight = truth.to_dense(truth.init(seed=5)) + 0.01 * normal(48, 40, dtype=torch.float32)
    blast = Blast.for_budget(48, 40, 700, blocks=(4, 4))
    low_rank = LowRank.for_budget(48, 40, 700)
    assert factorize(weight, blast).relative_error < factorize(weight, low_rank).relative_error


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_als_recovers_a_blast_matrix(seed):
    spec = Blast(48, 40, rank=4, blocks=(4, 4))
    weight = spec.to_dense(spec.init(seed=seed, dtype=torch.float64))
    result = factorize(weight, spec, solver="als", sweeps=300)
    assert result.history[0][1] > 0.2
    assert result.relative_error < 1e-4


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_als_recovers_a_blast_matrix_from_weighted_inputs(seed):
    spec = Blast(30, 41, rank=3, blocks=(3, 4))
    weight = spec.to_dense(spec.init(seed=seed, dtype=torch.float64))
    moment = moment_of(41, 200, decay=0.5)
    result = factorize(weight, spec, moment, solver="als", sweeps=300)
    assert result.history[0][1] > 0.1
    assert result.relative_error < 1e-2


def test_als_beats_the_reference_on_average_in_a_third_of_its_steps():
    """Not on every matrix: both end in local minima, and a seed decides in which."""
    truth = Blast(64, 48, rank=12, blocks=(4, 4))
    spec = Blast(64, 48, rank=6, blocks=(4, 4))
    ours, reference = 0.0, 0.0
    for seed in range(8):
        noise = normal(64, 48, seed=seed, dtype=torch.float32) / 48**0.5
        weight = truth.to_dense(truth.init(seed=seed)) + 0.2 * noise
        ours += factorize(weight, spec, solver="als", sweeps=100).relative_error
        reference += factorize(weight, spec, solver="precgd").relative_error
    assert ours < reference


def test_the_reference_reduces_its_error():
    weight = normal(48, 40, dtype=torch.float32)
    spec = Blast(48, 40, rank=8, blocks=(4, 4))
    result = factorize(weight, spec, solver="precgd", steps=100)
    assert len(result.history) == 101
    assert result.history[0][1] == pytest.approx(1.0, abs=1e-3)
    assert result.history[-1][1] < 0.75
    assert result.relative_error == pytest.approx(result.history[-1][1], rel=1e-3)


def test_the_reference_depends_on_its_seed():
    weight, spec = normal(24, 20, dtype=torch.float32), small_spec("blast", 24, 20)
    once, other = (quick(weight, spec, solver="precgd", seed=seed) for seed in (0, 1))
    assert not torch.equal(once.factors["U"], other.factors["U"])


# Repairing earlier errors.


def test_the_shifted_target_is_the_weight_where_nothing_is_missing():
    weight, moment = normal(24, 20, dtype=torch.float32), moment_of(20, 100)
    target = shifted_target(weight, moment, torch.zeros(24, 20))
    assert target.dtype == torch.float64
    assert torch.equal(target, weight.double())


def test_the_shifted_target_is_the_least_squares_map():
    weight, x = normal(24, 20), normal(300, 20, seed=1)
    shifted = x + 0.3 * normal(300, 20, seed=2) + 0.1
    moment, cross = shifted.T @ shifted / 300, x.T @ shifted / 300
    target = shifted_target(weight, moment, weight @ (cross - moment))
    solution, *_ = np.linalg.lstsq(shifted.numpy(), (x @ weight.T).numpy(), rcond=None)
    np.testing.assert_allclose(target.numpy(), solution.T, rtol=1e-9, atol=1e-9)


def test_the_shifted_target_leaves_the_best_fit_unchanged():
    """Fitting the shifted target equals the true objective up to a constant."""
    weight, x = normal(10, 8), normal(200, 8, seed=1)
    shifted = x + 0.3 * normal(200, 8, seed=2)
    moment, missing = shifted.T @ shifted / 200, weight @ (x - shifted).T @ shifted / 200
    target = shifted_target(weight, moment, missing)

    def true_loss(dense: Tensor) -> float:
        return float((x @ weight.T - shifted @ dense.T).square().sum() / 200)

    def shifted_loss(dense: Tensor) -> float:
        return float((((target - dense) @ moment) * (target - dense)).sum())

    first, second = normal(10, 8, seed=3), normal(10, 8, seed=4)
    assert true_loss(first) - true_loss(second) == pytest.approx(
        shifted_loss(first) - shifted_loss(second), rel=1e-9
    )


def test_the_shifted_target_refuses_a_singular_moment():
    with pytest.raises(FactorizationError, match="damping"):
        shifted_target(normal(4, 6), torch.zeros(6, 6, dtype=torch.float64), moment_of(6, 20))


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        (Blast(12, 10, 3, (2, 2)), {"solver": ["als"]}, "unknown solver"),
        (Blast(12, 10, 3, (2, 2)), {"solver": "gd", "epsilon": "a"}, "epsilon .* must be float"),
        (Blast(12, 10, 3, (2, 2)), {"solver": "precgd", "epsilon": None}, "must be float"),
        (Blast(12, 10, 3, (2, 2)), {"solver": "gd", "schedule": 3}, "schedule"),
        (GBLR(12, 10, 3), {"nonzeros": "0.5"}, "nonzeros .* must be float"),
        (GBLR(12, 10, 3), {"nonzeros": True}, "nonzeros .* must be float"),
        (Channels(12, 10, 3), {"kept": [0, 1, 2]}, "kept .* must be Tensor"),
        (Channels(12, 10, 3), {"refit": "no"}, "refit .* must be bool"),
    ],
    ids=str,
)
def test_options_of_another_kind(spec, options, words):
    with pytest.raises(FactorizationError, match=words):
        factorize(normal(12, 10), spec, **options)


@pytest.mark.parametrize(
    ("weights", "moments"), [(None, None), (3, None), ([normal(12, 10)], 3)], ids=str
)
def test_many_of_what_is_no_matrix(weights, moments):
    with pytest.raises(FactorizationError, match="must be"):
        factorize_many(weights, LowRank(12, 10, 3), moments)


def test_no_rounds_leave_zero():
    spec = Sum.for_budget(12, 10, 60)
    result = factorize(normal(12, 10), spec, rounds=0)
    assert result.relative_error == 1.0
    assert [error for _, error in result.history] == [1.0]
