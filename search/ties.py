"""Merging tied groups: what a dropped block does to widths.

When a block becomes the identity, its exit *is* its entry: units that stand opposite must be kept or removed
together. The engine closes a plan over these ties by intersection, which is safe and eats widths: two groups
that keep half of their units each, chosen apart, share a quarter. So the search merges first. The units that
active ties connect, through chains of dropped blocks too, are one *bundle*: ranked by the sum of its units'
scores, and decided in the group where the chain enters, at that group's level.

All of it has fixed shapes, for one candidate; `vmap` over candidates. Scores are integers, so that their sums
do not depend on the order of addition and a search repeats bit for bit on any device.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Row = tuple[str, np.ndarray, str, np.ndarray]  # entry group, its units, exit group, its units
TOTAL = 2**30  # all scores sum to at most this: no bundle overflows an int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Ties:
    """The units of all groups that a tie can touch, end to end, and the ties between them.

    U units, n groups, at most D ties at one unit. Ties are stored at both of their ends.
    """

    names: tuple[str, ...] = field(metadata={"static": True})
    sizes: np.ndarray  # int32[n]
    group: np.ndarray  # int32[U]
    rank: np.ndarray  # int32[U], 0 = the best unit of its group
    score: np.ndarray  # int32[U], every group's mean score counting the same
    protected: np.ndarray  # bool[U]
    other: np.ndarray  # int32[U, D], the unit at the other end
    via: np.ndarray  # int32[U, D], the block whose drop activates the tie; the number of blocks in unused places
    enters: np.ndarray  # bool[U, D], whether the tie comes in here (this end is the block's exit)


def gather(
    ties: Mapping[str, Sequence[Row]],
    blocks: Sequence[str],
    scores: Mapping[str, np.ndarray],
    protected: Collection[str],
) -> Ties | None:
    """The ties of the searched `blocks`, or None if there are none.

    Args:
        ties: rows of each block, as in `graph.ties`.
        blocks: names of the searched blocks, in the order of their keep bits.
        scores: scores of the units of every group.
        protected: groups of which no unit may go.
    """
    rows = [(i, row) for i, block in enumerate(blocks) for row in ties.get(block, ())]
    touched = {name for _, (a, _, b, _) in rows for name in (a, b)}
    names = tuple(name for name in scores if name in touched)
    sizes = np.array([len(scores[name]) for name in names], np.int32)
    offset = dict(zip(names, np.cumsum(sizes) - sizes, strict=True))
    ends: list[list[tuple[int, int, bool]]] = [[] for _ in range(int(sizes.sum()))]
    for i, (a, units_a, b, units_b) in rows:
        for u, v in zip(units_a + offset[a], units_b + offset[b], strict=True):
            if u != v:
                ends[u].append((int(v), i, False))
                ends[v].append((int(u), i, True))
    widest = max(map(len, ends), default=0)
    if not widest:
        return None
    other, via, enters = (
        np.array([[end[k] for end in at] + [blank] * (widest - len(at)) for at in ends], dtype)
        for k, blank, dtype in ((0, 0, np.int32), (1, len(blocks), np.int32), (2, False, bool))
    )
    return Ties(
        names=names,
        sizes=sizes,
        group=np.repeat(np.arange(len(names), dtype=np.int32), sizes),
        rank=np.concatenate([ranking(scores[name]) for name in names]),
        score=_integers([scores[name] for name in names]),
        protected=np.repeat([name in protected for name in names], sizes),
        other=other,
        via=via,
        enters=enters,
    )


def ranking(scores: np.ndarray) -> np.ndarray:
    """`int32[size]`: 0 for the unit with the highest score; of equals the earlier unit is the better one."""
    place = np.empty(len(scores), np.int32)
    place[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return place


@jax.jit  # for calls from the host; inside another jit it is a part of that program
def merge(ties: Ties, keep: Array, dropped: Array) -> Array:
    """Which units stay, `bool[U]`: closed under every active tie, and no group without a unit.

    A group that no active tie enters keeps exactly its count. Where ties enter only some of its units, it
    decides on the others, at its own share.

    Args:
        ties: the units and their ties.
        keep: `int32[n]`, how many units each group's level keeps.
        dropped: `bool[B]`, True for blocks that are out.
    """
    units, groups = len(ties.group), len(ties.names)
    root = _roots(ties, jnp.append(dropped, False)[ties.via])
    decides = root == jnp.arange(units)

    def bundle(flags: Array) -> Array:  # at a root: is any unit of its bundle flagged?
        return jax.ops.segment_max(flags.astype(jnp.int32), root, units) > 0

    joint = jax.ops.segment_sum(jnp.asarray(ties.score), root, units)
    order = jnp.lexsort((ties.rank, -joint, ~decides, ties.group))
    place = jnp.zeros(units, jnp.int32).at[order].set(jnp.arange(units, dtype=jnp.int32))
    sizes = jnp.asarray(ties.sizes)
    place = place - (jnp.cumsum(sizes) - sizes)[ties.group]  # counted within the group
    owned = jax.ops.segment_sum(decides.astype(jnp.int32), ties.group, groups)
    target = (keep * owned + sizes - 1) // sizes  # `keep` itself where the group decides on all
    chosen = (decides & (place < target[ties.group])) | (decides & bundle(jnp.asarray(ties.protected)))
    lonely = jax.ops.segment_max(chosen[root].astype(jnp.int32), ties.group, groups) <= 0
    rescued = decides & bundle(lonely[ties.group] & (ties.rank == 0))
    return (chosen | rescued)[root]


def _roots(ties: Ties, active: Array) -> Array:
    """`int32[U]`: the unit that decides for each unit, at the entry of its chain of active ties.

    The least label spreads along the ties until nothing changes; units that a tie enters have labels above
    all others, so that they win only where a chain closes on itself.
    """
    units = len(ties.group)
    entered = (active & ties.enters).any(1)
    start = jnp.arange(units, dtype=jnp.int32) + jnp.where(entered, units, 0).astype(jnp.int32)

    def spread(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        label, _ = carry
        least = jnp.minimum(label, jnp.where(active, label[ties.other], 2 * units).min(1))
        least = jnp.minimum(least, least[least % units])
        return least, (least != label).any()

    label, _ = jax.lax.while_loop(lambda carry: carry[1], spread, (start, jnp.asarray(True)))
    return label % units


def _integers(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Scores of all groups end to end, shifted to be positive, scaled to a mean of 1, in fixed point."""
    parts = []
    for values in scores:
        positive = values.astype(np.float64) - min(0.0, float(values.min()))
        mean = positive.mean()
        parts.append(positive / mean if mean > 0 else np.ones_like(positive))
    whole = np.concatenate(parts)
    return np.floor(whole * (TOTAL / len(whole))).astype(np.int32)
