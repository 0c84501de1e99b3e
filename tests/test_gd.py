"""The paper's two data-free algorithms, step by step against an independent implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize import factorize
from blastnn.structures import Blast
from tests.matrices import normal

SPEC = Blast(12, 15, rank=4, blocks=(3, 5))
# A root mean square of 1.5 is divided out of U again, and no power of two besides.
RMS = 1.5


def weight_of_known_size() -> Tensor:
    weight = normal(12, 15)
    return weight * RMS / weight.square().mean().sqrt()


def loss(target: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Equation (4), block by block."""
    return 0.5 * sum(
        (block - U[i] @ torch.diag(S[i, j]) @ V[j].T).square().sum()
        for i, row in enumerate(target.chunk(len(U), 0))
        for j, block in enumerate(row.chunk(len(V), 1))
    )


def curvature(name: str, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """The normal matrix of each block of one factor, from its definition in the paper."""
    rows, columns = range(len(U)), range(len(V))
    if name == "S":
        return torch.stack([torch.stack([(u.T @ u) * (v.T @ v) for v in V]) for u in U])
    if name == "U":
        stacks = [torch.cat([V[j] * S[i, j] for j in columns]) for i in rows]
    else:
        stacks = [torch.cat([U[i] * S[i, j] for i in rows]) for j in columns]
    return torch.stack([stack.T @ stack for stack in stacks])


def by_autograd(rule, steps: int, epsilon: float) -> Tensor:
    """The dense matrix after ``steps`` sequential updates from the library's own start."""
    weight = weight_of_known_size()
    state = factorize(weight, SPEC, solver="gd", steps=0, seed=5, epsilon=epsilon).factors
    state["U"] = state["U"] / RMS
    for k in range(steps):
        before = float(loss(weight / RMS, **state))
        for name in "UVS":
            x = state[name].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(weight / RMS, **{**state, name: x}), x)
            # Rows of every block: one for the diagonal of a coupling.
            rows = gradient[..., None, :] if name == "S" else gradient
            step = rule(k / steps, before, curvature(name, **state), rows)
            state[name] = state[name] - step.reshape(gradient.shape)
    return SPEC.to_dense(state) * RMS


def theorem(progress, before, gram, rows):
    sigma = np.linalg.norm(gram.numpy(), 2, axis=(-2, -1))
    return rows / torch.from_numpy(sigma)[..., None, None]


def decay(progress, before, gram, rows):
    return 0.03 * (1 - progress) * rows


def preconditioned(progress, before, gram, rows):
    shifted = gram + 0.1 * math.sqrt(before) * torch.eye(4, dtype=gram.dtype)
    return (1 - progress) * (rows @ torch.linalg.inv(shifted))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"solver": "gd"}, theorem),
        ({"solver": "gd", "schedule": "decay", "step_size": 0.03}, decay),
        ({"solver": "precgd"}, preconditioned),
    ],
    ids=["theorem", "decay", "precgd"],
)
@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_three_steps_are_the_papers(options, rule, epsilon):
    result = factorize(weight_of_known_size(), SPEC, steps=3, seed=5, epsilon=epsilon, **options)
    expected = by_autograd(rule, 3, epsilon)
    torch.testing.assert_close(SPEC.to_dense(result.factors), expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    rank=st.integers(1, 9),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    true_rank=st.integers(1, 24),
    log_epsilon=st.floats(-4, 1),
    double=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_error_never_rises_under_theorem_1(
    m, n, rank, blocks, true_rank, log_epsilon, double, seed
):
    blocks = (min(blocks[0], m), min(blocks[1], n))
    weight = normal(m, true_rank, seed=seed) @ normal(true_rank, n, seed=seed + 1)
    result = factorize(
        weight if double else weight.float(),
        Blast(m, n, rank=rank, blocks=blocks),
        solver="gd",
        seed=seed,
        steps=15,
        epsilon=10**log_epsilon,
    )
    squares = [error**2 for _, error in result.history]
    # What rounding may add to a squared error that is a difference of numbers near its first value.
    slack = (1e-12 if double else 1e-5) * max(1.0, squares[0])
    assert len(squares) == 16
    assert all(after <= before + slack for before, after in zip(squares, squares[1:], strict=False))


@pytest.mark.parametrize("solver", ["gd", "precgd"])
def test_epsilon_is_the_size_of_the_start(solver):
    weight, spec = weight_of_known_size(), Blast(12, 15, rank=300, blocks=(3, 5))
    start = factorize(weight, spec, solver=solver, steps=0, epsilon=0.25)
    assert len(start.history) == 1
    assert float(start.factors["U"].std()) == pytest.approx(RMS * 0.25, rel=0.05)
    assert float(start.factors["V"].std()) == pytest.approx(0.25, rel=0.05)
    assert 0 <= float(start.factors["S"].min()) < 0.01
    assert 0.99 < float(start.factors["S"].max()) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "constant"}, "schedule='constant'"),
        ({"schedule": "decay"}, "step_size=None"),
        ({"schedule": "decay", "step_size": 0.0}, "step_size=0.0"),
        ({"schedule": "decay", "step_size": math.nan}, "step_size=nan"),
        ({"step_size": 0.1}, "without a step_size"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"steps": -1}, "steps must be"),
        ({"schedule": "decay", "step_size": 100.0}, "overflowed"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(FactorizationError, match=message):
        factorize(normal(24, 20), Blast(24, 20, 6, (2, 2)), solver="gd", **options)
