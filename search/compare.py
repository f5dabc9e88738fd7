"""`treesurgeon compare`: runs side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from treesurgeon.search import report
from treesurgeon.search.records import Row, Run, number, open_run, reading
from treesurgeon.search.report import SPLITS, UNKNOWN, count, shown


@dataclass(frozen=True)
class Comparison:
    """What to compare."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of complete runs."""


def compare(options: Comparison, say: Callable[[str], None]) -> None:
    """Say what each run selected, what that costs and how good it is.

    Raises:
        RunError: a directory holds no run, or one that is not finished.
    """
    runs = [open_run(path) for path in options.runs]
    names = _names([run.directory for run in runs])
    head = ("run", "selected", "params", "MACs", *SPLITS, "gap", "certificate")
    rows: list[Sequence[str]] = []
    said, metrics, tests = [], [], set()
    for name, run in zip(names, runs, strict=True):
        with reading(run.directory):
            rows += [_line(name, run, run.selected), _line("", run, run.compared)]
            said.append(f"{name} ({run.config['model']}): {run.manifest['verdict']['sentence']}")
            metrics.append(run.metric.name)
            tests.add(run.manifest["data"]["fingerprints"]["test"])
    say(report.aligned([head, *rows]))
    say("")
    for line in said:
        say(line)
    if len(set(metrics)) > 1:
        say("These runs were judged by different metrics: " + ", ".join(metrics) + ".")
    if len(tests) > 1:
        say(f"These runs were tested on {len(tests)} different sets of images: compare their test columns with care.")


def _line(name: str, run: Run, row: Row) -> list[str]:
    found = {key: number(value) for key, value in row.items() if key not in ("variant", "selected")}
    metric, gap, (low, high) = run.metric, found["gap"], (found["test_low"], found["test_high"])
    return [
        name,
        row["variant"],
        *(count(found[key] or 0, number(run.dense[key]) or 0) for key in ("params", "macs")),
        *(shown(metric, found[split]) for split in SPLITS[:-1]),
        shown(metric, found["test"]) + (f" ({shown(metric, low)} to {shown(metric, high)})" if low is not None else ""),
        UNKNOWN if gap is None else metric.amount(gap, sign=True).split()[0],
        run.status if name else "",
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell the directories apart: without what all paths have in common."""
    full = [path.absolute() for path in paths]
    if len(set(full)) < 2:
        return [path.name for path in full]
    common = Path(os.path.commonpath([path.parent for path in full]))
    return [path.relative_to(common).as_posix() for path in full]
