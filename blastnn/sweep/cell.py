"""One cell: a job from disk to disk, its model scored, and the report written beside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blastnn.compress.draft import draft_job
from blastnn.compress.job import Job, Progress
from blastnn.compress.report import HTML, JSON, NO_DATA, build_report, save_report
from blastnn.compress.run import run_job
from blastnn.errors import PlanError
from blastnn.sweep.request import Cell, Prepared
from blastnn.sweep.scoring import Scorer, Scores

# A method that keeps less than this share of what it may keep cannot be compared at equal size.
LEAST_USED = 0.9


@dataclass(frozen=True)
class CellRunner:
    """Runs the cells of one sweep; ``measurements`` is the folder for what they share."""

    prepared: Prepared
    scorer: Scorer
    measurements: Path

    def run(self, cell: Cell, folder: Path, progress: Progress) -> dict[str, Any]:
        """Compress into ``folder``, going on with what is there, and score.

        Returns:
            ``params`` of the targets ``before`` and ``after`` with the share ``kept``, ``scores``,
            ``tasks``, ``seconds`` of the compression, whether the loaded model is ``verified`` to
            compute what the job did, and the report's ``warnings``.

        Raises:
            BlastnnError: the job cannot be done, or uses too little of its budget to be compared.
        """
        draft = draft_job(self.prepared.sweep.model, cell.options)
        windows = self.prepared.calibration if cell.calibrated else None
        job = Job(**vars(draft), windows=windows, progress=progress, measurements=self.measurements)
        _require_equal_size(cell, job, self.prepared.targets)
        outcome = run_job(job, folder, resume=True)
        found = self.scorer.score(folder, outcome.journal.probe)
        report = build_report(job, outcome, _measured(self.scorer, found.scores))
        save_report(report, folder)
        return {
            "params": self._params(report),
            "scores": found.scores,
            "tasks": found.tasks,
            "seconds": report["timing"]["total"],
            "verified": found.verified,
            # That a method without data had none is no news.
            "warnings": [w for w in report["warnings"] if cell.calibrated or w != NO_DATA],
        }

    def _params(self, report: dict[str, Any]) -> dict[str, Any]:
        """Of all targeted layers, those that stayed dense for some reason included."""
        targets = self.prepared.targets
        after = {row["name"]: row["params_after"] for row in report["coverage"]}
        before, kept = sum(targets.values()), sum(after[name] for name in targets)
        return {"before": before, "after": kept, "kept": kept / before}


def let_go(folder: Path) -> None:
    """Delete all of a cell but its report."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (JSON, HTML):
            path.unlink()


def _measured(scorer: Scorer, scores: Scores) -> dict[str, Any]:
    """The scores as a report has them."""
    found: dict[str, Any] = {"verified": None, "protocol": scorer.protocol, "perplexity": []}
    found |= {"cosine": [], "speed": None, "sample": None}
    if not scorer.causal:
        found["cosine"] = [
            {
                "text": score["text"],
                "mean": score["cosine"],
                "vectors": score["vectors"],
                "tokens": score["tokens"],
            }
            for score in scores
        ]
        return found
    for before, after in zip(scorer.dense, scores, strict=True):
        row = {key: after[key] for key in ("text", "sha256", "tokens", "window")}
        both = {"dense": before["perplexity"], "compressed": after["perplexity"]}
        found["perplexity"].append({**row, **both})
    return found


def _require_equal_size(cell: Cell, job: Job, targets: dict[str, int]) -> None:
    """Refuse a method that can use too little of its budget, before anything is computed."""
    planned = {layer.name: layer.planned_params for layer in job.plan.layers}
    removed = sum(params - planned[name] for name, params in targets.items())
    of, asked = cell.options.of, cell.options.keep
    kept = 1.0 - removed / (job.plan.model_params if of == "model" else sum(targets.values()))
    if kept < LEAST_USED * asked:
        raise PlanError(
            f"{cell.method.name} keeps {kept:.1%} of the parameters of the {of} where {asked:.1%} "
            f"may be kept, too few to be compared at equal size; compare at --keep {kept:.3f}"
        )
