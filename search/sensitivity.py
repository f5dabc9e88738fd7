"""What each change costs by itself, and the way from the dense model down that these numbers suggest.

One candidate for each group at a few widths, and one for each block: the rise of the loss over the dense model's. In
between widths are interpolated. `descend` then takes, step by step, the change that costs the least loss for what it
saves (greedy for the knapsack that adding up the rises would be): good starting points, since what the sum leaves
out, how changes act together, is what the search is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from treesurgeon.search.space import Space

SHARES = (0.625, 0.25)
LEAST = 1e-4  # nats: no change is taken to be free


def probes(space: Space) -> np.ndarray:
    """Genomes that differ from the dense one in one gene, `int32[K, G]`."""
    dense, out = space.dense_genome(), []
    for i, g in enumerate(space.groups):
        widths = space.widths[g]
        for value in sorted({int(np.abs(widths - share * space.sizes[g]).argmin()) for share in SHARES} - {0}):
            out.append(dense.copy())
            out[-1][i] = value
    for k in range(len(space.blocks)):
        out.append(dense.copy())
        out[-1][len(space.groups) + k] = 0
    return np.array(out, np.int32)


def smallest(space: Space) -> np.ndarray:
    """The genome that keeps least."""
    genome = space.cardinality - 1
    genome[len(space.groups) :] = 0
    return genome


def rises(space: Space, probed: np.ndarray, rise: np.ndarray) -> np.ndarray:
    """The rise of the loss for every value of every gene, `float[G, values]`, from those of the probes.

    Between the widths that were probed it is linear in the width, beyond the smallest it goes on as steeply.
    """
    cards, dense = space.cardinality, space.dense_genome()
    out = np.zeros((len(cards), cards.max()))
    changed = (probed != dense).argmax(1)
    for i in range(len(cards)):
        mine = np.flatnonzero(changed == i)
        if i >= len(space.groups):
            out[i, 0] = max(rise[mine[0]], LEAST)
            continue
        widths = space.widths[space.groups[i]].astype(float)
        points = [*sorted((widths[probed[m, i]], float(rise[m])) for m in mine), (widths[0], 0.0)]
        (w0, r0), (w1, r1) = points[:2]
        low = r0 + (w0 - 0.0) * max(r0 - r1, 0.0) / (w1 - w0)
        x, y = zip(*[(0.0, low), *points], strict=True)
        found = np.interp(widths, x, y)
        out[i, : len(widths)] = np.maximum.accumulate(np.maximum(found, LEAST * (1 - widths / widths[0])))
    return out


def descend(
    space: Space, rise: np.ndarray, size_of: Callable[[np.ndarray], np.ndarray], least: float, most: int = 1000
) -> np.ndarray:
    """Genomes from the dense one down to size `least`, `int32[S, G]`.

    Args:
        space: the space.
        rise: what `rises` returned.
        size_of: genomes `[K, G]` -> sizes `[K]`; called with one K.
        least: where to stop.
        most: steps at most.
    """
    cards, groups = space.cardinality, len(space.groups)
    genome = space.dense_genome()
    path = [genome]
    size = float(size_of(np.repeat(genome[None], len(cards), 0))[0])
    while size > least and len(path) < most:
        moved = np.repeat(genome[None], len(cards), 0)
        at = np.arange(len(cards))
        step = np.where(at < groups, np.minimum(genome + 1, cards - 1), 0)
        moved[at, at] = step
        saved = size - np.asarray(size_of(moved), float)
        price = rise[at, step] - rise[at, genome]
        price = np.where((step != genome) & (saved > 0), np.maximum(price, LEAST) / np.maximum(saved, 1e-12), np.inf)
        best = int(price.argmin())
        if not np.isfinite(price[best]):
            break
        genome = moved[best]
        size -= float(saved[best])
        path.append(genome)
    return np.array(path, np.int32)


def table(space: Space, rise: np.ndarray) -> list[Mapping[str, object]]:
    """The rises as rows, for people."""
    out: list[Mapping[str, object]] = []
    for i, name in enumerate(space.groups):
        for value, width in enumerate(space.widths[name]):
            out.append({"kind": "group", "name": name, "kept": int(width), "rise": float(rise[i, value])})
    for k, name in enumerate(space.blocks):
        out.append({"kind": "block", "name": name, "kept": 0, "rise": float(rise[len(space.groups) + k, 0])})
    return out
