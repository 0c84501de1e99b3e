"""The picture of a bench report: an SVG of its own, bars from zero, no library and no script.

One row for each phase, batch and prompt: the speed-up reached, as a bar, and the speed-up that
bytes or multiplications allow, as a mark. Dense is the line at 1.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

WIDTH, ROW, TOP, BOTTOM = 860, 34, 86, 54
LEFT, RIGHT = 220, 230
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-size:16px;font-weight:600}"
    ".small{font-size:12px;fill:#59636e}.prefill{fill:#8250df}.decode{fill:#0969da}"
    ".allowed{stroke:#cf222e;stroke-width:3}.grid{stroke:#d1d9e0}.dense{stroke:#59636e}"
)
Row = tuple[str, dict[str, Any], dict[str, Any]]  # phase, its figures, its setting


def draw(report: dict[str, Any]) -> str:
    """The picture of what ``blastnn.evaluate.bench.bench`` returned, as SVG text."""
    rows = [
        (phase, setting[phase], setting)
        for phase in ("decode", "prefill")
        for setting in report["settings"]
    ]
    height = TOP + ROW * len(rows) + BOTTOM
    box = {"viewBox": f"0 0 {WIDTH} {height}", "width": str(WIDTH), "height": str(height)}
    svg = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **box})
    ElementTree.SubElement(svg, "style").text = STYLE
    ElementTree.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "#fff"})
    _heading(svg, report)
    reach = max(max(found["speedup"], found["speedup_allowed"]) for _, found, _ in rows)
    scale = (WIDTH - LEFT - RIGHT) / max(1.0, reach)
    _axis(svg, scale, height, max(1.0, reach))
    for index, row in enumerate(rows):
        _row(svg, row, TOP + ROW * index, scale)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _heading(svg: ElementTree.Element, report: dict[str, Any]) -> None:
    models, machine = report["models"], report["machine"]
    title = f"Speed of {models['compressed']} beside {models['dense']}"
    _text(svg, 16, 26, title, "title")
    words = f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads"
    _text(svg, 16, 46, f"{words}, {report['dtype']}; bar: reached; mark: allowed", "small")


def _axis(svg: ElementTree.Element, scale: float, height: float, reach: float) -> None:
    step = 0.5 if reach <= 4 else round(reach / 6) or 1
    for index in range(int(reach / step) + 1):
        value = index * step
        x = LEFT + scale * value
        name = "dense" if value == 1 else "grid"
        _line(svg, x, TOP - 12, x, height - BOTTOM, name)
        words = "1x (dense)" if value == 1 else f"{value:g}x"
        _text(svg, x, height - BOTTOM + 20, words, "small", "middle")


def _row(svg: ElementTree.Element, row: Row, y: float, scale: float) -> None:
    phase, found, setting = row
    label = f"{phase}, batch {setting['batch']}, prompt {setting['prompt']}"
    _text(svg, LEFT - 12, y + 15, label, anchor="end")
    bar = {"x": f"{LEFT}", "y": f"{y:g}", "height": f"{ROW - 14}", "class": phase}
    ElementTree.SubElement(svg, "rect", {**bar, "width": f"{scale * found['speedup']:.1f}"})
    x = LEFT + scale * found["speedup_allowed"]
    _line(svg, x, y - 3, x, y + ROW - 11, "allowed")
    rates = [found[name]["tokens_per_second"] for name in ("dense", "compressed")]
    words = f"{found['speedup']:.2f}x, {rates[0]:.4g} to {rates[1]:.4g} tokens/s"
    _text(svg, WIDTH - RIGHT + 14, y + 15, words)


def _text(
    svg: ElementTree.Element,
    x: float,
    y: float,
    words: str,
    name: str = "plain",
    anchor: str = "start",
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": name, "text-anchor": anchor}
    ElementTree.SubElement(svg, "text", place).text = words


def _line(svg: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    ElementTree.SubElement(svg, "line", {**ends, "class": name})
