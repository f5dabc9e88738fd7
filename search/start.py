"""Where evolution starts: the walk down from the dense model that sensitivities suggest, and what is near its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.search import sensitivity
from treesurgeon.search.budget import Budget
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.setting import CALIBRATION, Setting
from treesurgeon.search.sharding import Layout, one_device
from treesurgeon.search.space import Space
from treesurgeon.search.sweep import Sweep

Say = Callable[[str], None]


def energies(setting: Setting, space: Space, layout: Layout | None = None) -> dict[str, np.ndarray]:
    """For searched groups, by units kept, the share of the energy of their activations that these cannot express.

    The mean over the kernels that read the units; groups that none reads are left out.
    """
    subject, graph = setting.subject, setting.subject.graph
    x = jnp.asarray(setting.calibration(CALIBRATION))
    found: dict[str, list[Array]] = {}
    residual = jax.jit(engine.residual_energy)
    layout = layout or one_device()
    for places in layout.over(engine.gram_matrices(subject.infer, graph), subject.variables, x)(x).values():
        for name, gram in places.items():
            if name in space.ranks:
                found.setdefault(name, []).append(residual(np.asarray(gram), np.argsort(space.ranks[name])))
    return {name: np.mean(curves, 0) for name, curves in found.items()}


def walk(
    space: Space,
    sweep: Sweep,
    energies: Mapping[str, np.ndarray],
    sizes: Callable[[np.ndarray], np.ndarray],
    target: float,
    count: int,
    rng: np.random.Generator,
    say: Say,
) -> dict[str, np.ndarray]:
    """From the dense model down to the target in a few stages, sensitivities measured anew before each.

    Returns:
        `rise`, the sensitivities of the dense model, `path`, the genomes on the way, and `near`, `count` genomes near
        its end (see sensitivity.py).
    """
    start = time.perf_counter()
    smallest = sensitivity.smallest(space)
    target = max(target, float(sizes(smallest[None])[0]))
    at, first, rise = space.dense_genome(), None, None
    path = [at]
    for stage in np.geomspace(1, target, sensitivity.STAGES + 1)[1:]:
        probed = sensitivity.probes(space, at)
        if not len(probed):
            break
        rise = sensitivity.rises(space, at, probed, sweep(at, probed), energies)
        first = rise if first is None else first
        path += list(sensitivity.descend(space, rise, sizes, stage, at)[1:])
        at = path[-1]
        seconds = time.perf_counter() - start
        say(f"{len(probed)} single changes tried, down to {sizes(at[None])[0]:.0%} of the size; {seconds:.0f} s")
    if sweep.compiled > len(sweep.parts):
        raise RunError(f"the sweep compiled {sweep.compiled} programs, not {len(sweep.parts)}: please report this")
    assert first is not None
    assert rise is not None
    near = sensitivity.neighbours(space, rise, sizes, target, at, count, rng)
    return {"rise": first, "path": np.array(path, np.int32), "near": near}


def starting_points(
    config: Config,
    space: Space,
    budget: Budget,
    path: np.ndarray,
    near: np.ndarray,
    costs_of: Callable[[np.ndarray], Mapping[str, np.ndarray]],
) -> np.ndarray:
    """Genomes to start from, those on the way down that sensitivities suggest first.

    With a budget these are the ones within it and their neighbours, else sizes spread evenly; then uniform ones. After
    the first half of them come some that end at each of the exits.
    """
    half = max(config.population // 2, 2)

    def fitting(genomes: np.ndarray) -> np.ndarray:
        costs = costs_of(genomes)
        return genomes[np.lexsort((-costs["macs"], budget.over(costs) > 0))]

    if budget.limits:
        chosen = [*fitting(path)[:1], *fitting(near)]
    else:
        chosen = path[np.unique(np.linspace(0, len(path) - 1, half).round().astype(int))]
    ended = []
    for end in range(1, len(space.exits) + 1):
        way, close = (np.concatenate([each[:, :-1], np.full((len(each), 1), end)], 1) for each in (path, near))
        ended.append([*fitting(way)[:2], *fitting(close)[:1]])
    ended = [each for few in zip_longest(*ended) for each in few if each is not None]  # the first of each exit first
    every = [*chosen[:half], *ended, *chosen[half:], *fitting(space.seeds())]
    rows = np.array(every, np.int32)
    _, first = np.unique(np.asarray(jax.jit(jax.vmap(space.canonical))(rows)), axis=0, return_index=True)
    return rows[np.sort(first)]
