"""The shared gradients of a BLAST product, against autograd through the structure's own product."""

from __future__ import annotations

import itertools

import pytest
import torch

from blastnn.kernels.blast_backward import blast_backward
from blastnn.structures import Blast
from tests.matrices import describe, normal, random_factors

# Blocks that divide, that leave part of a block over, and that leave whole blocks over.
SPECS = [
    Blast(12, 20, rank=3, blocks=(3, 4)),
    Blast(13, 11, rank=3, blocks=(2, 3)),
    Blast(9, 11, rank=5, blocks=(5, 4)),
    Blast(9, 9, rank=2, blocks=(7, 7)),
    Blast(7, 5, rank=1, blocks=(1, 1)),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=describe)


def operands(spec, tokens, dtype=torch.float64):
    factors = random_factors(spec, dtype=dtype)
    x = normal(tokens, spec.in_features, seed=10, dtype=dtype)
    grad_y = normal(tokens, spec.out_features, seed=11, dtype=dtype)
    return grad_y, x, factors["U"], factors["S"], factors["V"]


def by_autograd(spec, grad_y, x, U, S, V):
    leaves = [value.detach().clone().requires_grad_() for value in (x, U, S, V)]
    y = spec.matmul(leaves[0], dict(zip("USV", leaves[1:], strict=True)))
    return torch.autograd.grad(y, leaves, grad_y)


@every_spec
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 17, 40])
def test_gradients_are_autograds(spec, tokens):
    given = operands(spec, tokens)
    for actual, expected, value in zip(
        blast_backward(*given), by_autograd(spec, *given), given[1:], strict=True
    ):
        assert actual.shape == value.shape
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@every_spec
def test_gradients_of_the_dense_product(spec):
    """By another road: the gradients through the dense matrix."""
    grad_y, x, U, S, V = operands(spec, 6)
    leaves = [value.clone().requires_grad_() for value in (x, U, S, V)]
    y = leaves[0] @ spec.to_dense(dict(zip("USV", leaves[1:], strict=True))).T
    for actual, expected in zip(
        blast_backward(grad_y, x, U, S, V), torch.autograd.grad(y, leaves, grad_y), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@every_spec
def test_gradcheck(spec):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, U, S, V):
            ctx.save_for_backward(x, U, S, V)
            return spec.matmul(x, {"U": U, "S": S, "V": V})

        @staticmethod
        def backward(ctx, grad_y):
            return blast_backward(grad_y, *ctx.saved_tensors, ctx.needs_input_grad)

    inputs = [value.requires_grad_() for value in operands(spec, 4)[1:]]
    assert torch.autograd.gradcheck(Product.apply, inputs)
    assert torch.autograd.gradgradcheck(Product.apply, inputs, fast_mode=True)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_needed(needed):
    given = operands(SPECS[1], 5)
    everything = blast_backward(*given)
    for wanted, some, full in zip(needed, blast_backward(*given, needed), everything, strict=True):
        assert some is None if not wanted else torch.equal(some, full)


@every_spec
@pytest.mark.parametrize("poison", [1e30, -1e300])
def test_padding_never_shows_and_gets_no_gradient(spec, poison):
    grad_y, x, U, S, V = operands(spec, 5)
    clean = blast_backward(grad_y, x, U, S, V)
    lost_rows = torch.arange(U[..., 0].numel()).view(U.shape[:2]) >= spec.out_features
    lost_columns = torch.arange(V[..., 0].numel()).view(V.shape[:2]) >= spec.in_features
    U[lost_rows], V[lost_columns] = poison, poison
    for actual, expected in zip(blast_backward(grad_y, x, U, S, V), clean, strict=True):
        assert torch.equal(actual, expected)
    assert not clean[1][lost_rows].any()
    assert not clean[3][lost_columns].any()


@every_spec
def test_memory_layout_does_not_matter(spec):
    given = operands(spec, 5)
    strided = [v.repeat_interleave(2, -1)[..., ::2].mT.contiguous().mT for v in given]
    assert not any(v.is_contiguous() for v in strided if min(v.shape[-2:]) > 1)
    for actual, expected in zip(blast_backward(*strided), blast_backward(*given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_autograds(dtype):
    spec = Blast(61, 47, rank=13, blocks=(4, 3))
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(4):
        given = [v.roll(seed, 0) for v in operands(spec, 37, dtype)]
        exact = blast_backward(*[v.double() for v in given])
        for row, found in enumerate((blast_backward(*given), by_autograd(spec, *given))):
            for column, (actual, right) in enumerate(zip(found, exact, strict=True)):
                assert actual.dtype == dtype
                squares[row, column] += ((actual - right).norm() / right.norm()).square()
    assert (squares[0].sqrt() <= 2 * squares[1].sqrt()).all()
