"""`insight.html`: groups, their most selective units, and the images these answer to; one file, which loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treesurgeon.search import charts, markup
from treesurgeon.search.activity import Looked, Units
from treesurgeon.search.charts import Bar
from treesurgeon.search.markup import Html, element, join, table
from treesurgeon.search.pictures import write_pictures, write_whole
from treesurgeon.search.strips import address, strip

STYLE = ".strip { height: 3rem; max-width: none; vertical-align: middle }"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<header><h1>{title}</h1>
<p>{what}</p></header>
<main>
{content}
</main>
</body>
</html>
"""


def write_insight(directory: Path, looked: Looked, found: Sequence[Units], show: int, top: int) -> None:
    """Write `insight.html`, and its plot as `layers.svg` and `layers.png`."""
    title = f"What the units of {looked.name} answer to"
    bars = charts.bars(
        "Participation ratio, of as many units",
        [Bar(u.group, len(u.selectivity), u.ratio, f"{u.ratio:.1f} of {len(u.selectivity)}") for u in found],
        "Participation ratio of each group",
    )
    rows = [
        (u.group, str(len(u.selectivity)), f"{u.ratio:.1f}", f"{u.selectivity.mean():.2f}", str(u.idle)) for u in found
    ]
    head = ("group", "units", "participation ratio", "mean selectivity", "active on no image")
    sections = [element("h2", "Groups"), Html(bars.inline()), table("All groups", head, rows, "wnnnn")]
    sections += [part for units in found for part in _group(looked, units, show, top)]
    what = (
        f"On {len(looked.split):,} images of search. Selectivity is (μ - ν) / (μ + ν): μ is the mean activity on the "
        "class that a unit prefers, ν on the others; 1 answers to one class alone, 0 to all alike. It does not say how "
        "much the network needs a unit."
    )
    text = PAGE.format(
        title=markup.escape(title),
        style=charts.CSS + Path(__file__).with_name("page.css").read_text(encoding="utf-8") + STYLE,
        what=markup.escape(what),
        content=join(sections, "\n"),
    )
    write_pictures(directory, "layers", [bars])
    write_whole(directory / "insight.html", text.encode())


def _group(looked: Looked, units: Units, show: int, top: int) -> list[Html]:
    """The most selective units of a group with the images that they are most active on."""
    shown = np.argsort(-units.selectivity, kind="stable")[:show]
    if not len(shown):
        return []
    prefers = units.prefers
    cells = []
    for unit in shown:
        at = units.top(int(unit), top)
        names = ", ".join(looked.classes[label] for label in looked.split.labels[at])
        strip = picture(looked, at, names) if len(at) else Html("active on none")
        cells.append((str(unit), f"{units.selectivity[unit]:.2f}", looked.classes[prefers[unit]], strip, names))
    head = ("unit", "selectivity", "prefers", "most active on", "which are")
    caption = f"{units.group}: its most selective units"
    return [element("h2", units.group), table(caption, head, cells, "nnwwt")]


def picture(looked: Looked, at: np.ndarray, names: str) -> Html:
    """Images side by side, as they were before normalisation."""
    images = looked.split.images[at] * np.asarray(looked.std, np.float32) + np.asarray(looked.mean, np.float32)
    return Html(f'<img class="strip" alt="{markup.escape(names)}" src="{address(strip(images))}">')
