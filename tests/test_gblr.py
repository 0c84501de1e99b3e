"""Gaudi-GBLR: its masks, and the solver that finds them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn.errors import FactorizationError, StructureError
from blastnn.factorize import factorize
from blastnn.factorize.masked_least_squares import masked_least_squares
from blastnn.structures import GBLR, LowRank, cast_factors
from blastnn.structures.gblr import box_mask, smooth_mask
from tests.matrices import independent_error, moment_of, normal

SIZES = [1, 2, 7, 12, 31]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_by_hand(width: float, location: float, size: int, sigma: float) -> np.ndarray:
    """The formula as a plain inverse Fourier sum over positive and negative frequencies."""
    positions = np.arange(size)
    total = np.zeros(size, dtype=complex)
    for f in range(-((size - 1) // 2), size // 2 + 1):
        # np.sinc is sin(pi x) / (pi x).
        term = width * np.sinc(f * width) / np.sinc(f / size) * np.exp(-(f**2) / (2 * sigma**2))
        term *= np.exp(-2j * np.pi * f * location + 1j * np.pi * f * (1 / size - width))
        total += term * np.exp(2j * np.pi * f * positions / size)
    return total.real


def box_by_hand(start: int, count: int, size: int) -> list[float]:
    inside = {(start + k) % size for k in range(count)}
    return [float(t in inside) for t in range(size)]


# The masks.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sigma", [0.7, 2.0, 100.0])
def test_the_smooth_mask_is_its_formula(size, sigma):
    widths, locations = vector(1.0, 0.31, 0.77, 0.5), vector(0.0, 0.9, 0.123, -0.4)
    masks = smooth_mask(widths.clamp(min=1 / size), locations, size, sigma)
    for k in range(4):
        width = max(float(widths[k]), 1 / size)
        expected = mask_by_hand(width, float(locations[k]), size, sigma)
        np.testing.assert_allclose(masks[:, k].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_circular_intervals(size):
    pairs = [(start, count) for start in range(size) for count in range(1, size + 1)]
    starts, counts = (vector(*column) for column in zip(*pairs, strict=True))
    boxes = box_mask(counts / size, starts / size, size)
    for k, (start, count) in enumerate(pairs):
        assert boxes[:, k].tolist() == box_by_hand(start, count, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_sharp_limit_of_the_smooth_mask_is_the_box(size):
    widths = torch.arange(1, size + 1).double() / size
    locations = (3 * torch.arange(size) % size).double() / size
    smooth = smooth_mask(widths, locations, size, 1e6)
    torch.testing.assert_close(smooth, box_mask(widths, locations, size).double())


@settings(max_examples=100, deadline=None)
@given(
    width=st.floats(-2, 3), location=st.floats(-3, 3), size=st.integers(1, 40), sharp=st.booleans()
)
def test_any_numbers_make_a_mask(width, location, size, sharp):
    entry = (vector(width), vector(location), size)
    mask = box_mask(*entry) if sharp else smooth_mask(*entry, 3.0)
    assert mask.shape == (size, 1)
    covered = min(max(width, 1 / size), 1.0) * size
    # The zero frequency of a mask, its sum, is its width.
    assert float(mask.sum()) == pytest.approx(covered, abs=0.5 + 1e-9 if sharp else 1e-9)


def test_a_box_has_gradients_of_zero_and_a_smooth_mask_others():
    spec = GBLR(13, 11, rank=3)
    for sigma, moves in ((None, False), (2.0, True)):
        factors = {**spec.init(seed=1), "widths_out": torch.full((3,), 0.4)}
        factors = {name: f.requires_grad_() for name, f in factors.items()}
        GBLR(13, 11, rank=3, sigma=sigma).matmul(torch.ones(2, 11), factors).sum().backward()
        for name in ("widths_out", "locations_out"):
            assert bool(factors[name].grad.any()) == moves
        assert factors["U"].grad.any()


def test_the_first_factors_are_plain_low_rank():
    spec = GBLR(13, 11, rank=3)
    factors = spec.init(seed=1)
    torch.testing.assert_close(spec.to_dense(factors), factors["U"] @ factors["V"].T)
    assert spec.num_nonzero(factors) == spec.num_multiplications == 3 * (13 + 11)


def test_nonzeros_are_counted_in_the_boxes():
    spec = GBLR(13, 11, rank=2)
    factors = {
        "U": normal(13, 2),
        "V": normal(11, 2),
        "widths_out": vector(4 / 13, 0.0),
        "locations_out": vector(0.3, 0.6),
        "widths_in": vector(7 / 11, 2.0),
        "locations_in": vector(0.9, 0.0),
    }
    assert spec.num_nonzero(factors) == 4 + 1 + 7 + 11
    assert spec.num_nonzero(factors) == sum(int(m.sum()) for m in spec.masks(factors))


@pytest.mark.parametrize("sigma", [0, -1.0, math.nan, math.inf, "2"])
def test_a_bad_sigma_is_refused(sigma):
    with pytest.raises(StructureError, match="sigma"):
        GBLR(13, 11, rank=2, sigma=sigma)


# The solver.


@pytest.mark.parametrize("weighted", [False, True])
def test_masked_least_squares_is_the_exact_solution(weighted):
    A, Y, mask = normal(6, 9), normal(9, 2, seed=1), (normal(6, 2, seed=2) > -0.5).double()
    moment = moment_of(9, 60) if weighted else torch.eye(9, dtype=torch.float64)
    root = np.linalg.cholesky(moment.numpy())
    right, target = Y.T @ moment @ Y, A @ moment @ Y
    found = mask * masked_least_squares(normal(6, 2, seed=3), mask, None, right, target)
    for i in range(6):
        kept = np.flatnonzero(mask[i].numpy())
        design = root.T @ Y.numpy()[:, kept]
        expected, *_ = np.linalg.lstsq(design, root.T @ A[i].numpy(), rcond=None)
        np.testing.assert_allclose(found[i].numpy()[kept], expected, atol=1e-8)


def test_masked_least_squares_with_a_coupled_side_is_the_exact_solution():
    A, Y, mask = normal(6, 9), normal(6, 2, seed=1), (normal(9, 2, seed=2) > -0.5).double()
    moment = moment_of(9, 60)
    found = masked_least_squares(normal(9, 2, seed=3), mask, moment, Y.T @ Y, moment @ A.T @ Y)
    root = np.linalg.cholesky(moment.numpy())
    kept = np.flatnonzero(mask.numpy().ravel())
    # The residual (A - Y Z^T) L is linear in the entries of Z, here row by row.
    design = np.einsum("ik,jl->iljk", Y.numpy(), root).reshape(6 * 9, 18)[:, kept]
    expected, *_ = np.linalg.lstsq(design, (A.numpy() @ root).ravel(), rcond=None)
    np.testing.assert_allclose((mask * found).numpy().ravel()[kept], expected, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_without_a_budget_of_nonzeros_it_is_the_svd(weighted):
    weight, moment = normal(24, 20), moment_of(20, 100) if weighted else None
    spec = GBLR(24, 20, rank=5)
    result = factorize(weight, spec, moment)
    optimum = factorize(weight, LowRank(24, 20, rank=5), moment)
    assert result.solver == "masks"
    assert spec.num_nonzero(result.factors) == 5 * 44
    assert result.relative_error == pytest.approx(optimum.relative_error, rel=1e-9)


def boxed_matrix(spec: GBLR, width: float, seed: int) -> Tensor:
    boxes = {name: torch.full((spec.rank,), width).double() for name in ("widths_out", "widths_in")}
    for stream, name in enumerate(("locations_out", "locations_in")):
        boxes[name] = normal(spec.rank, seed=seed + stream) % 1.0
    return spec.to_dense({**spec.init(seed=seed, dtype=torch.float64), **boxes})


@pytest.mark.parametrize("weighted", [False, True])
def test_boxes_are_found_where_there_are_some(weighted):
    """On average: every run ends in a local minimum, and the matrix decides in which."""
    spec, errors, plain = GBLR(48, 40, rank=4), 0.0, 0.0
    moment = moment_of(40, 200, decay=0.5) if weighted else None
    for seed in (1, 11, 21, 31):
        weight = boxed_matrix(spec, 0.3, seed)
        result = factorize(weight, spec, moment, nonzeros=0.4)
        assert spec.num_nonzero(result.factors) <= 0.4 * 4 * 88
        errors += independent_error(weight, spec, result.factors, moment)
        plain += factorize(weight, LowRank(48, 40, rank=1), moment).relative_error
    assert errors < 0.5 * plain


@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(2, 24),
    n=st.integers(2, 24),
    rank=st.integers(1, 6),
    nonzeros=st.floats(0.5, 1),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_never_worse_than_fewer_ranks_of_equal_nonzeros(m, n, rank, nonzeros, weighted, seed):
    weight = normal(m, n, seed=seed)
    moment = moment_of(n, 5 * n, seed=seed + 1) if weighted else None
    spec = GBLR(m, n, rank=rank)
    budget = int(nonzeros * rank * (m + n))
    result = factorize(weight, spec, moment, seed=seed, steps=10, nonzeros=nonzeros)
    assert spec.num_nonzero(result.factors) <= budget
    fewer = (budget - 2 * rank) // max(1, m + n - 2)
    if fewer:
        plain = factorize(weight, LowRank(m, n, rank=fewer), moment)
        assert result.relative_error <= plain.relative_error * (1 + 1e-6) + 1e-9
    polish = [error for _, error in result.history[1:]]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(polish, polish[1:], strict=False))


def test_a_cast_moves_no_box():
    """300 entries are more than bfloat16 has digits for; the solver's boxes keep to a grid."""
    spec = GBLR(300, 12, rank=6)
    factors = factorize(normal(300, 12), spec, nonzeros=0.6, steps=20).factors
    exact = cast_factors(factors, torch.float64)
    assert int((spec.masks(exact)[0] == 0).sum()) > 0
    for dtype in (torch.bfloat16, torch.float16):
        cast = cast_factors(cast_factors(exact, dtype), torch.float64)
        for before, after in zip(spec.masks(exact), spec.masks(cast), strict=True):
            assert torch.equal(before, after)


def test_the_seed_opens_boxes_elsewhere():
    weight, spec = normal(24, 20), GBLR(24, 20, rank=5)
    once, other = (factorize(weight, spec, seed=s, nonzeros=0.6, steps=20) for s in (0, 1))
    assert not torch.equal(once.factors["locations_out"], other.factors["locations_out"])


@pytest.mark.parametrize("nonzeros", [0, -0.5, 1.5, math.nan, 0.01])
def test_a_bad_budget_of_nonzeros_is_refused(nonzeros):
    with pytest.raises(FactorizationError, match="nonzeros"):
        factorize(normal(24, 20), GBLR(24, 20, rank=5), nonzeros=nonzeros)
