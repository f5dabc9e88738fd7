"""Pictures of the coupling graph: Graphviz's language, and SVG that a browser shows as it is.

Groups stand on the left, the leaves whose axes they hold on the right, blocks as frames around the leaves that go with
them; a line carries the number of the leaf's axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from xml.sax.saxutils import escape

from treesurgeon.engine.describe import layout
from treesurgeon.engine.masks import labels
from treesurgeon.engine.rules.base import Axes

Graph: TypeAlias = Any  # graph.Graph, whose methods call what is here


@dataclass(frozen=True)
class _Frame:
    """A block (None: the whole picture) with the leaves and blocks in it, each after what comes before it."""

    block: str | None
    inside: list[_Frame | str] = field(default_factory=list)

    def leaves(self) -> Iterator[str]:
        for item in self.inside:
            yield from item.leaves() if isinstance(item, _Frame) else (item,)


@dataclass(frozen=True)
class _Node:
    """What stands on the left: units of a group, or the steps of a stack, and the axes that hold them."""

    name: str
    size: int
    kind: str
    held: tuple[tuple[str, int], ...]


def _nodes(graph: Graph) -> list[_Node]:
    axes = {**graph.inputs, **{path: leaf.axes for path, leaf in graph.leaves.items()}}
    held: dict[str, list[tuple[str, int]]] = {name: [] for name in (*graph.groups, *graph.steps)}
    for path, found in axes.items():
        for d, axis in enumerate(found):
            for name in sorted(labels(axis) & held.keys()):
                held[name].append((path, d))
    nodes = [_Node(name, group.size, "units", tuple(held[name])) for name, group in graph.groups.items()]
    return nodes + [_Node(name, len(steps), "steps", tuple(held[name])) for name, steps in graph.steps.items()]


def _frames(graph: Graph, nodes: Sequence[_Node]) -> _Frame:
    """Every leaf in its innermost block, in the order in which the groups on its module come up."""
    home: dict[str, str | None] = dict.fromkeys([*graph.inputs, *graph.leaves])
    for block in sorted(graph.blocks.values(), key=lambda block: len(graph.around(block.name))):
        home.update(dict.fromkeys(block.leaves, block.name))
    place: dict[str, int] = {}
    for k, node in enumerate(nodes):
        for path, _ in node.held:
            place[_module(path)] = k
    place |= dict.fromkeys(map(_module, graph.inputs), -1)
    frames: dict[str | None, _Frame] = {name: _Frame(name) for name in (None, *graph.blocks)}
    for path, block in home.items():
        frames[block].inside.append(path)
    for name, block in graph.blocks.items():
        frames[block.parent].inside.append(frames[name])

    def rank(item: _Frame | str) -> float:
        if isinstance(item, str):
            return place.get(_module(item), len(nodes))
        return min((rank(leaf) for leaf in item.leaves()), default=len(nodes))

    for frame in frames.values():
        frame.inside[:] = [item for item in frame.inside if isinstance(item, str) or any(True for _ in item.leaves())]
        frame.inside.sort(key=rank)
    return frames[None]


def _module(path: str) -> str:
    return path.rpartition("/")[0] or path


def _axes(graph: Graph, path: str) -> Axes:
    return graph.inputs[path] if path in graph.inputs else graph.leaves[path].axes


def _shape(graph: Graph, path: str) -> str:
    return "×".join(str(axis.size) for axis in _axes(graph, path))


def dot(graph: Graph) -> str:
    """The coupling graph in Graphviz's language."""

    def quote(text: str) -> str:
        return '"' + text.replace('"', r"\"") + '"'

    nodes = _nodes(graph)
    out = ["graph coupling {", "  rankdir=LR; node [fontname=Helvetica]; edge [color=gray]"]
    for node in nodes:
        label = quote(f"{node.name}: {node.size}")
        out.append(f"  {quote('group ' + node.name)} [label={label} shape=ellipse style=filled]")

    def draw(frame: _Frame, indent: str) -> None:
        for item in frame.inside:
            if isinstance(item, str):
                out.append(f"{indent}{quote(item)} [label={quote(f'{item} {_shape(graph, item)}')} shape=box]")
            else:
                out.append(f"{indent}subgraph {quote(f'cluster {item.block}')} {{ label={quote(f'block {item.block}')}")
                draw(item, indent + "  ")
                out.append(f"{indent}}}")

    draw(_frames(graph, nodes), "  ")
    for node in nodes:
        out += [f"  {quote('group ' + node.name)} -- {quote(path)} [label={d}]" for path, d in node.held]
    return "\n".join([*out, "}"])


ROW, GAP, CHAR, MOST, TOP = 20, 6, 7.3, 72, 36  # pixels; characters of a label
HUES = (("#1f6fb4", "#6cb6ff"), ("#c2410c", "#ff9a5c"), ("#15803d", "#5fd38d"), ("#7e3bbd", "#c69bff"),
        ("#b4235a", "#ff8fb6"), ("#7a6200", "#e3c34c"), ("#0f766e", "#4fd6c8"), ("#57606a", "#a9b4c0"))  # fmt: skip
STYLE = """
svg { background: #ffffff; font: 12px ui-monospace, Menlo, Consolas, monospace }
text { fill: #1f2328 } .quiet { fill: #6b7280 } .axis { font-size: 10px }
.leaf rect { fill: #f3f4f6; stroke: #9ca3af } .input rect { stroke-dasharray: 4 2 }
.block rect { fill: #8080801a; stroke: #9ca3af } .block text { font-size: 11px }
.group rect { fill: #ffffff; stroke-width: 1.5 } .steps rect { stroke-dasharray: 4 2 }
.group path { fill: none; stroke-width: 1.2; opacity: .65 } .group:hover path { stroke-width: 2.5; opacity: 1 }
"""
DARK = """
svg { background: #0d1117 } text { fill: #e6edf3 } .quiet { fill: #9198a1 }
.leaf rect { fill: #1b222b; stroke: #59636e } .group rect { fill: #0d1117 } .block rect { stroke: #59636e }
"""


def svg(graph: Graph) -> str:
    """The coupling graph as the text of an SVG file; it follows the reader's light or dark mode."""
    nodes = _nodes(graph)
    frame = _frames(graph, nodes)
    names = [_short(f"{node.name}: {node.size}") for node in nodes]
    left = 16 + CHAR * max(map(len, names), default=0) + 16
    start = left + 180  # where leaves begin
    shown = {path: f"{_short(path)} {_shape(graph, path)}" for path in frame.leaves()}
    wide = CHAR * max(map(len, shown.values()), default=0) + 12
    heads = _heads(graph)
    right = start + max(wide + 12 * (_depth(frame) + 1), CHAR * len(heads[2]))
    boxes: list[str] = []
    at: dict[str, tuple[float, float]] = {}
    bottom = _boxes(graph, frame, shown, (start, right), TOP, boxes, at)
    middles = [sum(at[path][1] for path, _ in node.held) / max(len(node.held), 1) for node in nodes]
    order = sorted(range(len(nodes)), key=lambda k: middles[k])
    heights = dict(zip(order, _apart([middles[k] for k in order], ROW + GAP, TOP + ROW / 2), strict=True))
    lines = [_group(graph, node, names[k], k % len(HUES), (left, heights[k]), at) for k, node in enumerate(nodes)]
    height = max([bottom, *(y + ROW for y in heights.values())]) + 16
    title = f"{len(graph.groups)} groups, {len(graph.blocks)} blocks, {len(graph.leaves)} leaves"
    size = f'width="{right + 16:.0f}" height="{height:.0f}" viewBox="0 0 {right + 16:.0f} {height:.0f}"'
    style = f"<style>{STYLE}{_hues(0)}@media (prefers-color-scheme: dark) {{{DARK}{_hues(1)}}}</style>"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<title>{title}</title>", style]
    for x, text in zip((16, start - CHAR * (len(heads[1]) + 1), start + 6), heads, strict=True):
        out.append(_text(x, TOP - 18, text, "quiet"))
    return "\n".join([*out, *boxes, *lines, "</svg>"])


def _heads(graph: Graph) -> tuple[str, str, str]:
    """What stands in the picture's columns: groups, numbers on lines, leaves."""
    groups = "groups: units" + ("; dashed: stacks of steps" if graph.steps else "")
    leaves = "leaves and sizes" + ("; dashed: inputs" if graph.inputs else "") + ("; in blocks" if graph.blocks else "")
    return groups, "axis", leaves


def _hues(mode: int) -> str:
    """A colour for the outline, lines and numbers of every so many groups."""
    return "".join(
        f".c{k} rect, .c{k} path {{ stroke: {hue[mode]} }} .c{k} .axis {{ fill: {hue[mode]} }}\n"
        for k, hue in enumerate(HUES)
    )


def _short(text: str) -> str:
    return text if len(text) <= MOST else f"…{text[1 - MOST :]}"


def _depth(frame: _Frame) -> int:
    return max((1 + _depth(item) for item in frame.inside if isinstance(item, _Frame)), default=0)


def _boxes(
    graph: Graph,
    frame: _Frame,
    shown: Mapping[str, str],
    across: tuple[float, float],
    y: float,
    out: list[str],
    at: dict[str, tuple[float, float]],
) -> float:
    """Draw what is in a frame between two x from `y` down; notes where each leaf stands, returns where it ends."""
    left, right = across
    for item in frame.inside:
        if isinstance(item, _Frame):
            block, k = graph.blocks[item.block], len(out)
            end = _boxes(graph, item, shown, (left + 6, right - 6), y + ROW, out, at)
            told = _title(f"block {item.block}, {'×'.join(map(str, block.shape))} ({block.where})")
            box = _rect(left, y, right - left, end - y, 5)
            label = _text(left + 6, y + 14, _short(f"block {item.block}"))
            out.insert(k, f'<g class="block">{told}{box}{label}</g>')
            y = end + GAP
            continue
        axes = _axes(graph, item)
        why = [graph.pinned.get(f"{item}[{d}]") or layout(axis) for d, axis in enumerate(axes)]
        told = _title(f"{item}, {_shape(graph, item)}", *(f"axis {d}: {text}" for d, text in enumerate(why)))
        box = _rect(left + 6, y, right - left - 12, ROW - 2, 3)
        label = _text(left + 12, y + 13, shown[item], "" if any(map(labels, axes)) else "quiet")
        kind = "leaf input" if item in graph.inputs else "leaf"
        out.append(f'<g class="{kind}">{told}{box}{label}</g>')
        at[item] = (left + 6, y + ROW / 2 - 1)
        y += ROW
    return y + (GAP if frame.block else 0)


def _apart(wanted: Sequence[float], step: float, first: float) -> list[float]:
    """Ascending heights from `first` on, at least `step` apart, near what is wanted: runs that touch share a mean."""
    runs: list[tuple[float, int]] = []  # the height of a run's first member, and how many it has
    for height in wanted:
        top, n = max(height, first), 1
        while runs and runs[-1][0] + step * runs[-1][1] > top:
            before, m = runs.pop()
            top = max((before * m + (top - step * m) * n) / (m + n), first)
            n += m
        runs.append((top, n))
    return [top + step * k for top, n in runs for k in range(n)]


def _group(
    graph: Graph, node: _Node, name: str, hue: int, port: tuple[float, float], at: Mapping[str, tuple[float, float]]
) -> str:
    """A group whose lines, to the axes that hold it, start at `port`."""
    right, y = port
    told = _title(f"{node.name}, {node.size} {node.kind}", *(f"{path}[{d}]" for path, d in node.held))
    width = CHAR * len(name) + 12
    parts = [_rect(right - width, y - 10, width, 20, 10), _text(right - width + 6, y + 4, name)]
    for path, d in node.held:
        x, height = at[path]
        half = (right + x) / 2
        curve = f"C{half:.1f} {y:.1f} {half:.1f} {height:.1f} {x:.1f} {height:.1f}"
        parts.append(f'<path d="M{right:.1f} {y:.1f} {curve}"/>')
        parts.append(_text(x - 9 * (len(_axes(graph, path)) - d), height - 2, str(d), "axis"))
    return f'<g class="group {node.kind} c{hue}">{told}{"".join(parts)}</g>'


def _title(*lines: str) -> str:
    return f"<title>{escape(chr(10).join(lines))}</title>"


def _rect(x: float, y: float, width: float, height: float, corner: float) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{corner}"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(text)}</text>'
