"""``compress_checkpoint``: from disk to disk, with the report; what the command line calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blastnn.arithmetic import plain_arithmetic
from blastnn.compress.job import Job, Progress, prepare_job
from blastnn.compress.options import Options
from blastnn.compress.report import (
    DEFAULT_TOKENS,
    JSON,
    measure_again,
    scored,
    write_report,
)
from blastnn.compress.run import run_job
from blastnn.errors import PlanError
from blastnn.evaluate.text import first_windows, read_text
from blastnn.files import read_json
from blastnn.models.context import window_length
from blastnn.models.demo import TEST
from blastnn.models.source import DEMO

LONG_ENOUGH = 40  # characters a token, of which no tokenizer needs so many


@plain_arithmetic()
def compress_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    options: Options | None = None,
    calibration: Sequence[str | Path] | str | Path | None = None,
    texts: Sequence[str | Path] | str | Path | None = None,
    scored_tokens: int = DEFAULT_TOKENS,
    plan: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **choices: Any,
) -> tuple[dict[str, Any], bool]:
    """Compress a model folder into another folder, block by block, and report on it.

    Args:
        path: ``"demo"``, a folder, a ``.gguf`` file or a hub id.
        output: a new or empty folder; with ``resume`` one that holds the same job.
        options: all choices; or give them one by one as ``choices``, e.g. ``keep=0.8``, on top of
            the default preset.
        calibration: text files; None is the default of ``demo``, an empty list means no data.
        texts: text files for the perplexities of the report; for ``demo`` its test texts.
        scored_tokens: how many tokens of each text are scored.
        plan: a plan file instead of the uniform plan.
        resume: go on with a stopped job.
        progress: told what happens.

    Returns:
        The report, and whether anything was compressed (False: it was finished before). A finished
        job is measured again where other ``texts`` or ``scored_tokens`` are asked for.

    Raises:
        BlastnnError: says which input is wrong and what to do.
        OSError: the disk is full or not writable; finished blocks stay resumable.
    """
    progress = progress or Progress()
    if options is not None and choices:
        raise PlanError(
            f"give options, or choices one by one, not both: {', '.join(sorted(choices))} would be "
            "ignored"
        )
    if not isinstance(scored_tokens, int) or isinstance(scored_tokens, bool) or scored_tokens < 1:
        raise PlanError(f"scored_tokens must be at least 1, but is {scored_tokens!r}")
    calibration, texts = _listed(calibration), _listed(texts)
    job = prepare_job(
        path, options or Options.from_preset("default", **choices), calibration, plan, progress
    )
    if texts is None:
        texts = TEST if job.folder.name == DEMO else ()
    if texts:
        _check_texts(texts, job)
    folder = Path(output)
    outcome = run_job(job, folder, resume)
    names = [str(text) for text in texts]
    known = read_json(folder / JSON) if (folder / JSON).is_file() else None
    same = not names or (known or {}).get("scored") == scored(names, scored_tokens)
    if outcome.already_finished and known and same:
        return known, False
    progress.say("measuring the dense and the compressed model in a process of their own")
    if outcome.already_finished and known:
        return measure_again(job, folder, outcome, known, names, scored_tokens), False
    return write_report(job, folder, outcome, names, scored_tokens), True


def _listed(texts: Sequence[str | Path] | str | Path | None) -> Sequence[str | Path] | None:
    """One text as a list of one; lists, and None, as they are."""
    return [texts] if isinstance(texts, str | Path) else texts


def _check_texts(texts: Sequence[str | Path], job: Job) -> None:
    """Texts to be scored at the end must be there, and make a window, now."""
    tokenizer = job.folder.tokenizer()
    window = window_length(job.folder.config, job.options.window)
    for read in map(read_text, texts):
        first_windows(read.beginning(LONG_ENOUGH * window), tokenizer, window, window)
