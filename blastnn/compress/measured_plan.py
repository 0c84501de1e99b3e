"""The plan that a job follows: its uniform one, or one allocated by measurement, once and for all.

The measurement is the first part of a job. Its result lies in the job's own folder, so that a
stopped job goes on with the same plan.
"""

from __future__ import annotations

import shutil
import time

import torch
from torch import Tensor

from blastnn.compress.allocate import allocate
from blastnn.compress.job import Job
from blastnn.compress.journal import Journal
from blastnn.compress.plan import Plan, plan_from_file
from blastnn.compress.sensitivity import SensitivityPass
from blastnn.compress.spectrum import Spectra
from blastnn.files import write_json

PLAN = "plan.json"
MEASUREMENT = "allocation"


def why_uniform(job: Job) -> str | None:
    """Why a job does not allocate its budget by measurement; None if it does."""
    if job.plan_given:
        return "a plan file was given"
    if job.options.allocation == "uniform":
        return "uniform was asked for"
    if job.windows is None:
        return "there is no calibration text to measure with"
    if job.options.keep >= 1.0:
        return "there is nothing to remove"
    return None


def settle_plan(job: Job, journal: Journal) -> Plan:
    """The plan to follow; measures and allocates unless that was done in an earlier sitting."""
    if why_uniform(job) is not None:
        return job.plan
    path = journal.folder / PLAN
    if not path.is_file():
        started = time.perf_counter()
        plan = allocate(job.plan, _measure(job, journal), job.options)
        journal.add_seconds("allocate", time.perf_counter() - started)
        journal.save()
        write_json(path, plan.to_json())
        shutil.rmtree(journal.folder / MEASUREMENT)
    return plan_from_file(job.plan, path, job.walker.head)


def measured_windows(job: Job) -> Tensor:
    """The windows to measure with ``(windows, window)``: spread evenly over the calibration."""
    assert job.windows is not None
    ids = job.windows.ids
    count = min(job.options.allocation_windows, len(ids))
    return ids[torch.arange(count) * len(ids) // count]


def _measure(job: Job, journal: Journal) -> Spectra:
    ids = measured_windows(job)
    job.progress.say(
        f"measuring how much each layer matters, on {ids.shape[0]} windows of {ids.shape[1]} tokens"
    )
    blocks = range(len(job.walker.blocks))
    return SensitivityPass(
        walker=job.walker,
        ids=ids,
        layers=[[la.name for la in job.plan.of_block(i) if la.spec is not None] for i in blocks],
        folder=journal.folder / MEASUREMENT,
        seed=job.options.seed,
        step=job.progress.measured,
    ).run()
