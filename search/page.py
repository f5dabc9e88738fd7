"""`report.html`: one file that works offline, and the plots beside it as SVG.

Everything comes from the run's directory (see records.py), so that a report can be made again at any time, anywhere.
The page may load nothing: its security policy names its one script by hash, and forbids all else.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from treesurgeon.search import charts, markup
from treesurgeon.search.charts import Bar, Chart, Point, short
from treesurgeon.search.markup import Html, element, join, table
from treesurgeon.search.records import DENSE, FAILS, NONE, PASSED, Row, Run, number, numbers, open_run
from treesurgeon.search.report import SPLITS, UNKNOWN, percent

AXES = {
    "params": "parameters",
    "macs": "multiply-accumulates",
    "activation_bytes": "activation bytes",
    "latency": "latency (predicted), ms",
    "memory": "peak memory (predicted), bytes",
    "error": "error on search",
    "loss": "loss on search",
    "generation": "generation",
}
RISE = 0.05  # below this the loss on `search` counts as level
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
    plots = {
        "pareto": [pareto(run)],
        "network": [network(run)],
        "sensitivity": [sensitivity(run)],
        "curves": [chart for _, chart, _ in learning(run)],
    }
    for name, drawn in plots.items():
        if drawn:
            _write(directory / f"{name}.svg", charts.document(drawn))
    path = directory / "report.html"
    _write(path, page(run))
    return path


def page(run: Run) -> str:
    """The text of `report.html`."""
    beside = Path(__file__).parent
    script = (beside / "page.js").read_text(encoding="utf-8")
    kind, badge = BADGES[run.status]
    return Template((beside / "page.html").read_text(encoding="utf-8")).substitute(
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=charts.CSS + (beside / "page.css").read_text(encoding="utf-8"),
        script=script,
        data=markup.embedded("data", plot_data(run)),
        title=markup.escape(f"{run.config['model']}, pruned"),
        badge=element("p", badge, class_=f"badge {kind}"),
        verdict=element("p", run.manifest["verdict"]["sentence"], class_="verdict"),
        results=results(run),
        plot=pareto(run).inline(),
        axes_x=_options(run, _default_axes(run)[0]),
        axes_y=_options(run, _default_axes(run)[1]),
        unscored=markup.escape(_unscored(run)),
        front=front(run),
        network=before_and_after(run),
        sensitivity=sensitivities(run),
        curves=learning_curves(run),
        certificate=certificate(run),
        pinned=pinned(run),
        settings=settings(run),
    )


# --- results ----------------------------------------------------------------------------------------------------------


def results(run: Run) -> Html:
    """Dense and the finalists, the selected one marked."""
    rows = run.tables["results"]
    reasons = {row["variant"]: row["reason"] for row in run.tables["front"]}
    measured = [name for name in ("latency", "memory") if number(run.dense[name]) is not None]
    units = {"latency": "latency, ms", "memory": "peak memory, bytes"}
    head = [
        "model",
        "parameters",
        "MACs",
        "bytes",
        *(units[name] for name in measured),
        *SPLITS,
        "gap, points",
        "verdict",
    ]
    cells = []
    for row in rows:
        line: list[str] = [row["variant"] + (" (selected)" if row["selected"] == "True" else "")]
        for name in ("params", "macs", "bytes"):
            share = element("span", f"{_known(row, name) / max(_known(run.dense, name), 1):.1%}", class_="small")
            line.append(join([short(_known(row, name)), share]))
        line += [short(_known(row, name)) for name in measured]
        for split in SPLITS:
            low, high = percent(number(row[f"{split}_low"])), percent(number(row[f"{split}_high"]))
            interval = element("span", f"{low[:-1]} to {high[:-1]}", class_="small")
            line.append(join([percent(number(row[split])), interval]))
        gap = number(row["gap"])
        line += [UNKNOWN if gap is None else f"{100 * gap:+.2f}", reasons.get(row["variant"], UNKNOWN)]
        cells.append(line)
    images = ", ".join(f"{_known(run.dense, f'{split}_images'):,.0f} of {split}" for split in SPLITS)
    caption = f"Accuracy with its 95 % interval (Wilson) on images: {images}. Quote test: no choice went by it."
    chosen = [i for i, row in enumerate(rows) if row["selected"] == "True"]
    return table(caption, head, cells, "w".ljust(len(head) - 1, "n") + "t", chosen)


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
                f"{100 * _known(step, 'error_margin'):.2f} points",
                f"{_known(step, 'error_p_value'):.2g}",
                f"{100 * _known(step, 'gap_margin'):.2f} points",
                f"{_known(step, 'gap_p_value'):.2g}",
                "passed" if step["passed"] == "True" else "failed",
            )
            for step in steps
        ]
        out.append(table(caption, head, cells, "wnnnnnnw"))
    return join(out)


# --- candidates -------------------------------------------------------------------------------------------------------


def plot_data(run: Run) -> dict[str, Any]:
    """What the interactive plot knows: `candidates.csv` with the models that were finished, as JSON values."""
    names = [name for name in AXES if name in _axes(run)]
    candidates = [
        {
            "candidate": int(row["candidate"]),
            **{name: number(row[name]) for name in dict.fromkeys([*names, "generation"])},
            "within": number(row["violation"]) == 0,
            "kept": numbers(row["kept"]),
            "dropped": _dropped(run, row),
        }
        for row in run.tables["candidates"]
    ]
    words = {row["variant"]: row["description"] for row in run.tables["front"]}
    models = [
        {
            "name": row["variant"],
            "selected": row["selected"] == "True",
            "description": words.get(row["variant"], "everything kept"),
            **{name: _model_value(row, name) for name in names},
        }
        for row in run.tables["results"]
    ]
    return {
        "axes": {name: AXES[name] for name in names},
        "groups": [
            {"name": row["group"], "size": int(row["size"]), "blocks": numbers(row["blocks"])}
            for row in run.tables["groups"]
        ],
        "blocks": [row["block"] for row in run.tables["blocks"]],
        "candidates": candidates,
        "models": models,
    }


def pareto(run: Run) -> Chart:
    """The plot as it is before any script runs."""
    x, y = _default_axes(run)
    points = [
        Point(a, b) for row in _scored(run) if (a := number(row[x])) is not None and (b := number(row[y])) is not None
    ]
    models = [
        Point(a, b, row["variant"], row["selected"] == "True")
        for row in run.tables["results"]
        if (a := _model_value(row, x)) is not None and (b := _model_value(row, y)) is not None
    ]
    label = (
        f"{len(points)} candidates by {AXES[x]} and {AXES[y]}, with the finished models; the table below names the best"
    )
    return charts.pareto(points, models, AXES[x], AXES[y], label)


def front(run: Run) -> Html:
    """The candidates that no other beats on the plot's first axes, as a table."""
    x, y = _default_axes(run)
    rows = {Point(number(row[x]) or 0, number(row[y]) or 0): row for row in reversed(_scored(run))}
    best = [rows[point] for point in charts.front(list(rows))]
    names = [name for name in AXES if name in _axes(run) and name != "generation"]
    cells = [
        [f"{row['generation']}.{row['candidate']}", *(short(_known(row, name)) for name in names), _changes(run, row)]
        for row in best
    ]
    caption = f"Candidates that no other beats by both {AXES[x]} and {AXES[y]}, as generation.candidate"
    head = ["candidate", *(AXES[name] for name in names), "units kept, and blocks dropped"]
    return table(caption, head, cells, "w".ljust(len(head) - 1, "n") + "t")


def _scored(run: Run) -> list[Row]:
    return [
        row for row in run.tables["candidates"] if number(row["violation"]) == 0 and number(row["loss"]) is not None
    ]


def _unscored(run: Run) -> str:
    missing = len(run.tables["candidates"]) - len(_scored(run))
    return f"{missing} more were over the budget and have no score." if missing else ""


def _axes(run: Run) -> list[str]:
    """The axes on which anything is known."""
    return [name for name in AXES if any(number(row[name]) is not None for row in run.tables["candidates"])]


def _default_axes(run: Run) -> tuple[str, str]:
    limits = (name for name in ("macs", "params", "activation_bytes", "latency", "memory") if run.config.get(name))
    return next(limits, "params"), "error"


def _model_value(row: Row, axis: str) -> float | None:
    """A finished model on an axis; its latency and memory are measured, the candidates' predicted."""
    if axis == "error":
        accuracy = number(row["search"])
        return None if accuracy is None else 1 - accuracy
    return number(row[axis]) if axis in ("params", "macs", "activation_bytes") else None


def _options(run: Run, chosen: str) -> Html:
    def option(name: str) -> Html:
        return element("option", AXES[name], value=name, **({"selected": ""} if name == chosen else {}))

    return join([option(name) for name in _axes(run)])


def _dropped(run: Run, row: Row) -> list[int]:
    """The blocks that a candidate drops, as rows of blocks.csv."""
    searched = [i for i, block in enumerate(run.tables["blocks"]) if block["searched"] == "True"]
    genes = numbers(row["genome"])
    return [i for i, gene in zip(searched, genes[len(genes) - len(searched) :], strict=True) if not gene]


def _changes(run: Run, row: Row) -> str:
    groups, blocks = run.tables["groups"], run.tables["blocks"]
    gone = _dropped(run, row)
    kept = [
        f"{group['group']} {units} of {group['size']}"
        for group, units in zip(groups, numbers(row["kept"]), strict=True)
        if units != int(group["size"]) and not set(gone) & set(numbers(group["blocks"]))
    ]
    return "; ".join(kept + [f"without {blocks[i]['block']}" for i in gone]) or "everything kept"


# --- the network ------------------------------------------------------------------------------------------------------


def _groups(run: Run) -> list[tuple[str, int, int, bool]]:
    """Name, size, kept units of every group, and whether it went away with a block."""
    plan = run.manifest["plan"]
    gone = {i for i, row in enumerate(run.tables["blocks"]) if row["block"] in plan["drop"]}
    out = []
    for row in run.tables["groups"]:
        name, size = row["group"], int(row["size"])
        struck = bool(gone & set(numbers(row["blocks"])))
        out.append((name, size, 0 if struck else len(plan["keep"].get(name, range(size))), struck))
    return out


def network(run: Run) -> Chart:
    """A bar per group: kept of size."""
    rows = [Bar(name, size, kept, f"{kept} of {size}", struck) for name, size, kept, struck in _groups(run)]
    title = f"{run.config['model']}: units kept in {run.selected['variant']}, struck out with a dropped block"
    return charts.bars(title, rows, title)


def before_and_after(run: Run) -> Html:
    """The network before and after."""
    rows = _groups(run)
    most = max((size for _, size, _, _ in rows), default=1)
    cells = [
        (
            element("del", name) if struck else name,
            _bar(size / most, kept / size),
            "dropped" if struck else f"{kept} of {size}",
        )
        for name, size, kept, struck in rows
    ]
    units = table(f"Units that {run.selected['variant']} keeps of each group", ("group", "units", "kept"), cells, "www")
    drop = set(run.manifest["plan"]["drop"])
    blocks = [
        element("li", join([element("del", row["block"]), " dropped"]) if row["block"] in drop else row["block"])
        for row in run.tables["blocks"]
    ]
    if not blocks:
        return join([units, element("p", "The network has no block that can be dropped.")])
    title = element("h3", f"Blocks that can be dropped: {len(drop)} of {len(blocks)} are")
    return join([units, title, element("ul", join(blocks), class_="blocks")])


def sensitivity(run: Run) -> Chart:
    """A bar per group and block: how far one change by itself moves the answers."""
    rows = _rises(run)
    title = "How far one change by itself moves the dense model's answers, in nats"
    return charts.bars(title, [Bar(f"{name}, {what}", rise, rise, f"{rise:.3g}") for name, what, rise in rows], title)


def sensitivities(run: Run) -> Html:
    """The same, as a table."""
    rows = _rises(run)
    if not rows:
        return element("p", "Nothing was measured.")
    most = max(rise for _, _, rise in rows) or 1.0
    caption = "How far each change by itself moves the dense model's answers (Kullback-Leibler divergence), most first"
    cells = [(name, what, _bar(rise / most, 1), f"{rise:.2g}") for name, what, rise in rows]
    return table(caption, ("group or block", "change", "divergence", "nats"), cells, "www")


def _rises(run: Run) -> list[tuple[str, str, float]]:
    """Name, change and rise: for a block without it, for a group near half of its units. The largest come first."""
    sizes = {row["group"]: int(row["size"]) for row in run.tables["groups"]}
    out, halves = [], {}
    for row in run.tables["sensitivity"]:
        name, kept, rise = row["name"], int(row["kept"]), number(row["rise"])
        if rise is None:
            continue
        if row["kind"] == "block":
            out.append((name, "dropped", rise))
        elif name not in halves or abs(2 * kept - sizes[name]) < abs(2 * halves[name][0] - sizes[name]):
            halves[name] = kept, rise
    out += [(name, f"{kept} of {sizes[name]}", rise) for name, (kept, rise) in halves.items()]
    return sorted(out, key=lambda entry: -entry[2])


# --- learning ---------------------------------------------------------------------------------------------------------


def overfitting(train: Sequence[float | None], search: Sequence[float]) -> int | None:
    """The first epoch of overfitting: after it the loss on `search` ends `RISE` above its least, `train`'s falls on."""
    least = search.index(min(search))
    before, last = train[min(max(least, 1), len(train) - 1)], train[-1]
    falls = before is not None and last is not None and last < before
    return least + 1 if falls and search[-1] > (1 + RISE) * search[least] else None


def learning(run: Run) -> list[tuple[str, Chart, Html]]:
    """For each finalist its name, its curves, and the same as a table."""
    out = []
    for name in dict.fromkeys(row["variant"] for row in run.tables["curves"]):
        rows = [row for row in run.tables["curves"] if row["variant"] == name]
        train, search = [number(row["train_loss"]) for row in rows], [_known(row, "search_loss") for row in rows]
        best = next(i for i, row in enumerate(rows) if row["best"] == "True")
        start = overfitting(train, search)
        words = "no overfitting is seen" if start is None else f"overfitting starts at epoch {start}"
        label = f"{name}: loss on search from {search[0]:.3g} to {search[-1]:.3g}, epoch {best} is kept, {words}"
        head = ("epoch", "train loss", "search loss", "search error")
        cells = [
            (
                row["epoch"] + (" (kept)" if row["best"] == "True" else ""),
                UNKNOWN if loss is None else f"{loss:.4f}",
                f"{_known(row, 'search_loss'):.4f}",
                percent(number(row["search_error"])),
            )
            for row, loss in zip(rows, train, strict=True)
        ]
        out.append(
            (name, charts.curves(name, train, search, best, start, label), table(label, head, cells, "w", [best]))
        )
    return out


def learning_curves(run: Run) -> Html:
    """The curves side by side, their numbers folded away."""
    found = learning(run)
    if not found:
        return element("p", "The finalists were not fine-tuned (--epochs 0), or there are none.")
    figures = join([element("div", Html(chart.inline())) for _, chart, _ in found])
    numbers_ = element("details", join([element("summary", "The numbers"), *(rows for _, _, rows in found)]))
    return join([element("div", figures, class_="curves"), numbers_])


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
    if value is None or value in ("", []):
        return UNKNOWN
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bar(length: float, part: float) -> Html:
    inner = element("span", "", style=f"width:{100 * part:.1f}%")
    return element("span", inner, class_="bar", style=f"width:{max(100 * length, 1):.1f}%", aria_hidden="true")


def _known(row: Row, name: str) -> float:
    """A number that must be there; nan where it is not finite."""
    value = number(row[name])
    return float("nan") if value is None else value


def _write(path: Path, content: str) -> None:
    """In one step, so that nobody meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)
