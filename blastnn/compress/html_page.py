"""Building blocks of the report page: safe markup, tolerant reading, and how numbers are written.

Markup is built from :func:`element`, which escapes every child and attribute that is not
already :class:`Html`.  Escaping is therefore the default, and not a thing to remember.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from blastnn.compress.html_style import STYLE

DASH = "\N{EM DASH}"
ARROW = "\N{RIGHTWARDS ARROW}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

Report = dict[str, Any]

# Control characters and lone surrogates cannot be shown, and surrogates cannot be saved as UTF-8.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# The page needs nothing from outside; the policy makes a browser hold it to that.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Html(str):
    """A string that is markup already, and so is not escaped again."""

    __slots__ = ()


def text(value: object) -> Html:
    """Return `value` as markup: escaped, unless it is :class:`Html`; nothing for None."""
    if isinstance(value, Html):
        return value
    raw = "" if value is None else str(value)
    return Html(escape(_UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", raw)))


def join(parts: Iterable[object]) -> Html:
    """Return `parts` one after the other."""
    return Html("".join(text(part) for part in parts))


def element(name: str, *children: object, **attributes: object) -> Html:
    """Return one element; `class_` means class, `aria_label` means aria-label, None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def part(tree: object, *keys: str) -> Any:
    """Return the value under `keys` in nested dicts, or None where any step is missing."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def records(value: object) -> list[dict[str, Any]]:
    """Return the dicts of a list, and an empty list for anything else."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def finite(value: object) -> float | None:
    """Return `value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: object, digits: int = 4) -> str:
    """Return a number with so many significant digits; a non-finite one is named as such."""
    amount = finite(value)
    if amount is None:
        return DASH if value is None else str(value)
    if amount == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(amount)))
    if not -5 <= magnitude < 7:
        return f"{amount:.{digits - 1}e}".replace("-", MINUS)
    return f"{amount:,.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS)


def count(value: object) -> str:
    """Return a whole number with thousands separators."""
    amount = finite(value)
    return number(value) if amount is None else f"{amount:,.0f}"


def scaled(value: object, units: Sequence[str], digits: int = 3) -> str:
    """Return a number in the largest of `units`, each a thousand times the one before."""
    amount = finite(value)
    if amount is None:
        return number(value)
    step = 0
    # 999.5 would be written as 1,000 of the smaller unit.
    while abs(amount) >= 999.5 and step + 1 < len(units):
        amount, step = amount / 1000, step + 1
    figure = f"{amount:.0f}" if step == 0 else number(amount, digits)
    return f"{figure}\N{NO-BREAK SPACE}{units[step]}".rstrip()


def size(value: object) -> str:
    """Return a number of bytes in decimal units."""
    return scaled(value, ("B", "kB", "MB", "GB", "TB"))


def amount_of_parameters(value: object) -> str:
    """Return a number of parameters, shortened."""
    return scaled(value, ("", "K", "M", "B", "T"))


def percent(value: object, digits: int = 1) -> str:
    """Return a fraction as a percentage."""
    amount = finite(value)
    return number(value) if amount is None else f"{100 * amount:,.{digits}f}%"


def change(before: object, after: object) -> str:
    """Return the signed relative change from `before` to `after`, or a dash."""
    start, end = finite(before), finite(after)
    if start is None or end is None or start <= 0:
        return DASH
    return f"{100 * (end / start - 1):+,.1f}%".replace("-", MINUS)


def duration(value: object) -> str:
    """Return a number of seconds in the units a person would use."""
    seconds = finite(value)
    if seconds is None:
        return number(value)
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plain(value: object) -> str:
    """Return any JSON value as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def fingerprint(value: object) -> Html:
    """Return a hash, shortened by the style sheet alone so that a copy of it is whole."""
    return element("code", value or DASH, class_="hash", title=value)


def section(title: str, *parts: object, name: str = "") -> Html:
    """Return one titled section of the page."""
    return element("section", element("h2", title), *parts, class_=name or None)


def note(*parts: object) -> Html:
    """Return a quiet explanatory line."""
    return element("p", *parts, class_="note")


def absent(what: str, reason: object = None) -> Html:
    """Return the line that stands where a part of the report is missing."""
    words = f"{what}: {reason or 'no reason given'}"
    return element("p", words[:1].upper() + words[1:], class_="absent")


def pairs(rows: Iterable[tuple[str, object]]) -> Html:
    """Return names and values as a definition list."""
    entries = (element("div", element("dt", name), element("dd", value)) for name, value in rows)
    return element("dl", *entries, class_="pairs")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], name: str = "") -> Html:
    """Return a table whose first column names the row; headings ending in # hold numbers."""
    kinds = ["number" if title.endswith("#") else None for title in head]
    titles = [
        element("th", title.rstrip("#"), scope="col", class_=kind)
        for title, kind in zip(head, kinds, strict=True)
    ]
    body = [_row(row, kinds) for row in rows]
    whole = element("table", element("thead", element("tr", *titles)), element("tbody", *body))
    return element("div", whole, class_=f"scroll {name}".strip(), tabindex="0")


def _row(cells: Sequence[object], kinds: Sequence[str | None]) -> Html:
    first = element("th", cells[0], scope="row", class_=kinds[0])
    rest = (
        element("td", cell, class_=kind) for cell, kind in zip(cells[1:], kinds[1:], strict=True)
    )
    return element("tr", first, *rest)


def folded(summary: object, *parts: object) -> Html:
    """Return parts that stay closed until they are asked for."""
    return element("details", element("summary", summary), *parts)


def document(title: str, *parts: object) -> str:
    """Return the whole page."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{text(title)}</title><style>{STYLE}</style>"
    )
    body = element("body", element("main", *parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>{body}</html>\n'
