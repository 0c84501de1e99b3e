"""Sections of the report page that show results: errors, sizes and measurements."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from blastnn.compress import charts
from blastnn.compress.html_page import (
    DASH,
    TIMES,
    Html,
    Report,
    absent,
    change,
    count,
    element,
    fingerprint,
    finite,
    folded,
    join,
    note,
    number,
    part,
    percent,
    plain,
    records,
    section,
    size,
    table,
)

_KINDS_SHOWN = 24
_PERPLEXITY_HEAD = ("Text", "Dense#", "Compressed#", "Change#", "Tokens#", "Window#", "SHA-256")

Layers = Sequence[dict[str, Any]]


def _unmeasured(report: Report, what: str) -> Html:
    """Return the line that stands for a measurement that was not made, and says why."""
    return absent(f"{what} not measured", report.get("not_measured"))


def measured_texts(report: Report) -> list[dict[str, Any]]:
    """Return the texts with a perplexity for at least one of the two models."""
    rows = records(part(report, "measured", "perplexity"))
    return [row for row in rows if {row.get("dense"), row.get("compressed")} != {None}]


def speed_ratio(pair: object) -> str:
    """Return compressed over dense speed, from the two speeds themselves where both are known."""
    dense, compressed = finite(part(pair, "dense")), finite(part(pair, "compressed"))
    ratio = compressed / dense if dense and compressed is not None else part(pair, "ratio")
    return DASH if ratio is None else number(ratio, 3) + TIMES


def error_section(layers: Layers) -> Html:
    """Return the relative errors: every layer by block, then the mean of each kind."""
    drawn = [layer for layer in layers if charts.error_of(layer) is not None]
    kinds = {charts.kind_of(layer) for layer in drawn}
    classes = charts.kind_classes(layer for layer in layers if charts.kind_of(layer) in kinds)
    by_layer = section(
        "Relative error by layer",
        note(
            "Layers that report one. Point at a mark for its name, or at a kind to single it out."
        ),
        charts.error_chart(drawn, classes),
    )
    if not drawn:
        return by_layer
    by_kind = section(
        "Mean relative error by kind",
        note("Bars start at 0; the thin line runs from the smallest error to the largest."),
        _kind_bars(drawn, classes),
    )
    return join((by_layer, by_kind))


def _kind_bars(drawn: Layers, classes: dict[str, str]) -> Html:
    errors: dict[str, list[float]] = defaultdict(list)
    for layer in drawn:
        errors[charts.kind_of(layer)].append(charts.error_of(layer) or 0.0)
    bars = [_kind_bar(kind, values, classes[kind]) for kind, values in errors.items()]
    bars.sort(key=lambda bar: -(bar.value or 0.0))
    full = charts.longest(bars)
    first = charts.bar_chart(bars[:_KINDS_SHOWN], full)
    if len(bars) <= _KINDS_SHOWN:
        return first
    rest = charts.bar_chart(bars[_KINDS_SHOWN:], full)
    return join((first, folded(f"{count(len(bars) - _KINDS_SHOWN)} more kinds", rest)))


def _kind_bar(kind: str, errors: list[float], colour: str) -> charts.Bar:
    mean = sum(errors) / len(errors)
    shown = join((number(mean, 3), " ", element("small", f"{TIMES}{count(len(errors))}")))
    return charts.Bar(kind, mean, shown, colour, (min(errors), max(errors)))


def size_section(report: Report) -> Html:
    """Return parameters and bytes before and after, for the targets and for the whole model."""
    return section(
        "Parameters and bytes",
        note("Bars start at 0, and within each half they share one scale."),
        element(
            "div",
            element("div", element("h3", "Parameters"), _before_after(report, "params", count)),
            element("div", element("h3", "Bytes"), _before_after(report, "bytes", size)),
            class_="two",
        ),
        _quantized_note(report),
    )


def _quantized_note(report: Report) -> Html | str:
    """Return how the factors are stored, if they are quantised."""
    how = report.get("quantization")
    if not how:
        return ""
    added = part(how, "error_added")
    return note(
        f"Large factors are stored in {count(part(how, 'bits'))} bits, {count(part(how, 'group'))} "
        f"numbers to a scale: {number(part(how, 'bits_per_weight'), 3)} bits a weight with scales. "
        f"That adds {number(part(added, 'mean'), 3)} to a layer's relative error in the mean, and "
        f"{number(part(added, 'largest'), 3)} at most."
    )


def _before_after(report: Report, what: str, write: Callable[[object], str]) -> Html:
    bars = []
    for of, title in (("targets", "Targets"), ("model", "Whole model")):
        sizes = part(report, "keep", of, what)
        before, after = part(sizes, "before"), part(sizes, "after")
        kept = element("small", percent(part(sizes, "kept")))
        bars.append(charts.Bar(f"{title}, before", finite(before), write(before), "dense"))
        shown = join((write(after), " ", kept))
        bars.append(charts.Bar(f"{title}, after", finite(after), shown))
    return charts.bar_chart(bars, name="by-two")


def perplexity_section(report: Report) -> Html:
    """Return the perplexity of both models on each text, and their similarity."""
    texts = measured_texts(report)
    cosines = part(report, "measured", "cosine") or []
    if not texts and not cosines:
        return section("Perplexity", _unmeasured(report, "perplexity"))
    return section(
        "Perplexity",
        note("Lower is better. ", plain(part(report, "measured", "protocol") or "")),
        _perplexity_bars(texts) if texts else _unmeasured(report, "perplexity"),
        _perplexity_table(texts) if texts else "",
        *([_cosine(row) for row in cosines] or [note("Cosine similarity not measured.")]),
    )


def _perplexity_bars(texts: Layers) -> Html:
    bars = (_model_bars(str(row.get("text") or "unnamed text"), row, 4) for row in texts)
    return charts.bar_chart([bar for pair in bars for bar in pair], name="by-two")


def _model_bars(name: str, pair: dict[str, Any], digits: int) -> list[charts.Bar]:
    """Return a bar for each of the two models; the colour classes have the models' names."""
    values = {model: pair.get(model) for model in ("dense", "compressed")}
    return [
        charts.Bar(f"{name}, {model}", finite(value), number(value, digits), model)
        for model, value in values.items()
    ]


def _perplexity_table(texts: Layers) -> Html:
    rows = (
        (
            row.get("text") or "unnamed text",
            number(row.get("dense")),
            number(row.get("compressed")),
            change(row.get("dense"), row.get("compressed")),
            count(row.get("tokens")),
            count(row.get("window")),
            fingerprint(row.get("sha256")),
        )
        for row in texts
    )
    return table(_PERPLEXITY_HEAD, rows)


def _cosine(cosine: object) -> Html:
    mean, tokens = number(part(cosine, "mean"), 5), count(part(cosine, "tokens"))
    return note(
        "Mean cosine similarity of the two models' hidden states: ",
        element("b", mean),
        f", of their means over a window (sentence vectors): {number(part(cosine, 'vectors'), 5)}, "
        f"over {tokens} tokens of {part(cosine, 'text') or 'unnamed text'} (1 = the same).",
    )


def speed_section(report: Report) -> Html:
    """Return tokens per second of both models."""
    speed = part(report, "measured", "speed")
    names = [name for name in ("prefill", "decode") if part(speed, name)]
    if not names:
        return section("Speed", _unmeasured(report, "speed"))
    return section(
        "Speed",
        note("Higher is better; each pair of bars has its own scale from 0."),
        *(_speed_bars(name, speed[name]) for name in names),
        _speed_table(speed, names),
        note(plain(speed.get("protocol") or "")),
    )


def _speed_bars(name: str, pair: dict[str, Any]) -> Html:
    return charts.bar_chart(_model_bars(name.capitalize(), pair, 3), name="by-two")


def _speed_table(speed: dict[str, Any], names: Sequence[str]) -> Html:
    rows = (
        (
            name.capitalize(),
            number(part(speed, name, "dense"), 3),
            number(part(speed, name, "compressed"), 3),
            speed_ratio(speed[name]),
            count(part(speed, name, "tokens")),
        )
        for name in names
    )
    return table(("Tokens/s", "Dense#", "Compressed#", "Compressed / dense#", "Tokens#"), rows)


def sample_section(report: Report) -> Html:
    """Return the text that both models write after the same prompt, side by side."""
    sample = part(report, "measured", "sample")
    if not sample:
        return section("Generated text", _unmeasured(report, "sample"))
    dense, compressed = (plain(part(sample, model) or "") for model in ("dense", "compressed"))
    same = _same_opening(dense, compressed)
    return section(
        "Generated text",
        note("The opening that both models share is set in grey."),
        _written("Prompt", plain(part(sample, "prompt") or ""), 0),
        element(
            "div",
            _written("Dense", dense, same),
            _written("Compressed", compressed, same),
            class_="samples",
        ),
    )


def _same_opening(dense: str, compressed: str) -> int:
    """Return how many characters both texts open with, counting whole words only."""
    same = len(os.path.commonprefix((dense, compressed)))
    if all(text[same : same + 1].strip() == "" for text in (dense, compressed)):
        return same
    while same and not dense[same - 1].isspace():
        same -= 1
    return same


def _written(title: str, words: str, same: int) -> Html:
    opening = element("span", words[:same], class_="same")
    prose = element("div", opening, words[same:], class_="prose", dir="auto")
    return element("div", element("h3", title), prose, class_="sample")
