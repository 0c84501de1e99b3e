"""Gated MLPs of prompts: transformers' own, with the activation and its product in one pass.

Which modules these are is told by what their ``forward`` does, not by their names: it is the code
of Llama's, which many families share. A token by itself keeps to transformers' code, as do compiled
graphs, which fuse the two anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from blastnn.kernels.gated import serves, silu_times

LAYERS = ("gate_proj", "up_proj", "down_proj")
FEW = 16  # tokens, for which there is nothing to win


def is_gated(module: nn.Module) -> bool:
    """Whether a module is ``down(silu(gate(x)) * up(x))`` and nothing else."""
    code = getattr(type(module).forward, "__code__", None)
    known = LlamaMLP.forward.__code__
    return (
        code is not None
        and (code.co_code, code.co_names) == (known.co_code, known.co_names)
        and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
        and "forward" not in vars(module)
        and not any(_listened_to(module.get_submodule(name)) for name in ("gate_proj", "act_fn"))
    )


def _listened_to(module: nn.Module) -> bool:
    """Whether hooks see what it gives, which is changed in place here, or is never made."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or x.numel() < FEW * x.shape[-1] or not serves(x):
        plain: Tensor = type(module).forward(module, x)
        return plain
    gate_proj, up_proj, down_proj = (module.get_submodule(name) for name in LAYERS)
    gate, up = gate_proj(x), up_proj(x)
    if gate.dtype == up.dtype == torch.float32:
        gate = gate.contiguous()  # some structures give a view
        silu_times(gate, up)
    else:  # under autocast
        gate = module.get_submodule("act_fn")(gate) * up
    y: Tensor = down_proj(gate)
    return y


@contextmanager
def fused_gates(model: PreTrainedModel) -> Iterator[int]:
    """The model with these MLPs while the context is open; yields how many there are."""
    found = [module for module in model.modules() if is_gated(module)]
    for module in found:
        module.forward = partial(_forward, module)
    try:
        yield len(found)
    finally:
        for module in found:
            del module.forward
