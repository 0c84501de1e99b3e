"""The report of a compression as one self-contained HTML page.

Each function below returns one section, and copes with any part of the report being absent.
"""

from __future__ import annotations

from typing import Any

from blastnn.compress.html_coverage import coverage_section, unusable_errors
from blastnn.compress.html_page import (
    ARROW,
    DASH,
    Html,
    Report,
    amount_of_parameters,
    change,
    count,
    document,
    duration,
    element,
    folded,
    join,
    number,
    part,
    percent,
    plain,
    records,
    section,
    size,
)
from blastnn.compress.html_provenance import (
    calibration_section,
    facts_section,
    memory_section,
    self_check_section,
    sensitivity_section,
    source_section,
    time_section,
)
from blastnn.compress.html_sections import (
    error_section,
    measured_texts,
    perplexity_section,
    sample_section,
    size_section,
    speed_ratio,
    speed_section,
)

_WARNINGS_SHOWN = 8


def render_html(report: dict[str, Any]) -> str:
    """Return the whole report as one HTML page that loads nothing from outside itself."""
    layers = records(report.get("coverage"))
    name = part(report, "source", "name") or "unnamed model"
    return document(
        f"{name}: compression report",
        _headline(report, name),
        _warnings(report, layers),
        _figures(report, layers),
        error_section(layers),
        size_section(report),
        perplexity_section(report),
        speed_section(report),
        sample_section(report),
        _provenance(report),
        coverage_section(layers),
        _footer(report),
    )


def _provenance(report: Report) -> Html:
    """Return the sections that a reader who wants to repeat the run needs."""
    return join(
        (
            calibration_section(report),
            sensitivity_section(report),
            facts_section("Options", report.get("options")),
            element("div", time_section(report), memory_section(report), class_="two"),
            element("div", source_section(report), self_check_section(report), class_="two"),
            facts_section("Versions", report.get("environment")),
        )
    )


def _from_to(before: object, after: object) -> Html:
    if before == after == DASH:
        return Html(DASH)
    return join((before, element("span", f" {ARROW} ", class_="arrow"), after))


def _headline(report: Report, name: object) -> Html:
    of = "model" if part(report, "keep", "of") == "model" else "targets"
    kept = element("b", percent(part(report, "keep", of, "params", "kept")))
    owner = "the parameters of the " + {"model": "whole model", "targets": "target layers"}[of]
    lead = ("Keeps ", kept, f" of {owner}; perplexity ", *_perplexity_words(report))
    return element(
        "header",
        element("p", "Compression report", class_="eyebrow"),
        element("h1", name),
        element("p", *lead, class_="lead"),
    )


def _perplexity_words(report: Report) -> list[object]:
    texts = measured_texts(report)
    if not texts:
        return [f"not measured: {report.get('not_measured') or 'no reason given'}"]
    dense, compressed = texts[0].get("dense"), texts[0].get("compressed")
    where = f" ({change(dense, compressed)}) on {texts[0].get('text') or 'unnamed text'}"
    return [element("b", _from_to(number(dense), number(compressed))), where]


def _warnings(report: Report, layers: list[dict[str, Any]]) -> Html:
    given = report.get("warnings")
    warnings = [plain(warning) for warning in given] if isinstance(given, list) else []
    warnings += unusable_errors(layers)
    if not warnings:
        return Html()
    items = [element("li", warning) for warning in warnings]
    first, rest = items[:_WARNINGS_SHOWN], items[_WARNINGS_SHOWN:]
    title = "1 warning" if len(items) == 1 else f"{count(len(items))} warnings"
    more = folded(f"{count(len(rest))} more", element("ul", *rest)) if rest else ""
    return section(title, element("ul", *first), more, name="warnings")


def _figures(report: Report, layers: list[dict[str, Any]]) -> Html:
    compressed = sum(layer.get("status") == "compressed" for layer in layers)
    time = duration(part(report, "timing", "total"))
    covered = f"{count(compressed)} of {count(len(layers))}" if layers else DASH
    return element(
        "dl",
        _kept_figure(report, "targets", "Parameters kept, targets"),
        _kept_figure(report, "model", "Parameters kept, whole model"),
        _size_figure(report),
        _perplexity_figure(report),
        _decode_figure(report),
        _figure("Linear layers compressed", covered, "" if time == DASH else f"in {time}"),
        class_="figures",
    )


def _figure(label: str, big: object, detail: object) -> Html:
    value = element("div", big, class_="big")
    description = element("dd", value, element("div", detail, class_="detail"))
    return element("div", element("dt", label), description)


def _kept_figure(report: Report, of: str, label: str) -> Html:
    params = part(report, "keep", of, "params")
    before, after = (amount_of_parameters(part(params, when)) for when in ("before", "after"))
    detail = "not recorded" if before == after == DASH else f"{before} {ARROW} {after}"
    if part(report, "keep", "of") == of:
        detail += f", asked {percent(part(report, 'keep', 'asked'))}"
    return _figure(label, percent(part(params, "kept")), detail)


def _size_figure(report: Report) -> Html:
    sizes = part(report, "keep", "model", "bytes")
    big = _from_to(size(part(sizes, "before")), size(part(sizes, "after")))
    kept = percent(part(sizes, "kept"))
    detail = "not recorded" if kept == DASH else f"{kept} of the bytes kept"
    return _figure("Size, whole model", big, detail)


def _perplexity_figure(report: Report) -> Html:
    texts = measured_texts(report)
    if not texts:
        return _figure("Perplexity", DASH, "not measured")
    dense, compressed = texts[0].get("dense"), texts[0].get("compressed")
    detail = f"{change(dense, compressed)} on {texts[0].get('text') or 'unnamed text'}"
    return _figure("Perplexity", _from_to(number(dense), number(compressed)), detail)


def _decode_figure(report: Report) -> Html:
    pair = part(report, "measured", "speed", "decode")
    if pair is None:
        return _figure("Decode speed", DASH, "not measured")
    dense, compressed = number(part(pair, "dense"), 3), number(part(pair, "compressed"), 3)
    return _figure("Decode speed", speed_ratio(pair), f"{dense} {ARROW} {compressed} tokens/s")


def _footer(report: Report) -> Html:
    words = [plain(word) for word in (report.get("format"), report.get("created")) if word]
    return element("footer", " \N{MIDDLE DOT} ".join(words)) if words else Html()
