"""``compress``: any module in memory, by the same block compressor as the job from disk to disk.

A transformers model of a known family is walked block by block and every layer is fitted on the
compressed model's inputs (or, with ``inputs="dense"``, on the dense model's). Any other module
counts as one block, whose layers are fitted on the dense model's inputs whatever ``inputs`` says,
gathered in one pass: nothing is known of its inner order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blastnn.arithmetic import plain_arithmetic
from blastnn.compress.allocate import allocate
from blastnn.compress.batches import Batch, batches_of, check_ids, run_on, token_shape
from blastnn.compress.block import (
    KEEP,
    UNREACHED,
    BlockCompressor,
    BlockProgress,
    LayerRecord,
)
from blastnn.compress.fit import fit_layer
from blastnn.compress.measured import row_blocks, to_measure_with
from blastnn.compress.moments import Moments, MomentSum, refuse
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.compress.planning import check_fit, make_plan
from blastnn.compress.pruning import prune_plan
from blastnn.compress.refine import require_windows
from blastnn.compress.sharing import share_inputs
from blastnn.compress.spectrum import measure_whole
from blastnn.compress.streams import Streams
from blastnn.errors import CalibrationError, PlanError
from blastnn.evaluate.probe import probe_arguments
from blastnn.integrations.transformers import describe
from blastnn.linear import StructuredLinear
from blastnn.models.families import FAMILIES
from blastnn.models.linears import dense_weight, find_tied, input_of, replace_module
from blastnn.models.skeleton import find_blocks
from blastnn.models.walk import capture_input, first_tensor, record_calls


@dataclass(frozen=True)
class CompressionResult:
    """A compressed copy of a model, its plan, and a record for every linear layer."""

    model: nn.Module
    plan: Plan
    records: list[LayerRecord]


@plain_arithmetic()
def compress(
    model: nn.Module,
    keep: float = 0.8,
    calibration: Iterable[Batch] | None = None,
    preset: str = "default",
    **choices: Any,
) -> CompressionResult:
    """Compress a copy of a model; the model itself is not changed.

    A model that is walked block by block is run in float32; the result has its own dtypes.

    Args:
        model: any module, with its weights in memory.
        keep: share of the targeted layers' parameters to keep.
        calibration: batches to run through the model: a tensor, a tuple or list of arguments (as a
            ``DataLoader`` gives them) or a dict of keyword arguments; None fits without data. For
            transformers models of a known family, token ids ``(batch, window)`` of one shape.
        preset: ``fast``, ``default`` or ``best``, as on the command line; how much text to
            calibrate with is yours to say here.
        choices: fields of ``Options`` in place of the preset's, e.g. ``structure`` or ``targets``.

    Raises:
        BlastnnError: says which input is wrong and what to do.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"compress takes a torch module, but was given {type(model)}; for a folder "
            "there is compress_checkpoint"
        )
    options = replace(Options.from_preset(preset, **choices), keep=keep)
    batches = None if calibration is None else batches_of(calibration)
    require_windows(options, 0 if batches is None else len(batches))
    if batches is not None and not batches:
        raise CalibrationError("calibration holds no batch; pass None for no data")
    modes = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
    copied = copy.deepcopy(model).eval()
    if _walkable(model, batches):
        assert isinstance(copied, PreTrainedModel)
        outcome = _by_blocks(copied, options, batches)
    else:
        outcome = _as_one_block(copied, options, batches)
    for name, module in outcome.model.named_modules(remove_duplicate=False):
        module.training = modes[name]
    if isinstance(outcome.model, PreTrainedModel):
        describe(outcome.model)
    return outcome


def _walkable(model: nn.Module, batches: list[Batch] | None) -> bool:
    """Token ids of one shape can be walked block by block; other batches need the whole model."""
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in FAMILIES:
        return False
    if batches is None:
        return True
    shapes = {token_shape(batch) for batch in batches}
    return len(shapes) == 1 and None not in shapes


def _by_blocks(
    model: PreTrainedModel, options: Options, batches: list[Batch] | None
) -> CompressionResult:
    blocks = find_blocks(model)
    for batch in batches or ():
        assert isinstance(batch, Tensor)
        check_ids(model, batch)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    plan = make_plan(model, [block.name for block in blocks], options, None, tied)
    plan = share_inputs(plan) if options.joint else plan
    plan = prune_plan(plan, model.config) if options.coupled else plan
    check_fit(plan, options.solver)
    dtype, dtypes = next(iter(blocks[0].module.parameters())).dtype, _dtypes(model)
    model.float()
    plan, outputs, leaving = _measured(model, plan, options, batches, [b.name for b in blocks])
    compressor = BlockCompressor(options, dtype, BlockProgress())
    trace, streams = None, None
    if batches is not None:
        base = model.base_model  # without a cache: every call of a block would add to it
        ids = [batch for batch in batches if isinstance(batch, Tensor)]
        run = [partial(base, **probe_arguments(base, batch)) for batch in ids]
        trace = record_calls(run[0], blocks)
        hidden = [capture_input(each, blocks) for each in run]
        streams = Streams(hidden, hidden)
    records: list[LayerRecord] = []
    for index, block in enumerate(blocks):
        calls = [] if trace is None else trace.of_block(index)
        of_block = {la.kind: outputs[la.name] for la in plan.of_block(index) if la.name in outputs}
        weight = leaving.get(block.name)
        plans = plan.of_block(index)
        outcome = compressor.run(block.module, calls, plans, streams, of_block, weight)
        replace_module(model, block.name, outcome.module)
        records += outcome.records
    records += [LayerRecord(p.name, "kept", p.reason) for p in plan.layers if p.block is None]
    _cast_back(model, dtypes)
    return CompressionResult(model, plan, records)


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Of all floating-point parameters and buffers by name."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}


def _cast_back(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """To the given dtypes again; a structured layer to that of the weight in whose place it is."""
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            module.to(dtypes[f"{name}.weight"])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


def _as_one_block(
    model: nn.Module, options: Options, batches: list[Batch] | None
) -> CompressionResult:
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise PlanError("the model has parameters on the meta device; load its weights first")
    if options.joint or options.coupled:
        raise PlanError("nothing is known of which layers of this module belong together")
    if options.refine:
        raise PlanError(
            "only models that are walked block by block can be refined: a transformers model of a "
            f"known family ({', '.join(sorted(FAMILIES))}), with batches of token ids of one shape"
        )
    plan = make_plan(model, [""], options, None, [], find_tied(model))
    check_fit(plan, options.solver)
    plan, outputs, _ = _measured(model, plan, options, batches, [])
    wanted = list(plan.compressed)
    moments = None if batches is None else _dense_moments(model, wanted, batches, options.moment)
    records = [LayerRecord(p.name, "kept", p.reason) for p in plan.layers if p.spec is None]
    unreached = [] if moments is None else [la.name for la in wanted if la.name not in moments]
    if unreached and options.strict:
        refuse(unreached, UNREACHED, KEEP)
    records += [LayerRecord(name, "kept", UNREACHED) for name in unreached]
    for layer in wanted:
        if layer.name in unreached:
            continue
        old = model.get_submodule(layer.name)
        seen = None if moments is None else moments[layer.name]
        dtype = dense_weight(old).dtype
        fitted, fields = fit_layer(old, layer, seen, outputs.get(layer.name), options, dtype)
        model = replace_module(model, layer.name, fitted.to(dtype))
        records.append(LayerRecord(layer.name, "compressed", **fields))
    return CompressionResult(model, plan, records)


def _measured(
    model: nn.Module,
    plan: Plan,
    options: Options,
    batches: list[Batch] | None,
    blocks: list[str],
) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor]]:
    """The plan with its budget allocated, and the weights of layers' and blocks' outputs, as
    ``options`` say and as far as there is anything to measure with.
    """
    asked = (options.allocation, options.outputs, options.refine) != ("uniform", "equal", 0)
    if batches is None or not asked or options.keep >= 1.0:
        return plan, {}, {}
    chosen = [batches[index] for index in to_measure_with(options, len(batches))]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    found = measure_whole(
        model,
        {layer.name: row_blocks(layer, options) for layer in plan.compressed},
        [partial(_output, model, batch) for batch in chosen],
        isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None,
        options.seed,
        blocks if options.refine else (),
    )
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    if options.allocation == "measured":
        plan = allocate(plan, found.spectra, options)
    return plan, found.outputs, found.blocks


def _output(model: nn.Module, batch: Batch) -> Tensor:
    return first_tensor(run_on(model, batch))


def _dense_moments(
    model: nn.Module, layers: list[LayerPlan], batches: list[Batch], moment: str
) -> dict[str, Moments]:
    sums: dict[str, MomentSum] = {}

    def gather(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = input_of(args, kwargs).detach().float()
        sums.setdefault(name, MomentSum(moment)).add(x.reshape(-1, x.shape[-1]))

    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    hooks = [
        module.register_forward_pre_hook(partial(gather, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        for batch in batches:
            run_on(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.finish(name) for name, total in sums.items()}
