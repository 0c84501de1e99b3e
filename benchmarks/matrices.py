"""The matrices that benchmarks share: one block of the demo model, and made-up large ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from blastnn.compress.job import prepare_job
from blastnn.compress.looks import Look, find_groups, look_at, run_calls
from blastnn.compress.moments import MomentSum
from blastnn.compress.options import Options
from blastnn.models.demo import prepare_model
from blastnn.models.tensors import TensorFolder

KINDS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def real_weights(block: int = 10) -> dict[str, Tensor]:
    """All seven weights of one block of the demo model, float32."""
    tensors = TensorFolder(Path(prepare_model(print)))
    return {
        kind: tensors.read(f"model.layers.{block}.{name}.weight").float()
        for kind, name in KINDS.items()
    }


@torch.no_grad()
def real_moments(block: int = 10, tokens: int = 8192, damping: float = 1e-4) -> dict[str, Tensor]:
    """The damped second moments of those weights' inputs in the dense model, float64."""
    job = prepare_job("demo", Options(tokens=tokens), None)
    assert job.windows is not None
    trace, hidden = job.walker.enter(job.windows.ids.split(1), torch.float32)
    for index in range(block):
        module = job.walker.load_block(index)
        hidden = [run_calls(module, trace.of_block(index), states) for states in hidden]
        job.walker.release_block(index)
    module, calls = job.walker.load_block(block), trace.of_block(block)
    found = {}
    for group in find_groups(module, calls, hidden[0], list(KINDS.values())):
        total = MomentSum()
        for states in hidden:
            (seen,), _ = look_at(module, calls, states, [Look(group)])
            total.add(seen.x)
        second = total.finish(group.layers[0]).damped(damping)
        found.update({kind: second for kind, name in KINDS.items() if name in group.layers})
    return found


def made_up(out_features: int, in_features: int, seed: int = 0, decay: float = 0.6) -> Tensor:
    """Gaussian entries with singular values proportional to ``index^-decay``.

    0.6 is near what the demo model's own feed-forward weights show over the middle of their
    spectrum. Cheap to make: a product of two Gaussian matrices with scaled columns.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(out_features, in_features)
    left = torch.randn(out_features, rank, generator=generator)
    right = torch.randn(in_features, rank, generator=generator)
    left *= torch.arange(1, rank + 1, dtype=torch.float32) ** -decay
    return left @ right.T
