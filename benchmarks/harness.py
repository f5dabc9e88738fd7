"""What every benchmark here shares: medians of interleaved repeats, and a table that names device and versions."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from treesurgeon.search import certificate
from treesurgeon.search.charts import CHAR, Chart, document, short, text, ticks

RESULTS = Path(__file__).parent / "results"


def seconds(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall time of each case, warmed up once, then measured in turns so that drift hits all alike."""
    for case in cases.values():
        jax.block_until_ready(case())
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(case())
            times[name].append(time.perf_counter() - start)
    return times


def spread(values: Sequence[float], digits: int = 2) -> str:
    """A median with the range of its repeats."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def wilson(share: float, count: int) -> str:
    """A share of `count` cases in percent, with its 95 % interval."""
    low, high = certificate.wilson(share, count)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def device() -> str:
    """The device that results belong to."""
    kind = jax.devices()[0].device_kind
    return f"{kind}, {os.cpu_count()} cores" if jax.default_backend() == "cpu" else kind


def publish(name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> None:
    """Print a table, and write it to `results/` under a name with the device and the versions."""
    lines = [
        f"# {title}",
        "",
        f"{device()}, {platform.system()}; jax {version('jax')}, flax {version('flax')}.",
        "",
    ]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] + ['---:'] * (len(head) - 1))} |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", notes]
    written = "\n".join(lines) + "\n"
    print(written)
    result(name, "md").write_text(written)


def result(name: str, suffix: str) -> Path:
    """The file of a result, under a name with the device and the versions."""
    RESULTS.mkdir(exist_ok=True)
    where = f"{jax.default_backend()}{os.cpu_count()}" if jax.default_backend() == "cpu" else jax.default_backend()
    return RESULTS / f"{name}-{where}-jax{version('jax')}.{suffix}"


def numbers(cell: str) -> tuple[float, float, float]:
    """The share and its interval that `wilson` wrote."""
    value, low, high = (float(part) for part in cell.replace("(", "").replace(")", "").split() if part != "to")
    return value, low, high


def bars(name: str, title: str, rows: Sequence[tuple[str, float, float, float]], unit: str, ours: str) -> None:
    """A picture beside the table: a bar for each row, `(name, value, low, high)`, with its interval.

    Args:
        name: as given to `publish`.
        title: above the bars.
        rows: what to show, from top to bottom.
        unit: what the values are.
        ours: how the names begin whose bars are coloured.
    """
    left, right, height, top = 20 + CHAR * max(len(label) for label, *_ in rows), 70.0, 26.0, 34.0
    width, end = left + 510, max(high for _, _, _, high in rows)
    base = top + height * len(rows)

    def across(value: float) -> float:
        return left + value / end * (width - left - right)

    out = [text(8, 20, title, "title")]
    for tick in ticks(0, end):
        out.append(f'<path class="grid" d="M{across(tick):.1f} {top}V{base}"/>')
        out.append(text(across(tick), base + 16, short(tick), "tick middle"))
    for i, (label, value, low, high) in enumerate(rows):
        y = top + i * height
        kind = "part" if label.startswith(ours) else "whole"
        out.append(text(left - 8, y + 17, label, "end"))
        out.append(f'<rect class="{kind}" x="{left}" y="{y + 4}" width="{across(value) - left:.1f}" height="18"/>')
        middle = y + height / 2
        out.append(f'<path class="interval" d="M{across(low):.1f} {middle}H{across(high):.1f}"/>')
        out.append(text(across(high) + 6, y + 17, f"{value:.1f}", "tick"))
    out.append(text((left + width - right) / 2, base + 34, unit, "name middle"))
    label = f"{title}: " + "; ".join(f"{label} {value:.3g}" for label, value, _, _ in rows)
    result(name, "svg").write_text(document([Chart(width, base + 44, label, "".join(out))]))
