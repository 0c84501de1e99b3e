"""``sweep.svg``: excess against the share of parameters kept, a line a method, a panel a text.

The vertical axis is logarithmic, because methods differ by factors; what lost nothing has no place
on it. An SVG of its own, without scripts, in the colours of the reader's theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from blastnn.compress.html_style import COLOURS, DARK, LIGHT

PICTURE = "sweep.svg"
ABREAST = 3  # panels in a row
WIDTH, HEIGHT = 340.0, 300.0  # of a panel, with its margins
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 34.0, 48.0
HEAD, LINE = 44.0, 22.0  # the title, and a line of the legend
LEGEND = 200.0  # width of an entry
Point = tuple[float, float]  # share of the parameters kept, excess


@dataclass(frozen=True)
class _Axes:
    """Where shares and excesses lie in a panel; the same for all panels."""

    shares: tuple[float, float]
    excesses: tuple[float, float]

    @classmethod
    def around(cls, points: Sequence[Point]) -> _Axes:
        shares = [share for share, _ in points] or [1.0]
        excesses = [excess for _, excess in points] or [1.0]
        room = max(0.08 * (max(shares) - min(shares)), 0.02)
        low, high = min(excesses) / 1.3, max(excesses) * 1.3
        return cls((min(shares) - room, max(shares) + room), (math.log10(low), math.log10(high)))

    def x(self, share: float) -> float:
        first, last = self.shares
        return LEFT + (WIDTH - LEFT - RIGHT) * (share - first) / (last - first)

    def y(self, excess: float) -> float:
        low, high = self.excesses
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(excess) - low) / (high - low)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten that lie inside."""
        low, high = self.excesses
        powers = range(math.floor(low), math.ceil(high) + 1)
        every = [unit * 10.0**power for power in powers for unit in (1, 2, 5)]
        return [value for value in every if low <= math.log10(value) <= high]


def draw(values: Mapping[str, Any]) -> str:
    """The picture of what ``sweep.json`` holds, as SVG text."""
    table = values["table"]
    curves = [_curves(table["rows"], index) for index in range(len(table["texts"]))]
    methods = list(
        dict.fromkeys(row["method"] for row in table["rows"] if row["method"] != "dense")
    )
    axes = _Axes.around([p for panel in curves for points in panel.values() for p in points])
    abreast = min(ABREAST, len(curves))
    width = WIDTH * max(abreast, 2)
    entries = max(1, int(width / LEGEND))
    top = HEAD + LINE * -(-len(methods) // entries)
    height = top + HEIGHT * -(-len(curves) // abreast)
    box = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **box})
    _child(svg, "style").text = _style()
    _child(svg, "rect", "paper", width="100%", height="100%")
    _text(svg, 16, 28, f"What {values['model']['name']} loses", "title")
    for index, method in enumerate(methods):
        x, y = 16 + LEGEND * (index % entries), HEAD + LINE * (index // entries)
        _mark(svg, index, x + 5, y + 4)
        _text(svg, x + 16, y + 8, method)
    for index, panel in enumerate(curves):
        x, y = WIDTH * (index % abreast), top + HEIGHT * (index // abreast)
        group = _child(svg, "g", transform=f"translate({x:g} {y:g})")
        _frame(group, axes, table["texts"][index], [row["keep"] for row in table["rows"][1:]])
        for number, method in enumerate(methods):
            _curve(group, axes, panel.get(method, []), method, number)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _curves(rows: Sequence[Mapping[str, Any]], text: int) -> dict[str, list[Point]]:
    """The points of every method on one text, from the smallest share on."""
    curves: dict[str, list[Point]] = {}
    for row in rows:
        if row["method"] != "dense" and row["excess"] and row["excess"][text] > 0.0:
            curves.setdefault(row["method"], []).append((row["kept"], row["excess"][text]))
    return {method: sorted(points) for method, points in curves.items()}


def _frame(group: Element, axes: _Axes, label: str, asked: Sequence[float]) -> None:
    """Grid, ticks and titles of a panel; shares are marked where they were asked for."""
    _text(group, LEFT, 18, label, "label")
    bottom = HEIGHT - BOTTOM
    for value in axes.ticks():
        y = axes.y(value)
        _child(group, "line", "grid", x1=f"{LEFT:g}", x2=f"{WIDTH - RIGHT:g}", y1=_n(y), y2=_n(y))
        _text(group, LEFT - 6, y + 4, f"{value:g}", "small", "end")
    first, last = axes.shares
    for share in sorted({share for share in asked if first <= share <= last}):
        x = axes.x(share)
        _child(group, "line", "grid", x1=_n(x), x2=_n(x), y1=f"{TOP - 6:g}", y2=f"{bottom:g}")
        _text(group, x, bottom + 18, f"{100 * share:g}%", "small", "middle")
    middle = (LEFT + WIDTH - RIGHT) / 2
    _text(group, middle, bottom + 38, "parameters kept", "small", "middle")
    turned = _text(group, 0, 0, "excess", "small", "middle")
    turned.set("transform", f"translate(12 {(TOP + bottom) / 2:g}) rotate(-90)")


def _curve(group: Element, axes: _Axes, points: Sequence[Point], method: str, number: int) -> None:
    places = [(axes.x(share), axes.y(excess)) for share, excess in points]
    if len(places) > 1:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        _child(group, "path", f"line k{number % COLOURS}", d=path)
    for (x, y), (share, excess) in zip(places, points, strict=True):
        mark = _mark(group, number, x, y)
        _child(mark, "title").text = f"{method}, {share:.2%} kept: excess {excess:.4f}"


def _mark(parent: Element, number: int, x: float, y: float) -> Element:
    """Round for the first colours, square for the second round."""
    name = f"mark k{number % COLOURS}"
    if number // COLOURS % 2:
        return _child(parent, "rect", name, x=_n(x - 3.5), y=_n(y - 3.5), width="7", height="7")
    return _child(parent, "circle", name, cx=_n(x), cy=_n(y), r="4")


def _style() -> str:
    """Colours spelled out, because not every viewer of SVG knows variables."""
    base = "text{font:13px system-ui,sans-serif}.title{font-size:16px;font-weight:600}"
    base += ".label{font-weight:600}.small{font-size:12px}.line{fill:none;stroke-width:1.75}"
    return f"{base}{_theme(LIGHT)}@media(prefers-color-scheme:dark){{{_theme(DARK)}}}"


def _theme(colours: Mapping[str, str]) -> str:
    rules = [f"text{{fill:{colours['ink']}}}.small{{fill:{colours['soft']}}}"]
    rules += [f".paper{{fill:{colours['card']}}}.grid{{stroke:{colours['rule']}}}"]
    for index in range(COLOURS):
        colour = colours[f"k{index}"]
        rules.append(f".mark.k{index}{{fill:{colour}}}.line.k{index}{{stroke:{colour}}}")
    return "".join(rules)


def _child(parent: Element, tag: str, name: str | None = None, **attributes: str) -> Element:
    classed = {"class": name} if name else {}
    return ElementTree.SubElement(parent, tag, {**classed, **attributes})


def _text(
    parent: Element, x: float, y: float, words: str, name: str = "plain", anchor: str = "start"
) -> Element:
    place = {"x": _n(x), "y": _n(y), "text-anchor": anchor}
    text = _child(parent, "text", name, **place)
    text.text = words
    return text


def _n(value: float) -> str:
    return f"{value:.1f}"
