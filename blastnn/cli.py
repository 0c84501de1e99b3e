"""The command line: thin, its choices come from the registries."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from blastnn.compress.options import PRESETS, Options
from blastnn.errors import BlastnnError, PlanError
from blastnn.factorize import SOLVERS
from blastnn.structures import STRUCTURES
from blastnn.version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help="demo, a folder, a .gguf file, or a hub id owner/name")]
Keep = Annotated[float | None, typer.Option(help="share of the parameters to keep, in (0, 1]")]
Of = Annotated[str | None, typer.Option(help="what keep counts: targets (linear layers) or model")]
StructureName = Annotated[str | None, typer.Option(help=f"one of {', '.join(sorted(STRUCTURES))}")]
Blocks = Annotated[str | None, typer.Option(help="block counts of BLAST: b, or b1,b2")]
Targets = Annotated[list[str] | None, typer.Option(help="pattern of layer names; repeatable")]
Solver = Annotated[str | None, typer.Option(help=f"auto, {', '.join(sorted(SOLVERS))}")]
Preset = Annotated[str, typer.Option(help=f"one of {', '.join(sorted(PRESETS))}")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON value instead of text")]
Text = Annotated[list[str] | None, typer.Option(help="text to measure on; repeatable")]
Tokens = Annotated[int, typer.Option(help="tokens of each text to score")]


@app.command()
def compress(
    model: Model,
    output: Annotated[Path | None, typer.Option(help="folder to write to")] = None,
    keep: Keep = None,
    of: Of = None,
    structure: StructureName = None,
    blocks: Blocks = None,
    targets: Targets = None,
    solver: Solver = None,
    sweeps: Annotated[int | None, typer.Option(help="iterations of the solver")] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="calibration text, repeatable; none for no data")
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="tokens to calibrate with")] = None,
    window: Annotated[int | None, typer.Option(help="tokens in a sequence")] = None,
    damping: Annotated[float | None, typer.Option(help="of the second moments")] = None,
    text: Text = None,
    tokens: Tokens = 16384,
    dtype: Annotated[str | None, typer.Option(help="of the written tensors")] = None,
    seed: Annotated[int | None, typer.Option(help="of the solver")] = None,
    preset: Preset = "default",
    plan: Annotated[Path | None, typer.Option(help="plan file written by blastnn plan")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped job")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan only; reads no weight")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model from disk to disk and write a report beside it."""
    from blastnn.compress.api import compress_checkpoint
    from blastnn.compress.run import prepare_job
    from blastnn.display import make_progress, print_plan, print_summary

    options = Options.from_preset(
        preset,
        keep=keep,
        of=of,
        structure=structure,
        blocks=parse_blocks(blocks),
        targets=tuple(targets) if targets else None,
        solver=solver,
        sweeps=sweeps,
        tokens=calibration_tokens,
        window=window,
        damping=damping,
        dtype=dtype,
        seed=seed,
    )
    texts = parse_calibration(calibration)
    if dry_run:
        print_plan(prepare_job(model, options, texts, plan), as_json)
        return
    if output is None:
        raise PlanError("give --output DIR, the folder to write to (or --dry-run)")
    with hint_on_interrupt(), make_progress(quiet=as_json) as progress:
        report, fresh = compress_checkpoint(
            model,
            output,
            options=options,
            calibration=texts,
            texts=text,
            tokens=tokens,
            plan=plan,
            resume=resume,
            progress=progress,
        )
    print_summary(report, output, fresh, as_json)


@app.command()
def plan(
    model: Model,
    keep: Keep = None,
    of: Of = None,
    structure: StructureName = None,
    blocks: Blocks = None,
    targets: Targets = None,
    preset: Preset = "default",
    output: Annotated[Path | None, typer.Option(help="plan file to write")] = None,
    as_json: Json = False,
) -> None:
    """Show ranks and sizes from a config.json alone; optionally write the plan to a file."""
    from blastnn.compress.run import prepare_job
    from blastnn.display import print_plan
    from blastnn.files import write_json

    options = Options.from_preset(
        preset,
        keep=keep,
        of=of,
        structure=structure,
        blocks=parse_blocks(blocks),
        targets=tuple(targets) if targets else None,
    )
    job = prepare_job(model, options, [])
    print_plan(job, as_json)
    if output is not None:
        write_json(output, job.plan.to_json())


@app.command()
def evaluate(
    folder: Annotated[str, typer.Argument(help="model folder, compressed or dense, or demo")],
    text: Annotated[list[str], typer.Option(help="text to score; repeatable")],
    against: Annotated[str | None, typer.Option(help="dense model to compare with")] = None,
    tokens: Tokens = 16384,
    window: Annotated[int, typer.Option(help="tokens in a window")] = 1024,
    as_json: Json = False,
) -> None:
    """Perplexity of a model, the dense one first, by one protocol."""
    from blastnn.display import print_scores
    from blastnn.evaluate.score import score_models

    print_scores(score_models(folder, against, text, tokens, window), as_json)


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="model folder, compressed or dense, or demo")],
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 60,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
) -> None:
    """Continue a prompt."""
    from blastnn.evaluate.generate import continue_text
    from blastnn.evaluate.score import open_any
    from blastnn.integrations.transformers import load_model
    from blastnn.models.source import load_tokenizer

    path = open_any(folder)
    answer = continue_text(
        load_model(path), load_tokenizer(path), prompt, max_tokens, temperature, seed
    )
    typer.echo(prompt + answer)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="compressed model folder")],
    verify: Annotated[
        bool, typer.Option("--verify", help="load it and compare its output with the job's")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is in a compressed folder; every factor is checked against its spec."""
    from blastnn.display import print_inspection
    from blastnn.evaluate.score import inspect_folder

    print_inspection(inspect_folder(folder, verify), as_json)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Smaller, faster neural networks with BLAST and other structured matrices."""
    if show:
        typer.echo(f"blastnn {__version__}")
        raise typer.Exit


def parse_blocks(text: str | None) -> tuple[int, int] | None:
    """``"4"`` or ``"4,8"`` as a pair; PlanError otherwise."""
    if text is None:
        return None
    parts = text.split(",")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdigit() for part in parts):
        raise PlanError(f"--blocks takes one number or two like 4,8, but was given {text!r}")
    numbers = [int(part) for part in parts]
    return numbers[0], numbers[-1]


def parse_calibration(sources: list[str] | None) -> list[str] | None:
    """None where nothing was said, an empty list for ``none``, else the files."""
    if sources == ["none"]:
        return []
    return sources or None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that blastnn or the system raises on purpose become one line and exit status 2."""
    try:
        yield
    except BlastnnError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"the disk is full ({error}); free some space and repeat with --resume")
        _fail(str(error))


@contextmanager
def hint_on_interrupt() -> Iterator[None]:
    """Ctrl-C in a long job ends it with a word on how to go on, and exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``blastnn`` command."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with one_line_errors():
        app(args=arguments, standalone_mode=True)
