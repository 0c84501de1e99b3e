"""A compression drafted: the model found and its layers planned, from ``config.json`` alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.compress.plan_file import plan_from_file
from blastnn.compress.planning import check_fit, make_plan
from blastnn.compress.pruning import prune_plan
from blastnn.compress.sharing import share_inputs
from blastnn.compress.walker import Walker
from blastnn.dtypes import DTYPES, dtype_named
from blastnn.models.source import ModelFolder, Say, open_model


@dataclass
class Draft:
    """What is known of a compression before any text or weight has been read.

    ``plan_given`` says that the plan is a file's, to be followed as it is.
    """

    folder: ModelFolder
    options: Options
    walker: Walker
    plan: Plan
    dtype: torch.dtype
    plan_given: bool

    @property
    def head(self) -> LayerPlan | None:
        """The output layer, if it is to be compressed."""
        outside = [layer for layer in self.plan.compressed if layer.block is None]
        return outside[0] if outside else None

    @property
    def tokens(self) -> int:
        """How many tokens to calibrate with: as many as asked for, until a text is cut."""
        return self.options.tokens

    def output_bytes(self) -> int:
        """Bytes of the tensors that will be written."""
        layers, how = self.plan.compressed, self.options.quantization
        rest = self.plan.model_params - sum(layer.dense_params for layer in layers)
        factors = sum(layer.num_bytes(how, self.dtype) for layer in layers)
        return rest * self.dtype.itemsize + factors

    def memory_bytes(self) -> dict[str, int]:
        """The parts of the peak memory that can be known in advance."""
        sizes = [
            sum(math.prod(_shape(self.walker.model, n)) for n in self.walker.names_of(i))
            for i in range(len(self.walker.blocks))
        ]
        outside = sum(math.prod(_shape(self.walker.model, n)) for n in self.walker.outside)
        widest = max((layer.in_features for layer in self.plan.compressed), default=0)
        hidden = self.folder.config.hidden_size
        streams = 1 if self.options.inputs == "dense" else 2
        # Dense inputs of q, k, v and of gate, up; dense outputs of o and down; what attention gave.
        watched = {"inside one block, dense and compressed": 5 * self.tokens * hidden * 4}
        training = {"refinement: gradients, Adam's moments, the best factors": 4 * max(sizes) * 4}
        return {
            "block, dense and compressed": 2 * max(sizes) * 4,
            "hidden states of the calibration text": streams * self.tokens * hidden * 4,
            **(watched if streams > 1 else {}),
            "second moments and their copies": 6 * widest * widest * 8 if self.tokens else 0,
            "embeddings, while entering": outside * 4,
            **(training if self.options.refine else {}),
        }


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    owner, _, leaf = name.rpartition(".")
    return tuple(getattr(model.get_submodule(owner), leaf).shape)


def draft_job(
    model: str | Path,
    options: Options,
    plan_file: Path | None = None,
    say: Say = lambda _: None,
) -> Draft:
    """Find the model and plan its layers; reads no weight, no text and no tokenizer.

    Args:
        model: as for ``open_model``.
        options: what to do.
        plan_file: a plan written earlier, which says what becomes of each layer; ``options`` that
            decide plans are then of no account, and no shares are measured.
        say: told about downloads.

    Raises:
        BlastnnError: says what is wrong with which input.
    """
    folder = open_model(model, say)
    walker = Walker(folder)
    plan = make_plan(walker.model, walker.block_names, options, walker.head, walker.loader.tied)
    if options.joint:
        plan = share_inputs(plan)
    if options.coupled:
        plan = prune_plan(plan, folder.config)
    if plan_file is not None:
        plan = plan_from_file(plan, plan_file, walker.head)
        options = replace(options, keep=plan.keep, of=plan.of)  # of which the reports tell
    check_fit(plan, options.solver)
    dtype, given = _output_dtype(folder, options), plan_file is not None
    draft = Draft(folder, options, walker, plan, dtype, given)
    draft.output_bytes()  # refuses a structure that cannot be stored as asked for
    return draft


def _output_dtype(folder: ModelFolder, options: Options) -> torch.dtype:
    if options.dtype is not None:
        return dtype_named(options.dtype)
    stored = getattr(folder.config, "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype == stored), torch.float32)
