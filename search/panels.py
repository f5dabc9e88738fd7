"""The panels of a report: candidates, the network before and after, sensitivities, learning curves.

Each is there as a static chart (see charts.py), and as HTML or as data for the page's script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treesurgeon.search import charts
from treesurgeon.search.charts import Bar, Chart, Point, short
from treesurgeon.search.depth_chart import OWN, depths
from treesurgeon.search.markup import Html, element, escape, join, table
from treesurgeon.search.metrics import ACCURACY
from treesurgeon.search.records import Row, Run, known, number, numbers, picture
from treesurgeon.search.report import UNKNOWN, shown
from treesurgeon.search.strips import address
from treesurgeon.search.tasks import CLASSIFICATION

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
JUDGED = "judged"  # the axis of what finished models were judged by, where candidates' error is another
COSTS = ("params", "macs")
RISE = 0.05  # below this the loss on `search` counts as level


# --- candidates -------------------------------------------------------------------------------------------------------


def plot_data(run: Run) -> dict[str, Any]:
    """What the interactive plot knows: `candidates.csv` with the models that were finished, as JSON values."""
    names = _axes(run)
    candidates = [
        {
            "candidate": int(row["candidate"]),
            **{name: number(row[name]) for name in dict.fromkeys([*names, "generation"]) if name != JUDGED},
            "within": number(row["violation"]) == 0,
            "kept": numbers(row["kept"]),
            "dropped": _dropped(run, row),
            "up_to": row["up_to"],
        }
        for row in run.tables["candidates"]
    ]
    words = {row["variant"]: row["description"] for row in run.tables["front"]}
    models = [
        {
            "name": row["variant"],
            "selected": row["selected"] == "True",
            "description": words.get(row["variant"], "everything kept"),
            **{name: _model_value(run, row, name) for name in names},
        }
        for row in finished(run)
    ]
    return {
        "axes": {name: axis(run, name) for name in names},
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
    x, y = default_axes(run)
    points = [
        Point(a, b) for row in _scored(run) if (a := number(row[x])) is not None and (b := number(row[y])) is not None
    ]
    models = [
        Point(a, b, row["variant"], row["selected"] == "True")
        for row in finished(run)
        if (a := _model_value(run, row, x)) is not None and (b := _model_value(run, row, y)) is not None
    ]
    label = (
        f"{len(points)} candidates by {axis(run, x)} and {axis(run, y)}, with the finished models; the table below "
        "names the best"
    )
    return charts.pareto(points, models, axis(run, x), axis(run, y), label)


def axis(run: Run, name: str) -> str:
    """An axis in words. Candidates' error is the task's own, whatever finished models are judged by."""
    if name in ("error", "loss") and run.manifest["data"]["images"]["search"] < _taught(run):
        return f"{name} on search and unlabelled images (finished models: on search)"
    if run.metric is ACCURACY:
        return AXES[name]
    wrong = "share of wrong answers" if run.task == CLASSIFICATION else f"1 - {run.task.score}"
    words = {"error": f"{wrong} on search", JUDGED: f"{run.metric.noun} on search (finished models)"}
    return words.get(name) or AXES[name]


def _taught(run: Run) -> int:
    """How many images scored candidates where unlabelled ones could be among them."""
    return int(run.config["search_images"]) if run.config.get("unlabelled") else 0


def finished(run: Run) -> list[Row]:
    """The models that the search made, and dense, as compared with too: what belongs in the plot of its candidates."""
    return [row for row in run.tables["results"] if row is run.compared or row["variant"] not in run.baselines]


def front(run: Run) -> Html:
    """The candidates that no other beats on the plot's first axes, as a table."""
    x, y = default_axes(run)
    rows = {Point(number(row[x]) or 0, number(row[y]) or 0): row for row in reversed(_scored(run))}
    best = [rows[point] for point in charts.front(list(rows))]
    names = [name for name in _axes(run) if name not in ("generation", JUDGED)]
    cells = [
        [f"{row['generation']}.{row['candidate']}", *(short(known(row, name)) for name in names), _changes(run, row)]
        for row in best
    ]
    caption = f"Candidates that no other beats by both {axis(run, x)} and {axis(run, y)}, as generation.candidate"
    head = ["candidate", *(axis(run, name) for name in names), "units kept, and blocks dropped"]
    return table(caption, head, cells, "w".ljust(len(head) - 1, "n") + "t")


def _scored(run: Run) -> list[Row]:
    return [
        row for row in run.tables["candidates"] if number(row["violation"]) == 0 and number(row["loss"]) is not None
    ]


def unscored(run: Run) -> str:
    """How many candidates are not in the plot, and why."""
    missing = len(run.tables["candidates"]) - len(_scored(run))
    return f"{missing} more were over the budget and have no score." if missing else ""


def _axes(run: Run) -> list[str]:
    """The axes on which anything is known."""
    known_ = [name for name in AXES if any(number(row[name]) is not None for row in run.tables["candidates"])]
    return known_ if run.metric is ACCURACY else [*known_, JUDGED]


def default_axes(run: Run) -> tuple[str, str]:
    """What the plot shows first: the budget's cost and the error."""
    limits = (name for name in ("macs", "params", "activation_bytes", "latency", "memory") if run.config.get(name))
    return next(limits, "params"), "error"


def _model_value(run: Run, row: Row, name: str) -> float | None:
    """A finished model on an axis; its latency and memory are measured, the candidates' predicted."""
    if name == JUDGED:
        score = number(row["search"])
        return score if score is None or not run.metric.rising else 1 - score
    column = {"error": "wrong"}.get(name, name)
    return number(row[column]) if column in ("wrong", "params", "macs", "activation_bytes") else None


def options(run: Run, chosen: str) -> Html:
    """The axes to pick from."""

    def option(name: str) -> Html:
        return element("option", axis(run, name), value=name, **({"selected": ""} if name == chosen else {}))

    return join([option(name) for name in _axes(run)])


def _dropped(run: Run, row: Row) -> list[int]:
    """The blocks that a candidate drops, as rows of blocks.csv."""
    searched = [i for i, block in enumerate(run.tables["blocks"]) if block["searched"] == "True"]
    genes = numbers(row["genome"]) or [1] * len(searched)  # a truncated finalist has none
    return [i for i, gene in zip(searched, genes[len(genes) - len(searched) :], strict=True) if not gene]


def _changes(run: Run, row: Row) -> str:
    groups, blocks = run.tables["groups"], run.tables["blocks"]
    gone, end = _dropped(run, row), [f"up to {row['up_to']}"] if row["up_to"] else []
    kept = [
        f"{group['group']} {units} of {group['size']}"
        for group, units in zip(groups, numbers(row["kept"]), strict=True)
        if 0 < units != int(group["size"]) and not set(gone) & set(numbers(group["blocks"]))
    ]
    return "; ".join(end + kept + [f"without {blocks[i]['block']}" for i in gone]) or "everything kept"


# --- the network ------------------------------------------------------------------------------------------------------


def _groups(run: Run) -> list[tuple[str, int, int, bool]]:
    """Name, size, kept units of every group, and whether it went away with a block or where the network was cut."""
    plan, gone, left = run.manifest["plan"], _gone(run), run.manifest.get("left")
    out = []
    for row in run.tables["groups"]:
        name, size = row["group"], int(row["size"])
        struck = bool(gone & set(numbers(row["blocks"]))) or (left is not None and name not in left["groups"])
        here = name if struck or left is None else left["groups"][name]
        out.append((name, size, 0 if struck else len(plan["keep"].get(here, range(size))), struck))
    return out


def _gone(run: Run) -> set[int]:
    """The blocks that the selected model lacks, as rows of blocks.csv."""
    plan, left = run.manifest["plan"], run.manifest.get("left")
    names = [row["block"] for row in run.tables["blocks"]]
    there = dict(zip(names, names, strict=True)) if left is None else left["blocks"]
    return {i for i, name in enumerate(names) if there.get(name) in (None, *plan["drop"])}


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
    drop, left = _gone(run), run.manifest.get("left")
    if left:
        where = left["at"] if left["at"].startswith("before ") else f"behind {left['at']}"
        said = f"The network is cut in depth, {where}: its head reads what stands there."
        units = join([element("p", said), units])
    blocks = [
        element("li", join([element("del", row["block"]), " dropped"]) if i in drop else row["block"])
        for i, row in enumerate(run.tables["blocks"])
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


def selective(run: Run) -> Html:
    """The most selective units of the selected model with the images that they are most active on."""
    if not run.selective:
        why = "units were not looked at (--no-pictures, or labels that are no classes), or none is ever active"
        return element("p", f"Nothing is shown: {why}.")
    names = run.manifest["labels"]
    figures = []
    for k, row in enumerate(run.selective):
        labels = [names[i] if i < len(names) else UNKNOWN for i in numbers(row["top_labels"])]
        where = "; below, where on them" if row["maps"] == "True" else ""
        words = f"Unit {row['unit']} of {row['group']} is most active on: {', '.join(labels)}{where}"
        image = Html(f'<img class="strip" alt="{escape(words)}" src="{address(picture(run, k))}">')
        told = (
            f"{row['group']}, unit {row['unit']}: prefers {row['class']}, selectivity {known(row, 'selectivity'):.2f}"
        )
        figures.append(element("figure", join([element("figcaption", told), image])))
    words = (
        f"The most selective units of {run.selected['variant']}, two of a group at most, with the images of search "
        "that each is most active on; below, in orange, where on them, if its group keeps positions. Selectivity is "
        "(μ - ν) / (μ + ν): μ is the mean activity on the class that a unit prefers, ν on the others. It says what a "
        "unit answers to, not how much the network needs it; treesurgeon insight shows all groups."
    )
    return join([element("p", words), element("div", join(figures), class_="units"), files("selective.csv")])


# --- learning ---------------------------------------------------------------------------------------------------------


def overfitting(train: Sequence[float | None], search: Sequence[float]) -> int | None:
    """The first epoch of overfitting: after it the loss on `search` ends `RISE` above its least, `train`'s falls on."""
    least = search.index(min(search))
    before, last = train[min(max(least, 1), len(train) - 1)], train[-1]
    falls = before is not None and last is not None and last < before
    return least + 1 if falls and search[-1] > (1 + RISE) * search[least] else None


def learning(run: Run) -> list[tuple[str, Chart, Html]]:
    """For each finalist, and each baseline that was trained, its name, its curves, and the same as a table."""
    out = []
    for name in dict.fromkeys(row["variant"] for row in run.tables["curves"]):
        rows = [row for row in run.tables["curves"] if row["variant"] == name]
        train, search = [number(row["train_loss"]) for row in rows], [known(row, "search_loss") for row in rows]
        best = next(i for i, row in enumerate(rows) if row["best"] == "True")
        start = overfitting(train, search)
        words = "no overfitting is seen" if start is None else f"overfitting starts at epoch {start}"
        where = rows[0].get("judges") or "search"
        label = f"{name}: loss on {where} from {search[0]:.3g} to {search[-1]:.3g}, epoch {best} is kept, {words}"
        axis = where.removesuffix(" images")
        head = ("epoch", "train loss", f"loss on {where}", "error")
        cells = [
            (
                row["epoch"] + (" (kept)" if row["best"] == "True" else ""),
                UNKNOWN if loss is None else f"{loss:.4f}",
                f"{known(row, 'search_loss'):.4f}",
                shown(run.metric, number(row["search_error"])),
            )
            for row, loss in zip(rows, train, strict=True)
        ]
        out.append(
            (name, charts.curves(name, train, search, best, start, label, axis), table(label, head, cells, "w", [best]))
        )
    return out


def learning_curves(run: Run) -> Html:
    """The curves side by side, their numbers folded away."""
    found = learning(run)
    if not found:
        return element("p", "The finalists were not fine-tuned (--epochs 0), or there are none.")
    figures = join([element("div", Html(chart.inline())) for _, chart, _ in found])
    numbers_ = element("details", join([element("summary", "The numbers"), *(rows for _, _, rows in found)]))
    return join([element("div", figures, class_="curves"), numbers_, files("curves.csv", "curves.svg", "curves.png")])


def depth_chart(run: Run) -> Chart:
    """Accuracy against depth."""
    told = [f"{row['point']}: {short(known(row, 'params'))} parameters, {short(known(row, 'macs'))} MACs"
            for row in run.depth]  # fmt: skip
    shares = {split: [known(row, f"{split}_accuracy") for row in run.depth] for split in ("train", "search")}
    return depths(
        f"{run.config['model']}: {run.task.score} against depth", [row["point"] for row in run.depth], shares, told
    )


def depth(run: Run) -> Html:
    """Accuracy against depth: the model cut at every block, with a head in closed form."""
    rows = run.depth
    whole = rows[-1]
    best = max(range(len(rows)), key=lambda i: (known(rows[i], "search_accuracy"), -known(rows[i], "macs")))
    cells = [
        (
            row["point"],
            *(f"{short(known(row, name))} ({known(row, name) / max(known(whole, name), 1):.0%})" for name in COSTS),
            _bar(max(known(row, "search_accuracy"), 0), 1),
            *(f"{known(row, name):.2%}" for name in ("train_accuracy", "search_accuracy")),
            f"{100 * known(row, 'gap'):+.2f}",
        )
        for row in rows
    ]
    score = run.task.score[:1].upper() + run.task.score[1:]
    caption = (
        f"{score} against depth: the checkpoint cut at every block, with a head in closed form on its features; the "
        + ("last row is the whole model" if whole["point"] == OWN else "last row is its whole depth with such a head")
    )
    head = ("cut at", "parameters", "MACs", "on search", "train", "search", "gap, points")
    found = table(caption, head, cells, "wnnwnnn", [best])
    return join([Html(depth_chart(run).inline()), found, files("depth.csv", "depth.svg", "depth.png")])


def files(*names: str) -> Html:
    """Links to files beside the page."""
    return element("p", join([element("a", name, href=name) for name in names], " "), class_="files")


def _bar(length: float, part: float) -> Html:
    inner = element("span", "", style=f"width:{100 * part:.1f}%")
    return element("span", inner, class_="bar", style=f"width:{max(100 * length, 1):.1f}%", aria_hidden="true")
