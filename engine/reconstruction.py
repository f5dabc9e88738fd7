"""Removed units, written as combinations of kept ones: least squares at every contraction that reads a group.

What a contraction reads in the reduced model is fitted to what it reads in the dense one, on a batch of examples, in
the order of execution: each fit sees what the fits before it have left. The result is a *map* for each group that a
kernel reads, `R[j, i]` = the share of unit i in unit j, with zeros for removed units i. Under `gate` a map acts on the
activations, so that a population of candidates shares its kernels; `fold` moves it into the kernels, and `cut` then
takes the kept rows. There is no intercept, so that zero padding stays zero.

The closed form of Y. He, X. Zhang, J. Sun: "Channel pruning for accelerating very deep neural networks", ICCV 2017,
with maps over units in place of whole kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path

from treesurgeon.engine.errors import PlanError
from treesurgeon.engine.gating import run_gated, undifferentiated
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import path_name
from treesurgeon.engine.retrace import Retracer
from treesurgeon.engine.selects import Guard
from treesurgeon.engine.sites import Place, Site, apply_map, places_of, rows, sampled

Maps: TypeAlias = Mapping[str, Mapping[str, Any]]
SAMPLES = 4096
RIDGE = 0.01


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """`learn = reconstruct(fn, graph)`; see there."""

    retracer: Retracer
    teacher: Retracer
    samples: int
    ridge: float

    def targets(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, dict[str, jax.Array]]:
        """What the dense model's contractions read, `float[samples, units]` by kernel axis and group."""
        found: dict[str, dict[str, jax.Array]] = {}

        def note(site: Site, x: Any) -> None:
            found[site.name] = {name: self._sample(x, site.dim, place) for name, place in site.places.items()}

        run_gated(self.teacher, params, {}, args, kwargs, note)
        return found

    def __call__(self, params: Any, masks: Mapping[str, Any], targets: Maps, *args: Any, **kwargs: Any) -> Any:
        """What the function returns under masks and maps, and the maps: `masks | {"maps": maps}` is for `gate`.

        Neither has derivatives.
        """
        maps: dict[str, dict[str, jax.Array]] = {}
        units = masks.get("units", {})

        def mend(site: Site, x: Any) -> Any | None:
            if not any(name in units for name in site.places):
                return None
            maps[site.name] = {}
            for name, place in site.places.items():
                have = self._sample(x, site.dim, place)
                kept = units.get(name, np.ones(place.size, bool))
                matrix = solve_map(have, targets[site.name][name], kept, self.ridge)
                maps[site.name][name] = matrix
                x = apply_map(x, site.dim, place, matrix)
            return x

        out = run_gated(self.retracer, params, masks, args, kwargs, mend, guard=Guard(gradients=False))
        return out, undifferentiated(maps)

    def _sample(self, x: Any, dim: int, place: Place) -> jax.Array:
        every = rows(x, dim, place)
        return every[sampled(len(every), self.samples)].astype(jnp.float32)


def reconstruct(
    fn: Callable, graph: Graph, *, teacher: Callable | None = None, samples: int = SAMPLES, ridge: float = RIDGE
) -> Reconstruction:
    """Least-squares maps that make up for what masks remove.

        learn = reconstruct(fn, graph)
        targets = learn.targets(params, x)                     # once
        out, maps = learn(params, masks, targets, x)           # for each candidate; vmaps over masks
        gate(fn, graph)(params, masks | {"maps": maps}, x)
        narrow(fn, graph, plan)(cut(fold(params, graph, maps), graph, plan), x)     # the same

    Kernels take part that are one parameter leaf, used once, outside of loops.

    Args:
        fn: a function of the graph's parameters: inference, or training mode where norms use the batch's statistics.
        graph: the traced graph.
        teacher: the function that says what contractions read in the dense model, with the arguments of `fn`; if None,
            `fn`. Where `fn` is in training mode, inference is the better teacher.
        samples: positions (examples and places) at most that a fit looks at.
        ridge: pull towards the kept units themselves, relative to their mean energy.
    """
    own = Retracer(fn, graph)
    return Reconstruction(own, own if teacher is None else Retracer(teacher, graph), samples, ridge)


def solve_map(have: Any, want: Any, kept: Any, ridge: float) -> jax.Array:
    """The map R that minimises |have Rᵀ - want|² + λ |R - K|², K keeping what is kept: `float32[units, units]`.

    Args:
        have: `[samples, units]`, zero at removed units.
        want: `[samples, units]`.
        kept: `bool[units]`.
        ridge: λ relative to the mean energy of the kept units.
    """
    kept = jnp.asarray(kept).astype(jnp.float32)
    gram = have.T @ have
    weight = ridge * jnp.trace(gram) / jnp.maximum(kept.sum(), 1) + jnp.finfo(jnp.float32).tiny ** 0.5
    left = gram + jnp.diag(weight * kept + (1 - kept))
    right = want.T @ have + jnp.diag(weight * kept)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(left), right.T).T * kept


def fold(params: Any, graph: Graph, maps: Maps) -> Any:
    """The dense parameters with maps moved into the kernels that read them.

    Args:
        params: the dense parameters.
        graph: the traced graph.
        maps: as `reconstruct` finds them.

    Raises:
        PlanError: a map names what is not there.
    """
    by_leaf: dict[str, list[tuple[int, str, Any]]] = {}
    for name, known in maps.items():
        match = re.fullmatch(r"(.*)\[(\d+)\]", name)
        if match is None or match[1] not in graph.leaves:
            raise PlanError(f"maps name {name!r}: expected the axis of a leaf, such as 'params/conv1/kernel[2]'")
        for group, matrix in known.items():
            by_leaf.setdefault(match[1], []).append((int(match[2]), group, matrix))

    def one(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        for axis, group, matrix in by_leaf.get(name, ()):
            leaf = apply_map(leaf, axis, places_of(graph.leaves[name].axes[axis])[group], jnp.asarray(matrix).T)
        return leaf

    return tree_map_with_path(one, params)
