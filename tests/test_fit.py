"""The generic fit: any structure, known to the library or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize import SOLVERS, automatic_table, choose_solver, factorize
from blastnn.structures import GBLR, STRUCTURES, Blast, Factors, LowRank, Structure
from blastnn.structures.base import seeded_normal
from tests.matrices import moment_of, normal


@dataclass(frozen=True)
class Circulant(Structure):
    """``A_ij = c_(i - j mod n)``: a structure that the library does not know."""

    name: ClassVar[str] = "circulant"

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"c": (self.in_features,)}

    def to_dense(self, factors: Factors) -> Tensor:
        i = torch.arange(self.in_features)
        return factors["c"][(i[:, None] - i[None, :]) % self.in_features]

    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        return x @ self.to_dense(factors).mT

    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        std = self.in_features**-0.5
        return {"c": std * seeded_normal((self.in_features,), seed, 0, dtype, device)}

    @classmethod
    def for_budget(cls, out_features: int, in_features: int, params: int, **options: Any) -> Self:
        return cls(out_features, in_features)

    def larger(self, step: int = 1) -> None:
        return None


def best_circulant(weight: Tensor, moment: Tensor) -> np.ndarray:
    """Its coefficients by linear least squares."""
    n, root = weight.shape[1], np.linalg.cholesky(moment.numpy())
    shifts = [np.roll(np.eye(n), k, axis=0) @ root for k in range(n)]
    design = np.stack([shift.ravel() for shift in shifts], axis=1)
    return np.linalg.lstsq(design, (weight.numpy() @ root).ravel(), rcond=None)[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_structure_of_ones_own_is_fitted(weighted):
    weight, spec = normal(12, 12), Circulant(12, 12)
    moment = moment_of(12, 60) if weighted else None
    result = factorize(weight, spec, moment)
    assert result.solver == "fit"
    assert "init" in result.status
    expected = best_circulant(weight, moment_of(12, 60) if weighted else torch.eye(12).double())
    # The solver damps the second moment by 1e-6 of its mean diagonal.
    tolerance = 1e-4 if weighted else 1e-6
    np.testing.assert_allclose(result.factors["c"].numpy(), expected, atol=tolerance)


def test_a_registered_structure_without_a_solver_of_its_own(monkeypatch):
    monkeypatch.setitem(STRUCTURES, "circulant", Circulant)
    assert automatic_table()["circulant"] == "fit"
    assert choose_solver(Circulant(4, 4), weighted=True) == "fit"


def test_every_other_solver_comes_first():
    assert list(SOLVERS)[-1] == "fit"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(24, 20), (13, 17)])
def test_from_a_random_start_it_reaches_the_optimum_of_low_rank(shape, weighted):
    weight, spec = normal(*shape), LowRank(*shape, rank=4)
    moment = moment_of(shape[1], 200, decay=0.5) if weighted else None
    result = factorize(weight, spec, moment, solver="fit", start="init", steps=400)
    optimum = factorize(weight, spec, moment, solver="svd")
    assert result.history[0][1] > 1.2 * optimum.relative_error
    assert result.relative_error == pytest.approx(optimum.relative_error, rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_it_improves_on_where_it_starts(weighted):
    weight, spec = normal(24, 20), Blast(24, 20, rank=4, blocks=(4, 4))
    moment = moment_of(20, 100) if weighted else None
    start = factorize(weight, spec, moment)
    result = factorize(weight, spec, moment, solver="fit", steps=60)
    assert start.solver in result.status
    assert result.history[0][1] == pytest.approx(start.relative_error, rel=1e-3)
    assert result.relative_error < start.relative_error
    assert result.relative_error == pytest.approx(result.history[-1][1], rel=1e-5)


@pytest.mark.parametrize("start", ["auto", "init"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_never_rises(start, dtype):
    weight, spec = normal(24, 20, dtype=dtype), Blast(24, 20, rank=3, blocks=(3, 2))
    result = factorize(weight, spec, moment_of(20, 100), solver="fit", start=start, steps=40)
    seconds, errors = zip(*result.history, strict=True)
    assert list(errors) == sorted(errors, reverse=True)
    assert list(seconds) == sorted(seconds)
    assert len(errors) > 1


def test_an_optimum_is_left_alone():
    weight, spec = normal(24, 20), LowRank(24, 20, rank=4)
    result = factorize(weight, spec, solver="fit", steps=5)
    optimum = factorize(weight, spec, solver="svd").relative_error
    assert result.relative_error == pytest.approx(optimum, rel=1e-12)


def test_a_random_start_is_the_seeds():
    weight, spec = normal(24, 20), Blast(24, 20, rank=3, blocks=(3, 2))
    one, other = (
        factorize(weight, spec, solver="fit", start="init", steps=3, seed=seed) for seed in (0, 1)
    )
    assert one.history[0][1] != other.history[0][1]


def test_boxes_that_move_in_steps_stay_and_smooth_ones_move():
    weight = normal(24, 20)
    for sigma, moves in ((None, False), (1.0, True)):
        spec = GBLR(24, 20, rank=3, sigma=sigma)
        start = factorize(weight, spec, solver="masks", nonzeros=1.0)
        result = factorize(weight, spec, solver="fit", start="init", steps=20)
        assert torch.equal(start.factors["widths_in"], result.factors["widths_in"]) != moves


def test_gradients_are_off_again_afterwards():
    with torch.enable_grad():
        result = factorize(normal(12, 12), Circulant(12, 12), steps=2)
        assert torch.is_grad_enabled()
    assert not result.factors["c"].requires_grad


@pytest.mark.parametrize("start", ["svd", None, ""])
def test_an_unknown_start_is_refused(start):
    with pytest.raises(FactorizationError, match="start.*init"):
        factorize(normal(12, 12), Circulant(12, 12), start=start)
