"""DiT-XL/2 as its linear layers and whatever else has parameters, on the meta device.

The model of Tables 7 and 8: latents of 32 x 32 x 4, patches of 2 x 2, 1000 classes and "none".
Nothing is computed with it. Modules are named as in the published checkpoint, so that a plan file
made here names that checkpoint's layers.
"""

from __future__ import annotations

import torch
from torch import nn

from blastnn.compress.options import Options
from blastnn.compress.plan import Plan
from blastnn.compress.planning import make_plan

DEPTH, WIDTH, CHANNELS, PATCH, PATCHES, CLASSES, FREQUENCIES = 28, 1152, 4, 2, 16 * 16, 1000, 256
# Sines that training never changes. The published number of parameters counts them.
POSITION_EMBEDDING = PATCHES * WIDTH


def dit_plan() -> Plan:
    """All linear layers of DiT-XL/2."""
    # Tables 7 and 8 name their ranks: whether those are faster than dense is not asked here.
    options = Options(allow_slower=True)
    blocks = [f"blocks.{index}" for index in range(DEPTH)]
    return make_plan(dit_xl_2(), blocks, options, head=None, tied=())


def dit_xl_2() -> nn.Module:
    """The tree of modules; it has no ``forward``. Layer norms are left out: none has parameters."""
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "x_embedder": nn.ModuleDict({"proj": nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)}),
                "t_embedder": nn.ModuleDict({"mlp": _time_embedding()}),
                "y_embedder": nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, WIDTH)}),
                "blocks": nn.ModuleList(_block() for _ in range(DEPTH)),
                "final_layer": _final_layer(),
            }
        )
        fixed = nn.Parameter(torch.empty(1, PATCHES, WIDTH), requires_grad=False)
    model.register_parameter("pos_embed", fixed)
    return model


def _block() -> nn.Module:
    """Query, key and value stacked, as the paper compresses them."""
    attention = {"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)}
    mlp = {"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)}
    return nn.ModuleDict(
        {
            "attn": nn.ModuleDict(attention),
            "mlp": nn.ModuleDict(mlp),
            "adaLN_modulation": _modulation(6),
        }
    )


def _modulation(vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, vectors * WIDTH))


def _time_embedding() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))


def _final_layer() -> nn.Module:
    """A mean and a variance for every number of a patch."""
    outputs = PATCH * PATCH * 2 * CHANNELS
    return nn.ModuleDict({"linear": nn.Linear(WIDTH, outputs), "adaLN_modulation": _modulation(2)})
