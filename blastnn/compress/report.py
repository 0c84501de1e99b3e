"""The evidence beside a compressed model: ``report.json`` and ``report.html``."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blastnn.compress.html import render_html
from blastnn.compress.job import Job
from blastnn.compress.measured import (
    measured_windows,
    why_not_allocated,
    why_not_weighted,
    why_unmeasured,
)
from blastnn.compress.memory_use import HOW
from blastnn.compress.options import SCORED_TOKENS
from blastnn.compress.plan import ALLOCATED, IN_BUDGET, LayerPlan
from blastnn.compress.run import RunOutcome
from blastnn.errors import BlastnnError, MeasurementError
from blastnn.evaluate.child import ask
from blastnn.files import write_json, write_text
from blastnn.models.context import window_length
from blastnn.structures.grid import block_pair
from blastnn.version import __version__

FORMAT = "blastnn-report/1"
JSON, HTML = "report.json", "report.html"
NO_DATA = "no calibration text: the factorisation did not look at the model's inputs"
NO_TEXT = "no text was given (--text FILE)"
DEFAULT_TOKENS = SCORED_TOKENS["default"]


def write_report(
    job: Job,
    output: Path,
    outcome: RunOutcome,
    texts: Sequence[str],
    tokens: int = DEFAULT_TOKENS,
) -> dict[str, Any]:
    """Measure the written model in a child process, and write both reports.

    Raises:
        BlastnnError: the model just written could not be loaded and measured.
    """
    report = build_report(job, outcome, _measure(job, output, outcome, texts, tokens))
    report["scored"] = scored(texts, tokens)
    save_report(report, output)
    return report


def scored(texts: Sequence[str], tokens: int) -> dict[str, Any]:
    """On what a report's figures were measured, as it says."""
    return {"texts": list(texts), "tokens": tokens}


def measure_again(
    job: Job,
    output: Path,
    outcome: RunOutcome,
    report: dict[str, Any],
    texts: Sequence[str],
    tokens: int,
) -> dict[str, Any]:
    """The report of a finished job with figures of other texts, written anew.

    Raises:
        BlastnnError: the model could not be loaded and measured.
    """
    measured = _measure(job, output, outcome, texts, tokens)
    measured.pop("verified")
    report = {**report, **_measured_on(measured), "scored": scored(texts, tokens)}
    save_report(report, output)
    return report


def _measured_on(measured: dict[str, Any]) -> dict[str, Any]:
    return {"measured": measured or None, "not_measured": None if measured else NO_TEXT}


def save_report(report: dict[str, Any], output: Path) -> None:
    """Write a built report as a page and, last, as JSON."""
    write_text(output / HTML, render_html(report))
    write_json(output / JSON, report)


def _measure(
    job: Job, output: Path, outcome: RunOutcome, texts: Sequence[str], tokens: int
) -> dict[str, Any]:
    request = {
        "dense": str(job.folder.path),
        "compressed": str(output),
        "texts": list(texts),
        "tokens": tokens,
        "window": window_length(job.folder.config, job.options.window),
        "probe": outcome.journal.probe,
    }
    try:
        return dict(ask("blastnn.evaluate.compare", request))
    except MeasurementError as error:
        raise BlastnnError(
            f"the model is written to {output}, but measuring it failed: {error}; repeat the "
            "command with --resume to measure again"
        ) from error


def build_report(job: Job, outcome: RunOutcome, measured: dict[str, Any]) -> dict[str, Any]:
    """All that is known about a finished job, as plain JSON values.

    ``measured`` is what ``blastnn.evaluate.compare`` found, or the part of it that was asked for.
    """
    journal = outcome.journal
    records = {record.name: asdict(record) for record in journal.records}
    coverage = [_row(layer, records.get(layer.name), job) for layer in job.plan.layers]
    verified = measured.pop("verified")
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {
            "name": job.folder.name,
            "path": str(job.folder.path),
            "sha256": journal.identity["model"],
            "note": job.folder.note,
        },
        "options": job.options.to_json(),
        "keep": _keep(job, coverage),
        "sensitivity": _measured(job, coverage),
        "refinement": _refinement(job, outcome.journal.refined),
        "quantization": _quantization(job, coverage),
        "calibration": _calibration(job),
        "coverage": coverage,
        "timing": _timing(journal.seconds, journal.sittings),
        "memory": {"peak_anonymous_bytes": outcome.peak_anonymous_bytes, "how": HOW},
        **_measured_on(measured),
        "self_check": {**journal.probe, "verified": verified},
        "environment": environment(),
        "warnings": warnings_of(job, coverage, verified),
    }


def _row(layer: LayerPlan, record: dict[str, Any] | None, job: Job) -> dict[str, Any]:
    """One line of the coverage table."""
    compressed = record is not None and record["status"] == "compressed"
    spec = layer.spec if compressed else None
    blocks = getattr(spec, "blocks", None)  # of a block-diagonal matrix one number
    how = job.options.quantization if spec else None
    dense_bytes = layer.dense_params * job.dtype.itemsize
    error, before = (
        (record["relative_error"], record["error_before_quantization"]) if record else (None, None)
    )
    return {
        "name": layer.name,
        "kind": layer.kind,
        "block": layer.block,
        "shape": [layer.out_features, layer.in_features],
        "status": "compressed" if compressed else "kept",
        "reason": layer.reason if record is None else record["reason"],
        "structure": spec.name if spec else None,
        "rank": getattr(spec, "rank", None),
        "blocks": list(block_pair(blocks)) if blocks else None,
        "solver": record["solver"] if record else None,
        "solver_status": record["solver_status"] if record else None,
        "params_before": layer.dense_params,
        "params_after": layer.planned_params if spec else layer.dense_params,
        "bytes_after": layer.num_bytes(how, job.dtype) if spec else dense_bytes,
        "shared": layer.shared if spec else None,
        "quantized": how.to_json() if how else None,
        "relative_error": error,
        "tokens": record["tokens"] if record else None,
        "refitted": bool(record and record["refitted"]),
        "weighted_outputs": bool(record and record["weighted_outputs"]),
        "quantization_error": None if error is None or before is None else error - before,
        "seconds": record["seconds"] if record else None,
        "notes": record["notes"] if record else [],
    }


def _keep(job: Job, coverage: list[dict[str, Any]]) -> dict[str, Any]:
    """Asked and achieved, of the targets and of the whole model, in parameters and bytes."""
    targeted = [r for r in coverage if r["status"] == "compressed" or r["reason"] in IN_BUDGET]
    before = sum(row["params_before"] for row in targeted)
    after = sum(row["params_after"] for row in targeted)
    stored = job.folder.tensors.num_bytes
    width = stored / job.plan.model_params  # bytes a parameter, before
    untied = (
        before
        if job.head is not None and f"{job.head.name}.weight" in job.walker.loader.tied
        else 0
    )
    total = job.plan.model_params
    # A tied head that is compressed leaves the embedding in place: nothing is saved there.
    rest = total - before + (job.head.dense_params if untied and job.head else 0)
    size = job.dtype.itemsize
    after_bytes = sum(row["bytes_after"] for row in targeted)
    return {
        "asked": job.plan.keep,
        "of": job.plan.of,
        "targets": {
            "params": _share(before, after),
            "bytes": _share(round(before * width), after_bytes),
        },
        "model": {
            "params": _share(total, rest + after),
            "bytes": _share(stored, rest * size + after_bytes),
        },
    }


def _measured(job: Job, coverage: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured beforehand, and what followed from it, or why it did not."""
    return {
        "windows": None if why_unmeasured(job) else measured_windows(job).shape[0],
        "why_not_allocated": why_not_allocated(job),
        "kept_dense": sum(layer.reason == ALLOCATED for layer in job.plan.layers),
        "refitted_layers": sum(row["refitted"] for row in coverage),
        "why_not_weighted": why_not_weighted(job),
        "weighted_layers": sum(row["weighted_outputs"] for row in coverage),
    }


def _refinement(job: Job, blocks: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """How the held-out error of each block changed; errors of layers are those before it."""
    if not blocks:
        return None
    ratios = [block["after"] / block["before"] for block in blocks.values() if block["before"]]
    mean = sum(ratios) / len(ratios) if ratios else 1.0
    return {"epochs": job.options.refine, "mean_ratio": mean, "blocks": blocks}


def _quantization(job: Job, coverage: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How factors are stored, what that costs in bits, and the relative error that it adds."""
    how = job.options.quantization
    rows = [row for row in coverage if row["quantized"] is not None]
    if how is None or not rows:
        return None
    added = [row["quantization_error"] for row in rows]
    weights = sum(row["params_after"] for row in rows)
    return {
        **how.to_json(),
        "bits_per_weight": 8 * sum(row["bytes_after"] for row in rows) / weights,
        "error_added": {"mean": sum(added) / len(added), "largest": max(added)},
    }


def _share(before: int, after: int) -> dict[str, Any]:
    return {"before": before, "after": after, "kept": after / before if before else 1.0}


def _calibration(job: Job) -> dict[str, Any] | None:
    if job.windows is None:
        return None
    return {
        "sources": job.windows.sources,
        "window": job.windows.ids.shape[1],
        "windows": job.windows.ids.shape[0],
        "tokens": job.windows.ids.numel(),
        "tokens_sha256": job.windows.sha256,
    }


def _timing(seconds: dict[str, float], sittings: int) -> dict[str, Any]:
    total = sum(seconds.values())
    other = seconds.get("other", 0.0)
    return {
        "total": total,
        "factorise": seconds.get("factorise", 0.0),
        "refine": seconds.get("refine", 0.0),
        "forward": seconds.get("forward", 0.0),
        "measure": seconds.get("measure", 0.0),
        "other": other,
        "other_share": other / total if total else 0.0,
        "sittings": sittings,
    }


def environment() -> dict[str, str | int]:
    """Versions and machine, for the record."""
    return {
        "blastnn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def warnings_of(job: Job, coverage: list[dict[str, Any]], verified: bool | None) -> list[str]:
    """What a reader of the report must not overlook, the gravest first."""
    found = []
    if verified is False:
        found.append(
            "the model loaded in a fresh process did not give the very bits that the job computed"
        )
    unreached = [
        row["name"]
        for row, layer in zip(coverage, job.plan.layers, strict=True)
        if layer.spec is not None and row["status"] == "kept"
    ]
    if unreached:
        found.append(f"{len(unreached)} planned layers were kept dense, e.g. {unreached[0]}")
    fallbacks = [row["name"] for row in coverage if row["notes"]]
    if fallbacks:
        found.append(f"{len(fallbacks)} layers took a numerical fallback, e.g. {fallbacks[0]}")
    few = [r for r in coverage if r["tokens"] is not None and r["tokens"] < r["shape"][1]]
    if few:
        found.append(
            f"{len(few)} layers have more inputs than tokens to be fitted to, e.g. "
            f"{few[0]['name']} ({few[0]['shape'][1]} inputs, {few[0]['tokens']} tokens): what the "
            "text leaves open is decided by --damping alone"
        )
    if job.windows is None:
        found.append(NO_DATA)
    elif job.windows.ids.shape[1] < job.options.window:
        found.append(
            f"the calibration text was cut into sequences of {job.windows.ids.shape[1]} tokens, "
            f"the model's limit, instead of {job.options.window}"
        )
    return found
