"""HTML by hand: text is escaped unless it is `Html` already."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {"n": "number", "w": "word", "t": "text"}


class Html(str):
    """Text that is HTML."""


def escape(content: str) -> Html:
    """Text as HTML, for elements and for attributes in double quotes."""
    return content if isinstance(content, Html) else Html(html.escape(content))


def element(name: str, content: str, **attributes: str) -> Html:
    """An element; a trailing underscore of an attribute's name is left out, others become dashes."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{escape(content)}</{name}>")


def join(parts: Sequence[str], between: str = "") -> Html:
    """Parts one after the other."""
    return Html(escape(between).join(escape(part) for part in parts))


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kinds: str = "", marked: Sequence[int] = ()
) -> Html:
    """A table that scrolls by itself where the page is narrow. The first cell of a row names it.

    Args:
        caption: what it shows.
        head: names of the columns.
        rows: the cells.
        kinds: a letter for each column, n for numbers, w for a word or two, t for text; numbers beyond its end.
        marked: rows that stand out.
    """
    classes = [KINDS[kind] for kind in kinds.ljust(len(head), "n")]
    names = join([element("th", name, scope="col", class_=kind) for name, kind in zip(head, classes, strict=True)])
    body = []
    for i, (first, *others) in enumerate(rows):
        cells = [element("th", first, scope="row")]
        cells += [element("td", cell, class_=kind) for cell, kind in zip(others, classes[1:], strict=True)]
        body.append(element("tr", join(cells), **({"class_": "marked"} if i in marked else {})))
    inside = join(
        [
            element("caption", element("span", caption)),
            element("thead", element("tr", names)),
            element("tbody", join(body)),
        ]
    )
    return element("div", element("table", inside), class_="scroll", role="region", tabindex="0", aria_label=caption)


def pairs(entries: Mapping[str, str]) -> Html:
    """Names and values."""
    return element("dl", join([part for k, v in entries.items() for part in (element("dt", k), element("dd", v))]))


def embedded(identity: str, data: Any) -> Html:
    """Data for a script, so that nothing in it can end the element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="{identity}">{text}</script>')
