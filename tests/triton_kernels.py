"""The Triton kernels against plain PyTorch. Not collected by itself: test_triton.py runs this file
in a process of its own, with TRITON_INTERPRET=1 or, where there is a GPU, without.

The interpreter's bfloat16 arithmetic is wrong, so bfloat16 is tried on a GPU only.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blastnn.kernels import triton_blast
from blastnn.kernels.triton_decode import MOST_TOKENS, decode
from blastnn.kernels.triton_ops import triton_blast as operator
from blastnn.kernels.triton_prefill import prefill
from blastnn.structures import Blast, cast_factors
from tests.matrices import describe, normal, random_factors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOKENS = [1, 3, 16, 17, 65]
SPECS = [
    Blast(12, 20, rank=3, blocks=(3, 4)),
    Blast(13, 11, rank=5, blocks=(2, 3)),
    Blast(9, 11, rank=16, blocks=(5, 4)),  # whole block row left over
    Blast(9, 9, rank=2, blocks=(7, 7)),  # whole blocks left over on both sides
    Blast(61, 47, rank=17, blocks=(1, 1)),
    Blast(37, 47, rank=33, blocks=(3, 2)),
    Blast(35, 23, rank=7, blocks=(17, 3)),  # more block rows than a tile holds
    Blast(11, 39, rank=7, blocks=(2, 19)),  # more block columns
]
PADDED = SPECS[2]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=describe)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Both launchers for each number of tokens that they serve.
every_launch = pytest.mark.parametrize(
    ("launch", "tokens"),
    [(decode, 1), (decode, 3), (decode, 16), (prefill, 1), (prefill, 16), (prefill, 35)],
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that is not written to is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(7, device=DEVICE).isnan().all()
    assert torch.empty(7, device=DEVICE).new_empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(spec, tokens, dtype=torch.float32, seed=0):
    factors = random_factors(spec, seed=3 * seed + 1, dtype=dtype)
    x = normal(tokens, spec.in_features, seed=seed + 1000, dtype=dtype)
    return x.to(DEVICE), {name: factor.to(DEVICE) for name, factor in factors.items()}


def exact_product(spec, x, factors):
    return spec.matmul(x.double(), cast_factors(factors, torch.float64))


def squared_errors(spec, x, factors, y):
    """Of ``y`` and of plain PyTorch, relative to what rounding has to do with."""
    exact = exact_product(spec, x, factors)
    scale = exact_product(spec, x.abs(), {k: f.abs() for k, f in factors.items()}).square().sum()
    plain = spec.matmul(x, factors)
    assert y.shape == plain.shape
    assert y.dtype == plain.dtype
    assert y.isfinite().all()
    return [float((found - exact).square().sum() / scale) for found in (y, plain)]


def assert_product(spec, x, factors, y):
    """Almost nothing to sum up can be exact by luck: one rounding is always allowed."""
    error, plain_error = (square**0.5 for square in squared_errors(spec, x, factors, y))
    assert error <= 2 * max(plain_error, torch.finfo(x.dtype).eps / 2)


@every_dtype
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, pytest.param(65, marks=pytest.mark.slow)])
def test_as_accurate_as_plain_pytorch(dtype, tokens):
    # Summed over shapes and draws: which order of summation is luckier differs for each of them.
    total = plain_total = 0.0
    for seed, spec in enumerate(SPECS):
        x, factors = operands(spec, tokens, dtype, seed)
        error, plain_error = squared_errors(spec, x, factors, triton_blast.matmul(spec, x, factors))
        total, plain_total = total + error, plain_total + plain_error
    assert total**0.5 <= 2 * plain_total**0.5


def assert_any_product(data):
    m, n = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 45))
    blocks = data.draw(st.integers(1, min(m, 6))), data.draw(st.integers(1, min(n, 6)))
    spec = Blast(m, n, rank=data.draw(st.integers(1, 35)), blocks=blocks)
    tokens, dtype = data.draw(st.sampled_from(TOKENS)), data.draw(st.sampled_from(DTYPES))
    x, factors = operands(spec, tokens, dtype, seed=data.draw(st.integers(0, 1000)))
    assert_product(spec, x, factors, triton_blast.matmul(spec, x, factors))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_size(data):
    assert_any_product(data)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_size_at_length(data):
    assert_any_product(data)


@every_spec
def test_no_tokens(spec):
    x, factors = operands(spec, 0)
    assert triton_blast.matmul(spec, x, factors).shape == (0, spec.out_features)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (4, 9), (2, 1, 3), (0,), (2, 0), (0, 3)])
def test_leading_dimensions_are_kept(leading):
    spec = SPECS[1]
    x, factors = operands(spec, max(1, torch.Size(leading).numel()))
    x = x[: torch.Size(leading).numel()].reshape(*leading, spec.in_features)
    y = triton_blast.matmul(spec, x, factors)
    assert y.shape == (*leading, spec.out_features)
    torch.testing.assert_close(y, spec.matmul(x, factors), rtol=1e-5, atol=1e-4)


@every_launch
@pytest.mark.parametrize("spec", [PADDED, SPECS[6]], ids=describe)
def test_writes_the_output_and_nothing_else(launch, tokens, spec):
    x, factors = operands(spec, tokens)
    m = spec.out_features
    around = torch.full((tokens + 3, m + 40), torch.nan, device=DEVICE)
    launch(x, *(factors[name] for name in "USV"), around[2:-1, 5 : 5 + m])
    assert_product(spec, x, factors, around[2:-1, 5 : 5 + m].clone())
    around[2:-1, 5 : 5 + m] = torch.nan
    assert around.isnan().all()


@every_launch
def test_reads_no_padding_and_nothing_beside_the_input(launch, tokens):
    x, factors = operands(PADDED, tokens)
    (b1, b2), (p, q) = PADDED.blocks, PADDED.block_shape
    y = [x.new_empty(tokens, PADDED.out_features) for _ in range(2)]
    launch(x, *(factors[name] for name in "USV"), y[0])
    poisoned = {name: factor.clone() for name, factor in factors.items()}
    poisoned["U"][torch.arange(b1 * p).view(b1, p) >= PADDED.out_features] = torch.inf
    poisoned["V"][torch.arange(b2 * q).view(b2, q) >= PADDED.in_features] = torch.inf
    around = torch.full((tokens + 3, b2 * q + 40), torch.nan, device=DEVICE)
    around[2:-1, 5 : 5 + PADDED.in_features] = x
    x = around[2:-1, 5 : 5 + PADDED.in_features]
    launch(x, *(poisoned[name] for name in "USV"), y[1])
    assert torch.equal(*y)


@every_launch
def test_memory_layout_does_not_matter(launch, tokens):
    spec = SPECS[5]
    x, factors = operands(spec, tokens)
    expected, y = x.new_empty(2, tokens, spec.out_features).unbind()
    launch(x, *(factors[name] for name in "USV"), expected)
    strided = [
        v.repeat_interleave(3, -1)[..., 1::3].mT.contiguous().mT
        for v in (x, *(factors[name] for name in "USV"))
    ]
    assert not any(v.is_contiguous() for v in strided[1:])
    launch(*strided, y)
    assert torch.equal(y, expected)
    expanded = x[:1].expand(tokens, -1)
    launch(expanded, *(factors[name] for name in "USV"), y)
    torch.testing.assert_close(y, expected[:1].expand(tokens, -1), rtol=1e-6, atol=1e-5)


@every_launch
def test_half_precision_projections_do_not_overflow(launch, tokens):
    """``z`` stays in float32: here it is beyond float16, while ``w`` and ``y`` are not."""
    spec = SPECS[5]
    x, factors = operands(spec, tokens, torch.float16)
    x, factors["S"] = x * 2**12, factors["S"] * 2**-12
    factors["V"] = factors["V"] * 2**5
    factors["U"] = factors["U"] * 2**-5
    assert not spec.matmul(x, factors).isfinite().all()
    y = x.new_empty(tokens, spec.out_features)
    launch(x, *(factors[name] for name in "USV"), y)
    exact = exact_product(spec, x, factors)
    assert float((y - exact).norm() / exact.norm()) < 2e-3


@every_dtype
@pytest.mark.parametrize("tokens", [3, 35])
def test_gradients_are_as_accurate_as_autograds(dtype, tokens):
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed, spec in enumerate(SPECS[:4]):
        x, factors = operands(spec, tokens, dtype, seed)
        grad_y = normal(tokens, spec.out_features, seed=seed, dtype=dtype).to(DEVICE)

        def gradients(product, cast, x=x, factors=factors, grad_y=grad_y):
            leaves = [v.to(cast).requires_grad_() for v in (x, *(factors[k] for k in "USV"))]
            y = product(leaves[0], dict(zip("USV", leaves[1:], strict=True)))
            return torch.autograd.grad(y, leaves, grad_y.to(cast))

        exact = gradients(spec.matmul, torch.float64)
        ours = gradients(lambda x, f, spec=spec: triton_blast.matmul(spec, x, f), dtype)
        for row, found in enumerate((ours, gradients(spec.matmul, dtype))):
            for column, (actual, right) in enumerate(zip(found, exact, strict=True)):
                assert actual.dtype == dtype
                assert actual.shape == right.shape
                squares[row, column] += float(((actual - right).norm() / right.norm()).square())
    assert (squares[0].sqrt() <= 2 * squares[1].sqrt()).all()


def test_frozen_factors_get_no_gradient():
    spec = SPECS[1]
    x, factors = operands(spec, 4)
    triton_blast.matmul(spec, x.requires_grad_(), factors).sum().backward()
    assert x.grad is not None
    assert all(factor.grad is None for factor in factors.values())


@pytest.mark.parametrize(("tokens", "trained"), [(0, True), (3, False), (3, True), (35, True)])
def test_operator_is_a_good_citizen_of_torch(tokens, trained):
    spec = SPECS[1]
    x, factors = operands(spec, tokens)
    values = [v.requires_grad_(trained) for v in (x, *(factors[name] for name in "USV"))]
    torch.library.opcheck(operator, (*values, spec.out_features))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    spec = SPECS[1]
    _, factors = operands(spec, 0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=dynamic)
    def product(x):
        return triton_blast.matmul(spec, x, factors)

    for tokens in (3, MOST_TOKENS + 1) if dynamic else (5,):
        x, _ = operands(spec, tokens)
        torch.testing.assert_close(product(x), triton_blast.matmul(spec, x, factors))
    assert len(graphs) == 1, "decode and prefill are one graph: no guard on the number of tokens"
    assert any("triton_blast" in str(node.target) for node in graphs[0].graph.nodes)


def test_exports():
    spec = SPECS[1]
    x, factors = operands(spec, 5)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return triton_blast.matmul(spec, x, factors)

    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: tokens},))
    more, _ = operands(spec, 20)
    torch.testing.assert_close(program.module()(more), triton_blast.matmul(spec, more, factors))
