"""Every solver on every structure it fits: laws, oracles of their own, and hard inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn import Blast, FactorizationResult, LowRank, StructuredLinear, factorize
from blastnn.errors import FactorizationError
from blastnn.factorize import SOLVERS, automatic_table, shifted_target
from blastnn.structures import STRUCTURES, Structure

SHAPE = (18, 13)
SPECS: dict[str, Structure] = {
    "blast": Blast(*SHAPE, rank=4, blocks=(3, 2)),
    "lowrank": LowRank(*SHAPE, rank=4),
}
PAIRS = [
    (solver, name)
    for solver, module in SOLVERS.items()
    for name, structure in STRUCTURES.items()
    if structure in module.STRUCTURES
]


def weight_and_moment(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A random weight, and the second moment of random, correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator, dtype=dtype)
    x = torch.randn(200, SHAPE[1], generator=generator, dtype=dtype)
    x = x @ torch.randn(SHAPE[1], SHAPE[1], generator=generator, dtype=dtype)
    return weight, x.T @ x / len(x)


def own_error(weight: Tensor, result: FactorizationResult, spec: Structure, C: Tensor) -> float:
    """The relative error by numpy's eigendecomposition, sharing no code with the package."""
    values, vectors = np.linalg.eigh(C.double().numpy())
    root = vectors * np.sqrt(np.clip(values, 0, None))
    dense = spec.to_dense({k: v.double() for k, v in result.factors.items()}).numpy()
    exact = weight.double().numpy()
    return float(np.linalg.norm((exact - dense) @ root) / np.linalg.norm(exact @ root))


def test_every_structure_has_an_automatic_solver() -> None:
    assert set(automatic_table()) == set(STRUCTURES) == set(SPECS)
    assert "none" not in automatic_table().values()


@pytest.mark.parametrize(("solver", "structure"), PAIRS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reported_error_is_the_error(
    solver: str, structure: str, weighted: bool, dtype: torch.dtype
) -> None:
    if weighted and not SOLVERS[solver].USES_SECOND_MOMENT:
        pytest.skip("a data-free solver")
    weight, moment = weight_and_moment(1)
    weight, spec = weight.to(dtype), SPECS[structure]
    result = factorize(weight, spec, moment if weighted else None, solver)
    assert {f.dtype for f in result.factors.values()} == {dtype}
    expected = own_error(weight, result, spec, moment if weighted else torch.eye(SHAPE[1]))
    assert result.relative_error == pytest.approx(expected, rel=1e-5)
    again = factorize(weight, spec, moment if weighted else None, solver)
    assert all(torch.equal(result.factors[k], again.factors[k]) for k in result.factors)


@pytest.mark.parametrize(("solver", "structure"), PAIRS)
def test_scaled_input_gives_scaled_output(solver: str, structure: str) -> None:
    weight, _ = weight_and_moment(2, torch.float32)
    spec = SPECS[structure]
    once = spec.to_dense(factorize(weight, spec, solver=solver).factors)
    large = spec.to_dense(factorize(weight * 1024, spec, solver=solver).factors)
    torch.testing.assert_close(large / 1024, once, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rank=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    weighted=st.booleans(),
)
def test_als_is_never_worse_than_whitened_svd(
    sizes: tuple[int, int], blocks: tuple[int, int], rank: int, seed: int, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(sizes, generator=generator)
    x = torch.randn(3 * sizes[1], sizes[1], generator=generator, dtype=torch.float64)
    moment = x.T @ x / len(x) if weighted else None
    spec = Blast(*sizes, rank=rank, blocks=blocks)
    result = factorize(weight, spec, moment, sweeps=8)
    spectral = factorize(weight, LowRank(*sizes, rank=rank), moment)
    assert result.relative_error <= spectral.relative_error * (1 + 1e-4) + 1e-5
    assert all(np.isfinite(error) for _, error in result.history)


def test_svd_is_the_optimum() -> None:
    weight, moment = weight_and_moment(3)
    spec = SPECS["lowrank"]
    root = np.linalg.cholesky(moment.numpy())
    for given_moment, target in ((None, weight.numpy()), (moment, weight.numpy() @ root)):
        values = np.linalg.svd(target, compute_uv=False)
        best = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())
        assert factorize(weight, spec, given_moment).relative_error == pytest.approx(best, rel=1e-4)


def test_als_recovers_a_blast_matrix_and_beats_the_literal_algorithm() -> None:
    spec = Blast(48, 40, rank=6, blocks=(4, 4))
    target = spec.to_dense(spec.init(seed=5, dtype=torch.float64))
    ours = factorize(target, spec, sweeps=400)
    low_rank = factorize(target, LowRank(48, 40, rank=6))
    assert ours.relative_error < 0.05 < low_rank.relative_error
    noisy = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    literal = factorize(noisy, spec, solver="precgd")
    assert factorize(noisy, spec, sweeps=60).relative_error < literal.relative_error < 1


def test_without_momentum_a_sweep_never_increases_the_error() -> None:
    from blastnn.factorize.als import _disturbed, _spectral_start
    from blastnn.factorize.als_sweep import BlockProblem
    from blastnn.factorize.problem import prepare

    spec = Blast(*SHAPE, rank=4, blocks=(3, 2))
    weight, moment = weight_and_moment(4)
    problem = prepare(weight, moment)
    blocks = BlockProblem.build(problem, spec)
    state, last = _disturbed(_spectral_start(problem, spec), 0.5, 0), float("inf")
    for _ in range(15):
        state, error = blocks.sweep(state)
        assert error <= last * (1 + 1e-9)
        assert error == pytest.approx(blocks.error(state), rel=1e-6)
        last = error


@pytest.mark.parametrize(("solver", "structure"), PAIRS)
def test_zero_is_zero_and_damage_is_refused(solver: str, structure: str) -> None:
    spec = SPECS[structure]
    zero = factorize(torch.zeros(SHAPE), spec, solver=solver)
    assert zero.relative_error == 0
    assert not any(bool(factor.any()) for factor in zero.factors.values())
    for poison in (float("nan"), float("inf")):
        weight = torch.ones(SHAPE)
        weight[2, 3] = poison
        with pytest.raises(FactorizationError, match="1 NaN or infinite"):
            factorize(weight, spec, solver=solver)


@pytest.mark.parametrize(("solver", "structure"), PAIRS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_extreme_magnitudes(solver: str, structure: str, magnitude: float) -> None:
    weight, _ = weight_and_moment(6, torch.float32)
    spec = SPECS[structure]
    plain = factorize(weight, spec, solver=solver).relative_error
    extreme = factorize(weight * magnitude, spec, solver=solver)
    assert extreme.relative_error == pytest.approx(plain, rel=1e-2)


def test_hard_shapes_and_moments() -> None:
    row = torch.randn(1, 30)
    assert factorize(row, LowRank(1, 30, rank=3)).relative_error < 1e-5
    assert factorize(row, Blast(1, 30, rank=2, blocks=(1, 3))).relative_error < 1e-4
    weight, _ = weight_and_moment(7)
    large = factorize(weight, Blast(*SHAPE, rank=40, blocks=(2, 2)))
    assert large.relative_error < 1e-5
    assert factorize(torch.ones(SHAPE), SPECS["blast"]).relative_error < 1e-4
    x = torch.randn(3, SHAPE[1], dtype=torch.float64)
    singular = factorize(weight, SPECS["blast"], x.T @ x)
    assert singular.relative_error < 0.05
    assert all(bool(torch.isfinite(factor).all()) for factor in singular.factors.values())


def test_refusals() -> None:
    weight, moment = weight_and_moment(8)
    spec = SPECS["blast"]
    with pytest.raises(FactorizationError, match="data-free"):
        factorize(weight, spec, moment, "precgd")
    with pytest.raises(FactorizationError, match="unknown solver"):
        factorize(weight, spec, solver="magic")
    with pytest.raises(FactorizationError, match="does not fit"):
        factorize(weight, spec, solver="svd")
    with pytest.raises(FactorizationError, match="18 x 13"):
        factorize(weight.T, spec)
    with pytest.raises(FactorizationError, match="second moment must be"):
        factorize(weight, spec, moment[:5, :5])
    with pytest.raises(FactorizationError, match="no input reached"):
        factorize(weight, spec, torch.zeros_like(moment))
    with pytest.raises(FactorizationError, match="eigenvalue"):
        factorize(weight, spec, moment - 2 * moment.diagonal().mean() * torch.eye(SHAPE[1]))
    with pytest.raises(FactorizationError, match="floating point"):
        factorize(torch.ones(SHAPE, dtype=torch.int64), spec)


def test_shifted_target_is_the_least_squares_answer() -> None:
    generator = torch.Generator().manual_seed(9)
    weight, _ = weight_and_moment(9)
    x = torch.randn(400, SHAPE[1], generator=generator, dtype=torch.float64)
    seen = x + 0.3 * torch.randn(400, SHAPE[1], generator=generator, dtype=torch.float64)
    second, cross = seen.T @ seen, x.T @ seen
    expected = np.linalg.lstsq(seen.numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(shifted_target(weight, second, cross).numpy(), expected, rtol=1e-8)
    torch.testing.assert_close(shifted_target(weight, second, second), weight)


def test_structured_linear_from_a_dense_layer() -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(*reversed(SHAPE))
    layer = StructuredLinear.from_linear(dense, Blast(*SHAPE, rank=13, blocks=(3, 2)))
    x = torch.randn(5, 7, SHAPE[1])
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-3)
    assert {name for name, _ in layer.named_parameters()} == {"U", "S", "V", "bias"}
    layer(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.parameters())
    other = StructuredLinear(layer.spec)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match="shapes"):
        StructuredLinear.from_factors(SPECS["blast"], dict(layer.factors))
