"""Block sparse plus low rank: what is particular to its structures and its solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.factorize import factorize
from blastnn.factorize.sparse_step import BlockRegression, Mask, scores
from blastnn.structures import LowRank, Pixelfly, SparseLowRank, Structure
from tests.matrices import describe, independent_error, moment_of, normal, random_factors

PADDED = [
    SparseLowRank(13, 11, rank=2, grid=(2, 3), kept=5),
    SparseLowRank(9, 11, rank=3, grid=(5, 4), kept=9),
    Pixelfly(13, 11, rank=2, grid=4, bands=1),
    Pixelfly(10, 31, rank=1, grid=7, bands=3),
]
padded_specs = pytest.mark.parametrize("spec", PADDED, ids=describe)


def by_hand(spec: SparseLowRank | Pixelfly, factors: dict[str, Tensor]) -> np.ndarray:
    """The definition, block by block."""
    (k1, k2), (p, q) = spec.block_counts, spec.block_shape
    padded = np.zeros((k1 * p, k2 * q))
    for block, place in zip(factors["B"], spec.block_places(factors).tolist(), strict=True):
        i, j = divmod(place, k2)
        padded[i * p : (i + 1) * p, j * q : (j + 1) * q] = block.numpy()
    sparse = padded[: spec.out_features, : spec.in_features]
    return sparse + factors["U"].numpy() @ factors["V"].numpy().T


# The structures.


@padded_specs
def test_the_dense_matrix_is_its_definition(spec):
    factors = random_factors(spec)
    np.testing.assert_allclose(spec.to_dense(factors).numpy(), by_hand(spec, factors), atol=1e-12)


@padded_specs
def test_the_product_is_one_graph(spec):
    factors, x = random_factors(spec), normal(5, spec.in_features)
    compiled = torch.compile(lambda x, f: spec.matmul(x, f), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, factors), spec.matmul(x, factors))


@pytest.mark.parametrize("seed", range(5))
def test_places_are_drawn_without_repetition(seed):
    spec = SparseLowRank(20, 30, rank=1, grid=(4, 5), kept=13)
    places = spec.init(seed=seed)["places"]
    assert len(set(places.tolist())) == 13
    assert 0 <= int(places.min()) <= int(places.max()) < 20
    assert not torch.equal(places, spec.init(seed=seed + 100)["places"])


def test_a_grid_is_stored_without_blocks_outside_the_matrix():
    spec = SparseLowRank(9, 10, rank=1, grid=(7, 4), kept=1)
    assert spec.grid == (5, 4)
    assert spec == SparseLowRank(9, 10, rank=1, grid=(5, 4), kept=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (14, 2)}, "at most 13"),
        ({"grid": (2, 12)}, "at most 11"),
        ({"grid": (2, 3, 1)}, "grid"),
        ({"grid": (0, 3)}, "grid"),
        ({"grid": None}, "grid"),
        ({"grid": True}, "grid"),
        ({"kept": 7}, "at most the 6 blocks"),
        ({"kept": 0}, "kept"),
    ],
)
def test_a_free_mask_that_does_not_fit_is_refused(changes, message):
    values = {"rank": 2, "grid": (2, 3), "kept": 5, **changes}
    with pytest.raises(StructureError, match=message):
        SparseLowRank(13, 11, **values)


@pytest.mark.parametrize("structure", [SparseLowRank, Pixelfly])
@pytest.mark.parametrize("share", [0, 1, -0.5, 2.0, True, "half"])
def test_a_share_outside_zero_and_one_is_refused(structure, share):
    with pytest.raises(StructureError, match="share"):
        structure.for_budget(64, 48, 1000, share=share)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_share_is_what_the_blocks_take(share):
    spec = SparseLowRank.for_budget(64, 48, 2000, share=share)
    in_blocks = spec.kept * 4 * 3
    assert in_blocks <= share * 2000 < in_blocks + 12
    assert spec.rank == (2000 - in_blocks) // (64 + 48)


BUTTERFLY = {
    0: ["x...", ".x..", "..x.", "...x"],
    1: ["xx..", "xx..", "..xx", "..xx"],
    2: ["xxx.", "xx.x", "x.xx", ".xxx"],
}


@pytest.mark.parametrize("bands", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (11, 4)])
def test_the_butterfly_pattern(bands, shape):
    pattern = Pixelfly(*shape, rank=1, grid=4, bands=bands).pattern
    expected = [
        (i, j) for i, row in enumerate(BUTTERFLY[bands]) for j, x in enumerate(row) if x == "x"
    ]
    assert list(pattern) == expected


def test_a_grid_that_is_no_power_of_two_is_a_corner():
    larger = Pixelfly(24, 24, rank=1, grid=8, bands=3).pattern
    corner = [(i, j) for i, j in larger if i < 6 and j < 6]
    assert list(Pixelfly(24, 24, rank=1, grid=6, bands=3).pattern) == corner


def test_the_butterfly_takes_the_most_bands_within_its_share():
    # 16 x 16 blocks of 4 x 4: t bands keep 16 (1 + t) blocks of 16 numbers.
    for share, bands in [(0.1, 0), (0.5, 1), (0.52, 2), (0.99, 4)]:
        budget = 1500 if bands < 4 else 2000
        assert Pixelfly.for_budget(64, 64, budget, share=share).bands == bands


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 14}, "at most 13"),
        ({"grid": (4, 5)}, "square"),
        ({"grid": 0}, "grid"),
        ({"bands": -1}, "bands"),
        ({"bands": 1.0}, "bands"),
        ({"bands": 3}, "has 2 bands"),
    ],
)
def test_a_butterfly_that_does_not_fit_is_refused(changes, message):
    values = {"rank": 2, "grid": 4, "bands": 1, **changes}
    with pytest.raises(StructureError, match=message):
        Pixelfly(13, 11, **values)


# The solver's half-step.


def root_of(moment: Tensor) -> np.ndarray:
    return np.linalg.cholesky(moment.numpy())


@padded_specs
def test_fitted_blocks_are_the_least_squares_solution(spec):
    residual, moment = normal(spec.out_features, spec.in_features), moment_of(spec.in_features, 60)
    mask = Mask(spec, spec.block_places(random_factors(spec)))
    fitted = BlockRegression.build(mask, moment).fit(residual).numpy()
    root, kept = root_of(moment), mask.dense().numpy()
    for row in range(spec.out_features):
        columns = np.flatnonzero(kept[row])
        expected, *_ = np.linalg.lstsq(root[columns].T, residual[row].numpy() @ root, rcond=None)
        np.testing.assert_allclose(fitted[row, columns], expected, atol=1e-9)
    assert not fitted[~kept].any()


def test_a_score_is_what_a_block_alone_gains():
    spec = SparseLowRank(9, 11, rank=1, grid=(2, 3), kept=1)
    residual, moment = normal(9, 11), moment_of(11, 60)
    root = root_of(moment)
    before = np.linalg.norm(residual.numpy() @ root) ** 2
    found = scores(residual, spec, moment)
    for place in range(6):
        mask = Mask(spec, torch.tensor([place]))
        rest = residual - BlockRegression.build(mask, moment).fit(residual)
        gain = before - np.linalg.norm(rest.numpy() @ root) ** 2
        assert float(found[place]) == pytest.approx(gain, rel=1e-9)


# The solver.


@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        SparseLowRank(48, 40, rank=3, grid=(8, 8), kept=10),
        SparseLowRank(47, 41, rank=2, grid=(8, 8), kept=8),
        Pixelfly(48, 40, rank=3, grid=8, bands=1),
    ],
    ids=describe,
)
def test_a_matrix_of_the_structure_is_recovered(spec, weighted, seed):
    truth = spec.init(seed=seed, dtype=torch.float64)
    moment = moment_of(spec.in_features, 200, decay=0.5) if weighted else None
    result = factorize(spec.to_dense(truth), spec, moment, sweeps=300)
    assert result.solver == "sparse"
    assert result.history[0][1] > 0.2
    assert result.relative_error < 1e-9
    assert torch.equal(spec.block_places(result.factors), spec.block_places(truth))


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(3, 24),
    n=st.integers(3, 24),
    rank=st.integers(1, 6),
    free=st.booleans(),
    kept=st.integers(1, 9),
    decay=st.floats(0, 2),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_error_never_rises(m, n, rank, free, kept, decay, weighted, seed):
    spec: Structure = Pixelfly(m, n, rank=rank, grid=3, bands=kept % 3)
    if free:
        spec = SparseLowRank(m, n, rank=rank, grid=(2, 3), kept=min(kept, 4))
    weight = normal(m, n, seed=seed) * torch.logspace(0, -decay, n, dtype=torch.float64)
    moment = moment_of(n, 5 * n, seed=seed + 1, decay=decay / 2) if weighted else None
    result = factorize(weight, spec, moment, sweeps=6)
    errors = [error for _, error in result.history]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(errors, errors[1:], strict=False))
    low_rank = factorize(weight, LowRank(m, n, rank=rank), moment)
    assert result.relative_error <= low_rank.relative_error * (1 + 1e-6) + 1e-6


def test_both_starts_are_tried():
    """Strong blocks hide the low rank from a start on the low rank, and the other way round."""
    spec = SparseLowRank(24, 24, rank=2, grid=(6, 6), kept=6)
    for blocks, low_rank in ((30.0, 1.0), (1.0, 30.0)):
        truth = spec.init(seed=3, dtype=torch.float64)
        truth = {**truth, "B": blocks * truth["B"], "U": low_rank * truth["U"]}
        assert factorize(spec.to_dense(truth), spec, sweeps=300).relative_error < 1e-9


def test_weighting_the_choice_of_blocks_pays():
    weight, moment = normal(48, 40), moment_of(40, 200, decay=1.5)
    spec = SparseLowRank(48, 40, rank=2, grid=(8, 8), kept=12)
    aware, blind = factorize(weight, spec, moment), factorize(weight, spec)
    same_blocks = Mask(spec, blind.factors["places"])
    low_rank = blind.factors["U"] @ blind.factors["V"].T
    refitted = BlockRegression.build(same_blocks, moment).fit(weight - low_rank)
    factors = {**blind.factors, "B": spec.split(refitted)[same_blocks.places]}
    assert aware.relative_error < 0.8 * independent_error(weight, spec, factors, moment)
    assert not torch.equal(aware.factors["places"], blind.factors["places"])
