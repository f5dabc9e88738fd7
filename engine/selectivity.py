"""Which units answer to which classes, and how many directions a group's activity has.

A. Morcos, D. Barrett, N. Rabinowitz, M. Botvinick: "On the importance of single directions for generalization", ICLR
2018 (arXiv 1803.06959), for the selectivity index. They find that what ablating a unit costs hardly goes with its
selectivity: it says what a unit answers to, and not how much the network needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.engine.criteria import Scores
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.readings import at_sites
from treesurgeon.engine.sites import Site, rows, units_last


def unit_activity(fn: Callable, graph: Graph) -> Callable:
    """`unit_activity(fn, graph)(params, *args)`: how active units are on each example, `{group: float[N, size]}`.

    The mean over positions of the absolute values that kernels of their own read (see sites.py), averaged over the
    readers; behind a ReLU these are the activations. Groups that none reads are left out. The first axis of every
    argument is that of the examples, which are run one by one under `vmap`.
    """

    def strength(site: Site, x: Any) -> Scores:
        return {name: jnp.abs(rows(x, site.dim, place)).mean(0) for name, place in site.places.items()}

    read = at_sites(fn, graph, strength)

    def measure(params: Any, *args: Any, **kwargs: Any) -> Scores:
        def one(example: tuple) -> Scores:
            found: dict[str, list[jax.Array]] = {}
            for places in read(params, *jax.tree.map(lambda x: x[None], example), **kwargs).values():
                for name, value in places.items():
                    found.setdefault(name, []).append(value)
            return {name: jnp.stack(values).mean(0) for name, values in found.items()}

        return jax.vmap(one)(args)

    return measure


def activity_maps(fn: Callable, graph: Graph) -> Callable:
    """`activity_maps(fn, graph)(params, *args)`: where units are active, `{group: float[N, *positions, size]}`.

    The absolute values that the reader with the most positions reads; its axes stand in their order, those of length
    one left out: height and width for images behind convolutions, or one axis where they were flattened. Groups that no
    kernel of its own reads are left out. The first axis of every argument is that of the examples.
    """

    def look(site: Site, x: Any) -> Scores:
        out = {}
        for name, place in site.places.items():
            last = jnp.abs(units_last(x, site.dim, place))
            out[name] = last.reshape(*(n for n in last.shape[:-1] if n != 1), last.shape[-1])
        return out

    read = at_sites(fn, graph, look)

    def measure(params: Any, *args: Any, **kwargs: Any) -> Scores:
        def one(example: tuple) -> Scores:
            found: dict[str, jax.Array] = {}
            for places in read(params, *jax.tree.map(lambda x: x[None], example), **kwargs).values():
                for name, value in places.items():
                    if name not in found or value.size > found[name].size:
                        found[name] = value
            return found

        return jax.vmap(one)(args)

    return measure


@partial(jax.jit, static_argnums=2)
def class_means(activity: Any, labels: Any, classes: int) -> jax.Array:
    """The mean activity of each unit on the examples of each class, `float[classes, size]`; NaN where there are none.

    Args:
        activity: `float[N, size]`, one group's.
        labels: `int[N]`.
        classes: how many there are.
    """
    member = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    counts = member.sum(0)[:, None]
    means = jnp.matmul(member.T, activity, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(counts, 1)
    return jnp.where(counts > 0, means, jnp.nan)


@jax.jit
def selectivity_index(means: Any) -> jax.Array:
    """The class selectivity of each unit, `float[size]`, from 0 (answers to all alike) to 1 (to one class alone).

    (μ - ν) / (μ + ν), where μ is the mean activity on the class that the unit is most active on, and ν the mean over
    the other classes of theirs. 0 for units that are never active, and where there is one class alone.

    Args:
        means: `float[classes, size]`, none below 0; classes of NaN are left out.
    """
    means = jnp.asarray(means)
    there = ~jnp.isnan(means)
    most = jnp.where(there, means, -jnp.inf).max(0)
    others = (jnp.where(there, means, 0).sum(0) - most) / jnp.maximum(there.sum(0) - 1, 1)
    total = most + others
    index = jnp.where(total > 0, (most - others) / jnp.where(total > 0, total, 1), 0)
    return jnp.where(there.sum(0) > 1, jnp.clip(index, 0, 1), 0)


def class_selectivity(fn: Callable, graph: Graph, classes: int) -> Callable:
    """`class_selectivity(fn, graph, classes)(params, x, labels)`: the units' selectivity, `{group: float[size]}`.

    Groups that no kernel of its own reads are left out.

    Args:
        fn: a function of the graph's parameters and of examples `x`.
        graph: the traced graph.
        classes: how many there are; labels are `int[N]`.
    """
    active = unit_activity(fn, graph)

    def measure(params: Any, x: Any, labels: Any) -> Scores:
        found = active(params, x)
        return {name: selectivity_index(class_means(values, labels, classes)) for name, values in found.items()}

    return measure


@jax.jit
def participation_ratio(activity: Any) -> jax.Array:
    """How many directions the activity of a group takes up, a number from 1 to its size; 0 if it never changes.

    (Σ λ)² / Σ λ² over the eigenvalues of its covariance over examples, which is tr(C)² / tr(C²). P. Gao and others: "A
    theory of multineuronal dimensionality, dynamics and measurement", 2017 (bioRxiv 214262).

    Args:
        activity: `float[N, size]`.
    """
    centred = jnp.asarray(activity, jnp.float32)
    centred = centred - centred.mean(0)
    scale = jnp.abs(centred).max()
    centred = centred / jnp.where(scale > 0, scale, 1)
    covariance = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    square = jnp.square(covariance).sum()
    return jnp.where(square > 0, jnp.trace(covariance) ** 2 / jnp.where(square > 0, square, 1), 0)
