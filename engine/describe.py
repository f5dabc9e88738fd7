"""What a person reads about a graph: the whole as tables, one axis explained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from treesurgeon.engine.axes import Atom, Axis, Fixed, Prod, Shuffled, Sum, resolve
from treesurgeon.engine.masks import labels

Graph: TypeAlias = Any  # graph.Graph, whose methods call what is here


def prunable_share(graph: Graph) -> float:
    """The share of the used parameters that lie in leaves which some group or stack can shrink."""
    used = [leaf for leaf in graph.leaves.values() if leaf.trainable and leaf.contexts is not None]
    sizes = [(math.prod(leaf.shape), any(labels(axis) for axis in leaf.axes)) for leaf in used]
    return sum(n for n, free in sizes if free) / max(sum(n for n, _ in sizes), 1)


def holders(graph: Graph, group: str) -> list[tuple[str, int]]:
    """The axes on which units of a group stand: free inputs, then leaves."""
    found = [(name, d) for name, axes in graph.inputs.items() for d, axis in enumerate(axes) if group in labels(axis)]
    return found + [(m.path, m.axis) for m in graph.groups[group].members]


def describe(graph: Graph) -> str:
    """The graph as a table that a person can read."""
    share = f"{100 * prunable_share(graph):.1f} %"
    out = [f"{len(graph.groups)} groups; {share} of the parameters lie in leaves they can shrink"]
    rows: list[Sequence[str]] = [
        (name, str(g.size), ", ".join(f"{path}[{d}]" for path, d in holders(graph, name)))
        for name, g in graph.groups.items()
    ]
    out += _table(("group", "units", "members"), rows)
    out.append(f"\n{len(graph.blocks)} blocks")
    rows = [
        (
            name,
            "x".join(map(str, b.shape)),
            ", ".join(b.leaves) + (f"  (inside {b.parent})" if b.parent else ""),
        )
        for name, b in graph.blocks.items()
    ]
    out += _table(("block", "shape", "goes with it"), rows)
    out.append(f"\n{len(graph.pinned)} pinned axes")
    out += _table(("axis", "why"), [(axis, str(reason)) for axis, reason in graph.pinned.items()])
    if graph.divisors:
        out.append(f"\n{len(graph.divisors)} divisors follow their axis")
        out += [f"  {line}" for line in graph.divisors]
    return "\n".join(out)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int = 110) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        line = "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        lines.append(line if len(line) <= most else line[: most - 1] + "…")
    return lines


def layout(axis: Axis) -> str:
    """An axis in words: `a | b` for segments end to end, `a × b` for a product, `(a) in another order`."""
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        return f"{axis.size} pinned"
    if isinstance(axis, Atom):
        return axis.label or f"{axis.size} units"
    if isinstance(axis, Sum):
        return " | ".join(layout(part) for part in axis.parts)
    if isinstance(axis, Shuffled):
        return f"({layout(axis.axis)}) in another order"
    return " × ".join(f"({layout(f)})" if isinstance(resolve(f), (Sum, Prod)) else layout(f) for f in axis.factors)


def explain(graph: Graph, path: str, axis: int) -> str:
    """One axis of one leaf: its layout, what goes with each group on it, where they meet, or why it is pinned."""
    found = (graph.inputs[path] if path in graph.inputs else graph.leaves[path].axes)[axis]
    out = [f"{path}[{axis}], size {found.size}: {layout(found)}"]
    if reason := graph.pinned.get(f"{path}[{axis}]"):
        return f"{path}[{axis}], size {found.size}, is pinned: {reason}"
    held = labels(found)
    for name in [name for name in graph.groups if name in held]:
        group = graph.groups[name]
        out.append(f"group {name!r}, {group.size} units; with it go")
        out += [f"  {other}[{d}]" for other, d in holders(graph, name) if (other, d) != (path, axis)]
        met = graph.meetings.get(name, ())
        if met:
            out.append("because they meet at")
            out += [f"  {line}" for line in met]
    for label, names in graph.steps.items():
        if label in held:
            out.append(f"entries of a scanned stack: dropping the block {names[0]!r}, … removes one")
    return "\n".join(out)
