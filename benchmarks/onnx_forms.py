"""Which form of the BLAST product does ONNX Runtime run fastest, for one token and for many?

python benchmarks/onnx_forms.py [--threads 2] [--rounds 25]

Every form is exported with a symbolic token count, compared with the dense matrix, and only then
timed, all forms in turn. Microseconds, medians. The dense layer is timed beside them.

Letters: as in blastnn/kernels/portable.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blastnn.integrations.onnx import export_onnx, open_session
from blastnn.structures import Blast

SIZES = ((1536, 576), (576, 576), (576, 1536))
TOKENS = (1, 16, 128)


def columns(x: Tensor, V: Tensor) -> Tensor:
    """``(T, n)`` to ``(b2, T, q)``."""
    return x.unflatten(1, (V.shape[0], V.shape[1])).transpose(0, 1)


def joined(y: Tensor) -> Tensor:
    """``(b1, T, p)`` to ``(T, m)``."""
    return y.transpose(0, 1).flatten(1)


def broadcast(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """The coupling as a broadcast product and a sum: what ``portable`` does."""
    z = columns(x, V) @ V
    return joined((z[None] * S[:, :, None]).sum(1) @ U.mT)


def over_rank(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """The coupling as ``r`` products of ``(b1, b2)`` and ``(b2, T)``."""
    z = V.mT @ columns(x, V).mT  # (b2, r, T)
    return (U @ (S.permute(2, 0, 1) @ z.transpose(0, 1)).transpose(0, 1)).flatten(0, 1).T


def einsum(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """The coupling as one Einsum."""
    return joined(torch.einsum("jtr,ijr->itr", columns(x, V) @ V, S) @ U.mT)


def unrolled(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Two-dimensional products only, which ONNX Runtime packs in advance; ``b1 b2`` terms."""
    w = sum(
        (x_j @ V_j) * s_j[:, None]
        for x_j, V_j, s_j in zip(columns(x, V), V, S.unbind(1), strict=True)
    )
    return torch.cat([w_i @ U_i.T for w_i, U_i in zip(w, U, strict=True)], 1)


FORMS: dict[str, Callable[..., Tensor]] = {
    "broadcast": broadcast,
    "over rank": over_rank,
    "einsum": einsum,
    "unrolled": unrolled,
}


class Form(nn.Module):
    """One form with factors of its own."""

    def __init__(self, product: Callable[..., Tensor], factors: dict[str, Tensor]) -> None:
        super().__init__()
        self.product = product
        self.factors = nn.ParameterDict(factors)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, n)`` to ``(T, m)``."""
        return self.product(x, *(self.factors[name] for name in "USV"))


def sessions(spec: Blast, folder: Path, threads: int) -> dict[str, Any]:
    """A session for the dense layer and for every form, each compared with the dense matrix."""
    factors = spec.init()
    dense = nn.Linear(spec.in_features, spec.out_features, bias=False)
    dense.weight.data = spec.to_dense(factors).contiguous()
    modules = {"dense": dense, **{name: Form(form, factors) for name, form in FORMS.items()}}
    found = {}
    for name, module in modules.items():
        x = torch.randn(5, spec.in_features)
        written = export_onnx(module, folder / f"{name}.onnx", example=(x,), overwrite=True)
        session = found[name] = open_session(written.path, threads)
        y = torch.from_numpy(session.run(None, {written.inputs[0]: x.numpy()})[0])
        torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)
    return found


def medians(found: dict[str, Any], tokens: int, width: int, rounds: int) -> dict[str, float]:
    """Microseconds of a run by name; the first round warms up."""
    x = torch.randn(tokens, width).numpy()
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds + 1):
        for name, session in found.items():
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: x})
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Print a line for every size and token count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    for m, n in SIZES:
        spec = Blast.for_budget(m, n, m * n // 2, blocks=(4, 4))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            found = sessions(spec, Path(folder), given.threads)
        for tokens in TOKENS:
            rows = medians(found, tokens, n, given.rounds)
            shown = ", ".join(f"{name} {value:.0f}" for name, value in rows.items())
            print(f"{m}x{n} rank {spec.rank}, {tokens} tokens: {shown}", flush=True)


if __name__ == "__main__":
    main()
