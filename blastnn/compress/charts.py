"""Charts of the report page, drawn as inline SVG: every bar and axis starts at zero."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blastnn.compress.html_page import Html, absent, element, finite, join, number, percent
from blastnn.compress.html_style import COLOURS, NAMED_KINDS

_WIDTH, _HEIGHT = 900.0, 390.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 8.0, 30.0, 52.0
_BOX = f"0 0 {_WIDTH} {_HEIGHT}"
# Width of the column for layers that belong to no block, such as the output head.
_OUTSIDE = 90.0
_OTHER = "k-other"
_SQUARE = {f"k{index}" for index in range(COLOURS, NAMED_KINDS)}

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """One labelled bar; `span` draws a thin line between two values over it."""

    label: object
    value: float | None
    shown: object
    colour: str = "compressed"
    span: tuple[float, float] | None = None


def longest(bars: Iterable[Bar]) -> float:
    """Return the value that full width must stand for, so that bars can share a scale."""
    reach = [max(bar.value or 0.0, bar.span[1] if bar.span else 0.0) for bar in bars]
    return max(reach, default=0.0)


def bar_chart(bars: Sequence[Bar], full: float | None = None, name: str = "") -> Html:
    """Return horizontal bars from zero; `full` is the value at full width."""
    scale = longest(bars) if full is None else full
    rows = (_bar_row(bar, scale) for bar in bars)
    return element("div", *rows, class_=f"bars {name}".strip())


def _bar_row(bar: Bar, scale: float) -> Html:
    return element(
        "div",
        element("span", bar.label, class_="bar-label"),
        element("svg", *_bar_shapes(bar, scale), class_=f"bar {bar.colour}", aria_hidden="true"),
        element("span", bar.shown, class_="bar-value"),
        class_="bar-row",
    )


def _bar_shapes(bar: Bar, scale: float) -> list[Html]:
    shapes = []
    if bar.value is not None and bar.value > 0:
        shapes.append(element("rect", width=_share(bar.value, scale), height="100%", rx="2"))
    if bar.span is not None:
        low, high = (_share(end, scale) for end in bar.span)
        shapes.append(element("line", x1=low, x2=high, y1="50%", y2="50%"))
        shapes += [element("line", x1=end, x2=end, y1="25%", y2="75%") for end in (low, high)]
    return shapes


def _share(value: float, scale: float) -> str:
    fraction = value / scale if scale > 0 else 0.0
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}%"


def split_bar(parts: Sequence[tuple[str, float]]) -> Html:
    """Return one bar divided by value, with the name and share of each part under it."""
    total = math.fsum(value for _, value in parts)
    rects, start = [], 0.0
    for index, (_, value) in enumerate(parts):
        place = {"x": _share(start, total), "width": _share(value, total), "height": "100%"}
        rects.append(element("rect", **place, class_=f"part{index}"))
        start += value
    shares = [f"{name} {percent(value / total if total else None)}" for name, value in parts]
    names = (_legend_entry(words, f"part{index}") for index, words in enumerate(shares))
    bar = element("svg", *rects, class_="split", aria_hidden="true")
    return join((bar, element("ul", *names, class_="legend")))


def kind_classes(layers: Iterable[Layer]) -> dict[str, str]:
    """Give each kind of layer a style class; the rarest share one when there are too many."""
    layers_by_kind = Counter(kind_of(layer) for layer in layers)
    named = {kind for kind, _ in layers_by_kind.most_common(NAMED_KINDS)}
    # Classes follow the order of the model, which a reader knows, and not the counts.
    in_order = [kind for kind in layers_by_kind if kind in named]
    classes = {kind: f"k{index}" for index, kind in enumerate(in_order)}
    return {kind: classes.get(kind, _OTHER) for kind in layers_by_kind}


def name_of(layer: Layer) -> str:
    """Return the name of a layer."""
    return str(layer.get("name") or "unnamed layer")


def kind_of(layer: Layer) -> str:
    """Return the kind of a layer, or its name where it has no kind."""
    return str(layer.get("kind") or name_of(layer))


def error_of(layer: Layer) -> float | None:
    """Return the relative error of a layer if it is a finite number that can be drawn."""
    error = finite(layer.get("relative_error"))
    return error if error is not None and error >= 0 else None


def round_step(reach: float, most: int) -> float:
    """Return the smallest step of 1, 2 or 5 times a power of ten that makes `most` steps do."""
    if reach < 1e-30:
        return 1.0
    power = 10.0 ** math.floor(math.log10(reach / most))
    return next(power * unit for unit in (1, 2, 5, 10) if power * unit * most >= reach * 0.999999)


@dataclass(frozen=True)
class _Frame:
    """Where blocks and errors lie on the chart."""

    first: int
    last: int
    outside: bool
    step: float
    top: float

    @classmethod
    def around(cls, layers: Sequence[Layer]) -> _Frame:
        blocks = [block for layer in layers if (block := _block_of(layer)) is not None]
        highest = max(error_of(layer) or 0.0 for layer in layers)
        step = round_step(highest, 5)
        top = step * max(1, math.ceil(highest / step - 1e-6))
        first, last = (min(blocks), max(blocks)) if blocks else (0, -1)
        return cls(first, last, len(blocks) < len(layers), step, top)

    @property
    def width(self) -> float:
        return _WIDTH - _LEFT - _RIGHT - (_OUTSIDE if self.outside else 0.0)

    def x(self, block: int | None) -> float:
        if block is None:
            return _WIDTH - _RIGHT - _OUTSIDE / 2
        return _LEFT + self.width * (block - self.first + 0.5) / (self.last - self.first + 1)

    def y(self, error: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * error / self.top


def error_chart(layers: Iterable[Layer], classes: Mapping[str, str]) -> Html:
    """Return the relative error of every layer that has one, by block and by kind."""
    drawn = [layer for layer in layers if error_of(layer) is not None]
    if not drawn:
        return absent("relative error by layer", "no layer reports one")
    frame = _Frame.around(drawn)
    by_class: dict[str, list[Layer]] = defaultdict(list)
    for layer in drawn:
        by_class[classes[kind_of(layer)]].append(layer)
    order = sorted(by_class, key=list(dict.fromkeys(classes.values())).index)
    # The kinds that share a class are drawn first, so that they do not hide the named ones.
    series = [_series(by_class[name], name, frame) for name in sorted(order, key=_OTHER.__ne__)]
    label = f"Relative error of {len(drawn)} layers by block, from 0 to {number(frame.top, 3)}"
    drawing = element("svg", _axes(frame), *series, viewBox=_BOX, role="img", aria_label=label)
    shown = element("div", drawing, class_="frame")
    return element("figure", shown, _legend(order, classes), class_="plot")


def _block_of(layer: Layer) -> int | None:
    block = finite(layer.get("block"))
    return None if block is None else int(block)


def _axes(frame: _Frame) -> Html:
    bottom = frame.y(0.0)
    shapes = [_label(0, 14, "Relative error (0 = unchanged)", "start")]
    for index in range(round(frame.top / frame.step) + 1):
        height = frame.y(index * frame.step)
        name = "zero" if index == 0 else None
        line = {"x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": f"{height:.1f}", "y2": f"{height:.1f}"}
        shapes.append(element("line", **line, class_=name))
        shapes.append(_label(_LEFT - 10, height + 4, f"{index * frame.step:.6g}", "end"))
    stride = max(1, round(round_step(frame.last - frame.first + 1, 12)))
    for block in range(-(-frame.first // stride) * stride, frame.last + 1, stride):
        shapes.append(_label(frame.x(block), bottom + 20, str(block), "middle"))
    if frame.last >= frame.first:
        shapes.append(_label(_LEFT + frame.width / 2, bottom + 45, "Block", "middle"))
    if frame.outside:
        shapes.append(_label(frame.x(None), bottom + 20, "no block", "middle"))
    return element("g", *shapes, class_="grid")


def _label(x: float, y: float, words: str, anchor: str) -> Html:
    return element("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _series(layers: Sequence[Layer], name: str, frame: _Frame) -> Html:
    # A line between the many kinds that share the last class would join what is unrelated.
    line = "" if name == _OTHER else _line(layers, frame)
    marks = (_mark(layer, name, frame) for layer in layers)
    return element("g", line, *marks, class_=f"series {name}")


def _line(layers: Sequence[Layer], frame: _Frame) -> Html:
    """Join neighbouring blocks by their mean error, and leave a gap where a block has none."""
    errors: dict[int, list[float]] = defaultdict(list)
    for layer in layers:
        block, error = _block_of(layer), error_of(layer)
        if block is not None and error is not None:
            errors[block].append(error)
    steps = []
    for block in sorted(errors):
        mean = math.fsum(errors[block]) / len(errors[block])
        command = "L" if block - 1 in errors else "M"
        steps.append(f"{command}{frame.x(block):.1f} {frame.y(mean):.1f}")
    return element("path", d=" ".join(steps))


def _mark(layer: Layer, name: str, frame: _Frame) -> Html:
    error = error_of(layer) or 0.0
    rank = layer.get("rank")
    words = f"{name_of(layer)}\nrelative error {number(error)}"
    title = element("title", words if rank is None else f"{words}, rank {rank}")
    return _shape(name, frame.x(_block_of(layer)), frame.y(error), title)


def _shape(name: str, x: float, y: float, *children: object) -> Html:
    """Return a mark: round for the first colours and the rest, square for the second round."""
    if name in _SQUARE:
        corner = {"x": f"{x - 3:.1f}", "y": f"{y - 3:.1f}"}
        return element("rect", *children, class_="mark", **corner, width="6", height="6")
    return element("circle", *children, class_="mark", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3.2")


def _legend(order: Sequence[str], classes: Mapping[str, str]) -> Html:
    labels = {name: kind for kind, name in classes.items()}
    others = sum(name == _OTHER for name in classes.values())
    labels[_OTHER] = f"{others} other kinds"
    # A kind can be reached by keyboard too, to single out its series.
    entries = (_legend_entry(labels[name], name, tabindex="0") for name in order)
    return element("ul", *entries, class_="legend")


def _legend_entry(words: str, name: str, tabindex: str | None = None) -> Html:
    swatch = element("svg", _shape(name, 6, 6), width="12", height="12", aria_hidden="true")
    return element("li", swatch, words, class_=name, tabindex=tabindex)
