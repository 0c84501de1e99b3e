"""The HTML report: complete, safe whatever the names hold, and whole when parts are missing."""

from __future__ import annotations

import copy
import random
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blastnn.compress.html import render_html
from blastnn.compress.report import warnings_of

BLOCKS = 30
KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The elements, attributes and shown text of a page; raises if elements do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def layer(block: int, kind: str, error: float) -> dict[str, Any]:
    out, width = KINDS[kind]
    return {
        "name": f"model.layers.{block}.{kind}",
        "kind": kind,
        "block": block,
        "shape": [out, width],
        "status": "compressed",
        "reason": None,
        "structure": "blast",
        "rank": 16 * (out // 96),
        "blocks": [4, 4],
        "solver": "als",
        "solver_status": "converged",
        "params_before": out * width,
        "params_after": int(0.8 * out * width),
        "relative_error": error,
        "seconds": 0.4 + error,
        "notes": [],
    }


def kept_layer(name: str, reason: str, block: int | None = None) -> dict[str, Any]:
    return {
        "name": name, "kind": name.split(".", 3)[-1], "block": block, "shape": [49152, 576],
        "status": "kept", "reason": reason, "structure": None, "rank": None, "blocks": None,
        "solver": None, "solver_status": None, "params_before": 28311552,
        "params_after": 28311552, "relative_error": None, "seconds": None, "notes": [],
    }  # fmt: skip


def coverage() -> list[dict[str, Any]]:
    chance = random.Random(7)
    base = dict(zip(KINDS, (0.12, 0.09, 0.21, 0.19, 0.23, 0.25, 0.24), strict=True))
    layers = [
        layer(block, kind, base[kind] * (0.6 + 0.5 * block / BLOCKS) * chance.uniform(0.92, 1.08))
        for block in range(BLOCKS)
        for kind in KINDS
    ]
    layers[4] |= {"solver_status": "iteration limit", "notes": ["loss still falling by 0.2%"]}
    for index in (2, 9, 16):
        name, block = layers[index]["name"], layers[index]["block"]
        layers[index] = kept_layer(name, "structure would not be smaller", block)
        layers[index]["kind"] = "self_attn.v_proj"
    return [*layers, kept_layer("lm_head", "tied to the embedding")]


def measured() -> dict[str, Any]:
    shared = "The old lighthouse stood at the edge of the bay, and every evening its keeper"
    texts = [("wikitext-2 test", 18.42, 19.87), ("lambada", 27.05, 30.61), ("code", 9.317, 9.688)]
    return {
        "protocol": "Windows of 1024 tokens without overlap; the mean is over all tokens.",
        "perplexity": [
            {"text": name, "sha256": "ab" * 32, "tokens": 40960, "window": 1024,
             "dense": dense, "compressed": compressed}
            for name, dense, compressed in texts
        ],
        "cosine": [
            {"text": "wikitext-2 test", "mean": 0.99213, "vectors": 0.9987, "tokens": 8192}
        ],
        "speed": {
            "prefill": {"tokens": 512, "dense": 812.4, "compressed": 901.7, "ratio": 1.11},
            "decode": {"tokens": 64, "dense": 31.2, "compressed": 33.9, "ratio": 1.0865},
            "protocol": "Median of 5 runs, 2 threads, float32.",
        },
        "sample": {
            "prompt": "Write the opening of a short story about a lighthouse.",
            "dense": shared + " climbed the hundred and twelve steps with a lamp in his hand."
            "\n\nHe had done so for thirty years, and had never once been late. " * 4,
            "compressed": shared + " walked up to the lamp and waited for the ships to come in."
            "\n\nThere were fewer of them each year, but he still counted. " * 4,
        },
    }  # fmt: skip


def sizes(before: int, after: int) -> dict[str, Any]:
    def pair(unit: int) -> dict[str, Any]:
        return {"before": before * unit, "after": after * unit, "kept": after / before}

    return {"params": pair(1), "bytes": pair(2)}


@pytest.fixture
def report() -> dict[str, Any]:
    return realistic_report()


def realistic_report() -> dict[str, Any]:
    return {
        "format": "blastnn-report/1",
        "created": "2026-01-17T09:24:31+00:00",
        "source": {"name": "SmolLM2-135M", "path": "/models/smollm2-135m.safetensors",
                   "sha256": "0f" * 32, "note": "bfloat16 weights, read as float32"},
        "options": {"structure": "blast", "keep": 0.8, "blocks": [4, 4], "solver": "als",
                    "iterations": 120, "damping": 1e-6, "seed": 1234, "skip": ["lm_head"],
                    "allocate_by_error": True, "limit": None},
        "keep": {"asked": 0.8, "of": "targets", "targets": sizes(106168320, 84818880),
                 "model": sizes(134515008, 113165568)},
        "calibration": {
            "sources": [
                {"name": "wikitext-2 train", "sha256": "1c" * 32, "tokens": 30720, "windows": 30},
                {"name": "python files", "sha256": "9e" * 32, "tokens": 10240, "windows": 10},
            ],
            "window": 1024, "windows": 40, "tokens": 40960, "tokens_sha256": "5d" * 32,
        },
        "coverage": coverage(),
        "timing": {"total": 341.2, "factorise": 248.8, "forward": 79.3, "other": 13.1,
                   "other_share": 0.0384},
        "memory": {"peak_anonymous_bytes": 1_930_000_000,
                   "how": "largest RssAnon of the process, read every 50 ms"},
        "measured": measured(),
        "not_measured": None,
        "self_check": {"positions": 64, "logits_sha256": "77" * 32, "verified": True},
        "environment": {"blastnn": "0.1.0", "python": "3.11.9", "torch": "2.9.0+cpu",
                        "transformers": "5.1.0", "threads": 2, "platform": "Linux x86_64"},
        "warnings": ["1 layer stopped at its iteration limit: model.layers.0.mlp.gate_proj."],
    }  # fmt: skip


def test_every_layer_is_in_the_table_with_its_reason(report: dict[str, Any]) -> None:
    shown = Page(render_html(report)).text
    names = [entry["name"] for entry in report["coverage"]]
    assert len(names) == BLOCKS * len(KINDS) + 1
    assert all(name in shown for name in names)
    assert "structure would not be smaller" in shown
    assert "loss still falling by 0.2%" in shown


def test_headline_results_are_shown(report: dict[str, Any]) -> None:
    shown = Page(render_html(report)).text
    for words in ("SmolLM2-135M", "79.9%", "84.1%", "18.42", "19.87", "+7.9%", "106,168,320"):
        assert words in shown
    for kind in KINDS:
        assert kind in shown


def test_every_part_of_the_report_reaches_the_page(report: dict[str, Any]) -> None:
    shown = Page(render_html(report)).text
    for words in (
        report["created"], report["source"]["sha256"], report["source"]["note"],
        report["calibration"]["tokens_sha256"], "python files", "1234", "allocate_by_error",
        "0.99213", "1.09", "33.9", "Median of 5 runs", "fewer of them each year", "1.93",
        report["memory"]["how"], report["self_check"]["logits_sha256"], "2.9.0+cpu",
        report["warnings"][0], "Windows of 1024 tokens", "5 min 41 s",
    ):  # fmt: skip
        assert words in shown


HOSTILE = "</style></script><script>alert('x')</script><img src=x onerror=\"y\">&amp;"


def extended(tree: Any, more: str) -> Any:
    """Add text to every string of a report, apart from those that steer it."""
    if isinstance(tree, dict):
        steering = ("status", "of", "format")
        return {
            key: value if key in steering else extended(value, more) for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [extended(value, more) for value in tree]
    return tree + more if isinstance(tree, str) else tree


def test_markup_in_any_string_is_shown_and_not_obeyed(report: dict[str, Any]) -> None:
    report["options"][HOSTILE] = 1
    report["environment"][HOSTILE] = 1
    clean, dirty = (Page(render_html(extended(report, more))) for more in (" words", HOSTILE))
    assert not {"script", "img"} & set(dirty.tags)
    assert dirty.tags.count("style") == 1
    assert not [name for name, _ in dirty.attributes if name.startswith("on")]
    assert "<script>alert('x')</script>" in dirty.text
    assert clean.tags == dirty.tags


def test_nothing_is_loaded_from_outside(report: dict[str, Any]) -> None:
    assert "http://" not in render_html(report) and "https://" not in render_html(report)
    report["source"]["path"] = "https://models.example/smol"
    page = Page(render_html(report))
    assert not {"link", "script", "img", "iframe", "object", "a", "use"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "xlink:href")]
    assert "url(" not in render_html(report) and "@import" not in render_html(report)


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value of the report, the first of each list only."""
    found = [prefix] if prefix else []
    entries = list(tree.items()) if isinstance(tree, dict) else []
    entries = list(enumerate(tree))[:1] if isinstance(tree, list) else entries
    for key, value in entries:
        found += paths(value, (*prefix, key))
    return found


SMALL = realistic_report() | {"coverage": coverage()[:14]}


@pytest.mark.parametrize("path", paths(SMALL), ids=lambda path: ".".join(map(str, path)))
def test_any_single_part_may_be_none(path: tuple[Any, ...]) -> None:
    damaged = copy.deepcopy(SMALL)
    place: Any = damaged
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = None
    assert "None" not in Page(render_html(damaged)).text
    if isinstance(place, dict):
        del place[path[-1]]
        assert "None" not in Page(render_html(damaged)).text


def test_an_empty_report_is_still_a_page() -> None:
    shown = Page(render_html({})).text
    assert "not measured" in shown and "None" not in shown


def test_missing_measurements_give_their_reason(report: dict[str, Any]) -> None:
    report |= {"measured": None, "not_measured": "no evaluation text was given"}
    shown = Page(render_html(report)).text.lower()
    for what in ("perplexity", "speed", "sample"):
        assert f"{what} not measured: no evaluation text was given" in shown


def test_a_missing_sample_leaves_the_other_measurements(report: dict[str, Any]) -> None:
    report["measured"] |= {"sample": None, "speed": None, "cosine": []}
    shown = Page(render_html(report)).text
    assert "Sample not measured" in shown and "Speed not measured" in shown
    assert "19.87" in shown


def numbers_in_drawings(page: str) -> list[str]:
    drawn = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d"}
    return [str(value) for name, value in Page(page).attributes if name in drawn]


@pytest.mark.parametrize("error", [float("nan"), float("inf"), -0.5])
def test_unusable_errors_are_named_and_not_drawn(report: dict[str, Any], error: float) -> None:
    report["coverage"][5]["relative_error"] = error
    report["warnings"] = []
    page = render_html(report)
    shown = Page(page).text
    assert "1 warning" in shown
    assert "1 layer has a relative error that is not a usable number" in shown
    assert report["coverage"][5]["name"] in shown
    assert not [value for value in numbers_in_drawings(page) if "nan" in value or "inf" in value]


def test_unusable_measurements_do_not_break_the_page(report: dict[str, Any]) -> None:
    report["measured"]["perplexity"][0]["compressed"] = float("inf")
    report["measured"]["perplexity"][1]["compressed"] = float("nan")
    report["measured"]["speed"]["decode"]["dense"] = 0.0
    page = render_html(report)
    assert "inf" in Page(page).text and "nan" in Page(page).text
    assert not [value for value in numbers_in_drawings(page) if "nan" in value or "inf" in value]


def bar_widths(page: str, words: str) -> list[float]:
    """Return the widths of the bars whose label begins with the words."""
    rows = page.split('class="bar-row"')[1:]
    chosen = [row for row in rows if f'class="bar-label">{words}' in row]
    return [float(row.split('<rect width="')[1].split("%")[0]) for row in chosen]


def test_bars_are_in_proportion_from_zero(report: dict[str, Any]) -> None:
    page = render_html(report)
    dense, compressed = bar_widths(page, "wikitext-2 test")
    assert compressed / dense == pytest.approx(19.87 / 18.42, rel=1e-3)
    before, after = bar_widths(page, "Targets")[:2]
    whole = bar_widths(page, "Whole model, before")[0]
    assert after / before == pytest.approx(84818880 / 106168320, rel=1e-3)
    assert before / whole == pytest.approx(106168320 / 134515008, rel=1e-3)


def test_marks_lie_in_proportion_from_the_zero_line(report: dict[str, Any]) -> None:
    for entry in report["coverage"]:
        entry["relative_error"] = None
    for entry, error in zip(report["coverage"][3:6], (0.0, 0.1, 0.2), strict=True):
        entry["relative_error"] = error
    marks = render_html(report).split('<circle class="mark"')[1:4]
    zero, half, full = (float(mark.split('cy="')[1].split('"')[0]) for mark in marks)
    assert zero > full and (zero - half) == pytest.approx((zero - full) / 2, abs=0.2)


def test_thousands_of_layers_of_hundreds_of_kinds(report: dict[str, Any]) -> None:
    report["coverage"] = [
        layer(block, "mlp.up_proj", 0.1) | {
            "name": f"h.{block}.moe.experts.{expert}.w1", "kind": f"moe.experts.{expert}.w1"
        }
        for block in range(24)
        for expert in range(100)
    ]  # fmt: skip
    page = render_html(report)
    shown = Page(page).text
    assert all(entry["name"] in shown for entry in report["coverage"])
    assert "84 other kinds" in shown
    assert len(page) < 4_000_000


def test_other_names_and_layers_outside_blocks(report: dict[str, Any]) -> None:
    report["coverage"] = [
        layer(0, "mlp.up_proj", 0.1)
        | {"name": "transformer.h.0.attn.c_attn", "kind": "attn.c_attn"},
        layer(0, "mlp.up_proj", 0.3) | {"name": "score", "kind": "score", "block": None},
    ]
    shown = Page(render_html(report)).text
    assert "attn.c_attn" in shown and "no block" in shown


def test_a_failed_self_check_is_one_warning(report: dict[str, Any]) -> None:
    """The report warns of it, so the page need not do so a second time."""
    windows = SimpleNamespace(ids=torch.zeros(2, 1024))
    options = SimpleNamespace(window=1024)
    job = SimpleNamespace(plan=SimpleNamespace(layers=()), windows=windows, options=options)
    report["self_check"]["verified"] = False
    report["warnings"] = warnings_of(job, [], False)
    shown = Page(render_html(report)).text
    assert "1 warning" in shown and "did not give the very bits" in shown
    assert "NO, it failed" in shown
    assert warnings_of(job, [], True) == []


def test_no_warnings_make_no_warning_box(report: dict[str, Any]) -> None:
    report["warnings"] = []
    assert 'class="warnings"' not in render_html(report)


def test_text_that_cannot_be_saved_is_replaced(report: dict[str, Any]) -> None:
    report["measured"]["sample"]["dense"] = "a\ud800b\x00c"
    page = render_html(report)
    assert page.encode("utf-8") and "\x00" not in page
