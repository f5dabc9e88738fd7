"""What is measured on a batch of examples for the criteria that need it: see criteria.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten, tree_unflatten

from treesurgeon.engine.criteria import Scores, per_unit, trained
from treesurgeon.engine.gating import run_gated
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import named_leaves
from treesurgeon.engine.retrace import Retracer
from treesurgeon.engine.sites import Site, rows

CHUNK = 8


def fisher_energy(loss: Callable, graph: Graph, *, chunk: int = CHUNK) -> Callable:
    """`fisher_energy(loss, graph)(params, *batch)`: the units' diagonal Fisher information, `{group: float[size]}`.

    The mean over examples of (Σ w ∂L/∂w)², the sum running over all trained weights that go with the unit. It is the
    second-order change of the loss when the unit goes, the Fisher matrix standing in for the Hessian of Y. LeCun,
    J. Denker, S. Solla: "Optimal brain damage", NIPS 1989: L. Theis et al.: "Faster gaze prediction with dense networks
    and Fisher pruning", 2018 (arXiv 1801.05787), over coupled layers as in L. Liu et al.: "Group Fisher pruning for
    practical network compression", ICML 2021.

    Args:
        loss: `loss(params, *batch)`, a scalar; called with batches of one example.
        graph: the traced graph.
        chunk: examples whose gradients are held at a time.
    """

    def measure(params: Any, *batch: Any) -> Scores:
        leaves, tree = tree_flatten(params)
        paths = list(named_leaves(params))
        fixed = dict(zip(paths, leaves, strict=True))
        free = {path: leaf for path, leaf in fixed.items() if graph.leaves[path].trainable}

        def one(example: Any) -> Scores:
            def at(free: dict[str, Any]) -> Any:
                full = {**fixed, **free}
                return loss(tree_unflatten(tree, [full[p] for p in paths]), *jax.tree.map(lambda x: x[None], example))

            slopes = jax.grad(at)(free)
            return {
                name: jnp.square(sum((per_unit(free[m.path] * slopes[m.path], m, size) for m in members), 0.0))
                for name, size, members in trained(graph)
            }

        each = jax.lax.map(one, batch, batch_size=chunk)
        return {name: jnp.broadcast_to(v.mean(0), (graph.groups[name].size,)) for name, v in each.items()}

    return measure


def zero_share(fn: Callable, graph: Graph) -> Callable:
    """`zero_share(fn, graph)(params, *args)`: how much of what readers read is zero, `{group: float[size]}`, 0 to 1.

    Measured where kernels of their own read the units (see sites.py), over examples and positions, and averaged over
    the readers. Groups that none reads are left out.
    """

    def share(site: Site, x: Any) -> Scores:
        return {name: (rows(x, site.dim, place) == 0).mean(0) for name, place in site.places.items()}

    read = at_sites(fn, graph, share)

    def measure(params: Any, *args: Any, **kwargs: Any) -> Scores:
        found: dict[str, list[jax.Array]] = {}
        for places in read(params, *args, **kwargs).values():
            for name, value in places.items():
                found.setdefault(name, []).append(value)
        return {name: jnp.stack(values).mean(0) for name, values in found.items()}

    return measure


def gram_matrices(fn: Callable, graph: Graph) -> Callable:
    """`gram_matrices(fn, graph)(params, *args)`: mean products of the units that each reader reads.

    `{kernel axis: {group: float32[size, size]}}`, over examples and positions, where kernels of their own read the
    units (see sites.py). Sums of such results over batches are as good.
    """

    def gram(site: Site, x: Any) -> Scores:
        out = {}
        for name, place in site.places.items():
            every = rows(x, site.dim, place).astype(jnp.float32)
            out[name] = every.T @ every / len(every)
        return out

    return at_sites(fn, graph, gram)


def at_sites(fn: Callable, graph: Graph, look: Callable[[Site, Any], Scores]) -> Callable:
    """`at_sites(fn, graph, look)(params, *args)`: what `look` sees wherever units are read, by kernel axis."""
    retracer = Retracer(fn, graph)

    def measure(params: Any, *args: Any, **kwargs: Any) -> dict[str, Scores]:
        found: dict[str, Scores] = {}

        def note(site: Site, x: Any) -> None:
            found[site.name] = look(site, x)

        run_gated(retracer, params, {}, args, kwargs, note)
        return found

    return measure
