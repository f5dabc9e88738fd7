"""The space of variants: a keep level per group of units, a keep bit per block.

A genome is `int32[groups + blocks]`: first a level index for each searched group (0 keeps every unit), then a
bit for each searched block (1 keeps it); where there are points at which candidates may end (see exits.py), a last gene
says at which one, 0 for the whole depth. `decode` turns one genome into masks inside jit, with fixed shapes;
`vmap` it over a population. Which units a level keeps is settled beforehand by a ranking of the units, so
that the search is over how many, not over which.

    space = build(graph, scores, protected=first_stage(graph))
    masks = jax.vmap(space.decode)(genomes)
    plan = space.to_plan(genome)
"""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from treesurgeon import engine
from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.search.ties import Ties, gather, merge, ranking

LEVELS = tuple(eighths / 8 for eighths in range(8, 0, -1))


class SpaceError(TreesurgeonError, ValueError):
    """A space that cannot be built, or a genome that is not of it."""


@dataclass(frozen=True, eq=False)
class Space:
    """What the search may change, made by `build`."""

    groups: tuple[str, ...]  # searched ones, in the order of their genes
    blocks: tuple[str, ...]  # searched ones, likewise, after the groups
    sizes: Mapping[str, int]  # of every group of the graph
    widths: Mapping[str, np.ndarray]  # searched group -> int32[levels], units kept, from all downwards
    ranks: Mapping[str, np.ndarray]  # searched group -> int32[size], 0 = the best unit
    ties: Ties | None
    exits: tuple[str, ...] = ()  # points at which candidates may end, from value 1 of the last gene on
    before: tuple[tuple[frozenset[str], frozenset[str]], ...] = ()  # groups and blocks that lie before each of these

    @property
    def cardinality(self) -> np.ndarray:
        """`int32[G]`: how many values each gene takes."""
        last = [1 + len(self.exits)] if self.exits else []
        return np.array([len(self.widths[g]) for g in self.groups] + [2] * len(self.blocks) + last, np.int32)

    def dense_genome(self) -> np.ndarray:
        """The genome that keeps everything."""
        return self.encode()

    def encode(self, keep: Mapping[str, int] | None = None, drop: Collection[str] = ()) -> np.ndarray:
        """The genome nearest to these widths (units kept; all if not named), without these blocks, up to the end."""
        keep = keep or {}
        _known(keep, self.groups, "searched group")
        _known(drop, self.blocks, "searched block")
        levels = [int(np.abs(self.widths[g] - keep.get(g, self.sizes[g])).argmin()) for g in self.groups]
        return np.array(levels + [int(b not in drop) for b in self.blocks] + [0] * bool(self.exits), np.int32)

    def seeds(self) -> np.ndarray:
        """Genomes to start from, `int32[S, G]`: dense first, then every group at the same share."""
        shares = [self.encode({g: round(f * self.sizes[g]) for g in self.groups}) for f in LEVELS]
        return np.array(list(dict.fromkeys(map(tuple, [self.dense_genome(), *shares]))), np.int32)

    def decode(self, genome: ArrayLike) -> dict[str, Any]:
        """One genome's masks: `{"units": {group: bool[size]}, "blocks": {block: bool[]}}`, True = kept.

        With exits `"exit": int[]` as well, 0 for the whole depth. Only what can change is named: what is left out of
        masks is kept, and costs nothing under `engine.gate`.
        """
        genome = jnp.asarray(genome)
        keep = {g: jnp.asarray(self.widths[g])[genome[i]] for i, g in enumerate(self.groups)}
        kept = genome[len(self.groups) :][: len(self.blocks)] > 0
        units = {g: jnp.asarray(self.ranks[g]) < n for g, n in keep.items()}
        if self.ties is not None:
            counts = jnp.stack([keep.get(g, jnp.asarray(self.sizes[g])) for g in self.ties.names])
            ends = np.cumsum(self.ties.sizes)
            merged = jnp.split(merge(self.ties, counts, ~kept), ends[:-1])
            held = np.asarray(self.ties.protected)[ends - 1]  # these cannot change
            units |= {g: m for g, m, whole in zip(self.ties.names, merged, held, strict=True) if not whole}
        masks: dict[str, Any] = {"units": units, "blocks": dict(zip(self.blocks, kept, strict=True))}
        return masks | {"exit": genome[-1]} if self.exits else masks

    def stacked(self, genomes: np.ndarray) -> dict[str, Any]:
        """The masks of many genomes, `int[K, G]`, as arrays of the host with a leading axis."""
        return jax.tree.map(np.asarray, _decoded(self, genomes))

    def canonical(self, genome: Array) -> Array:
        """The genome that stands for the same candidate: what lies behind its end is as in the dense model."""
        if not self.exits:
            return genome
        acts = [[True] * len(genome)]
        for groups, blocks in self.before:
            acts.append([*(name in groups for name in self.groups), *(name in blocks for name in self.blocks), True])
        return jnp.where(jnp.asarray(acts)[genome[-1]], genome, self.dense_genome())

    def niche(self, genome: Array) -> Array:
        """What a candidate competes with: before any fine-tuning a short network is ahead of a deep one."""
        return genome[-1] if self.exits else jnp.int32(0)

    def end(self, genome: ArrayLike) -> str:
        """The point at which a genome ends; empty for the whole depth."""
        return ("", *self.exits)[int(np.asarray(genome)[-1])] if self.exits else ""

    def to_plan(self, genome: ArrayLike) -> Any:
        """The `engine.Plan` of one genome but for its end, on the host; groups that keep everything are not named."""
        masks = self._masks(genome)
        keep = {g: np.flatnonzero(m) for g, m in masks["units"].items() if not m.all()}
        return engine.Plan(keep=keep, drop=frozenset(b for b, m in masks["blocks"].items() if not m))

    def describe(self, genome: ArrayLike, limit: int = 4) -> str:
        """One line for a person: widths as they turn out after ties, and the blocks that are out; not where it ends."""
        masks = self._masks(genome)
        narrow = [f"{g} {m.size}→{m.sum()}" for g, m in masks["units"].items() if not m.all()]
        gone = [b for b, m in masks["blocks"].items() if not m]
        return in_words(narrow, gone, limit) or "everything kept"

    def _masks(self, genome: ArrayLike) -> dict[str, dict[str, np.ndarray]]:
        genes = np.asarray(genome)
        cards = self.cardinality
        if genes.shape != cards.shape:
            raise SpaceError(f"genome: expected {len(cards)} genes, got shape {list(genes.shape)}")
        if bad := np.flatnonzero((genes < 0) | (genes >= cards)).tolist():
            name = (*self.groups, *self.blocks, "where it ends")[bad[0]]
            raise SpaceError(
                f"gene {bad[0]} ({name}): expected 0 to {cards[bad[0]] - 1}, got {genes[bad[0]]}; "
                "was the genome made by another space?"
            )
        masks = self.decode(genes)
        return {kind: {name: np.asarray(mask) for name, mask in masks[kind].items()} for kind in ("units", "blocks")}


@partial(jax.jit, static_argnums=0)
def _decoded(space: Space, genomes: ArrayLike) -> Any:
    return jax.vmap(space.decode)(genomes)


def build(
    graph: Any,
    scores: Mapping[str, ArrayLike],
    *,
    levels: Sequence[float] = LEVELS,
    multiple: int | None = None,
    protected: Collection[str] = frozenset(),
    blocks: Collection[str] | None = None,
) -> Space:
    """The space over a graph's groups and blocks.

    Args:
        graph: the engine's, or anything with its `groups`, `blocks` and `ties`.
        scores: importance of each group's units, `float[size]`, higher = keep longer; needed for searched
            groups.
        levels: shares of a group's units to choose from; all of them is always a choice.
        multiple: widths are rounded to multiples of this; if None, to the largest of 8, 4, 2, 1 that leaves a
            group eight widths.
        protected: names of groups and blocks that stay as they are, see `first_stage`.
        blocks: names of the blocks that may be dropped; if None, those that no other block encloses.

    Raises:
        SpaceError: names or scores do not fit the graph, or nothing is left to search.
    """
    _known(protected, (*graph.groups, *graph.blocks), "group or block")
    _known(scores, graph.groups, "group")
    _known(blocks or (), graph.blocks, "block")
    if any(not 0 < f <= 1 for f in levels) or (multiple is not None and multiple < 1):
        raise SpaceError(
            f"levels {tuple(levels)}, multiple {multiple}: levels are shares above 0 and up to 1, "
            "a multiple is 1 or more"
        )
    sizes = {name: group.size for name, group in graph.groups.items()}
    widths = {g: _widths(n, levels, multiple) for g, n in sizes.items() if g not in protected}
    widths = {g: w for g, w in widths.items() if len(w) > 1}
    values = {g: _scores(g, n, scores, g in widths) for g, n in sizes.items()}
    if blocks is None:
        blocks = {b for b, block in graph.blocks.items() if block.parent is None}
    searched = tuple(b for b in graph.blocks if b in blocks and b not in protected)
    if not widths and not searched:
        raise SpaceError(
            f"nothing to search: the graph has {len(sizes)} groups and {len(graph.blocks)} blocks, of which "
            f"{len(protected)} are protected; protect fewer names"
        )
    return Space(
        groups=tuple(widths),
        blocks=searched,
        sizes=sizes,
        widths=widths,
        ranks={g: ranking(values[g]) for g in widths},
        ties=gather(graph.ties, searched, values, {g for g in sizes if g in protected}),
    )


def first_stage(graph: Any) -> frozenset[str]:
    """Groups and blocks of the first stage of a network: low-level features, which every task shares.

    Goes by names: the stage of `layer1_3/conv2` is `layer1`. It is the stage of the first group, and if that
    is a single group (a stem) the one after it as well, unless that would be half of the network or more.
    """
    order = list(dict.fromkeys(map(_stage, graph.groups)))
    if not order:
        return frozenset()
    members = {stage: [g for g in graph.groups if _stage(g) == stage] for stage in order}
    stages = order[:2] if len(members[order[0]]) == 1 else order[:1]
    while stages and sum(len(members[s]) for s in stages) * 2 >= len(graph.groups):
        stages.pop()
    if not stages:
        return frozenset(members[order[0]][:1])
    return frozenset(n for n in (*graph.groups, *graph.blocks) if _stage(n) in stages)


def _stage(name: str) -> str:
    head, _, number = name.split("/")[0].rpartition("_")
    return head if head and number.isdigit() else name.split("/")[0]


def _widths(size: int, levels: Iterable[float], multiple: int | None) -> np.ndarray:
    step = multiple or next(m for m in (8, 4, 2, 1) if size >= 8 * m or m == 1)
    rounded = {min(size, max(step, math.floor(f * size / step + 0.5) * step)) for f in levels}
    return np.array(sorted({size, *rounded}, reverse=True), np.int32)


def _scores(name: str, size: int, scores: Mapping[str, ArrayLike], needed: bool) -> np.ndarray:
    if name not in scores:
        if needed:
            raise SpaceError(f"scores: none for group {name!r}; rank its {size} units, or protect it")
        return np.ones(size)
    values = np.asarray(scores[name], np.float64)
    if values.shape != (size,):
        raise SpaceError(f"scores of group {name!r}: expected shape [{size}], got {list(values.shape)}")
    if bad := np.flatnonzero(~np.isfinite(values)).tolist():
        raise SpaceError(
            f"scores of group {name!r}: unit {bad[0]} has {values[bad[0]]} ({len(bad)} of {size} are not "
            "finite); are there NaN or infinite weights in the checkpoint?"
        )
    return values


def _known(names: Iterable[str], choices: Collection[str], what: str) -> None:
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, 3) or list(choices)[:3]
            such = f"there are {len(choices)}, such as {', '.join(near)}" if near else "there are none"
            raise SpaceError(f"no {what} is named {name!r}; {such}")


def in_words(narrow: Sequence[str], gone: Sequence[str], limit: int = 4) -> str:
    """The first so many groups that lost units, and blocks that are out."""
    parts = [_some(narrow, limit)] if narrow else []
    return "; ".join(parts + (["without " + _some(gone, limit)] if gone else []))


def _some(items: Sequence[str], limit: int) -> str:
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
