"""Sections of the report page that say what was done, on what, and with what."""

from __future__ import annotations

import re
from typing import Any

from blastnn.compress import charts
from blastnn.compress.html_page import (
    DASH,
    Html,
    Report,
    absent,
    count,
    duration,
    element,
    fingerprint,
    finite,
    note,
    number,
    pairs,
    part,
    plain,
    records,
    section,
    size,
    table,
)

_HASH = re.compile("[0-9a-f]{32,}")


def calibration_section(report: Report) -> Html:
    """Return what the compression was calibrated on, so that it can be repeated."""
    calibration = report.get("calibration")
    if not calibration:
        return section("Calibration", absent("calibration text", "none recorded"))
    seed = part(calibration, "seed")
    facts = [
        ("Windows", count(part(calibration, "windows"))),
        ("Tokens per window", count(part(calibration, "window"))),
        ("Tokens", count(part(calibration, "tokens"))),
        ("Seed", _value(part(report, "options", "seed") if seed is None else seed)),
        ("SHA-256 of tokens", fingerprint(part(calibration, "tokens_sha256"))),
    ]
    sources = records(part(calibration, "sources"))
    return section("Calibration", pairs(facts), _sources(sources) if sources else "")


def sensitivity_section(report: Report) -> Html:
    """Return what was measured before the compression, and what followed from it."""
    found = report.get("sensitivity")
    if not found:
        return section("Allocation", absent("measurement", "none recorded"))
    why, equal = part(found, "why_not_allocated"), part(found, "why_not_weighted")
    facts = [
        (
            "Budget",
            f"as planned: {why}" if why else "shared out by what layers matter to the output",
        ),
        ("Layers kept dense for it", count(part(found, "kept_dense"))),
        ("Outputs", f"all count alike: {equal}" if equal else "weighted by their gradients"),
        ("Layers with weighted outputs", count(part(found, "weighted_layers"))),
        ("Layers that stay dense, refitted", count(part(found, "refitted_layers"))),
        ("Windows measured", count(part(found, "windows"))),
        ("Refinement", _refinement(report)),
    ]
    return section("Allocation", pairs(facts))


def _refinement(report: Report) -> str:
    if not (found := report.get("refinement")):
        return "none"
    blocks, share = len(part(found, "blocks") or ()), number(part(found, "mean_ratio"), 3)
    return (
        f"{count(part(found, 'epochs'))} passes of the calibration text, {blocks} blocks; held-out "
        f"error of a block {share} of what it was; the errors of layers are those before it"
    )


def _sources(sources: list[dict[str, Any]]) -> Html:
    rows = (
        (
            source.get("name") or DASH,
            count(source.get("documents")),
            count(source.get("tokens")),
            count(source.get("windows")),
            fingerprint(source.get("sha256")),
        )
        for source in sources
    )
    return table(("Source", "Documents in it#", "Tokens#", "Windows#", "SHA-256"), rows)


def facts_section(title: str, facts: object) -> Html:
    """Return a flat dict as it is, in its own order."""
    if not isinstance(facts, dict) or not facts:
        return section(title, absent(title.lower(), "none recorded"))
    return section(title, pairs((plain(key), _value(facts[key])) for key in facts))


def _value(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and _HASH.fullmatch(value):
        return element("code", value)
    return DASH if value is None else plain(value)


def time_section(report: Report) -> Html:
    """Return how the time was spent."""
    timing = report.get("timing")
    names = {
        "factorise": "Factorising",
        "refine": "Refining",
        "forward": "Forward passes",
        "measure": "Measuring beforehand",
        "other": "Other",
    }
    spent = {title: finite(part(timing, key)) for key, title in names.items()}
    known = [(title, seconds) for title, seconds in spent.items() if seconds is not None]
    if not known:
        return section("Time", absent("time", "none recorded"))
    total = ("Total", duration(part(timing, "total")))
    rows = [*((title, duration(seconds)) for title, seconds in known), total]
    if part(timing, "sittings") is not None:
        rows.append(("Sittings", count(part(timing, "sittings"))))
    return section("Time", charts.split_bar(known), pairs(rows))


def memory_section(report: Report) -> Html:
    """Return the largest memory of the run, and how it was read."""
    memory = report.get("memory")
    peak = part(memory, "peak_anonymous_bytes")
    how = plain(part(memory, "how") or "")
    if peak is None:
        return section("Memory", absent("peak memory not measured", how))
    return section("Memory", pairs([("Peak anonymous memory", size(peak))]), note(how))


def source_section(report: Report) -> Html:
    """Return which model was compressed."""
    source = report.get("source")
    rows = [
        ("Path", part(source, "path") or DASH),
        ("SHA-256", part(source, "sha256") or DASH),
        ("Note", part(source, "note") or DASH),
    ]
    return section("Source model", pairs((name, element("code", value)) for name, value in rows))


def self_check_section(report: Report) -> Html:
    """Return the check that the saved model computes what the compressed one did."""
    check = report.get("self_check")
    if not isinstance(check, dict):
        return section("Self-check", absent("self-check", "none recorded"))
    verdicts = {True: "yes", False: "NO, it failed", None: "not checked"}
    verified = check.get("verified")
    verdict = next((words for key, words in verdicts.items() if verified is key), plain(verified))
    return facts_section("Self-check", {**check, "verified": verdict})
