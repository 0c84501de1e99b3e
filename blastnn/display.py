"""What the command line shows: a live table on a terminal, plain lines when piped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from blastnn.compress.block import LayerRecord
from blastnn.compress.draft import Draft
from blastnn.compress.job import Job, Progress
from blastnn.compress.memory_use import anonymous_bytes
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.factorize import SOLVERS, automatic_table, explain_solver
from blastnn.structures import STRUCTURES, spec_from_json

COLUMNS = ("layer", "shape", "rank", "error", "seconds", "memory", "time left")
SHOWN_ROWS = 14
MIB = 2**20


class Reporter(Progress):
    """Base of the two displays: keeps the clock and estimates the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._start = time.perf_counter()
        self._todo = self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def say(self, message: str) -> None:
        """A remark on a line of its own."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def planned(self, plan: Plan, finished: Sequence[LayerRecord]) -> None:
        """Start the clock; finished layers do not count towards the estimate."""
        names = {record.name for record in finished}
        self._todo = sum(la.dense_params for la in plan.compressed if la.name not in names)
        self._start = time.perf_counter()
        before, after = plan.target_params
        self.say(
            f"{len(plan.compressed)} layers, {before:,} parameters -> {after:,}"
            + (f"; going on behind {len(names)} finished layers" if names else "")
        )

    def row(self, plan: LayerPlan, record: LayerRecord) -> tuple[str, ...]:
        """The cells of one layer."""
        self._done += plan.dense_params
        spent = time.perf_counter() - self._start
        left = spent / self._done * max(self._todo - self._done, 0)
        memory = anonymous_bytes()
        error = record.relative_error
        return (
            plan.name,
            f"{plan.out_features}x{plan.in_features}",
            str(getattr(plan.spec, "rank", "-")),
            "-" if error is None else f"{error:.4f}",
            "-" if record.seconds is None else f"{record.seconds:.1f}",
            "-" if memory is None else f"{memory / MIB:.0f}M",
            f"{int(left) // 60}:{int(left) % 60:02d}",
        )


class PlainReporter(Reporter):
    """One line a layer, for pipes and files."""

    def layer(self, plan: LayerPlan, record: LayerRecord) -> None:
        """Print the layer's cells."""
        cells = zip(COLUMNS[1:], self.row(plan, record)[1:], strict=True)
        self.say(f"{plan.name}  " + "  ".join(f"{key} {value}" for key, value in cells))


class LiveReporter(Reporter):
    """A table that is redrawn in place, with the last layers and the totals."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._rows: list[tuple[str, ...]] = []
        self._footer = ""
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._live.__exit__(*details)

    def layer(self, plan: LayerPlan, record: LayerRecord) -> None:
        """Add the layer and redraw."""
        self._rows.append(self.row(plan, record))
        self._draw()

    def block(self, index: int, total: int) -> None:
        """Show how many blocks are written."""
        self._footer = f"{index + 1} of {total} blocks written; Ctrl-C stops, --resume goes on"
        self._draw()

    def _draw(self) -> None:
        self._live.update(Group(table(COLUMNS, self._rows[-SHOWN_ROWS:]), self._footer))


def make_progress(quiet: bool = False) -> Reporter:
    """The display that suits the terminal; on standard error where output must stay clean."""
    console = Console(stderr=quiet)
    return LiveReporter(console) if console.is_terminal else PlainReporter(console)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table, numbers to the right."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=2))


def print_plan(draft: Draft, as_json: bool) -> None:
    """Ranks, sizes and the estimated memory of a draft."""
    before, after = draft.plan.target_params
    total = draft.plan.model_params
    sizes = {
        "target_params": {"before": before, "after": after},
        "model_params": {"before": total, "after": total - before + after},
        "output_bytes": draft.output_bytes(),
        "memory_bytes": draft.memory_bytes(),
    }
    if as_json:
        print_json({**draft.plan.to_json(), **sizes})
        return
    rows = []
    for layer in draft.plan.layers:
        what = layer.reason or str(layer.spec)
        shape = f"{layer.out_features}x{layer.in_features}"
        rows.append((layer.name, shape, f"{layer.planned_params:,}", what))
    console = Console(soft_wrap=True)
    console.print(table(("layer", "shape", "parameters", "becomes"), rows))
    console.print(f"targets {before:,} -> {after:,} ({after / max(before, 1):.1%})")
    console.print(f"model   {total:,} -> {total - before + after:,}")
    console.print(f"output  {draft.output_bytes() / MIB:.0f} MiB")
    for part, size in draft.memory_bytes().items():
        console.print(f"memory  {size / MIB:.0f} MiB for {part}")
    if not isinstance(draft, Job):
        console.print(f"        reckoned with {draft.tokens:,} tokens of calibration text")


def print_summary(report: dict[str, Any], output: Path, fresh: bool, as_json: bool) -> None:
    """What a finished job achieved."""
    if as_json:
        print_json(report)
        return
    console = Console(soft_wrap=True, highlight=False)
    if not fresh:
        console.print(f"{output} was finished before; nothing to do")
    keep = report["keep"]
    for part in ("targets", "model"):
        for unit in ("params", "bytes"):
            share = keep[part][unit]
            asked = (
                f" (asked {keep['asked']:.1%})" if part == keep["of"] and unit == "params" else ""
            )
            console.print(
                f"{part:8}{unit:7}{share['before']:>13,} -> {share['after']:>13,}  "
                f"kept {share['kept']:.2%}{asked}"
            )
    if report.get("quantization"):
        how = report["quantization"]
        error = how["error_added"]
        console.print(
            f"factors in {how['bits']} bits, {how['bits_per_weight']:.2f} a weight with scales; "
            f"relative error added: mean {error['mean']:.4f}, largest {error['largest']:.4f}"
        )
    measured = report["measured"]
    if measured is None:
        console.print(f"not measured: {report['not_measured']}")
    else:
        _print_measured(console, measured)
    timing = report["timing"]
    console.print(
        f"{timing['total']:.0f} s: factorisation {timing['factorise']:.0f}, forward passes "
        f"{timing['forward']:.0f}, other {timing['other']:.0f} ({timing['other_share']:.1%})"
    )
    peak = report["memory"]["peak_anonymous_bytes"]
    if peak is not None:
        console.print(f"peak anonymous memory {peak / MIB:.0f} MiB")
    verified = {True: "equal, bit for bit", False: "DIFFERENT", None: "not compared"}
    state = verified[report["self_check"]["verified"]]
    console.print(f"logits of the model loaded in a fresh process and of the job: {state}")
    for warning in report["warnings"]:
        console.print(f"warning: {warning}")
    console.print(f"{output / 'report.html'}")


def _print_measured(console: Console, measured: dict[str, Any]) -> None:
    for row in measured["perplexity"]:
        console.print(
            f"perplexity {row['text']}: dense {row['dense']:.2f}, compressed "
            f"{row['compressed']:.2f} ({row['tokens']} tokens)"
        )
    if measured["cosine"]:
        console.print(f"mean cosine of the hidden states: {measured['cosine']['mean']:.4f}")
    for phase in ("prefill", "decode"):
        if measured["speed"]:
            speed = measured["speed"][phase]
            console.print(
                f"{phase}: dense {speed['dense']:.1f} tokens/s, compressed "
                f"{speed['compressed']:.1f} ({speed['ratio']:.2f}x)"
            )


def print_scores(scores: dict[str, Any], as_json: bool) -> None:
    """Perplexities, the dense model's first."""
    if as_json:
        print_json(scores)
        return
    for row in scores["perplexity"]:
        values = ", ".join(
            f"{key} {scores['models'][key]}: {row[key]:.4f}" for key in scores["models"]
        )
        print(f"{row['text']} ({row['tokens']} tokens, windows of {row['window']}): {values}")
    print(f"protocol: {scores['protocol']}")


def print_inspection(found: dict[str, Any], as_json: bool) -> None:
    """The structured layers of a folder."""
    if as_json:
        print_json(found)
        return
    rows = [
        (
            name,
            layer["structure"],
            f"{layer['out_features']}x{layer['in_features']}",
            str(layer.get("rank", "-")),
            str(layer.get("blocks", "-")),
            f"{layer['params']:,}",
            f"{layer['bytes']:,}",
            f"{layer['bits_per_weight']:.2f}",
        )
        for name, layer in found["layers"].items()
    ]
    console = Console(soft_wrap=True)
    console.print(
        table(
            ("layer", "structure", "shape", "rank", "blocks", "parameters", "bytes", "bits"), rows
        )
    )
    sizes = found["targets"]
    console.print(
        f"{len(rows)} layers, {sizes['before']:,} -> {sizes['after']:,} parameters "
        f"({sizes['kept']:.2%}); all factors present and well shaped, "
        f"{sizes['bytes']:,} bytes at {sizes['bits_per_weight']:.2f} bits a weight; "
        f"{found['bytes']:,} bytes in all"
    )
    if "verified" in found:
        words = "equal, bit for bit" if found["verified"] else "DIFFERENT"
        console.print(f"output of the loaded model and of the job that wrote it: {words}")


def print_quantized(report: dict[str, Any], output: Path, as_json: bool) -> None:
    """What quantising a compressed folder saved, and the error that it added."""
    if as_json:
        print_json(report)
        return
    console = Console(soft_wrap=True, highlight=False)
    for part in ("targets", "model"):
        sizes = report[part]["bytes"]
        console.print(
            f"{part:8}bytes {sizes['before']:>13,} -> {sizes['after']:>13,}  "
            f"kept {sizes['after'] / sizes['before']:.2%}"
        )
    error = report["error_added"]
    console.print(
        f"{len(report['layers'])} layers at {report['bits_per_weight']:.2f} bits a weight, scales "
        f"included; relative error added: mean {error['mean']:.4f}, largest {error['largest']:.4f}"
    )
    console.print(f"{output / 'report.json'}; measure it with blastnn evaluate")


def print_export(result: dict[str, Any], as_json: bool) -> None:
    """The files, how well their outputs agree with PyTorch's, and how long a forward pass takes."""
    if as_json:
        print_json(result)
        return
    print(
        f"{', '.join(result['files'])}: {result['bytes']:,} bytes, {result['dtype']} (the model's "
        f"tensors: {result['tensor_bytes']:,})"
    )
    print(f"{', '.join(result['inputs'])} -> {', '.join(result['outputs'])}")
    for row in result["agreement"]:
        print(
            f"{row['shape'][0]} x {row['shape'][1]} tokens: differs from PyTorch by at most "
            f"{row['max_difference']:.2g}, {row['relative']:.1e} of the largest output"
        )
    speed = result["speed"]
    for phase in ("prefill", "single"):
        seconds = speed[phase]["seconds"]
        line = f"{speed[phase]['tokens']} tokens: {1e3 * seconds['model']:.1f} ms"
        if "against" in seconds:
            name = result["against"]["model"]
            line += f"; {name} {1e3 * seconds['against']:.1f} ms ({speed[phase]['ratio']:.2f}x)"
        print(line)
    print(f"{speed['protocol']}, {speed['threads']} threads")


def print_kernels(rows: list[dict[str, Any]], as_json: bool) -> None:
    """For each kind of layer the kernel that serves it, why, and how fast it is beside dense."""
    if as_json:
        print_json(rows)
        return
    for row in rows:
        spec = spec_from_json(row["spec"])
        bits = f", {row['quantized']['bits']} bits" if row["quantized"] else ""
        print(f"{spec}{bits}: {row['layers']} layers, {row['dtype']} on {row['device']}")
        for name, reason in row["passed_over"].items():
            print(f"  not {name}: {reason}")
        expected = row["predicted_speedup"]
        told = "" if expected is None else f"; expected to be {expected:.2f} times as fast as dense"
        print(f"  {row['kernel']}{told if row['kernel'] == 'native' and not bits else ''}")
        for tokens, found in row["measured"].items():
            speeds = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found.items())
            print(f"    {tokens} tokens: {speeds} of dense's speed")


def print_solvers(as_json: bool) -> None:
    """The structures with their automatic solvers, then all solvers in order of preference."""
    if as_json:
        print_json({"auto": automatic_table(), "solvers": list(SOLVERS)})
        return
    console = Console(soft_wrap=True)
    for name, structure in STRUCTURES.items():
        console.print(f"{name}: {explain_solver(structure)}", highlight=False)
    console.print()
    for name, module in SOLVERS.items():
        console.print(f"{name}: {(module.__doc__ or '').splitlines()[0]}", highlight=False)


BENCH_COLUMNS = (
    "phase",
    "batch",
    "prompt",
    "tokens/s",
    "dense",
    "speed-up",
    "allowed",
    "reached",
)


def print_bench(report: dict[str, Any], as_json: bool) -> None:
    """Speeds of both models, what is allowed and what is reached."""
    if as_json:
        print_json(report)
        return
    console = Console(soft_wrap=True, highlight=False)
    rows = [
        _bench_row(phase, setting)
        for phase in ("decode", "prefill")
        for setting in report["settings"]
    ]
    console.print(table(BENCH_COLUMNS, rows))
    machine, limits, energy = report["machine"], report["ceilings"], report["energy"]
    console.print(
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, "
        f"{report['dtype']}; reads {limits['bytes_per_second'] / 1e9:.1f} GB/s, multiplies "
        f"{limits['multiplications_per_second'] / 1e9:.1f} G/s at most"
    )
    console.print(f"energy: {energy['source'] or energy['not_measured']}")
    peak = report["settings"][-1]["peak_bytes"]
    for name in ("dense", "compressed"):
        size = peak[name]["resident"]
        shown = "not known" if size is None else f"{size / MIB:.0f} MiB"
        console.print(f"peak memory of {name}, last row's batch and prompt: {shown}")
    for setting in report["settings"]:
        for name, state in setting["compile"].items():
            if state["fallback"] is not None:
                console.print(f"{name} was not compiled: {state['fallback']}")
    console.print(f"protocol: {report['protocol']}")


def _bench_row(phase: str, setting: dict[str, Any]) -> tuple[str, ...]:
    found = setting[phase]
    return (
        phase,
        str(setting["batch"]),
        str(setting["prompt"]),
        *(f"{found[name]['tokens_per_second']:.1f}" for name in ("compressed", "dense")),
        f"{found['speedup']:.2f}x",
        f"{found['speedup_allowed']:.2f}x",
        f"{found['share_of_allowed']:.0%}",
    )
