"""What each change does by itself, and the way from the dense model down that these numbers suggest.

One candidate for each group at one width, and one for each block: how far it moves the answers (the divergence, which
has far less noise than the loss has). Other widths follow in proportion to the energy that their units cannot express:
the divergence is quadratic in a small disturbance. `descend` then takes, step by step, the change that costs least for
what it saves: greedy for the knapsack that adding up the costs would be. Since changes do not add up (each block can be
missed, all of them cannot), the way is gone in stages, and before each the changes that are left are tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from treesurgeon.search.space import Space

SHARE = 0.5  # of the units that are left
STAGES = 2
LEAST = 1e-4  # nats: no change is taken to be free


def probes(space: Space, start: np.ndarray) -> np.ndarray:
    """Genomes that differ from `start` in one gene and keep less, `int32[K, G]`."""
    out = []
    for i, g in enumerate(space.groups):
        widths = space.widths[g]
        value = int(np.abs(widths - SHARE * widths[start[i]]).argmin())
        if value > start[i]:
            out.append(start.copy())
            out[-1][i] = value
    for k in np.flatnonzero(start[len(space.groups) :]):
        out.append(start.copy())
        out[-1][len(space.groups) + k] = 0
    return np.array(out, np.int32).reshape(-1, len(start))


def smallest(space: Space) -> np.ndarray:
    """The genome that keeps least."""
    genome = space.cardinality - 1
    genome[len(space.groups) :] = 0
    return genome


def rises(
    space: Space, start: np.ndarray, probed: np.ndarray, rise: np.ndarray, energies: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The cost of every value of every gene over that of `start`, `float[G, values]`, from those of the probes.

    What was not probed costs inf.

    Args:
        space: the space.
        start: the genome that the probes start from.
        probed: what `probes` returned.
        rise: the divergence of each.
        energies: for groups, by units kept (from 0 on), the share of the energy that they cannot express.
    """
    cards = space.cardinality
    out = np.full((len(cards), cards.max()), np.inf)
    out[np.arange(len(cards)), start] = 0
    for m, i in enumerate((probed != start).argmax(1)):
        if i >= len(space.groups):
            out[i, 0] = max(rise[m], LEAST)
            continue
        here, name = start[i], space.groups[i]
        widths = space.widths[name]
        kept = energies[name][widths] if name in energies else 1 - widths / widths[0]
        lost = np.maximum(kept[here:] - kept[here], 0)
        scale = rise[m] / max(lost[probed[m, i] - here], np.finfo(float).tiny)
        out[i, here : len(widths)] = np.maximum(scale * lost, LEAST * (1 - widths[here:] / widths[here]))
    return out


def descend(
    space: Space,
    rise: np.ndarray,
    size_of: Callable[[np.ndarray], np.ndarray],
    least: float,
    start: np.ndarray,
    most: int = 1000,
) -> np.ndarray:
    """Genomes from `start` down to size `least`, `int32[S, G]`.

    Args:
        space: the space.
        rise: what `rises` returned.
        size_of: genomes `[K, G]` -> sizes `[K]`; called with one K.
        least: where to stop.
        start: where to begin.
        most: steps at most.
    """
    cards, groups = space.cardinality, len(space.groups)
    genome = start
    path = [genome]
    size = float(size_of(np.repeat(genome[None], len(cards), 0))[0])
    while size > least and len(path) < most:
        moved = np.repeat(genome[None], len(cards), 0)
        at = np.arange(len(cards))
        step = np.where(at < groups, np.minimum(genome + 1, cards - 1), 0)
        moved[at, at] = step
        saved = size - np.asarray(size_of(moved), float)
        known = np.isfinite(rise[at, step]) & np.isfinite(rise[at, genome])
        price = np.where(known, rise[at, step], np.inf) - np.where(known, rise[at, genome], 0)
        open_ = (step != genome) & (saved > 0) & np.isfinite(price)
        price = np.where(open_, np.maximum(price, LEAST) / np.maximum(saved, 1e-12), np.inf)
        best = int(price.argmin())
        if not np.isfinite(price[best]):
            break
        genome = moved[best]
        size -= float(saved[best])
        path.append(genome)
    return np.array(path, np.int32)


def neighbours(
    space: Space,
    rise: np.ndarray,
    size_of: Callable[[np.ndarray], np.ndarray],
    least: float,
    start: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Genomes near `start`, `int32[count, G]`: up to three changes taken back at random, made up for by the cheapest
    others until the size is `least`.
    """
    dense, groups = space.dense_genome(), len(space.groups)
    out = []
    for _ in range(count):
        genome = start.copy()
        reduced = np.flatnonzero(genome != dense)
        for i in rng.choice(reduced, min(len(reduced), int(rng.integers(1, 4))), replace=False):
            genome[i] = rng.integers(0, genome[i]) if i < groups else 1
        out.append(descend(space, rise, size_of, least, genome)[-1])
    return np.array(out, np.int32).reshape(-1, len(start))


def table(space: Space, rise: np.ndarray) -> list[Mapping[str, object]]:
    """The dense model's rises as rows, for people."""
    out: list[Mapping[str, object]] = []
    for i, name in enumerate(space.groups):
        for value, width in enumerate(space.widths[name]):
            out.append({"kind": "group", "name": name, "kept": int(width), "rise": float(rise[i, value])})
    for k, name in enumerate(space.blocks):
        out.append({"kind": "block", "name": name, "kept": 0, "rise": float(rise[len(space.groups) + k, 0])})
    return out
