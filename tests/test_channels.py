"""Kept rows or columns: which are kept, and with which numbers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from blastnn.errors import FactorizationError, StructureError
from blastnn.factorize import factorize
from blastnn.structures import Channels
from tests.matrices import independent_error, moment_of, normal


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("group", [1, 3])
def test_what_is_not_kept_is_zero(axis: str, group: int) -> None:
    spec = Channels(7, 8, 2, axis, group)
    dense = spec.to_dense(spec.init(seed=3, dtype=torch.float64))
    places = spec.init(seed=3)["places"]
    kept = [g * group + i for g in places.tolist() for i in range(group)]
    lines = dense if axis == "rows" else dense.T
    for index, line in enumerate(lines):
        assert bool(line.any()) == (index in kept)


@pytest.mark.parametrize("data", [True, False])
def test_one_column_less_is_the_best_one(data: bool) -> None:
    """Against all choices, each with its own least-squares numbers."""
    A, C = normal(6, 5), moment_of(5, 40) if data else None
    result = factorize(A, Channels(6, 5, 4), C, dtype=torch.float64)
    spec, errors = Channels(6, 5, 4), []
    for kept in combinations(range(5), 4):
        J = torch.tensor(kept)
        metric = torch.eye(5).double() if C is None else C
        W = A @ metric[:, J] @ torch.linalg.inv(metric[J][:, J])
        errors.append(independent_error(A, spec, {"W": W, "places": J}, C))
    asked = [
        factorize(A, spec, C, dtype=torch.float64, kept=torch.tensor(kept)).relative_error
        for kept in combinations(range(5), 4)
    ]
    assert asked == pytest.approx(errors, rel=1e-4)
    assert result.relative_error == pytest.approx(min(errors), rel=0.2)
    assert result.relative_error <= sorted(errors)[1] * 1.0001


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_the_strongest_groups_stay(axis: str, group: int) -> None:
    """One group is made strong in the metric of the inputs, not in its numbers."""
    A, x = normal(8, 8), normal(200, 8, seed=5)
    size = torch.ones(8).double()
    size[4 : 4 + group] = 100.0
    lines = A * size[:, None] if axis == "rows" else A
    C = (x if axis == "rows" else x * size).T @ (x if axis == "rows" else x * size) / 200
    result = factorize(lines, Channels(8, 8, 1, axis, group), C)
    assert result.factors["places"].tolist() == [4 // group]


def test_without_refit_the_numbers_are_the_weights() -> None:
    A, C = normal(6, 8), moment_of(8, 40)
    spec, kept = Channels(6, 8, 2, "columns", 2), torch.tensor([3, 1])
    factors = factorize(A, spec, C, dtype=torch.float64, kept=kept, refit=False).factors
    assert factors["places"].tolist() == [1, 3]
    assert torch.equal(factors["W"], A[:, [2, 3, 6, 7]])


@pytest.mark.parametrize("kept", [[0], [0, 0], [1, 8], [-1, 2], [0.0, 1.0]])
def test_what_is_no_choice_is_refused(kept: list[float]) -> None:
    with pytest.raises(FactorizationError, match="2 different numbers of groups below 8"):
        factorize(normal(6, 8), Channels(6, 8, 2), kept=torch.tensor(kept))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((4, 4, 5), "at most the 4 groups"),
        ((4, 4, 1, "depth"), "axis"),
        ((4, 4, 1, "rows", 0), "group"),
    ],
)
def test_specs_that_describe_nothing(values: tuple[object, ...], words: str) -> None:
    with pytest.raises(StructureError, match=words):
        Channels(*values)
