"""Accuracy against depth as a chart: a line for each series over places in order, with tooltips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from treesurgeon.search.charts import CHAR, LABEL, Chart, text

OWN = "its own head"  # the place where the model is whole
STEP, HEIGHT, LEFT, TOP, FOOT = 44, 280, 56, 40, 24  # pixels
LEAST = 360  # of the picture's width
SLOPE = 60  # degrees, of the names below


def depths(
    title: str, places: Sequence[str], series: Mapping[str, Sequence[float]], told: Sequence[str] | None = None
) -> Chart:
    """Shares, 0 to 1, at places in order, a line for each series; what is below 0 is drawn there.

    Args:
        title: above the picture.
        places: names below it.
        series: `train`, `search` or both, a share for each place.
        told: what the tooltips say of each place, the share aside; by default its name.
    """
    if not places or any(len(values) != len(places) for values in series.values()):
        raise ValueError(f"depths: expected series with a value for each of {len(places)} places")
    values = [max(value, 0) for each in series.values() for value in each]
    low, high = int(10 * min(values)) / 10, math.ceil(10 * max(values) - 1e-9) / 10
    high = high if high > low else low + 0.1
    right = LEFT + STEP * len(places)
    names = [name if len(name) <= LABEL else f"…{name[1 - LABEL :]}" for name in places]
    foot = FOOT + math.sin(math.radians(SLOPE)) * CHAR * max(map(len, names))

    def at(k: int, value: float) -> tuple[float, float]:
        return LEFT + STEP * (k + 0.5), TOP + HEIGHT * (high - max(value, 0)) / (high - low)

    out = [text(LEFT, 18, title, "title")]
    for k in range(round(10 * (high - low)) + 1):
        value = low + k / 10
        y = at(0, value)[1]
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        out.append(text(LEFT - 8, y + 4, f"{value:.0%}", "tick end"))
    for k, name in enumerate(names):
        x, y = at(k, low)
        turned = f"translate({x + 4:.1f} {y + 14:.1f}) rotate(-{SLOPE})"
        out.append(f'<g transform="{turned}">{text(0, 0, name, "end")}</g>')
    label_at = -math.inf
    for name, shares in sorted(series.items(), key=lambda entry: -entry[1][-1]):
        points = [at(k, value) for k, value in enumerate(shares)]
        out.append(f'<path class="{name}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
        for k, (x, y) in enumerate(points):
            tip = escape(f"{(told or places)[k]}\n{name} {shares[k]:.2%}")
            out.append(f'<circle class="of-{name}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>')
        label_at = max(points[-1][1] + 4, label_at + 14)  # below the one before, if that is near
        out.append(text(right - 10, label_at, name, f"of-{name}"))
    label = "; ".join(
        f"{title}, on {name}: " + ", ".join(f"{place} {share:.1%}" for place, share in zip(places, shares, strict=True))
        for name, shares in series.items()
    )
    return Chart(max(right + 70, LEAST), TOP + HEIGHT + foot, label, "".join(out))
