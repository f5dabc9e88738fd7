"""A run's directory read back: all that a report or a comparison needs, from plain files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from treesurgeon.engine import TreesurgeonError
from treesurgeon.search import report
from treesurgeon.search.config import RunError
from treesurgeon.search.data import SHARES, DataError, Split, open_source, split_roles
from treesurgeon.search.metrics import METRICS, Metric
from treesurgeon.search.selection import PLAIN, title
from treesurgeon.search.tasks import TASKS, Task, Units

TABLES: Mapping[str, Sequence[str]] = {
    "results": report.RESULT_COLUMNS,
    "front": report.FRONT_COLUMNS,
    "candidates": report.CANDIDATE_COLUMNS,
    "sensitivity": report.SENSITIVITY_COLUMNS,
    "curves": report.CURVE_COLUMNS,
    "certificate": report.CERTIFICATE_COLUMNS,
    "groups": report.GROUP_COLUMNS,
    "blocks": report.BLOCK_COLUMNS,
    "pinned": report.PIN_COLUMNS,
}
OPTIONAL: Mapping[str, Sequence[str]] = {
    "depth": report.DEPTH_COLUMNS,
    "formats": report.FORMAT_COLUMNS,
    "selective": report.SELECTIVE_COLUMNS,
}
Row = Mapping[str, str]
PASSED, FAILS, NONE, DENSE = "passed", "fails", "not certified", "nothing smaller passed"


@dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
        directory: where it is.
        config, manifest, environment: `config.json`, `selected/manifest.json`, `environment.json`.
        tables: the rows of every CSV file by its name without `.csv`.
        shift: `shift.json`, where there is one.
        depth: the rows of `depth.csv`, where `treesurgeon depth` has written one there.
        formats: the rows of `formats.csv`, where formats were measured.
        selective: the rows of `selective.csv`, where units were looked at.
    """

    directory: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    environment: Mapping[str, str]
    tables: Mapping[str, Sequence[Row]]
    shift: Mapping[str, Any] = field(default_factory=dict)
    depth: Sequence[Row] = ()
    formats: Sequence[Row] = ()
    selective: Sequence[Row] = ()

    @property
    def metric(self) -> Metric:
        """What models were judged by."""
        return METRICS[self.manifest["metric"]]

    @property
    def task(self) -> Task:
        """What the labels are for; older versions had classes alone."""
        return TASKS[self.manifest.get("task", "classification")]

    @property
    def status(self) -> str:
        """What became of the certificate: `PASSED`, `FAILS`, `NONE` or `DENSE`."""
        found = self.manifest["certificate"]
        if not found["valid"]:
            return NONE
        if found["selected"] in ("dense", PLAIN):
            return DENSE
        return PASSED if found["passed"] else FAILS

    @property
    def reference(self) -> str:
        """What variants were compared with, in words; older versions had the dense model as it is."""
        return title(self.compared["variant"])

    @property
    def baselines(self) -> Mapping[str, Any]:
        """What the manifest says of the baselines, by name; runs of older versions have none."""
        return self.manifest.get("baselines", {}).get("found", {})

    @property
    def dense(self) -> Row:
        """The dense model's row of `results.csv`."""
        return next(row for row in self.tables["results"] if row["variant"] == "dense")

    @property
    def compared(self) -> Row:
        """The row of the model that variants were compared with."""
        name = self.manifest.get("reference", "dense")
        return next(row for row in self.tables["results"] if row["variant"] == name)

    @property
    def selected(self) -> Row:
        """The selected model's row of `results.csv`."""
        return next(row for row in self.tables["results"] if row["selected"] == "True")


def open_run(path: Path) -> Run:
    """Read a run's directory.

    Raises:
        RunError: it is not one, it is not finished, or a file of it is missing or damaged.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not a directory: pass that of a run, such as runs/NAME")
    if not (path / "config.json").is_file():
        hint = "; pass the run's directory, one level up" if (path / "manifest.json").is_file() else ""
        raise RunError(f"{path} holds no run: it has no config.json{hint}")
    if not (path / "selected").is_dir():
        raise RunError(f"{path} is not finished: run the same search again to go on, then come back")
    run = Run(
        path,
        _json(path / "config.json"),
        _json(path / "selected/manifest.json"),
        _json(path / "environment.json"),
        {name: _rows(path / f"{name}.csv", columns) for name, columns in TABLES.items()},
        _json(path / "shift.json") if (path / "shift.json").exists() else {},
        *(
            _rows(path / f"{name}.csv", columns) if (path / f"{name}.csv").exists() else ()
            for name, columns in OPTIONAL.items()
        ),
    )
    for name, wanted in (("dense", "variant=dense"), ("selected", "selected=True")):
        key, value = wanted.split("=")
        if sum(row.get(key) == value for row in run.tables["results"]) != 1:
            raise RunError(f"{path}/results.csv does not have exactly one row of the {name} model: copy the run again")
    return run


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While the block goes by what files at a path say: they can say anything.

    Raises:
        RunError: the block met an entry that is not there, or is of another kind or out of range.
    """
    try:
        yield
    except TreesurgeonError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, StopIteration) as error:
        raise RunError(
            f"{path}: an entry of its files is missing or of another kind ({error!r}): copy it again, or repeat the run"
        ) from error


def images_again(manifest: Mapping[str, Any], role: str, data: str, data_dir: str) -> Split:
    """The images that had a role in the run of a selected model, dealt out as they were there; numbers standardised.

    Args:
        manifest: the selected model's.
        role: such as `test`.
        data, data_dir: where the data is now, as for `treesurgeon search`.

    Raises:
        DataError: the data cannot be read, or does not fit the model.
        LookupError, TypeError, ValueError: the manifest does not say enough; see `reading`.
    """
    was, normalisation = manifest["data"], manifest["normalisation"]
    shape = tuple(manifest["model"]["input_shape"])
    source = open_source(data, data_dir or None, shape, manifest.get("task"))  # older versions had none
    if absent := [split for split in was["fitted"] or () if split not in source.splits]:
        raise DataError(
            f"data {data!r}: no split {absent[0]!r}, which the run on {was['spec']} took for `train`; the dataset has "
            f"{', '.join(source.splits)}: pass the same data"
        )
    split: Split = getattr(
        split_roles(
            source,
            None if was["fitted"] is None else tuple(was["fitted"]),
            num_classes=len(manifest["labels"]),
            input_shape=shape,
            mean=normalisation["mean"],
            std=normalisation["std"],
            seed=manifest["seed"],
            shares=was.get("shares", SHARES),  # older versions had these alone
            caps={"train": was["images"]["train"]} if "images" in was else None,  # as it was capped there
        ),
        role,
    )
    units = units_of(manifest)
    return replace(split, labels=units.standardised(split.labels)) if units else split


def units_of(manifest: Mapping[str, Any]) -> Units | None:
    """What the numbers that a selected model returns are in; None where it returns none."""
    found = manifest.get("units")
    return Units(tuple(map(float, found["offset"])), tuple(map(float, found["scale"]))) if found else None


def picture(run: Run, number: int) -> bytes:
    """The picture of a row of `selective.csv`."""
    for ending, start in (("png", b"\x89PNG"), ("jpg", b"\xff\xd8\xff")):
        path = run.directory / f"selective/{number}.{ending}"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error}): copy the run again") from error
        if not content.startswith(start):
            raise RunError(f"{path} is no picture: copy the run again")
        return content
    raise _missing(run.directory / f"selective/{number}.png")


def number(text: str) -> float | None:
    """A field of a CSV file as a number; None where it is empty, not a number, or infinite."""
    try:
        value = float(text) if text else float("nan")
    except ValueError:
        raise RunError(f"expected a number in a table of the run, got {text!r}: copy the run again") from None
    return value if abs(value) < float("inf") else None


def known(row: Row, name: str) -> float:
    """A field that must hold a number; nan where that is not finite."""
    value = number(row[name])
    return float("nan") if value is None else value


def numbers(text: str) -> list[int]:
    """A field that holds whole numbers joined by spaces."""
    try:
        return [int(part) for part in text.split()]
    except ValueError:
        raise RunError(f"expected whole numbers in a table of the run, got {text!r}: copy the run again") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): copy the run again") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} does not hold a JSON object: copy the run again")
    return found


def _rows(path: Path, columns: Sequence[str]) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file)) or [[]]
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error}): copy the run again") from error
    if tuple(head) != tuple(columns):
        raise RunError(f"{path}: expected the columns {', '.join(columns)}, got {', '.join(head)}: repeat the run")
    if short := [i for i, row in enumerate(rows, 2) if len(row) != len(columns)]:
        raise RunError(f"{path}, line {short[0]}: expected {len(columns)} fields: copy the run again")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _missing(path: Path) -> RunError:
    return RunError(
        f"{path} is missing: the run was copied in part, or made by an older version; copy it again or repeat it"
    )
