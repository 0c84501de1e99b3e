"""Closed forms for block structures: optimal where they say so, never rising elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn.errors import FactorizationError, StructureError
from blastnn.factorize import factorize, joint_low_rank
from blastnn.structures import (
    BLR2,
    Blast,
    BlockDiagonal,
    BlockLowRank,
    LowRank,
    Monarch,
    Structure,
    Sum,
)
from tests.matrices import describe, independent_error, moment_of, normal, random_factors


def correlated(n: int, samples: int = 0, seed: int = 3) -> tuple[np.ndarray, Tensor]:
    """Inputs ``(samples, n)`` that depend on each other, and their second moment."""
    samples = samples or 8 * n
    x = normal(samples, n, seed=seed) @ normal(n, n, seed=seed + 1) / n**0.5
    return x.numpy(), x.T @ x / samples


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root, unlike the library's Cholesky factor."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def tail(matrix: np.ndarray, rank: int) -> float:
    """The squared distance to the nearest matrix of this rank."""
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def cuts(size: int, blocks: int) -> list[slice]:
    """Blocks of ``ceil(size / blocks)``, the last ones cut off."""
    width = -(-size // blocks)
    return [slice(i * width, min((i + 1) * width, size)) for i in range(blocks)]


# projection


@pytest.mark.parametrize("blocks", [(3, 2), (4, 5), (5, 7), (1, 1)])
@pytest.mark.parametrize("rank", [1, 2])
def test_without_data_every_block_is_its_truncated_svd(blocks, rank):
    weight = normal(13, 17)
    result = factorize(weight, BlockLowRank(13, 17, rank, blocks))
    squared = sum(
        tail(weight.numpy()[rows, columns], rank)
        for rows in cuts(13, blocks[0])
        for columns in cuts(17, blocks[1])
    )
    assert result.relative_error == pytest.approx(squared**0.5 / float(weight.norm()), rel=1e-9)
    assert result.status.startswith("optimal")


@pytest.mark.parametrize("blocks", [(3, 2), (4, 5), (5, 7)])
def test_without_data_monarch_is_the_svd_of_strided_rows(blocks):
    weight = normal(13, 17)
    result = factorize(weight, Monarch(13, 17, 1, blocks))
    squared = sum(
        tail(weight.numpy()[start :: blocks[0], columns], 1)
        for start in range(blocks[0])
        for columns in cuts(17, blocks[1])
    )
    assert result.relative_error == pytest.approx(squared**0.5 / float(weight.norm()), rel=1e-9)


@pytest.mark.parametrize("kind", [BlockLowRank, Monarch])
def test_with_data_one_block_column_is_optimal(kind):
    weight, (_, moment) = normal(13, 10), correlated(10)
    result = factorize(weight, kind(13, 10, 2, (3, 1)), moment)
    whitened = weight.numpy() @ root(moment.numpy())
    rows = cuts(13, 3) if kind is BlockLowRank else [slice(i, None, 3) for i in range(3)]
    squared = sum(tail(whitened[part], 2) for part in rows)
    expected = squared**0.5 / float(np.linalg.norm(whitened))
    assert result.relative_error == pytest.approx(expected, rel=1e-5)


def test_with_data_full_diagonal_blocks_are_the_least_squares_fit():
    """Each block of rows regressed on the inputs that it may read."""
    weight, (x, moment) = normal(13, 11), correlated(11)
    spec = BlockDiagonal(13, 11, blocks=3)
    dense = spec.to_dense(factorize(weight, spec, moment).factors).numpy()
    outputs = x @ weight.numpy().T
    for rows, columns in zip(cuts(13, 3), cuts(11, 3), strict=True):
        fit, *_ = np.linalg.lstsq(x[:, columns], outputs[:, rows], rcond=None)
        np.testing.assert_allclose(dense[rows, columns], fit.T, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_diagonal_blocks_of_low_rank_are_optimal(weighted):
    weight = normal(12, 15)
    moment = correlated(15)[1] if weighted else torch.eye(15, dtype=torch.float64)
    spec = BlockDiagonal(12, 15, blocks=3, rank=2)
    error = factorize(weight, spec, moment if weighted else None).relative_error
    C, A = moment.numpy(), weight.numpy()
    squared = float(np.trace(A @ C @ A.T))
    for rows, columns in zip(cuts(12, 3), cuts(15, 3), strict=True):
        metric = root(C[columns, columns])
        whitened = A[rows] @ C[:, columns] @ np.linalg.inv(metric)
        # What a block can explain is what its best fit of that rank explains.
        squared -= float(np.linalg.norm(whitened) ** 2) - tail(whitened, 2)
    assert error == pytest.approx((squared / np.trace(A @ C @ A.T)) ** 0.5, rel=1e-4)


def test_converged_sweeps_leave_no_block_to_improve():
    weight, (_, moment) = normal(12, 12), correlated(12)
    spec = BlockLowRank(12, 12, 1, (2, 3))
    result = factorize(weight, spec, moment, sweeps=5000)
    assert result.status.startswith("converged")
    C, dense = moment.numpy(), spec.to_dense(result.factors).numpy()
    total = result.relative_error * np.linalg.norm(weight.numpy() @ root(C))
    for rows in cuts(12, 2):
        for columns in cuts(12, 3):
            gap = weight.numpy()[rows] - dense[rows]
            gap[:, columns] += dense[rows, columns]
            metric = root(C[columns, columns])
            whitened = gap @ C[:, columns] @ np.linalg.inv(metric)
            now = np.linalg.norm(whitened - dense[rows, columns] @ metric) ** 2
            assert now - tail(whitened, 1) < 1e-4 * total**2


@pytest.mark.parametrize("kind", [BlockLowRank, Monarch])
@pytest.mark.parametrize("weighted", [False, True])
def test_projection_recovers_its_own_kind(kind, weighted):
    spec = kind(13, 17, 2, (3, 4))
    weight = spec.to_dense(random_factors(spec))
    result = factorize(weight, spec, correlated(17)[1] if weighted else None)
    assert result.relative_error < 1e-7


# bases


@pytest.mark.parametrize("blocks", [(3, 4), (4, 2), (1, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_bases_recover_a_blr2_matrix(blocks, weighted):
    spec = BLR2(13, 17, 2, blocks)
    weight = spec.to_dense(random_factors(spec))
    result = factorize(weight, spec, correlated(17)[1] if weighted else None)
    assert result.relative_error < 1e-7


def test_bases_of_one_block_row_are_the_optimal_low_rank():
    """With ``b1 = 1`` a BLR^2 matrix is any matrix of rank ``r``."""
    weight, (_, moment) = normal(13, 17), correlated(17)
    result = factorize(weight, BLR2(13, 17, 3, (1, 4)), moment, sweeps=500)
    optimum = factorize(weight, LowRank(13, 17, 3), moment)
    assert result.relative_error == pytest.approx(optimum.relative_error, rel=1e-2)
    assert result.relative_error >= optimum.relative_error * (1 - 1e-6)


def test_full_couplings_fit_better_than_diagonal_ones_of_the_same_rank():
    weight, (_, moment) = normal(24, 20), correlated(20)
    full = factorize(weight, BLR2(24, 20, 4, (3, 3)), moment)
    diagonal = factorize(weight, Blast(24, 20, 4, (3, 3)), moment)
    assert full.relative_error < diagonal.relative_error


# alternate


@pytest.mark.parametrize("weighted", [False, True])
def test_alternation_recovers_low_rank_plus_block_diagonal(weighted):
    spec = Sum(30, 28, (LowRank(30, 28, 1), BlockDiagonal(30, 28, 7)))
    factors = random_factors(spec)
    factors["first_U"] *= 3
    weight = spec.to_dense(factors)
    result = factorize(weight, spec, correlated(28)[1] if weighted else None, rounds=500)
    assert result.history[0][1] > 0.05
    assert result.relative_error < 0.02


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_is_no_worse_than_either_part_alone(weighted):
    weight, moment = normal(24, 20), correlated(20)[1] if weighted else None
    parts = (LowRank(24, 20, 2), BlockDiagonal(24, 20, 4))
    alone = min(factorize(weight, part, moment).relative_error for part in parts)
    assert factorize(weight, Sum(24, 20, parts), moment).relative_error < alone


def test_both_orders_are_tried():
    """The better order is the same part first, wherever it stands in the sum."""
    weight = normal(24, 20)
    parts = (LowRank(24, 20, 1), BlockDiagonal(24, 20, 2))
    there, back = (factorize(weight, Sum(24, 20, pair)) for pair in (parts, parts[::-1]))
    assert there.relative_error == pytest.approx(back.relative_error, rel=1e-9)
    assert {there.status.split("; the ")[1], back.status.split("; the ")[1]} == {
        "first part went first",
        "second part went first",
    }


def test_a_part_that_iterates_can_be_added():
    weight = normal(24, 20, dtype=torch.float32)
    parts = (Blast(24, 20, 2, (2, 2)), Sum(24, 20, (LowRank(24, 20, 1), LowRank(24, 20, 1))))
    result = factorize(weight, Sum(24, 20, parts), correlated(20)[1], rounds=2)
    assert result.relative_error < factorize(weight, parts[0], correlated(20)[1]).relative_error


# Every solver here: the error never rises.

SPECS = [
    BlockLowRank(14, 11, 1, (3, 4)),
    Monarch(14, 11, 1, (4, 3)),
    BlockDiagonal(14, 11, 3, 2),
    BLR2(14, 11, 2, (3, 2)),
    Sum(14, 11, (LowRank(14, 11, 1), BlockDiagonal(14, 11, 4))),
]


@pytest.mark.parametrize("spec", SPECS, ids=describe)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    decay=st.floats(0, 2),
    samples=st.sampled_from([0, 4, 50]),
    double=st.booleans(),
)
def test_history_never_rises(spec: Structure, seed: int, decay: float, samples: int, double: bool):
    dtype = torch.float64 if double else torch.float32
    weight = normal(14, 11, seed=seed, dtype=dtype)
    moment = moment_of(11, samples, seed=seed + 1, decay=decay) if samples else None
    result = factorize(weight, spec, moment)
    errors = [error for _, error in result.history]
    seconds = [second for second, _ in result.history]
    assert errors == sorted(errors, reverse=True)
    assert seconds == sorted(seconds)
    if samples != 4:  # with a singular moment the damping, which history counts, is of some weight
        expected = independent_error(weight, spec, result.factors, moment)
        assert errors[-1] == pytest.approx(expected, rel=1e-3, abs=1e-6)


# Joint Rank-k


@pytest.mark.parametrize("weighted", [False, True])
def test_joint_rank_k_is_the_svd_of_the_stack(weighted):
    weights = [normal(m, 10, seed=m) for m in (8, 3, 12)]
    moment = correlated(10)[1] if weighted else None
    result = joint_low_rank(weights, 4, moment)
    metric = root(moment.numpy()) if moment is not None else np.eye(10)
    whitened = np.concatenate([weight.numpy() for weight in weights]) @ metric
    expected = (tail(whitened, 4) ** 0.5) / np.linalg.norm(whitened)
    assert result.relative_error == pytest.approx(expected, rel=1e-5)
    assert len({factors["V"].data_ptr() for factors in result.factors}) == 1
    for weight, factors, error in zip(weights, result.factors, result.errors, strict=True):
        spec = LowRank(*weight.shape, 4)
        spec.check(factors)
        assert error == pytest.approx(independent_error(weight, spec, factors, moment), rel=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_joint_rank_k_takes_any_scale_and_keeps_the_dtype(size):
    weights = [normal(m, 10, seed=m, dtype=torch.float32) * size for m in (8, 12)]
    result = joint_low_rank(weights, 10)
    assert all(f.dtype == torch.float32 for part in result.factors for f in part.values())
    assert result.relative_error < 1e-5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least one"),
        ([normal(3, 4), normal(3, 5)], "weight 1 is .3, 5."),
        ([normal(3, 4), normal(3, 4, dtype=torch.float32)], "weight 1 .*float32"),
        ([normal(4)], "weight 0"),
        ([normal(3, 4) * float("nan")], "NaN"),
    ],
)
def test_weights_that_do_not_stack_are_refused(weights, message):
    with pytest.raises(FactorizationError, match=message):
        joint_low_rank(weights, 2)


def test_joint_rank_k_refuses_a_bad_rank():
    with pytest.raises(StructureError, match="rank"):
        joint_low_rank([normal(3, 4)], 0)
