"""Where a run's time goes: `timings.csv`, a row for each part of it, of each time that it was started."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COLUMNS = ("part", "seconds")


class Timings:
    """Wall time by part, in the order in which the parts end; without a path it is not written down."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Note what was timed elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if self.path is None:
            return
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            rows = csv.writer(file)
            if fresh:
                rows.writerow(COLUMNS)
            rows.writerow((name, f"{seconds:.1f}"))

    @property
    def sentence(self) -> str:
        """All of it in words."""
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        return f"took {sum(self.seconds.values()):.0f} s: {parts}"


def read(path: Path) -> dict[str, float]:
    """Seconds by part, of all starts of a run together."""
    out: dict[str, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            out[row["part"]] = out.get(row["part"], 0.0) + float(row["seconds"])
    return out
