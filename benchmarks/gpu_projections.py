"""Each projection of Llama-7B on a GPU: dense, BLAST in plain PyTorch (compiled), BLAST in Triton.

Has not been run on a GPU yet. Nothing is timed before every product of every case has been checked:
against float64, none may be off by more than twice plain PyTorch. Times are medians of interleaved
replays of CUDA graphs, each after the caches were overwritten, so they hold neither Python nor
weights that a model would have evicted. Beside them stand the ceilings of the same run: the rate of
a large copy and of a large matrix product. GB/s counts the weights, the input and the output once.

Matrices: 4096 x 4096, 11008 x 4096 and 4096 x 11008 with 16 x 16 blocks, at the ranks of Table 9
(half of the parameters) and at the rank that removes 20%. Long inputs come first: the kernels take
their tiles from the first input that they see.

    python -m benchmarks.gpu_projections [--tokens 1 16 256 1024 4096] [--rounds 50]

Shape letters: ``m`` out_features, ``n`` in_features, ``T`` tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from blastnn.kernels import triton_blast
from blastnn.structures import Blast, cast_factors

Product = Callable[[], Tensor]

DTYPE = torch.bfloat16
TABLE_9 = [
    Blast(4096, 4096, rank=1024, blocks=(16, 16)),
    Blast(11008, 4096, rank=1488, blocks=(16, 16)),
    Blast(4096, 11008, rank=1488, blocks=(16, 16)),
]
WARM_UP = 3


def specs() -> list[Blast]:
    """The ranks of Table 9, then those that keep 80% of the parameters."""
    fifth = [
        Blast.for_budget(m, n, m * n * 4 // 5, step=16, blocks=16)
        for m, n in ((spec.out_features, spec.in_features) for spec in TABLE_9)
    ]
    return [*TABLE_9, *fifth]


def products(spec: Blast, tokens: int, device: str) -> dict[str, Product]:
    """The ways to multiply one random input, by name; ``exact`` in float64, ``eager`` to judge."""
    torch._dynamo.reset()  # one compilation for each case: no dynamic shapes, no limit on how many
    factors = spec.init(seed=1, dtype=DTYPE, device=device)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, spec.in_features, generator=generator).to(device, DTYPE)
    weight = spec.to_dense(factors)
    compiled = torch.compile(spec.matmul, fullgraph=True, dynamic=False)
    return {
        "exact": lambda: spec.matmul(x.double(), cast_factors(factors, torch.float64)),
        "eager": lambda: spec.matmul(x, factors),
        "dense": lambda: torch.nn.functional.linear(x, weight),
        "plain": lambda: compiled(x, factors),
        "triton": lambda: triton_blast.matmul(spec, x, factors),
    }


def check(spec: Blast, tokens: int, device: str) -> None:
    """Raise SystemExit where a BLAST product is off by more than twice eager plain PyTorch."""
    ways = products(spec, tokens, device)
    exact = ways["exact"]()
    allowed = 2 * float((ways["eager"]() - exact).norm() / exact.norm())
    for name in ("plain", "triton"):
        error = float((ways[name]() - exact).norm() / exact.norm())
        if not error <= allowed:  # NaN is no success
            raise SystemExit(
                f"{name} is wrong: {spec} on {tokens} tokens is off by {error:.2e}, and at most "
                f"{allowed:.2e} is allowed; nothing was timed"
            )


def captured(product: Product) -> torch.cuda.CUDAGraph:
    """A graph of one product, after enough calls to have compiled and tuned it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product()
    return graph


def seconds(work: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """The median time of each piece of work, taking turns, with overwritten caches."""
    scratch = torch.empty(2**28, dtype=torch.int8, device=device)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: median(start.elapsed_time(end) for start, end in pairs) / 1e3
        for name, pairs in marks.items()
    }


def ceilings(rounds: int, device: str) -> tuple[float, float]:
    """Bytes a second of a large copy, operations a second of a large product."""
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in range(2))
    work = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b)}
    for run in work.values():
        run()
    took = seconds(work, rounds, device)
    return 2 * source.numel() / took["copy"], 2 * side**3 / took["product"]


def measure(spec: Blast, tokens: int, rounds: int, device: str) -> list[str]:
    """A table row for each way to multiply."""
    m, n = spec.out_features, spec.in_features
    ways = products(spec, tokens, device)
    names = ("dense", "plain", "triton")
    graphs = {name: captured(ways[name]) for name in names}
    took = seconds({name: graph.replay for name, graph in graphs.items()}, rounds, device)
    rows = []
    for name in names:
        numbers = m * n if name == "dense" else spec.num_params
        operations = 2 * tokens * (m * n if name == "dense" else spec.num_multiplications)
        moved = DTYPE.itemsize * (numbers + tokens * (m + n))
        rows.append(
            f"| {m} x {n} | {spec.rank} | {tokens} | {name} | {1e6 * took[name]:.1f} | "
            f"{took['dense'] / took[name]:.2f} | {moved / took[name] / 1e9:.0f} | "
            f"{operations / took[name] / 1e12:.1f} |"
        )
    return rows


def main() -> None:
    """Check every case, then print the ceilings and a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=50)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch sees no CUDA device; run it where one is")
    device = "cuda"
    cases = [(spec, t) for spec in specs() for t in sorted(given.tokens, reverse=True)]
    with torch.no_grad():
        for spec, tokens in cases:
            check(spec, tokens, device)
        copy, product = ceilings(given.rounds, device)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
        print(f"ceilings: {copy / 1e9:.0f} GB/s copying, {product / 1e12:.0f} TFLOP/s multiplying")
        print("| matrix | rank | tokens | product | us | dense / this | GB/s | TFLOP/s |")
        print("|---|---|---|---|---|---|---|---|")
        for spec, tokens in cases:
            print("\n".join(measure(spec, tokens, given.rounds, device)), flush=True)


if __name__ == "__main__":
    main()
