"""The parts of our own solver, each against a slow version that is obviously right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize import als_weighted, factorize, factorize_many, prepare
from blastnn.factorize.als_free import FreeSweep
from blastnn.factorize.als_pace import Schedule
from blastnn.factorize.als_state import (
    State,
    Sweeper,
    solve_rows,
)
from blastnn.factorize.als_weighted import WeightedSweep
from blastnn.factorize.scratch import Scratch
from blastnn.factorize.svd import approximate_low_rank, whitened_svd
from blastnn.kernels import native, normal_equations
from blastnn.kernels.normal_equations import descend
from blastnn.structures import Blast
from tests.matrices import independent_error, moment_of, normal
from tests.memory import CONTEXTS

SPECS = [
    Blast(24, 18, rank=5, blocks=(4, 3)),
    Blast(18, 24, rank=5, blocks=(3, 4)),
    Blast(23, 17, rank=4, blocks=(3, 4)),
    Blast(13, 29, rank=3, blocks=(2, 5)),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
both_kinds = pytest.mark.parametrize("weighted", [False, True], ids=["free", "weighted"])


def problem_of(spec: Blast, weighted: bool, seed: int = 0) -> tuple[Sweeper, State, Tensor]:
    """A sweeper in float64, random factors for it, and the moment it uses."""
    m, n = spec.out_features, spec.in_features
    moment = moment_of(n, 5 * n, seed=seed + 9, decay=0.5) if weighted else None
    problem = prepare(normal(m, n, seed=seed), moment)
    sweeper = (WeightedSweep if weighted else FreeSweep)([problem], spec)
    shapes = spec.factor_shapes()
    U, S, V = (normal(*shape, seed=seed + i)[None] for i, shape in enumerate(shapes.values()))
    U.view(-1, spec.rank)[m:] = 0.0  # rows of padding are zero at every solver's start, and stay so
    V.view(-1, spec.rank)[n:] = 0.0
    return sweeper, State(U, S, V), torch.eye(n).double() if moment is None else problem.moment


def loss(
    spec: Blast, sweeper: Sweeper, moment: Tensor, factors: dict[str, Tensor], penalty: float = 0.0
) -> Tensor:
    """The objective through the dense matrix, and those of all components one by one."""
    residual = sweeper.problems[0].weight - spec.to_dense(factors)
    value = ((residual @ moment) * residual).sum()
    if penalty:
        single = Blast(spec.out_features, spec.in_features, rank=1, blocks=spec.blocks)
        for k in range(spec.rank):
            component = single.to_dense({name: f[..., k, None] for name, f in factors.items()})
            value = value + penalty * ((component @ moment) * component).sum()
    return value


def gradients(
    spec: Blast, sweeper: Sweeper, moment: Tensor, state: State, penalty: float = 0.0
) -> tuple[dict[str, Tensor], float]:
    factors = {name: f.clone().requires_grad_() for name, f in state.one(0).items()}
    value = loss(spec, sweeper, moment, factors, penalty)
    value.backward()
    return {name: f.grad for name, f in factors.items()}, float(value.detach())


NO_PENALTY = [0.0]
EXACT = [1.0]


@pytest.mark.skipif(native.failure() is not None, reason="no C++ compiler")
@every_spec
def test_a_sweep_in_one_call_is_that_of_all_rows_one_step_after_the_other(spec, monkeypatch):
    m, n = spec.out_features, spec.in_features
    weights = [normal(m, n, seed=seed) for seed in (1, 2)]
    state = State(*(torch.cat(pair) for pair in zip(*_states(spec), strict=True)))
    omega, penalty = [1.3, 0.8], [1e-2, 3e-1]
    sweeper = FreeSweep([prepare(w.float(), None) for w in weights], spec)
    monkeypatch.setattr(sweeper, "_sweep", None)  # it is not called
    found = sweeper.sweep(state.to(torch.float32), omega, penalty)
    exact = FreeSweep([prepare(w, None) for w in weights], spec).sweep(state, omega, penalty)
    for mine, theirs in zip(found.state.tensors(), exact.state.tensors(), strict=True):
        assert mine.dtype == torch.float32
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-5 * scale)
    assert found.errors == pytest.approx(exact.errors, rel=1e-4)
    assert found.overlaps == pytest.approx(exact.overlaps, rel=1e-4)


def _states(spec: Blast) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [problem_of(spec, False, seed)[1].tensors() for seed in (1, 2)]


@pytest.mark.skipif(native.failure() is not None, reason="no C++ compiler")
def test_a_sweep_in_one_call_tells_that_a_matrix_has_no_factor():
    rows, V = normal(1, 2, 3, 8).float(), normal(1, 2, 4, 3, seed=1).float()
    U, S = normal(1, 2, 3, 3, seed=2).float(), normal(1, 2, 2, 3, seed=3).float()
    ways = EXACT, [1e-3], 1e-6, 2
    assert normal_equations.sweep_freely(rows, (U, S, V), *ways) is not None
    V[0, 0, 0, 0] = float("nan")
    assert normal_equations.sweep_freely(rows, (U, S, V), *ways) is None
    with pytest.raises(RuntimeError, match="do not fit together"):
        normal_equations.sweep_freely(rows, (U, S[:, :1], V), *ways)


@every_spec
@both_kinds
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_an_exact_sweep_ends_where_its_last_factor_has_no_gradient(spec, weighted, penalty):
    sweeper, state, moment = problem_of(spec, weighted)
    before, _ = gradients(spec, sweeper, moment, state, penalty)
    swept = sweeper.sweep(state, EXACT, [penalty])
    after, _ = gradients(spec, sweeper, moment, swept.state, penalty)
    # Without data V is last, or U for a wide matrix, which is solved transposed.
    wide = spec.out_features < spec.in_features
    last = "U" if weighted or wide else "V"
    assert float(after[last].norm()) < 1e-9 * float(before[last].norm())


@every_spec
@both_kinds
def test_the_error_of_a_sweep_is_that_of_its_factors(spec, weighted):
    sweeper, state, moment = problem_of(spec, weighted)
    for omega in (1.0, 1.3):
        swept, energy = sweeper.sweep(state, [omega], NO_PENALTY), sweeper.problems[0].energy
        _, value = gradients(spec, sweeper, moment, swept.state)
        expected = (value / energy) ** 0.5
        assert swept.errors[0] == pytest.approx(expected, rel=1e-9)
        assert sweeper.error(swept.state)[0] == pytest.approx(expected, rel=1e-9)
        _, penalised = gradients(spec, sweeper, moment, swept.state, penalty=1.0)
        assert swept.overlaps[0] == pytest.approx((penalised - value) / energy, rel=1e-9)


@every_spec
def test_products_that_are_too_large_to_keep_are_computed_again(spec, monkeypatch):
    sweeper, state, _ = problem_of(spec, weighted=True)
    kept = sweeper.sweep(state, EXACT, NO_PENALTY)
    monkeypatch.setattr(als_weighted, "KEEP_BYTES", 0)
    again = sweeper.sweep(state, EXACT, NO_PENALTY)
    assert again.errors == kept.errors
    pairs = zip(kept.state.tensors(), again.state.tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@both_kinds
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    spec=st.sampled_from(SPECS),
    omega=st.floats(0.2, 1.9),
    penalty=st.sampled_from([0.0, 1e-3, 0.1, 5.0]),
)
def test_a_sweep_never_raises_what_it_is_to_lower(weighted, seed, spec, omega, penalty):
    sweeper, state, moment = problem_of(spec, weighted, seed)
    before = float(loss(spec, sweeper, moment, state.one(0), penalty))
    for _ in range(3):
        state = sweeper.sweep(state, [omega], [penalty]).state
        found = float(loss(spec, sweeper, moment, state.one(0), penalty))
        assert found <= before * (1 + 1e-9)
        before = found


@every_spec
def test_an_identity_moment_changes_nothing_but_the_damping(spec):
    weight = normal(spec.out_features, spec.in_features)
    moment = torch.eye(spec.in_features, dtype=torch.float64)
    free = factorize(weight, spec, sweeps=200)
    weighted = factorize(weight, spec, moment, sweeps=200)
    # Two orders of the same exact steps: local minima may differ a little, not the quality.
    assert weighted.relative_error == pytest.approx(free.relative_error, rel=0.1)


@pytest.mark.parametrize("shape", [(48, 40), (40, 48)])
def test_without_noise_the_error_vanishes(shape):
    spec = Blast(*shape, rank=4, blocks=(4, 4))
    weight = spec.to_dense(spec.init(seed=0, dtype=torch.float64))
    result = factorize(weight, spec, sweeps=300)
    assert result.history[0][1] > 0.2
    assert result.relative_error < 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("m", "n"), [(64, 64), (96, 64)])
def test_no_local_minimum_stops_short_of_an_exact_target(m: int, n: int, seed: int) -> None:
    """Without a penalty of overlaps most of these end at an error of 0.1."""
    spec = Blast(m, n, rank=6, blocks=(8, 8))
    shapes = spec.factor_shapes().items()
    target = spec.to_dense({k: normal(*s, seed=10 * seed + i) for i, (k, s) in enumerate(shapes)})
    assert factorize(target, spec, sweeps=60).relative_error < 1e-3


def test_the_penalty_falls_to_what_keeps_components_apart() -> None:
    schedule = Schedule(sweeps=40)
    planned = [schedule.penalty(sweep, 0.3, 0.3) for sweep in range(40)]
    assert planned[0] == pytest.approx(schedule.penalty_start * 0.3**2)
    ratios = {round(b / a, 9) for a, b in zip(planned[:25], planned[1:26], strict=True)}
    assert len(ratios) == 1 and ratios.pop() < 1.0
    assert planned[26:] == [schedule.penalty_last * 0.3**2] * 14
    # It is never more than the error at the time is worth, and none where nothing is to be done.
    assert schedule.penalty(0, 0.3, 0.01) == pytest.approx(schedule.penalty_most * 1e-4)
    assert schedule.penalty(0, 1.0, 1.0) == schedule.penalty_largest
    assert schedule.penalty(0, 0.0, 0.0) == 0.0


def test_float32_descends_below_what_a_sweeps_own_error_can_tell():
    """What that has lost to rounding, 2e-3, must not look like a rise, and end the iteration."""
    target = Blast(256, 256, rank=8, blocks=(16, 16))
    shapes = target.factor_shapes()
    exact = target.to_dense(
        {k: normal(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    )
    spec = Blast(256, 256, rank=32, blocks=(16, 16))
    assert factorize(exact.double(), spec, sweeps=300).relative_error < 1e-4
    assert factorize(exact.float(), spec, sweeps=300).relative_error < 1e-4


@both_kinds
def test_the_randomised_start_of_larger_matrices_is_near_the_svd(weighted):
    weight = normal(200, 160) * torch.logspace(0, -1, 160)
    moment = moment_of(160, 800, decay=0.5) if weighted else None
    problem = prepare(weight, moment)
    P, Q = approximate_low_rank(problem, 20, seed=0)
    best, R, _ = whitened_svd(problem, 20)
    optimum = problem.objective_error(best @ R.T)
    found = problem.objective_error(P @ Q.T)
    assert optimum <= found <= 1.2 * optimum


@both_kinds
def test_a_batch_is_its_members(weighted):
    spec = Blast(24, 18, rank=5, blocks=(4, 3))
    weights = [normal(24, 18, seed=seed) for seed in range(3)]
    moments = [moment_of(18, 60, seed=seed) if weighted else None for seed in range(3)]
    together = factorize_many(weights, spec, moments, sweeps=12)
    for weight, moment, result in zip(weights, moments, together, strict=True):
        alone = factorize(weight, spec, moment, sweeps=12)
        assert result.relative_error == pytest.approx(alone.relative_error, rel=1e-9)
        assert len(result.history) == len(alone.history)
        expected = independent_error(weight, spec, result.factors, moment)
        assert result.relative_error == pytest.approx(expected, rel=1e-9)


def test_a_batch_may_be_a_tensor_with_one_moment_for_all():
    spec, moment = Blast(24, 18, rank=5, blocks=(4, 3)), moment_of(18, 60)
    weights = torch.stack([normal(24, 18, seed=seed, dtype=torch.float32) for seed in range(2)])
    results = factorize_many(weights, spec, moment, sweeps=5)
    for weight, result in zip(weights, results, strict=True):
        expected = independent_error(weight, spec, result.factors, moment)
        assert result.relative_error == pytest.approx(expected, rel=1e-6)


def test_a_zero_matrix_in_a_batch_leaves_the_others_alone():
    spec = Blast(24, 18, rank=5, blocks=(4, 3))
    weights = [normal(24, 18), torch.zeros(24, 18).double(), normal(24, 18, seed=1)]
    first, zero, last = factorize_many(weights, spec, sweeps=5)
    assert zero.relative_error == 0.0
    assert not spec.to_dense(zero.factors).any()
    assert 0.0 < first.relative_error < 1.0
    assert 0.0 < last.relative_error < 1.0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch_with_too_few_or_many_moments_is_refused(count):
    spec, moments = Blast(24, 18, rank=5, blocks=(4, 3)), [moment_of(18, 60)] * count
    with pytest.raises(FactorizationError, match="each of the 2 weights"):
        factorize_many([normal(24, 18), normal(24, 18, seed=1)], spec, moments)


def test_an_empty_batch_has_no_results():
    assert factorize_many([], Blast(24, 18, rank=5, blocks=(4, 3))) == []


def positive(*shape: int, seed: int = 0) -> Tensor:
    """Well-conditioned symmetric positive definite matrices."""
    root = normal(*shape[:-1], 3 * shape[-1], seed=seed)
    return root @ root.mT


def test_rows_are_solved():
    G, right = positive(2, 3, 5, 5), normal(2, 3, 7, 5, seed=1)
    notes: list[list[str]] = [[], []]
    solved = solve_rows(G, right, [0.0, 0.0], notes)
    torch.testing.assert_close(solved @ G, right)
    assert notes == [[], []]


def test_an_indefinite_normal_matrix_is_lifted_and_noted():
    G = positive(2, 3, 5, 5)
    G[1, 2] -= 1.5 * torch.linalg.eigvalsh(G[1, 2])[0] * torch.eye(5)
    notes: list[list[str]] = [[], []]
    solved = solve_rows(G, normal(2, 3, 7, 5), [0.0, 0.0], notes)
    assert solved.isfinite().all()
    assert notes[0] == []
    assert "not positive definite" in notes[1][0]


def test_couplings_descend_to_the_solution():
    W, right, start = positive(3, 6, 6), normal(3, 6, seed=1), normal(3, 6, seed=2)
    exact = torch.linalg.solve(W, right)
    torch.testing.assert_close(descend(W, right, start, 30), exact)

    def objective(x: Tensor) -> Tensor:
        return 0.5 * torch.einsum("kr,krt,kt->k", x, W, x) - (x * right).sum(-1)

    values = [objective(descend(W, right, start, steps)) for steps in range(5)]
    assert all((b < a).all() for a, b in zip(values, values[1:], strict=False))


def test_couplings_that_are_solved_already_stay():
    W, solution = positive(3, 6, 6), normal(3, 6, seed=2)
    right = (W @ solution[..., None])[..., 0]
    torch.testing.assert_close(descend(W, right, solution, 4), solution)
    assert descend(torch.zeros(2, 6, 6), torch.zeros(2, 6), torch.ones(2, 6), 4).eq(1).all()


def test_weighted_gram_is_the_sum_it_says():
    scales, gram = normal(2, 3, 4, 5), normal(3, 4, 5, 5, seed=1)
    expected = torch.einsum("kijr,ijrt,kijt->kirt", scales, gram, scales)
    scratch = Scratch()
    for _ in range(2):
        torch.testing.assert_close(scratch.weighted_gram(scales, gram[None]), expected)


def test_an_indefinite_normal_matrix_of_a_single_block_is_noted_too():
    """The solves for ``V`` have one normal matrix a problem, with no dimension of blocks."""
    G = positive(2, 5, 5)
    G[1] -= 1.5 * torch.linalg.eigvalsh(G[1])[0] * torch.eye(5)
    notes: list[list[str]] = [[], []]
    assert solve_rows(G, normal(2, 7, 5), [0.0, 0.0], notes).isfinite().all()
    assert notes[0] == []
    assert "not positive definite" in notes[1][0]


@pytest.mark.parametrize("seed", range(3))
def test_nearly_low_rank_weights_at_a_high_rank(seed):
    weight = normal(112, 1, seed=9) * 0 + 1 + 1e-4 * normal(112, 25, seed=seed)
    moment = normal(25, 25, seed=seed)
    spec = Blast(112, 25, rank=21, blocks=(1, 6))
    result = factorize(weight.float(), spec, moment @ moment.T)
    assert result.relative_error < 1e-3


def test_a_problem_of_a_batch_does_not_see_the_others():
    spec = Blast(48, 40, rank=6, blocks=(4, 4))
    easy = spec.to_dense(spec.init(seed=5, dtype=torch.float64))
    hard = normal(48, 40)
    alone = factorize(easy, spec, sweeps=60)
    together = factorize_many([easy, hard], spec, sweeps=60)[0]
    assert together.relative_error == pytest.approx(alone.relative_error, rel=1e-3, abs=1e-9)


# Numbers on both sides of a block of the kernels, with every way of sharing rows out.
SYSTEMS = [(1, 1, 1), (3, 5, 7), (2, 1, 33), (4, 49, 70), (1, 100, 96), (2, 130, 65), (5, 3, 300)]


@pytest.mark.parametrize(("count", "rows", "r"), SYSTEMS, ids=str)
def test_normal_equations_are_as_exact_as_torch_solves_them(count: int, rows: int, r: int):
    G = positive(count, r, r).float()
    right, ridge = normal(count, rows, r, seed=1).float(), torch.rand(count).tolist()
    exact_factor, _ = normal_equations.factor_plainly(G.double(), ridge)
    exact = normal_equations.solve_plainly(exact_factor, right.double())
    factor, failed = normal_equations.factor(G, ridge)
    solved = normal_equations.solve_factored(factor, right)
    plain = normal_equations.solve_plainly(normal_equations.factor_plainly(G, ridge)[0], right)
    assert not failed.any()
    assert factor.triu(1).count_nonzero() == 0
    torch.testing.assert_close(factor.double(), exact_factor, rtol=1e-5, atol=1e-5 * r**0.5)
    # Of few numbers the plain error can be nothing by luck: so some roundings more.
    allowed = 2.0 * (plain - exact).norm() + 4.0 * torch.finfo(torch.float32).eps * exact.norm()
    assert (solved - exact).norm() <= allowed


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_matrices_without_a_factor_are_told_apart(bad: float):
    G = positive(4, 80, 80).float()
    G[2, 70, 70] = bad
    _, failed = normal_equations.factor(G, [0.0] * 4)
    assert failed.tolist() == [False, False, True, False]


def test_normal_equations_do_not_depend_on_the_number_of_threads():
    G, right = positive(3, 200, 200).float(), normal(3, 150, 200).float()
    single = positive(1, 300, 300).float()
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            factor, _ = normal_equations.factor(G, [1.0] * 3)
            found.append(
                [
                    normal_equations.solve_factored(factor, right),
                    normal_equations.factor(single, [1.0])[0],
                    normal_equations.descend_couplings(G[:, None], G[:, None], *coupled(3), 2),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def coupled(count: int) -> tuple[Tensor, Tensor]:
    """Right sides and starts."""
    return normal(count, 1, 1, 200).float(), normal(count, 1, 1, 200, seed=1).float()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [1, 7, 16, 70])
def test_all_couplings_descend_at_once_as_one_by_one(r: int, steps: int):
    own, gram = positive(2, 3, r, r).float(), positive(2, 4, r, r, seed=1).float()
    right, start = normal(2, 3, 4, r, seed=2).float(), normal(2, 3, 4, r, seed=3).float()
    found = normal_equations.descend_couplings(own, gram, right, start, steps)
    doubles = [tensor.double() for tensor in (own, gram, right, start)]
    exact = normal_equations.descend_couplings(*doubles, steps)
    plain = descend(own[:, :, None] * gram[:, None], right, start, steps)
    assert (found - exact).norm() <= 2.0 * (plain - exact).norm() + 1e-6 * exact.norm()


def test_couplings_without_a_direction_stay():
    zero = torch.zeros(1, 2, 20, 20)
    start = normal(1, 2, 2, 20).float()
    found = normal_equations.descend_couplings(zero, zero, torch.zeros(1, 2, 2, 20), start, 3)
    assert torch.equal(found, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 16, 70])
def test_gram_matrices_are_weighted_by_couplings_as_they_say(r: int, dtype: torch.dtype):
    gram, scales = positive(2, 4, r, r).to(dtype), normal(2, 3, 4, r, seed=1).to(dtype)
    expected = torch.einsum("kijr,kjrt,kijt->kirt", scales, gram, scales)
    found = normal_equations.weighted_grams(gram, scales)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)
    mirrored = normal_equations.weighted_grams(gram.mT, scales.flip(1)).flip(1)
    torch.testing.assert_close(mirrored, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 16, 70])
def test_gram_matrices_are_scaled_from_both_sides_and_added(r: int, dtype: torch.dtype) -> None:
    gram, total = normal(2, 4, r, r).to(dtype), normal(2, 3, r, r, seed=1).to(dtype)
    left = normal(2, 3, 4, r, seed=2).to(dtype)
    right = normal(2, 4, 3, r, seed=3).to(dtype).transpose(1, 2)
    whole = normal(2, 3, r, seed=4).to(dtype)[:, :, None].expand(-1, -1, 4, -1)
    apart = normal(2, 3, r, 4, seed=5).to(dtype).mT
    for one, other in ((left, left), (left, whole), (whole, right), (apart, left), (left, apart)):
        found = total.clone()
        normal_equations.add_weighted_grams(gram, one, other, found)
        expected = total + torch.einsum("kabr,kbrt,kabt->kart", one, gram, other)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 16, 70])
def test_what_couplings_explain_is_summed_over_all_of_a_row(r: int, dtype: torch.dtype) -> None:
    own, gram = positive(2, 3, r, r).to(dtype), normal(2, 4, r, r, seed=1).to(dtype)
    rows, columns = normal(2, 4, 3, r, seed=2).to(dtype), normal(2, 3, r, 4, seed=3).to(dtype)
    for couplings in (rows.transpose(1, 2), columns.mT):
        expected = torch.einsum("kitr,kjtr,kijt->kir", own, gram, couplings)
        found = normal_equations.explained_by(own, gram, couplings)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 16, 70])
def test_products_are_summed_as_they_say(r: int, dtype: torch.dtype):
    products, factors = normal(2, 3, 4, 6, r).to(dtype), normal(2, 4, 6, r, seed=1).to(dtype)
    couplings, before = normal(2, 3, 4, r, seed=2).to(dtype), normal(2, 4, 6, r, seed=3).to(dtype)
    found = normal_equations.paired_sums(products, factors)
    torch.testing.assert_close(found, torch.einsum("kijqr,kjqr->kijr", products, factors))
    total = before.clone()
    normal_equations.add_coupled(products, couplings, total)
    expected = before + torch.einsum("kijqr,kijr->kjqr", products, couplings)
    torch.testing.assert_close(total, expected)


def test_each_problem_has_its_own_ridge_relative_to_its_own_diagonals():
    G = positive(2, 3, 5, 5).float() * torch.tensor([1.0, 100.0])[:, None, None, None]
    lower, _ = normal_equations.factor(G, [0.5, 2.0])
    mean = G.diagonal(dim1=-2, dim2=-1).mean(-1)
    lift = mean * torch.tensor([0.5, 2.0])[:, None]
    torch.testing.assert_close(lower @ lower.mT, G + lift[..., None, None] * torch.eye(5))


@both_kinds
@pytest.mark.parametrize("context", sorted(CONTEXTS))
def test_larger_matrices_do_not_notice_the_callers_context(weighted, context):
    """Of a size at which the start is drawn, and the sweep's products are the library's."""
    weight, spec = normal(200, 190, dtype=torch.float32), Blast(200, 190, rank=40, blocks=(2, 3))
    moment = moment_of(190, 400) if weighted else None
    expected = factorize(weight, spec, moment, sweeps=3)
    with CONTEXTS[context]():
        actual = factorize(weight.clone(), spec, moment, sweeps=3)
    assert actual.relative_error == expected.relative_error
    assert all(torch.equal(f, actual.factors[key]) for key, f in expected.factors.items())


def test_an_exact_problem_among_others_is_left_alone():
    exact = normal(24, 3, dtype=torch.float32) @ normal(3, 18, seed=1, dtype=torch.float32)
    spec = Blast(24, 18, rank=5, blocks=(4, 3))
    alone = factorize(exact, spec)
    together, other = factorize_many([exact, normal(24, 18, dtype=torch.float32)], spec)
    assert len(together.history) == len(alone.history) == 1
    assert together.relative_error < 1e-6 and together.status == alone.status
    assert len(other.history) == 41
