"""Every kernel of the dispatch table against the structure's own product, and the table itself."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from blastnn.errors import CheckpointError, StructureError
from blastnn.kernels import (
    TABLE,
    choose,
    dispatch,
    explain,
    fix_choices,
    native,
    predicted_speedup,
    reference,
    winners,
)
from blastnn.kernels.build import BuildError, find_compiler, library
from blastnn.linear import StructuredLinear
from blastnn.quantization import QUANTIZATIONS, dequantize_factors, quantize_factors
from blastnn.structures import (
    STRUCTURES,
    Blast,
    BlockLowRank,
    LowRank,
    Monarch,
    Structure,
    cast_factors,
)
from tests.memory import poisoned_memory

SPECS = [
    Blast(13, 11, rank=5, blocks=(3, 2)),
    Blast(31, 9, rank=1, blocks=(1, 1)),
    Blast(101, 67, rank=37, blocks=(5, 7)),
    Blast(67, 101, rank=40, blocks=(16, 2)),
    Blast(192, 576, rank=70, blocks=(4, 4)),
    Blast(96, 513, rank=17, blocks=(2, 1)),
    Blast(300, 520, rank=129, blocks=(16, 16)),
    LowRank(61, 47, rank=13),
    LowRank(128, 256, rank=64),
    BlockLowRank(101, 67, rank=7, blocks=(5, 7)),
    BlockLowRank(96, 600, rank=20, blocks=(3, 2)),
    BlockLowRank(300, 520, rank=270, blocks=(1, 2)),
    Monarch(101, 67, rank=9, blocks=(7, 5)),
    Monarch(192, 576, rank=13, blocks=(16, 16)),
]
# Around every border: one to four at a time, few and many, whole micro-kernels, two chunks.
TOKENS = [1, 2, 3, 4, 5, 7, 15, 16, 17, 24, 25, 67, 256, 257, 600]
KERNELS = [kernel for kernel in TABLE["cpu"] if kernel is not reference]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.NAME)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def fresh(spec: Structure, dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors that no earlier run has seen, with something in the padding."""
    return {k: torch.randn(s).div(4).to(dtype) for k, s in spec.factor_shapes().items()}


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def rounding_errors(
    spec: Structure, x: Tensor, factors: dict[str, Tensor], *results: Tensor
) -> list[float]:
    """Relative to what is summed up: a sum of almost zero owes its digits to luck."""
    wide = cast_factors(factors, torch.float64)
    exact = x.double() @ spec.to_dense(wide).T
    scale = spec.matmul(x.double().abs(), {key: f.abs() for key, f in wide.items()}).norm()
    return [float((y.double() - exact).norm() / scale) for y in results]


def serves(kernel, spec: Structure, dtype: torch.dtype) -> bool:
    return kernel.obstacle(spec, "cpu", dtype) is None


@every_kernel
@every_spec
@every_dtype
def test_error_is_at_most_twice_that_of_plain_pytorch(kernel, spec, dtype):
    assert serves(kernel, spec, dtype)
    torch.seed()
    mine = plain = 0.0
    for tokens in TOKENS:
        factors, x = fresh(spec, dtype), torch.randn(tokens, spec.in_features).to(dtype)
        y = kernel.matmul(spec, x, factors)
        assert (y.shape, y.dtype) == ((tokens, spec.out_features), dtype)
        one, other = rounding_errors(spec, x, factors, y, spec.matmul(x, factors))
        # One draw may flatter plain PyTorch by chance; what counts is the sum over all of them.
        assert one <= 4 * other + torch.finfo(dtype).eps / 4, tokens
        mine, plain = mine + one**2, plain + other**2
    assert mine**0.5 <= 2 * plain**0.5


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_few_tokens_are_as_exact_as_many(tokens):
    """Long sums are made of short ones, in whatever order the factors are read."""
    spec = LowRank(576, 576, rank=144)
    assert serves(native, spec, torch.float32)
    few = many = 0.0
    for seed in range(8):
        factors = spec.init(seed=seed)
        x = torch.randn(64, 576, generator=torch.Generator().manual_seed(seed))
        exact = x.double() @ spec.to_dense(cast_factors(factors, torch.float64)).T
        found = torch.cat([native.matmul(spec, part, factors) for part in x.split(tokens)])
        few += float((found - exact).square().sum())
        many += float((native.matmul(spec, x, factors) - exact).square().sum())
    assert few**0.5 <= 1.1 * many**0.5


@every_kernel
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (4, 9), (0,), (2, 0), (0, 3)])
def test_leading_dimensions_are_kept(kernel, leading):
    spec = SPECS[2]
    factors, x = fresh(spec, torch.float32), torch.randn(*leading, spec.in_features)
    y = kernel.matmul(spec, x, factors)
    assert y.shape == (*leading, spec.out_features)
    torch.testing.assert_close(y, spec.matmul(x, factors), rtol=1e-4, atol=1e-4)


@every_kernel
@pytest.mark.parametrize("tokens", [3, 40])
def test_memory_layout_does_not_matter(kernel, tokens):
    spec = SPECS[2]
    factors = fresh(spec, torch.float32)
    turned = {key: f.mT.contiguous().mT for key, f in factors.items()}
    n = spec.in_features
    for x in (
        torch.randn(n, tokens).T,
        torch.randn(2 * tokens, 2 * n)[::2, ::2],
        torch.randn(1, n).expand(tokens, n),
    ):
        expected = kernel.matmul(spec, x.contiguous(), factors)
        assert torch.equal(kernel.matmul(spec, x, turned), expected)


@every_kernel
@every_dtype
def test_bits_depend_on_neither_threads_nor_calls(kernel, dtype):
    threads = torch.get_num_threads()
    for spec in SPECS:
        factors, x = fresh(spec, dtype), torch.randn(300, spec.in_features).to(dtype)
        for part in (x[:1], x[:9], x[:30], x):
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(kernel.matmul(spec, part, factors))
            torch.set_num_threads(threads)
            assert all(torch.equal(results[0], other) for other in results)


@every_kernel
@every_spec
@every_dtype
def test_no_output_is_left_over_from_older_memory(kernel, spec, dtype):
    assert serves(kernel, spec, dtype)
    for tokens in TOKENS:
        factors, x = fresh(spec, dtype), torch.randn(tokens, spec.in_features).to(dtype)
        expected = kernel.matmul(spec, x, factors)
        with poisoned_memory():
            assert torch.equal(kernel.matmul(spec, x, factors), expected), tokens


def test_compiled_operators_get_poisoned_memory_too():
    """What the test above rests on: the output is filled before it is computed."""
    assert serves(native, SPECS[0], torch.float32)
    factors, x = fresh(SPECS[0], torch.float32), torch.randn(3, SPECS[0].in_features)
    with torch.profiler.profile() as profile, poisoned_memory():
        y = torch.ops.blastnn.blast_forward(x, factors["U"], factors["S"], factors["V"], 13)
    names = [event.name for event in profile.events()]
    assert y.isfinite().all()
    assert "blastnn::blast_forward" in names
    inside = names[names.index("blastnn::blast_forward") :]
    assert "aten::empty" in inside and "aten::fill_" in inside


@every_spec
@every_dtype
def test_no_product_reads_what_an_earlier_one_left_in_scratch_memory(spec, dtype):
    """Weights of nothing but NaN leave it everywhere; zeros times that would be NaN again."""
    assert serves(native, spec, dtype)
    larger = Blast(600, 1040, rank=300, blocks=(16, 16))
    ruined = {key: f.fill_(torch.nan) for key, f in fresh(larger, dtype).items()}
    inputs = torch.full((300, larger.in_features), torch.nan, dtype=dtype)
    for tokens in TOKENS:
        factors, x = fresh(spec, dtype), torch.randn(tokens, spec.in_features).to(dtype)
        assert native.matmul(larger, inputs, ruined).isnan().all()
        assert native.matmul(spec, x, factors).isfinite().all(), tokens
        for how in QUANTIZATIONS.values():
            if native.quantized_obstacle(spec, how, "cpu", dtype) is None:
                stored = quantize_factors(spec, factors, how)
                native.matmul(larger, inputs, ruined)
                assert native.quantized_matmul(spec, how, x, stored).isfinite().all(), tokens


@every_kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(kernel, value):
    spec = SPECS[4]
    factors, x = fresh(spec, torch.float32), torch.randn(20, spec.in_features)
    x[3, 5] = value
    y = kernel.matmul(spec, x, factors)
    assert not y[3].isfinite().any()
    assert y[[*range(3), *range(4, 20)]].isfinite().all()


@every_kernel
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[7], SPECS[9]], ids=str)
def test_gradients_are_those_of_plain_pytorch(kernel, spec):
    for leading in ((3,), (2, 20), (0,), ()):
        factors = {key: f.requires_grad_() for key, f in fresh(spec, torch.float32).items()}
        x = torch.randn(*leading, spec.in_features, requires_grad=True)
        given = torch.randn(*leading, spec.out_features)
        grads = [
            torch.autograd.grad(product(x, factors), [x, *factors.values()], given)
            for product in (spec.matmul, lambda x, f: kernel.matmul(spec, x, f))
        ]
        for expected, actual in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at gradients itself
def test_pytorch_finds_the_operator_well_formed():
    spec = SPECS[0]
    assert serves(native, spec, torch.float32)
    values = [v.requires_grad_() for v in fresh(spec, torch.float32).values()]
    U, S, V = values
    x = torch.randn(2, 3, spec.in_features, requires_grad=True)
    operator = torch.ops.blastnn.blast.default
    torch.library.opcheck(operator, (x, U, S, V, spec.out_features))
    torch.library.opcheck(operator, (x[0, :, :6].detach(), U[:1], None, V[:1], 5))
    forward = torch.ops.blastnn.blast_forward.default
    torch.library.opcheck(forward, (x[0, :, :6].detach(), U[0].detach(), None, V[0].detach(), 5))
    for refused in (operator, forward):
        with pytest.raises(RuntimeError, match="do not fit"):
            refused(x, U, None, V[:1], spec.out_features)


@torch.no_grad()
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[7], SPECS[9], SPECS[12]], ids=str)
def test_a_graph_writes_into_its_own_memory_what_a_call_returns(spec):
    """Two operators, one product: with factors as they are and, where it can be, quantised."""
    factors, x = fresh(spec, torch.float32), torch.randn(2, 3, spec.in_features)
    how = QUANTIZATIONS["int4"]
    products = [lambda x: native.matmul(spec, x, factors)]
    if native.quantized_obstacle(spec, how, "cpu", torch.float32) is None:
        stored = quantize_factors(spec, factors, how)
        products.append(lambda x: native.quantized_matmul(spec, how, x, stored))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    for product in products:
        compiled = torch.compile(product, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), product(x))
        assert any("_into" in str(node.target) for node in graphs[-1].graph.nodes)


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_something_serves_every_structure(name):
    spec = STRUCTURES[name].for_budget(22, 26, 22 * 26 // 2)
    for device in (*TABLE, "mps"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            choice = choose(spec, device, dtype)
            assert choice.kernel.obstacle(spec, device, dtype) is None
            assert all(choice.passed_over.values())


def test_operands_must_agree():
    layer = StructuredLinear(SPECS[0])
    with pytest.raises(StructureError, match="float16.*float32.*cast"):
        layer(torch.randn(2, 11, dtype=torch.float16))
    with pytest.raises(StructureError, match="meta.*cpu.*move"):
        layer(torch.randn(2, 11, device="meta"))
    with pytest.raises(StructureError, match=r"\(\.\.\., 11\)"):
        layer(torch.randn(2, 12))
    with pytest.raises(StructureError, match=r"\(\.\.\., 11\)"):
        layer(torch.tensor(1.0))


def test_autocast_is_followed():
    layer = StructuredLinear(SPECS[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 11)).dtype == torch.bfloat16


@pytest.fixture
def forgetful(monkeypatch):
    """A session in which nothing has been compiled or chosen yet."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    native.failure.cache_clear()
    yield monkeypatch
    native.failure.cache_clear()


def test_without_a_compiler_plain_pytorch_serves_and_says_so_once(forgetful, caplog, tmp_path):
    forgetful.setenv("PATH", str(tmp_path))
    forgetful.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        find_compiler()
    spec = SPECS[0]
    with caplog.at_level(logging.WARNING, "blastnn"):
        for _ in range(2):
            choice = choose(spec, "cpu", torch.float32)
            forgetful.setattr(dispatch, "_chosen", {})
    assert choice.name == "reference"
    assert "no C++ compiler" in choice.passed_over["native"]
    assert [record.message for record in caplog.records] == [
        "blastnn's CPU kernel is not used, plain PyTorch is: "
        "no C++ compiler (c++ or g++ or clang++) was found"
    ]
    layer, x = StructuredLinear(spec), torch.randn(3, 11)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias)


def test_a_compiler_that_fails_is_quoted(forgetful, caplog, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: it is Monday' >&2\nexit 1\n")
    broken.chmod(0o755)
    forgetful.setenv("CXX", str(broken))
    forgetful.setenv("BLASTNN_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "blastnn"):
        choice = choose(SPECS[0], "cpu", torch.float32)
    assert choice.name == "reference"
    assert "it is Monday" in choice.passed_over["native"]
    assert "it is Monday" in caplog.text


def test_processes_that_start_together_compile_once(forgetful, tmp_path):
    """Two of a test run, or of a server: the second waits and takes what the first built."""
    compiler = tmp_path / "slow"
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && exit 0\n'
        f"echo once >> {tmp_path}/runs\nsleep 0.3\n"
        'for word; do [ "$before" = -o ] && touch "$word"; before=$word; done\n'
    )
    compiler.chmod(0o755)
    forgetful.setenv("CXX", str(compiler))
    forgetful.setenv("BLASTNN_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        built = [future.result() for future in [pool.submit(library) for _ in range(2)]]
    assert built[0] == built[1] and built[0].is_file()
    assert (tmp_path / "runs").read_text() == "once\n"


@every_dtype
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2], SPECS[3], SPECS[4], SPECS[7]], ids=str)
def test_quantised_factors_are_multiplied_as_they_are_stored(spec, name, dtype):
    how = QUANTIZATIONS[name]
    assert native.quantized_obstacle(spec, how, "cpu", dtype) is None
    stored = quantize_factors(spec, fresh(spec, dtype), how)
    plain = dequantize_factors(spec, stored, how, torch.float64)
    for tokens in TOKENS:
        x = torch.randn(tokens, spec.in_features).to(dtype)
        exact = x.double() @ spec.to_dense(plain).T
        mine = error(native.quantized_matmul(spec, how, x, stored), exact)
        assert mine <= 2 * error(reference.quantized_matmul(spec, how, x, stored), exact) + 1e-7


def test_a_measured_choice_is_kept_with_the_model_and_made_again(forgetful, caplog):
    forgetful.setattr(dispatch, "_preferred", {})
    spec = SPECS[4]
    (row,) = explain([(spec, None)] * 3, tokens=[1, 5])
    assert (row["layers"], row["kernel"], set(row["measured"])) == (3, "native", {"1", "5"})
    row["measured"] = {"1": {"native": 1.5, "reference": 1.1}, "5": {"native": 0.9, "reference": 1}}
    found = winners([row])
    assert [choice["kernel"] for choice in found["choices"]] == ["reference"]
    assert fix_choices({**found, "machine": {"processor": "another"}}) is not None
    assert choose(spec, "cpu", torch.float32).name == "native"
    assert fix_choices(found) is None
    choice = choose(spec, "cpu", torch.float32)
    assert choice.name == "reference"
    assert choice.passed_over == {"native": "reference was measured to be faster"}
    with pytest.raises(CheckpointError, match="format"):
        fix_choices({"format": "other"})
    with pytest.raises(StructureError, match="serve"):
        dispatch.prefer(spec, "cpu", torch.float32, "triton")


def test_what_cannot_be_faster_is_told_to_the_planner():
    assert predicted_speedup(Blast.for_budget(4096, 4096, 2**23, blocks=16)) > 1.6
    assert predicted_speedup(Blast.for_budget(512, 512, int(0.97 * 2**18), blocks=8)) < 1
    assert predicted_speedup(Blast.for_budget(1536, 576, int(0.8 * 1536 * 576), blocks=16)) < 1
    assert predicted_speedup(Blast.for_budget(192, 576, int(0.8 * 192 * 576), blocks=8)) > 1
    assert predicted_speedup(Blast(16, 16, rank=2, blocks=(2, 2))) is None  # too small to matter
    assert predicted_speedup(STRUCTURES["gblr"].for_budget(512, 512, 2**17)) is None
