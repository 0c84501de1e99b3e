"""What a job measures before it starts: how much its layers matter, once and for all.

From that follow the plan, whose budget is shared out anew, the weights of the layers' outputs, and
those of what leaves the blocks, for a refinement. All lie in the job's own folder, so that a
stopped job goes on with the same ones.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from torch import Tensor

from blastnn.compress.allocate import allocate
from blastnn.compress.job import Job
from blastnn.compress.journal import Journal
from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan, Plan, plan_from_file
from blastnn.compress.sensitivity import SensitivityPass, block_file, outputs_file
from blastnn.files import write_json
from blastnn.models.tensors import read_tensors
from blastnn.structures import Channels

PLAN = "plan.json"
MEASUREMENT = "measured"


def why_unmeasured(job: Job) -> str | None:
    """Why a job measures nothing beforehand; None if it does."""
    if job.windows is None:
        return "there is no calibration text to measure with"
    if job.options.keep >= 1.0:
        return "there is nothing to remove"
    return None


def why_not_allocated(job: Job) -> str | None:
    """Why a job's budget is not shared out by measurement; None if it is."""
    if job.plan_given:
        return "a plan file was given"
    if job.options.allocation == "uniform":
        return "uniform was asked for"
    return why_unmeasured(job)


def why_not_weighted(job: Job) -> str | None:
    """Why the outputs of a job's layers all count alike; None if they do not."""
    return "equal was asked for" if job.options.outputs == "equal" else why_unmeasured(job)


def refines(job: Job) -> bool:
    """Whether blocks are refined: asked for, and something is removed."""
    return job.options.refine > 0 and why_unmeasured(job) is None


def settle(job: Job, journal: Journal) -> Plan:
    """The plan to follow; measures and allocates unless that was done in an earlier sitting."""
    allocated, refined = why_not_allocated(job) is None, refines(job)
    if not allocated and not refined and why_not_weighted(job) is not None:
        return job.plan
    path, folder = journal.folder / PLAN, journal.folder / MEASUREMENT
    if not path.is_file():
        started = time.perf_counter()
        spectra = _pass_of(job, folder).run()
        plan = allocate(job.plan, spectra, job.options) if allocated else job.plan
        journal.add_seconds("measure", time.perf_counter() - started)
        journal.save()
        write_json(path, plan.to_json())
    return plan_from_file(job.plan, path, job.walker.head)


def outputs_of(journal: Journal, index: int) -> dict[str, Tensor]:
    """Blocks on the diagonal of ``G`` of one block's layers, as far as they were gathered."""
    path = outputs_file(journal.folder / MEASUREMENT, index)
    return read_tensors(path) if path.is_file() else {}


def block_weight(job: Job, journal: Journal, index: int) -> Tensor | None:
    """``G (h, h)`` of what leaves one block; None where blocks are not refined."""
    if not refines(job):
        return None
    return read_tensors(block_file(journal.folder / MEASUREMENT, index))["G"]


def forget(journal: Journal) -> None:
    """Give the disk back what was measured; the plan stays."""
    shutil.rmtree(journal.folder / MEASUREMENT, ignore_errors=True)


def to_measure_with(options: Options, windows: int) -> list[int]:
    """Which of so many windows of calibration text to measure with: spread evenly over them."""
    count = min(options.gradient_windows, windows)
    return [index * windows // count for index in range(count)]


def measured_windows(job: Job) -> Tensor:
    """The windows to measure with ``(windows, window)``."""
    assert job.windows is not None
    ids = job.windows.ids
    return ids[to_measure_with(job.options, len(ids))]


def row_blocks(layer: LayerPlan, options: Options) -> int | None:
    """Into how many blocks of rows a layer's ``G`` is cut; None where it is not wanted."""
    if layer.spec is None or options.outputs != "weighted":
        return None
    if isinstance(layer.spec, Channels):
        return 1 if options.coupled and layer.spec.axis == "columns" else None
    return layer.spec.row_blocks()


def _pass_of(job: Job, folder: Path) -> SensitivityPass:
    ids, options = measured_windows(job), job.options
    job.progress.say(
        f"measuring how much each layer matters, on {ids.shape[0]} windows of {ids.shape[1]} tokens"
    )
    plans = [job.plan.of_block(index) for index in range(len(job.walker.blocks))]
    return SensitivityPass(
        walker=job.walker,
        ids=ids,
        layers=[{la.name: row_blocks(la, options) for la in of if la.spec} for of in plans],
        folder=folder,
        seed=job.options.seed,
        blocks=refines(job),
        step=job.progress.measured,
    )
