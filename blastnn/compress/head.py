"""The output layer, compressed after the blocks: its inputs lie behind the last of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from blastnn.compress.block import LayerRecord
from blastnn.compress.fit import fit_layer
from blastnn.compress.job import Job
from blastnn.compress.moments import Moments, MomentSum
from blastnn.compress.streams import Streams
from blastnn.linear import StructuredLinear
from blastnn.models.walk import StopForward, Trace, run_tail, stopped


@dataclass(frozen=True)
class HeadOutcome:
    """The compressed output layer, its record, and how long its inputs took to gather."""

    layer: StructuredLinear
    record: LayerRecord
    forward_seconds: float


def compress_head(job: Job, trace: Trace, streams: Streams | None) -> HeadOutcome:
    """Fit the output layer that ``job.head`` plans.

    Args:
        job: its walker reads the layer, and all else outside the blocks, for this while.
        trace: how the model calls its blocks.
        streams: what leaves the last block; None fits without data.
    """
    assert job.head is not None
    started = time.perf_counter()
    job.walker.loader.load(job.walker.outside)
    layer = job.walker.model.get_submodule(job.head.name)
    moments = None if streams is None else _moments(job, layer, trace, streams)
    gathered = time.perf_counter()
    fitted, fields = fit_layer(layer, job.head, moments, None, job.options, job.dtype)
    job.walker.loader.release(job.walker.outside)
    seconds = time.perf_counter() - gathered
    record = LayerRecord(job.head.name, "compressed", seconds=seconds, **fields)
    return HeadOutcome(fitted, record, gathered - started)


def _moments(job: Job, layer: nn.Module, trace: Trace, streams: Streams) -> Moments:
    assert job.head is not None
    total = MomentSum(job.options.moment)
    for dense, compressed in zip(streams.dense, streams.compressed, strict=True):
        seen = (dense,) if streams.equal else (compressed, dense)
        total.add(*(_input(job, layer, trace, hidden) for hidden in seen))
    return total.finish(job.head.name)


@torch.no_grad()
def _input(job: Job, layer: nn.Module, trace: Trace, hidden: Tensor) -> Tensor:
    """``(tokens, in_features)``: what the output layer sees where the blocks give ``hidden``."""

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise StopForward(args[0])

    assert job.windows is not None
    run = partial(job.walker.model, job.windows.ids[:1], use_cache=False)
    hook = layer.register_forward_pre_hook(stop)
    try:
        x = stopped(lambda: run_tail(run, job.walker.blocks, trace.wrap, hidden))
    finally:
        hook.remove()
    return x.reshape(-1, x.shape[-1])
