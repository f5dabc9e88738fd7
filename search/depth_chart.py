"""Curves as the text of an SVG file, for a browser: light or dark as its reader has it, with tooltips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

STEP, HEIGHT, LEFT, TOP, FOOT = 44, 280, 56, 40, 150  # pixels
LEAST = 360  # of the picture's width
HUES = (("#1f6fb4", "#6cb6ff"), ("#c2410c", "#ff9a5c"), ("#15803d", "#5fd38d"))
STYLE = """
svg { background: #ffffff; font: 12px ui-monospace, Menlo, Consolas, monospace }
text { fill: #1f2328 } .grid { stroke: #d0d7de } .line { fill: none; stroke-width: 2 }
"""
DARK = "svg { background: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #30363d }"


def curves(
    title: str, places: Sequence[str], series: Mapping[str, Sequence[float]], told: Sequence[str] | None = None
) -> str:
    """Shares, 0 to 1, at places in order, a line for each series.

    Args:
        title: above the picture.
        places: names below it.
        series: by name, a share for each place; three at most.
        told: what the tooltips say of each place, the share aside; by default its name.
    """
    if not places or len(series) > len(HUES) or any(len(values) != len(places) for values in series.values()):
        raise ValueError(f"curves: expected up to {len(HUES)} series with a value for each of {len(places)} places")
    values = [value for each in series.values() for value in each]
    low, high = int(10 * min(values)) / 10, math.ceil(10 * max(values) - 1e-9) / 10
    high = high if high > low else low + 0.1
    width = max(LEFT + STEP * len(places) + 90, LEAST)

    def at(k: int, value: float) -> tuple[float, float]:
        return LEFT + STEP * (k + 0.5), TOP + HEIGHT * (high - value) / (high - low)

    out = [f'<text x="{LEFT}" y="22">{escape(title)}</text>']
    ticks = round(10 * (high - low))
    for value in (low + k / 10 for k in range(ticks + 1)):
        y = at(0, value)[1]
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{LEFT + STEP * len(places)}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.0%}</text>')
    for k, name in enumerate(places):
        x, y = at(k, low)
        out.append(
            f'<text transform="translate({x + 4:.1f} {y + 14:.1f}) rotate(-60)" text-anchor="end">{escape(name)}</text>'
        )
    for s, (name, shares) in enumerate(series.items()):
        points = [at(k, value) for k, value in enumerate(shares)]
        path = " ".join(f"{'L' if k else 'M'}{x:.1f} {y:.1f}" for k, (x, y) in enumerate(points))
        out.append(f'<g class="c{s}"><path class="line" d="{path}"/>')
        for k, (x, y) in enumerate(points):
            tip = f"{(told or places)[k]}\n{name} {shares[k]:.2%}"
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(tip)}</title></circle>')
        out.append(f'<text x="{points[-1][0] + 12:.1f}" y="{points[-1][1] + 4 + 12 * s:.1f}">{escape(name)}</text></g>')
    size = f'width="{width}" height="{TOP + HEIGHT + FOOT}" viewBox="0 0 {width} {TOP + HEIGHT + FOOT}"'
    style = f"<style>{STYLE}{_hues(0)}@media (prefers-color-scheme: dark) {{{DARK}{_hues(1)}}}</style>"
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', style, *out, "</svg>"])


def _hues(mode: int) -> str:
    return "".join(
        f".c{k} .line {{ stroke: {hue[mode]} }} .c{k} circle, .c{k} text {{ fill: {hue[mode]} }}\n"
        for k, hue in enumerate(HUES)
    )
