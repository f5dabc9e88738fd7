"""`report.html`: one file that works offline, and the plots beside it as SVG and as PNG.

Everything comes from the run's directory (see records.py), so that a report can be made again at any time, anywhere.
The page may load nothing: its security policy names its one script by hash, and forbids all else.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from string import Template
from typing import Any

from treesurgeon.search import charts, markup, panels
from treesurgeon.search.charts import Chart, short
from treesurgeon.search.markup import Html, element, join, table
from treesurgeon.search.metrics import ACCURACY
from treesurgeon.search.pictures import write_pictures, write_whole
from treesurgeon.search.records import DENSE, FAILS, NONE, PASSED, Run, known, number, open_run, reading
from treesurgeon.search.report import ENDS, SPLITS, UNKNOWN, shown

BADGES = {
    PASSED: ("good", "Certificate: passed"),
    FAILS: ("bad", "Certificate: fails"),
    NONE: ("open", "Not certified"),
    DENSE: ("open", "Certificate: nothing smaller passed"),
}


def write_page(directory: Path) -> Path:
    """Write `report.html` and its plots into a run's directory, and return its path.

    Raises:
        RunError: the directory holds no complete run.
    """
    run = open_run(directory)
    with reading(directory):
        plots, text = draw(run), page(run)
    for name, drawn in plots.items():
        if drawn:
            write_pictures(directory, name, drawn)
    path = directory / "report.html"
    write_whole(path, text.encode())
    return path


def draw(run: Run) -> dict[str, list[Chart]]:
    """The plots by the names of their files."""
    plots = {
        "pareto": [panels.pareto(run)],
        "network": [panels.network(run)],
        "sensitivity": [panels.sensitivity(run)],
        "curves": [chart for _, chart, _ in panels.learning(run)],
    }
    if run.depth:
        plots["depth"] = [panels.depth_chart(run)]
    return plots


def page(run: Run) -> str:
    """The text of `report.html`."""
    beside = Path(__file__).parent
    script = (beside / "page.js").read_text(encoding="utf-8")
    kind, badge = BADGES[run.status]
    return Template((beside / "page.html").read_text(encoding="utf-8")).substitute(
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=charts.CSS + (beside / "page.css").read_text(encoding="utf-8"),
        script=script,
        data=markup.embedded("data", panels.plot_data(run)),
        title=markup.escape(f"{run.config['model']}, pruned"),
        badge=element("p", badge, class_=f"badge {kind}"),
        verdict=element("p", run.manifest["verdict"]["sentence"], class_="verdict"),
        results=results(run),
        plot=panels.pareto(run).inline(),
        axes_x=panels.options(run, panels.default_axes(run)[0]),
        axes_y=panels.options(run, panels.default_axes(run)[1]),
        unscored=markup.escape(panels.unscored(run)),
        front=panels.front(run),
        network=panels.before_and_after(run),
        units=panels.selective(run),
        sensitivity=panels.sensitivities(run),
        curves=panels.learning_curves(run),
        data_section=data_and_checkpoint(run),
        certificate=certificate(run),
        formats=formats(run),
        pinned=pinned(run),
        settings=settings(run),
    )


# --- results ----------------------------------------------------------------------------------------------------------


def results(run: Run) -> Html:
    """Dense, the finalists, the selected one marked, and the baselines."""
    rows = run.tables["results"]
    reasons = {row["variant"]: row["reason"] for row in run.tables["front"]}
    reasons |= {name: found["remark"] for name, found in run.baselines.items()}
    measured = [name for name in ("latency", "memory") if number(run.dense[name]) is not None]
    units = {"latency": "latency, ms", "memory": "peak memory, bytes"}
    head = [
        "model",
        *reversed(SPLITS),  # what to quote comes first, where a narrow screen shows it
        f"gap, {run.metric.unit}",
        "parameters",
        "MACs",
        "bytes",
        *(units[name] for name in measured),
        "verdict, or what the baseline is",
    ]
    cells = []
    for row in rows:
        line: list[str] = [row["variant"] + (" (selected)" if row["selected"] == "True" else "")]
        for split in reversed(SPLITS):
            cell = [shown(run.metric, number(row[split]))]
            low, high = number(row[f"{split}_low"]), number(row[f"{split}_high"])
            if low is not None and high is not None:
                cell.append(element("span", f"{100 * low:.2f} to {100 * high:.2f}", class_="small"))
            line.append(join(cell))
        gap = number(row["gap"])
        wider = UNKNOWN if gap is None else run.metric.amount(gap, sign=True).split()[0]
        line.append(wider)
        for name in ("params", "macs", "bytes"):
            share = element("span", f"{known(row, name) / max(known(run.dense, name), 1):.1%}", class_="small")
            line.append(join([short(known(row, name)), share]))
        line += [*(short(known(row, name)) for name in measured), reasons.get(row["variant"], UNKNOWN)]
        cells.append(line)
    images = ", ".join(f"{known(run.dense, f'{split}_images'):,.0f} of {split}" for split in SPLITS)
    what = "Accuracy with its 95 % interval (Wilson)" if run.metric is ACCURACY else run.metric.description
    caption = f"{what}, on images: {images}. Quote test: no choice went by it."
    chosen = [i for i, row in enumerate(rows) if row["selected"] == "True"]
    found = table(caption, head, cells, "w".ljust(len(head) - 1, "n") + "t", chosen)
    return join([found, element("p", run.manifest["baselines"]["sentence"])]) if run.baselines else found


def certificate(run: Run) -> Html:
    """The tests that were made on `certify`, and what they mean."""
    found, steps = run.manifest["certificate"], run.tables["certificate"]
    out: list[str] = [element("p", found["sentence"])]
    if steps:
        caption = f"Tests on {found['count']:,} images of certify, in their order, each at level {found['delta']:g}"
        head = ("variant", "images lost", "gained", "error margin", "p", "gap margin", "p", "outcome")
        cells = [
            (
                *(step[name] for name in ("variant", "worse", "better")),
                run.metric.amount(known(step, "error_margin")),
                f"{known(step, 'error_p_value'):.2g}",
                run.metric.amount(known(step, "gap_margin")),
                f"{known(step, 'gap_p_value'):.2g}",
                "passed" if step["passed"] == "True" else "failed",
            )
            for step in steps
        ]
        out.append(table(caption, head, cells, "wnnnnnnw"))
    compared = [row for row in run.tables["front"] if number(row["cv_difference"]) is not None]
    if compared:
        cells = [
            (row["variant"], *(run.metric.amount(known(row, f"cv_{name}"), sign=True) for name in ENDS))
            for row in compared
        ]
        caption = f"Cross-validation: {run.metric.noun} less {run.reference}'s, and the ends of its interval"
        out.append(table(caption, ("variant", *ENDS), cells, "wnnn"))
    return join(out)


# --- the data and the checkpoint --------------------------------------------------------------------------------------


def data_and_checkpoint(run: Run) -> Html:
    """Whether the inputs are shifted, what became of the head, and accuracy against depth where that was measured."""
    out = [element("p", _sentence(run.shift["sentence"]))] if "sentence" in run.shift else []
    head = run.manifest.get("head")
    if head:
        fitted = "fitted with a hidden layer" if head.get("hidden") else "fitted in closed form"
        lists = {"carried over": head["carried"], fitted: head["fitted"]}
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
        out.append(element("p", f"The labels are not the checkpoint's. Before the search, rows of its head: {said}."))
    if run.depth:
        out.append(panels.depth(run))
    return join(out or [element("p", "Nothing was recorded.")])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def formats(run: Run) -> Html:
    """What the selected model takes in each format of `treesurgeon export`."""
    if not run.formats:
        return element("p", "Nothing was measured: dense was selected, or formats were left out (--no-formats).")
    head = ("format", "bytes", "of dense", "ms", "dense, ms", "speed-up", "calls", "on")
    cells = [
        (
            row["format"],
            *(f"{known(row, name):,.0f}" for name in ("bytes", "dense_bytes")),
            *(f"{known(row, name):.3g}" for name in ("latency", "dense_latency")),
            f"{known(row, 'dense_latency') / known(row, 'latency'):.2f}×",
            row["repeats"],
            row["device"],
        )
        for row in run.formats
    ]
    caption = (
        f"{run.selected['variant']} as treesurgeon export writes it: size, and median milliseconds for "
        f"{run.formats[0]['batch']} images, in calls that took turns with the dense model's"
    )
    found = [table(caption, head, cells, "wnnnnnnw"), panels.files("formats.csv")]
    if any(row["format"] == "stablehlo" for row in run.formats):
        found.insert(1, element("p", "selected/model.stablehlo is larger: it holds the derivative as well."))
    return join(found)


# --- the rest ---------------------------------------------------------------------------------------------------------


def pinned(run: Run) -> Html:
    """What may not change, and why."""
    rows = [(row["axis"], row["reason"]) for row in run.tables["pinned"]]
    return table(f"{len(rows)} axes of parameters that may not change", ("axis", "why"), rows, "wt")


def settings(run: Run) -> Html:
    """Configuration, versions, seed, fingerprints."""
    config = {name: _shown(value) for name, value in run.config.items() if name not in ("data", "checkpoint")}
    data = run.manifest["data"]
    fitted = data["fitted"]
    facts = {
        "seed": str(run.manifest["seed"]),
        "data": data["spec"],
        "checkpoint": element("code", run.config["checkpoint"]),
        "the checkpoint was fitted on": "unknown" if fitted is None else ", ".join(fitted) or "none of this data",
        **{
            f"{role}, {data['images'][role]:,} images": element("code", digest)
            for role, digest in data["fingerprints"].items()
        },
    }
    normalisation = run.manifest["normalisation"]
    facts |= {f"{name} of images": ", ".join(map(str, values)) for name, values in normalisation.items()}
    parts = {"Data and seed": facts, "Versions": run.environment, "Configuration": config}
    return join([part for title, entries in parts.items() for part in (element("h3", title), markup.pairs(entries))])


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    if value in ("", []):
        return UNKNOWN
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
