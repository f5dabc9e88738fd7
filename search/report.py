"""What a search leaves for people and for spreadsheets: the table, and a CSV file for all that a report shows."""

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.search.metrics import ACCURACY, Metric

COLUMNS = ("variant", "params", "MACs", "train", "search", "test", "gap")
CANDIDATE_COLUMNS = (
    "generation",
    "candidate",
    "loss",
    "error",
    "violation",
    "params",
    "macs",
    "activation_bytes",
    "latency",
    "memory",
    "kept",  # units of each group of groups.csv, in its order
    "genome",  # the last genes are the searched blocks of blocks.csv, in its order: 1 keeps, 0 drops
    "up_to",  # the point at which the candidate ends, empty for the whole depth
)
SENSITIVITY_COLUMNS = ("kind", "name", "kept", "rise")
GROUP_COLUMNS = (
    "group",
    "size",
    "widths",
    "criterion",  # what ranked its units
    "blocks",  # rows of blocks.csv, from 0, that it goes away with
)
BLOCK_COLUMNS = ("block", "parent", "searched", "leaves")
PIN_COLUMNS = ("axis", "reason")
CURVE_COLUMNS = ("variant", "epoch", "train_loss", "search_loss", "search_error", "best", "judges")
SPLITS = ("train", "search", "test")
ENDS = ("difference", "low", "high")  # of a cross-validated estimate
RESULT_COLUMNS = (
    "variant",
    "selected",
    "params",
    "macs",
    "bytes",
    "activation_bytes",
    "latency",
    "memory",
    *(f"{split}{end}" for split in SPLITS for end in ("", "_low", "_high", "_images")),
    "gap",
    "wrong",  # on search, as candidates.csv has it whatever the metric: the share of wrong answers, or see `Task.wrong`
)
CERTIFICATE_COLUMNS = (
    "variant",
    "worse",
    "better",
    "error_margin",
    "gap_margin",
    "error_p_value",
    "gap_p_value",
    "passed",
)
FRONT_COLUMNS = (
    "variant",
    "selected",
    "params",
    "macs",
    "activation_bytes",
    "latency",
    "memory",
    "metric",
    "train_error",
    "search_error",
    "gap",
    *(f"cv_{end}" for end in ENDS),
    "best_epoch",
    "reason",
    "description",
    "genome",
)
DEPTH_COLUMNS = ("point", "features", "params", "macs", "train_accuracy", "search_accuracy", "gap", "penalty")
SELECTIVE_COLUMNS = ("group", "unit", "selectivity", "class", "top_images", "top_labels", "maps")
FORMAT_COLUMNS = ("format", "bytes", "dense_bytes", "latency", "dense_latency", "repeats", "batch", "device")
UNKNOWN = "–"


class ReportError(TreesurgeonError, ValueError):
    """Records that do not fit a table's columns."""


@dataclass(frozen=True)
class Line:
    """One line of the table. Scores are the metric's (accuracies are shares, 0 to 1); None is shown as unknown."""

    variant: str
    params: int
    macs: int
    train: float | None
    search: float | None
    test: float | None = None
    selected: bool = False
    metric: Metric = ACCURACY

    @property
    def gap(self) -> float | None:
        """What the metric loses from `train` to `search`."""
        return None if self.train is None or self.search is None else self.metric.gap(self.train, self.search)


def show(lines: Sequence[Line], console: Console | None = None, title: str | None = None) -> None:
    """Print the table, dense first: with rich on a terminal, as aligned plain text anywhere else."""
    console = console or Console(file=sys.stdout)
    if not console.is_terminal:
        console.file.write((f"{title}\n" if title else "") + text(lines) + "\n")
        return
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line, cells in zip(lines, _cells(lines), strict=True):
        table.add_row(*cells, style="bold green" if line.selected else None)
    console.print(table)


def text(lines: Sequence[Line]) -> str:
    """The table as aligned plain text."""
    return aligned([COLUMNS, *_cells(lines)])


def aligned(table: Sequence[Sequence[str]]) -> str:
    """A table with its head as plain text: the first column to the left, the others to the right."""
    rows = list(map(tuple, table))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    first, *others = widths
    return "\n".join(
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        for name, *cells in rows
    )


def markdown(lines: Sequence[Line]) -> str:
    """The table for a README or a model card; the selected variant in bold."""
    rows = [
        [f"**{cell}**" if line.selected else cell for cell in (c.replace("|", r"\|") for c in cells)]
        for line, cells in zip(lines, _cells(lines), strict=True)
    ]
    head = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + rows)


def write_front(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Write `front.csv`, a record for each finalist: keys from `FRONT_COLUMNS`, any may be absent."""
    write_table(path, FRONT_COLUMNS, records)


def write_sensitivity(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Write `sensitivity.csv`: the rise of the loss for each change by itself."""
    write_table(path, SENSITIVITY_COLUMNS, records)


def write_table(path: str | os.PathLike[str], columns: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as CSV: keys from `columns`, any may be absent."""
    _write(Path(path), columns, [_row(columns, record) for record in records])


def write_depth(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Write `depth.csv`, a record for each truncation: keys from `DEPTH_COLUMNS`, any may be absent."""
    _write(Path(path), DEPTH_COLUMNS, [_row(DEPTH_COLUMNS, record) for record in records])


def write_generation(path: str | os.PathLike[str], generation: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Add one generation to `candidates.csv`: keys from `CANDIDATE_COLUMNS`, any may be absent.

    Rows of this generation and of later ones are replaced: a search that was killed after it wrote them and
    before it saved its state evaluates them again, and the file ends up the same.
    """
    path = Path(path)
    earlier = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file)) or [[]]
        if tuple(head) != CANDIDATE_COLUMNS:
            raise ReportError(f"{path}: not a candidates.csv of this version (columns {head}); move it away")
        earlier = [row for row in rows if int(row[0]) < generation]
    new = [
        _row(CANDIDATE_COLUMNS, {"candidate": i, **record, "generation": generation})
        for i, record in enumerate(records)
    ]
    _write(path, CANDIDATE_COLUMNS, earlier + new)


def _cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    return [
        (
            line.variant,
            count(line.params, lines[0].params),
            count(line.macs, lines[0].macs),
            *(shown(line.metric, score) for score in (line.train, line.search, line.test)),
            UNKNOWN if line.gap is None else line.metric.amount(line.gap, sign=True).split()[0],
        )
        for line in lines
    ]


def count(value: float, dense: float) -> str:
    """A count in few digits, and its share of the dense model's."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit} ({value / dense:.0%})"
    return f"{value:g} ({value / dense:.0%})" if dense else f"{value:g}"


def shown(metric: Metric, score: float | None) -> str:
    """A score, or an error, as the metric is written."""
    return UNKNOWN if score is None else metric.show(score)


def _row(columns: Sequence[str], record: Mapping[str, Any]) -> list[str]:
    if unknown := set(record) - set(columns):
        raise ReportError(f"no column for {', '.join(sorted(unknown))}; there are {', '.join(columns)}")
    return [_field(record.get(column)) for column in columns]


def _field(value: Any) -> str:
    """A value in full: floats so that they read back exactly, sequences (genomes) joined by spaces."""
    if value is None:
        return ""
    if hasattr(value, "tolist"):  # numpy and JAX, scalars and arrays
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return " ".join(map(_field, value))
    return repr(value) if isinstance(value, float) else str(value)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In one step: a reader, or a kill, never meets half a file."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(buffer.getvalue(), encoding="utf-8", newline="")
    beside.replace(path)
