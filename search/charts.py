"""The plots of a report as static SVG: candidates, learning curves, bars. Every text in them is escaped.

A chart's look is in `chart.css`, which follows the reader's light or dark mode: the page includes it once, a file of
its own (`document`) carries it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

CSS = Path(__file__).with_name("chart.css").read_text(encoding="utf-8")
CHAR, LABEL = 6.6, 46  # pixels a character, characters of a label
LINE = 12  # pixels from one name to the next


@dataclass(frozen=True)
class Chart:
    """A drawing: its size in pixels, what it says to those who do not see it, and the SVG inside."""

    width: float
    height: float
    label: str
    inside: str

    def inline(self) -> str:
        """As an element of a page; it shrinks with the page."""
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" style="max-width:{self.width:.0f}px"'
        return f'<svg class="chart" role="img" aria-label={quoteattr(self.label)} {size}>{self.inside}</svg>'


def document(charts: Sequence[Chart]) -> str:
    """Charts one below the other, as the text of an SVG file."""
    width = max((chart.width for chart in charts), default=0)
    height = sum(chart.height for chart in charts)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    out = [f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{CSS}</style>"]
    y = 0.0
    for chart in charts:
        out.append(f'<g transform="translate(0 {y:.0f})"><title>{escape(chart.label)}</title>{chart.inside}</g>')
        y += chart.height
    return "\n".join([*out, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Plane:
    """Numbers to pixels: a frame with nice ticks on both axes.

    Attributes:
        x, y: the least and the largest number on each axis.
        size: of the chart, in pixels.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    size: tuple[float, float]
    left: float = 56
    bottom: float = 40
    top: float = 12
    right: float = 14

    @staticmethod
    def around(xs: Sequence[float], ys: Sequence[float], size: tuple[float, float]) -> Plane:
        """The plane that shows all of these, with a little room."""
        return Plane(_roomy(xs), _roomy(ys), size)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies."""
        (width, height), (x0, x1), (y0, y1) = self.size, self.x, self.y
        across = self.left + (x - x0) / (x1 - x0) * (width - self.left - self.right)
        return across, height - self.bottom - (y - y0) / (y1 - y0) * (height - self.bottom - self.top)

    def axes(self, x_name: str, y_name: str, whole: bool = False) -> str:
        """Lines, ticks and names; `whole`: only whole numbers along x."""
        (left, base), (right, top) = self.at(self.x[0], self.y[0]), self.at(self.x[1], self.y[1])
        out = []
        for tick in ticks(*self.y):
            height = self.at(self.x[0], tick)[1]
            out.append(f'<path class="grid" d="M{left:.1f} {height:.1f}H{right:.1f}"/>')
            out.append(text(left - 6, height + 4, short(tick), "tick end"))
        for tick in ticks(*self.x, count=5 if self.size[0] > 400 else 4):
            if whole and tick != round(tick):
                continue
            across = self.at(tick, self.y[0])[0]
            out.append(f'<path class="grid" d="M{across:.1f} {base:.1f}V{top:.1f}"/>')
            out.append(text(across, base + 16, short(tick), "tick middle"))
        out.append(text((left + right) / 2, self.size[1] - 6, x_name, "name middle"))
        name = text(0, 0, y_name, "name middle")
        out.append(f'<g transform="translate(13 {(base + top) / 2:.1f}) rotate(-90)">{name}</g>')
        return "".join(out)


@dataclass(frozen=True)
class Point:
    """A candidate, or a model with a name."""

    x: float
    y: float
    name: str = ""
    selected: bool = False


def pareto(candidates: Sequence[Point], models: Sequence[Point], x_name: str, y_name: str, label: str) -> Chart:
    """Candidates as dots, those that no other beats on both axes joined, and named models as diamonds."""
    size = 720.0, 400.0
    everyone = [*candidates, *models]
    plane = Plane.around([p.x for p in everyone], [p.y for p in everyone], size)
    out = [plane.axes(x_name, y_name)]
    edge = front(candidates)
    if edge:
        out.append(f'<path class="front" d="M{_staircase(edge, plane)}"/>')
    on_edge = set(edge)
    for point in candidates:
        x, y = plane.at(point.x, point.y)
        out.append(f'<circle class="dot{" best" * (point in on_edge)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    names: list[tuple[float, float, str]] = []
    for model in models:
        x, y = plane.at(model.x, model.y)
        kind = "selected" if model.selected else "model"
        out.append(f'<path class="{kind}" d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>')
        at = min(x, size[0] - CHAR * len(model.name) / 2 - 2)
        names.append((at, _free(names, at, y, model.name, plane.top), model.name))
        out.append(text(*names[-1], "name middle"))
    return Chart(*size, label, "".join(out))


def _free(names: Sequence[tuple[float, float, str]], at: float, y: float, name: str, top: float) -> float:
    """A height for a name centred there that stands on no other: above a diamond's centre if there is room, or below.

    Args:
        names: those that stand, by their centre and height.
        at: its centre.
        y: the diamond's height.
        name: the name.
        top: the least height of a name.
    """

    def covered(height: float) -> bool:
        return any(
            abs(at - x) < CHAR * (len(name) + len(other)) / 2 and abs(height - up) < LINE for x, up, other in names
        )

    above = (y - 10 - LINE * k for k in range(len(names) + 1) if y - 10 - LINE * k >= top)
    below = (y + 19 + LINE * k for k in range(len(names) + 1))
    return next(height for height in (*above, *below) if not covered(height))


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats on both axes, from left to right."""
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not out or point.y < out[-1].y:
            out.append(point)
    return out


def _staircase(edge: Sequence[Point], plane: Plane) -> str:
    places = [plane.at(point.x, point.y) for point in edge]
    (x, y), *rest = places
    return f"{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)


def curves(
    title: str,
    train: Sequence[float | None],
    search: Sequence[float],
    best: int,
    overfits: int | None,
    label: str,
    judges: str = "search",
) -> Chart:
    """The loss on `train`, and on what epochs are chosen by, after each epoch.

    Args:
        title: the model's name.
        train, search: from epoch 0 on; nothing is known on `train` before the first. What is not a number is left out.
        best: the epoch that was kept.
        overfits: the first epoch of overfitting, if there is one.
        label: for those who do not see it.
        judges: what epochs are chosen by, in words.
    """
    size = 360.0, 240.0
    values = [value for value in [*train, *search] if value is not None and math.isfinite(value)]
    plane = Plane.around([0, max(len(search) - 1, 1)], values, size)
    plane = Plane(plane.x, plane.y, size, top=30)
    out = [
        text(plane.left, 16, title, "title"),
        plane.axes(f"epoch (line: {judges}, dashes: training)", "loss", whole=True),
    ]
    if overfits is not None:
        (x, bottom), (right, top) = plane.at(overfits - 1, plane.y[0]), plane.at(plane.x[1], plane.y[1])
        box = f'x="{x:.1f}" y="{top:.1f}" width="{right - x:.1f}" height="{bottom - top:.1f}"'
        out.append(f'<rect class="overfit" {box}/>')
        out.append(text(right - 4, top - 4, "shaded: overfits", "tick end"))
    for kind, losses in (("train", train), ("search", search)):
        places = [
            plane.at(epoch, loss) for epoch, loss in enumerate(losses) if loss is not None and math.isfinite(loss)
        ]
        if places:
            out.append(f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
    if search[best] in values:
        x, y = plane.at(best, search[best])
        out.append(f'<circle class="kept" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    return Chart(*size, label, "".join(out))


@dataclass(frozen=True)
class Bar:
    """A row of `bars`.

    Attributes:
        name: on the left.
        whole, part: lengths; the part is drawn over the whole.
        note: on the right.
        struck: whether the name is struck out.
    """

    name: str
    whole: float
    part: float
    note: str
    struck: bool = False


def bars(title: str, rows: Sequence[Bar], label: str) -> Chart:
    """A bar a row."""
    names = [row.name if len(row.name) <= LABEL else f"…{row.name[1 - LABEL :]}" for row in rows]
    left = 12 + CHAR * max(map(len, names), default=0) + 10
    most = max((row.whole for row in rows), default=0) or 1
    right = 12 + CHAR * max((len(row.note) for row in rows), default=0)
    out, step, y = [text(12, 18, title, "title")], 20, 30.0
    for name, row in zip(names, rows, strict=True):
        out.append(text(left - 8, y + 12, name, "name end struck" if row.struck else "name end"))
        for kind, length in (("whole", row.whole), ("part", row.part)):
            out.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{y:.1f}" width="{320 * length / most:.1f}" height="14"/>'
            )
        out.append(text(left + 320 * row.whole / most + 6, y + 12, row.note, "tick"))
        y += step
    return Chart(left + 330 + right, y + 12, label, "".join(out))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers between two."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(step for step in (1, 2, 5, 10) if step * power >= rough) * power
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def text(x: float, y: float, words: str, kind: str) -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _roomy(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if low >= 0 and low < 4 * room else low - room), high + room
