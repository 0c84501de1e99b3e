"""The block structures: what they contain, how they are cut, and what conversions keep."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures import (
    BLR2,
    Blast,
    BlockDiagonal,
    BlockLowRank,
    LowRank,
    Monarch,
    Structure,
    Sum,
    spec_from_json,
)
from blastnn.structures.convert import (
    CONVERSIONS,
    blast_to_blr2,
    monarch_permutation,
    monarch_to_blast,
    to_blast,
)
from blastnn.structures.regrid import refine, regrid
from tests.matrices import describe, example_specs, normal, random_factors

SHAPES = [(7, 7), (12, 20), (13, 11), (31, 9), (8, 37)]
CONVERTIBLE = [spec for spec in example_specs(SHAPES, (0.4, 1.5)) if type(spec) in CONVERSIONS]


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


# Conversions into BLAST.


@pytest.mark.parametrize("spec", CONVERTIBLE, ids=describe)
def test_conversion_to_blast_is_exact(spec):
    factors = random_factors(spec)
    blast, same = to_blast(spec, factors)
    blast.check(same)
    assert_same(blast.to_dense(same), spec.to_dense(factors))


@pytest.mark.parametrize("spec", CONVERTIBLE[::3], ids=describe)
@pytest.mark.parametrize("blocks", [(1, 1), (3, 2), (4, 7)])
def test_conversion_onto_another_grid_is_exact(spec, blocks):
    factors = random_factors(spec)
    blast, same = to_blast(spec, factors, blocks)
    assert blast.blocks == blocks
    assert_same(blast.to_dense(same), spec.to_dense(factors))


@pytest.mark.parametrize("blocks", [(1, 1), (5, 7), (13, 11)])
def test_low_rank_keeps_its_rank_on_any_grid(blocks):
    spec = LowRank(13, 11, rank=3)
    blast, same = to_blast(spec, random_factors(spec), blocks)
    assert blast == Blast(13, 11, rank=3, blocks=blocks)
    assert (same["S"] == 1).all()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (13, 11)])
@pytest.mark.parametrize(("rank", "expected"), [(None, 3), (2, 2)])
def test_block_diagonal_takes_the_rank_of_a_block(shape, rank, expected):
    spec = BlockDiagonal(*shape, blocks=4, rank=rank)
    assert to_blast(spec, random_factors(spec))[0] == Blast(*shape, rank=expected, blocks=(4, 4))


@pytest.mark.parametrize("blocks", [(3, 3), (2, 5), (5, 2), (1, 4)])
@pytest.mark.parametrize("t", [1, 2, 4])
def test_block_low_rank_takes_a_latin_square_of_slots(blocks, t):
    spec = BlockLowRank(12, 20, rank=t, blocks=blocks)
    blast, same = to_blast(spec, random_factors(spec))
    assert blast.rank == t * max(blocks)
    slots = same["S"].view(*blocks, max(blocks), t)
    assert (slots.sum(2) == 1).all()  # one slot for each block
    assert (slots.sum(0) <= 1).all()  # never twice in a block column
    assert (slots.sum(1) <= 1).all()  # never twice in a block row


def test_the_slots_of_the_papers_appendix_give_another_matrix():
    """A.1 selects slot ``j`` in block ``(i, j)``, which is ``u_ij v_jj^T``, not ``u_ij v_ij^T``."""
    spec = BlockLowRank(9, 9, rank=1, blocks=(3, 3))
    factors = random_factors(spec)
    u, v = factors["U"][..., 0], factors["V"][..., 0]  # (i, j, p)
    blast = Blast(9, 9, rank=3, blocks=(3, 3))
    printed = {
        "U": u.transpose(1, 2).contiguous(),
        "S": torch.eye(3, dtype=torch.float64).expand(3, 3, 3),
        "V": v.permute(1, 2, 0).contiguous(),
    }
    given_by_a1 = blast.to_dense(printed)
    for i in range(3):
        for j in range(3):
            block = given_by_a1[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            assert_same(block, torch.outer(u[i, j], v[j, j]))
    assert (given_by_a1 - spec.to_dense(factors)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("rank", "blocks"), [(2, (3, 4)), (5, (3, 2)), (5, (2, 3)), (3, (3, 3)), (4, (1, 6))]
)
def test_blr2_takes_its_rank_times_the_least_of_rank_and_blocks(rank, blocks):
    spec = BLR2(13, 19, rank=rank, blocks=blocks)
    factors = random_factors(spec)
    blast, same = to_blast(spec, factors)
    assert blast.rank == rank * min(rank, *blocks)
    assert_same(blast.to_dense(same), spec.to_dense(factors))


@pytest.mark.parametrize("blocks", [(1, 1), (3, 2), (5, 7)])
def test_blr2_contains_blast(blocks):
    spec = Blast(13, 11, rank=3, blocks=blocks)
    factors = random_factors(spec)
    full, same = blast_to_blr2(spec, factors)
    full.check(same)
    assert (full.rank, full.blocks) == (3, blocks)
    assert_same(full.to_dense(same), spec.to_dense(factors))


def test_a_sum_concatenates_along_the_rank():
    parts = LowRank(12, 20, rank=2), BlockDiagonal(12, 20, blocks=4, rank=1)
    spec = Sum(12, 20, parts)
    assert to_blast(spec, random_factors(spec))[0] == Blast(12, 20, rank=3, blocks=(4, 4))


@pytest.mark.parametrize(("one", "other"), [((2, 2), (3, 5)), ((5, 4), (7, 3)), ((13, 11), (2, 2))])
def test_a_sum_of_unlike_grids_is_exact(one, other):
    spec = Sum(13, 11, (Blast(13, 11, 2, one), Sum(13, 11, (Blast(13, 11, 1, other),) * 2)))
    factors = random_factors(spec)
    blast, same = to_blast(spec, factors)
    assert_same(blast.to_dense(same), spec.to_dense(factors))


def test_what_has_no_exact_conversion_is_refused():
    spec = Monarch(12, 20, rank=1, blocks=(2, 2))
    with pytest.raises(StructureError, match="monarch_to_blast"):
        to_blast(spec, random_factors(spec))
    with pytest.raises(StructureError, match="shapes"):
        to_blast(LowRank(12, 20, rank=2), random_factors(LowRank(12, 20, rank=3)))


# Refinement.


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_regrid_is_exact_on_any_grid(data):
    m, n = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    grid = st.tuples(st.integers(1, m), st.integers(1, n))
    spec = Blast(m, n, data.draw(st.integers(1, 3)), data.draw(grid))
    factors = random_factors(spec)
    other, same = regrid(spec, factors, data.draw(grid))
    other.check(same)
    assert_same(other.to_dense(same), spec.to_dense(factors))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_refinement_keeps_the_rank_where_blocks_divide(k):
    spec = Blast(24, 36, rank=3, blocks=(2, 3))
    factors = random_factors(spec)
    finer, same = refine(spec, factors, k)
    assert finer == Blast(24, 36, rank=3, blocks=(2 * k, 3 * k))
    assert_same(finer.to_dense(same), spec.to_dense(factors))


def test_refinement_needs_new_blocks_that_tile_the_old():
    # 11 rows: blocks of 6 become blocks of 3, although 4 does not divide 11.
    spec = Blast(11, 12, rank=2, blocks=(2, 2))
    factors = random_factors(spec)
    finer, same = refine(spec, factors, 2)
    assert finer.rank == 2
    assert_same(finer.to_dense(same), spec.to_dense(factors))
    # 13 rows: blocks of 7 would become blocks of 4, which straddle them.
    odd = Blast(13, 12, rank=2, blocks=(2, 2))
    with pytest.raises(StructureError, match=r"\(4, 3\) do not tile those of \(7, 6\).*rank 4"):
        refine(odd, random_factors(odd), 2)
    with pytest.raises(StructureError, match="at most 11"):
        refine(spec, factors, 6)
    with pytest.raises(StructureError, match="k must be"):
        refine(spec, factors, 0)


# Monarch.


MONARCHS = [
    Monarch(12, 20, rank=2, blocks=(4, 5)),
    Monarch(9, 11, rank=2, blocks=(4, 3)),
    Monarch(13, 7, rank=1, blocks=(6, 7)),
    Monarch(5, 9, rank=3, blocks=(5, 2)),
]
every_monarch = pytest.mark.parametrize("spec", MONARCHS, ids=describe)


@every_monarch
def test_monarch_has_strided_rows(spec):
    factors = random_factors(spec)
    (b1, b2), (_, q) = spec.blocks, spec.block_shape
    dense = spec.to_dense(factors)
    for row in range(spec.out_features):
        place, block = divmod(row, b1)
        parts = [factors["V"][block, k] @ factors["U"][block, k, place] for k in range(b2)]
        assert_same(dense[row], torch.cat(parts)[: spec.in_features])
    assert b2 * q >= spec.in_features


@every_monarch
def test_monarch_is_blast_with_permuted_rows(spec):
    factors = random_factors(spec)
    blast, same, permutation = monarch_to_blast(spec, factors)
    assert torch.equal(permutation, monarch_permutation(spec))
    assert permutation.shape == (spec.out_features,)
    assert permutation.unique().numel() == spec.out_features
    assert_same(blast.to_dense(same)[permutation], spec.to_dense(factors))


@pytest.mark.parametrize("kind", [BlockLowRank, Monarch])
@pytest.mark.parametrize(("m", "b1"), [(12, 4), (9, 4), (13, 6), (5, 5), (1, 1)])
def test_rows_are_split_and_joined_again(kind, m, b1):
    spec = kind(m, 7, rank=1, blocks=(b1, 2))
    matrix = normal(m, 3)
    rows = spec.split_rows(matrix)
    assert rows.shape == (b1, spec.block_shape[0], 3)
    assert torch.equal(spec.join_rows(rows), matrix)
    assert int((rows == 0).all(2).sum()) == spec.padded_shape[0] - m


# Block-diagonal: counts and budgets.


@settings(max_examples=100, deadline=None)
@given(m=st.integers(1, 60), n=st.integers(1, 60), params=st.integers(1, 4000))
def test_block_diagonal_takes_the_fewest_blocks_that_fit(m, n, params):
    sizes = {b: b * math.ceil(m / b) * math.ceil(n / b) for b in range(1, min(m, n) + 1)}
    fitting = [b for b, size in sizes.items() if size <= params]
    if not fitting:
        with pytest.raises(StructureError, match=str(params)):
            BlockDiagonal.for_budget(m, n, params)
        return
    spec = BlockDiagonal.for_budget(m, n, params)
    assert spec == BlockDiagonal(m, n, blocks=min(fitting))
    following = spec.larger()
    above = [size for b, size in sizes.items() if b < spec.blocks and size > sizes[spec.blocks]]
    assert (following and following.num_params) == (min(above) if above else None)


def test_block_diagonal_of_a_given_count_goes_from_low_rank_to_full():
    budget = {params: BlockDiagonal.for_budget(12, 20, params, blocks=4) for params in (32, 59, 60)}
    assert [spec.rank for spec in budget.values()] == [1, 1, None]
    assert budget[59].larger() == budget[60]
    assert budget[60].larger() is None
    assert BlockDiagonal(12, 20, blocks=4).larger() == BlockDiagonal(12, 20, blocks=3)
    assert BlockDiagonal(12, 20, blocks=1).larger() is None


def test_block_diagonal_takes_a_pair_of_equal_counts():
    assert BlockDiagonal(12, 20, blocks=(4, 4)) == BlockDiagonal(12, 20, blocks=4)
    with pytest.raises(StructureError, match=r"as many row blocks as column blocks.*\(4, 2\)"):
        BlockDiagonal.for_budget(12, 20, 100, blocks=(4, 2))
    with pytest.raises(StructureError, match="at most 12"):
        BlockDiagonal(12, 20, blocks=13)
    with pytest.raises(StructureError, match="fixed_blocks"):
        BlockDiagonal(12, 20, blocks=3, fixed_blocks="yes")


# Sums.


@dataclass(frozen=True)
class Rows(LowRank):
    """A low-rank matrix whose output rows are shuffled by an index factor."""

    name = "rows"

    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"places": (self.out_features,)}

    def matmul(self, x, factors):
        return super().matmul(x, factors)[..., factors["places"]]

    def to_dense(self, factors):
        return super().to_dense(factors)[factors["places"]]

    def init(self, **options):
        places = torch.arange(self.out_features).flip(0)
        return {**super().init(**options), "places": places}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_index_factors_of_the_parts_pass_through(order):
    parts = (Rows(12, 20, rank=2), LowRank(12, 20, rank=3))
    spec = Sum(12, 20, tuple(parts[i] for i in order))
    word = ("first_", "second_")[order.index(0)]
    assert spec.index_shapes() == {f"{word}places": (12,)}
    assert list(spec.tensor_shapes())[-1] == f"{word}places"
    factors = spec.init(seed=2)
    spec.check(factors)
    scaled = spec.scaled(factors, 3)
    spec.check(scaled)
    assert torch.equal(scaled[f"{word}places"], factors[f"{word}places"])
    x = normal(5, 20, dtype=torch.float32)
    torch.testing.assert_close(spec.matmul(x, factors), x @ spec.to_dense(factors).T)


def test_sums_nest_in_json():
    inner = Sum(12, 20, (BlockDiagonal(12, 20, blocks=4), Monarch(12, 20, rank=1, blocks=(3, 2))))
    spec = Sum(12, 20, (LowRank(12, 20, rank=2), inner))
    written = spec.to_json()
    assert written["parts"][1]["parts"][1]["structure"] == "monarch"
    assert spec_from_json(json.loads(json.dumps(written))) == spec
    assert list(spec.factor_shapes()) == [
        *("first_U", "first_V", "second_first_B", "second_second_U", "second_second_V")
    ]
    factors = random_factors(spec)
    first, second = spec.split(factors)
    assert_same(spec.to_dense(factors), spec.parts[0].to_dense(first) + inner.to_dense(second))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((LowRank(12, 20, rank=1),), "two specs"),
        ((LowRank(12, 20, rank=1), LowRank(20, 12, rank=1)), "20 x 12"),
        ((LowRank(12, 20, rank=1), "blast"), "must be a spec"),
        (None, "two specs"),
    ],
)
def test_parts_that_do_not_add_are_refused(parts, message):
    with pytest.raises(StructureError, match=message):
        Sum(12, 20, parts)


@pytest.mark.parametrize("parts", [None, "both", {}, [1, 2], [{"structure": "lowrank"}]])
def test_json_parts_that_are_no_specs_are_refused(parts):
    with pytest.raises(StructureError):
        spec_from_json({"structure": "sum", "out_features": 4, "in_features": 4, "parts": parts})


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 2])
def test_a_share_of_nothing_is_refused(share):
    with pytest.raises(StructureError, match="share"):
        Sum.for_budget(12, 20, 200, share=share)


def test_a_sum_keeps_its_budget_and_the_share_of_its_parts():
    spec = Sum.for_budget(64, 48, 1536, share=0.75)
    first, second = spec.parts
    assert isinstance(first, LowRank)
    assert isinstance(second, BlockDiagonal)
    assert second.num_params <= 0.25 * 1536 < replace(second, blocks=second.blocks - 1).num_params
    assert first.rank == (1536 - second.num_params) // (64 + 48)


# Fractional scaling, on which the initialisation of sums rests.


@pytest.mark.parametrize("spec", example_specs([(13, 11)], (0.8,)), ids=describe)
@pytest.mark.parametrize("exponent", [-0.5, 2.25])
def test_a_fractional_exponent_scales_the_matrix(spec: Structure, exponent: float):
    factors = random_factors(spec)
    scaled = spec.to_dense(spec.scaled(factors, exponent)).numpy()
    np.testing.assert_allclose(scaled, spec.to_dense(factors).numpy() * 2**exponent, rtol=1e-12)
