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
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    where = f"{jax.default_backend()}{os.cpu_count()}" if jax.default_backend() == "cpu" else jax.default_backend()
    (RESULTS / f"{name}-{where}-jax{version('jax')}.md").write_text(text)
