"""The criteria that score units, one function each, and the table of them.

A criterion is written over the named leaves of the dense parameters and, where it needs one, something measured. To
add one, write its function and its row in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.graph import Graph, Member
from treesurgeon.engine.reconstruction import RIDGE

Scores: TypeAlias = dict[str, jax.Array]
Leaves: TypeAlias = Mapping[str, Any]


class Criterion(NamedTuple):
    """How to score the units of a graph's groups, `score(graph, leaves)` or `score(graph, leaves, needed)`.

    `needs` is the keyword argument of `importance` for what it takes besides the parameters ("" for nothing), `source`
    what to pass there, in words.
    """

    score: Callable[..., Scores]
    needs: str = ""
    source: str = ""


def magnitude(graph: Graph, leaves: Leaves, power: int) -> Scores:
    """Sums of |weight|^power over the kernels' weights that go with the unit, producers and readers alike.

    H. Li et al.: "Pruning filters for efficient ConvNets", ICLR 2017; over all coupled layers as in G. Fang et al.:
    "DepGraph: towards any structural pruning", CVPR 2023.
    """
    return {
        name: sum((per_unit(jnp.abs(leaves[m.path]) ** power, m, size) for m in kernels), jnp.zeros(size))
        for name, size, kernels in _members(graph, lambda m: _is_kernel(graph, m))
    }


def norm_scale(graph: Graph, leaves: Leaves) -> Scores:
    """|scale| of the norms on the unit; `l2` for groups without a norm.

    Z. Liu et al.: "Learning efficient convolutional networks through network slimming", ICCV 2017.
    """
    found = {
        name: [per_unit(jnp.abs(leaves[m.path]), m, size) for m in scales]
        for name, size, scales in _members(graph, lambda m: m.path.rpartition("/")[2] == "scale")
    }
    return _or_l2(graph, leaves, {name: sum(parts[1:], parts[0]) for name, parts in found.items() if parts})


def fpgm(graph: Graph, leaves: Leaves) -> Scores:
    """Mean distance of the unit's filter to those of the other units, summed over the kernels that make the units.

    Units near the geometric median can be expressed by others. Y. He et al.: "Filter pruning via geometric median for
    deep convolutional neural networks acceleration", CVPR 2019, whose sum is a mean here, so that the size of a group
    does not count. Where no kernel makes the units (an embedding), all kernels of the group count.
    """
    out = {}
    for name, size, kernels in _members(graph, lambda m: _is_kernel(graph, m)):
        makers = [m for m in kernels if m.makes] or kernels
        found = [_distances(filters(leaves[m.path], m, size)).sum(1) / (size - 1) for m in makers]
        out[name] = sum(found, jnp.zeros(size))
    return out


def lamp(graph: Graph, leaves: Leaves) -> Scores:
    """The unit's `l2` over the sum of `l2` of all units of its group that have as much or more.

    J. Lee et al.: "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, with units in place of weights:
    the best unit of every group scores 1, so that a global ranking empties none.
    """
    out = {}
    for name, squares in magnitude(graph, leaves, 2).items():
        ordered = jnp.sort(squares)
        above = jnp.cumsum(ordered[::-1])[::-1]
        total = above[jnp.searchsorted(ordered, squares, side="left")]
        out[name] = squares / jnp.maximum(total, jnp.finfo(squares.dtype).tiny)
    return out


def taylor(graph: Graph, leaves: Leaves, grads: Any) -> Scores:
    """Squared first-order change of the loss, (Σ w ∂L/∂w)² per leaf, from the gradient over a batch.

    P. Molchanov et al.: "Importance estimation for neural network pruning", CVPR 2019.
    """
    return {
        name: sum((per_unit(leaves[m.path] * grads[m.path], m, size) ** 2 for m in members), jnp.zeros(size))
        for name, size, members in trained(graph)
    }


def apoz(graph: Graph, leaves: Leaves, zeros: Mapping[str, Any]) -> Scores:
    """The share of what readers read of the unit that is not zero; `l2` for groups of which nothing was measured.

    H. Hu et al.: "Network trimming: a data-driven neuron pruning approach towards efficient deep architectures", 2016
    (arXiv 1607.03250): one less their average percentage of zeros. It tells units apart only behind a ReLU or the like.
    """
    return _or_l2(graph, leaves, {name: 1 - jnp.asarray(share) for name, share in zeros.items()})


def reconstruction(graph: Graph, leaves: Leaves, grams: Mapping[str, Mapping[str, Any]]) -> Scores:
    """The share of what a reader reads that is lost with the unit, summed over readers.

    Lost is what the other units cannot express by least squares: 1 / (G⁻¹)ᵢᵢ of the Gram matrix G, with a ridge, over
    the trace of G; the single-unit case of Y. He et al.: "Channel pruning for accelerating very deep neural networks",
    ICCV 2017. `l2` for groups of which nothing was measured.
    """
    out: Scores = {}
    for places in grams.values():
        for name, gram in places.items():
            lost = unexpressed(gram, RIDGE) / jnp.maximum(jnp.trace(gram), jnp.finfo(jnp.float32).tiny)
            out[name] = out.get(name, 0) + lost
    return _or_l2(graph, leaves, out)


def selectivity(graph: Graph, leaves: Leaves, found: Mapping[str, Any]) -> Scores:
    """How much the unit's activity tells one class from the others; `l2` for groups of which nothing was measured.

    A. Morcos et al.: "On the importance of single directions for generalization", ICLR 2018. It keeps the units that
    answer to the classes at hand, which need not be those that the network needs: the paper finds that it is not.
    """
    return _or_l2(graph, leaves, {name: jnp.asarray(index) for name, index in found.items()})


def random(graph: Graph, leaves: Leaves, key: jax.Array) -> Scores:
    """Uniform numbers from 0 to 1: the control that every criterion has to beat.

    S. Mittal et al.: "Recovering from random pruning: on the plasticity of deep convolutional neural networks",
    WACV 2018.
    """
    return {
        name: jax.random.uniform(jax.random.fold_in(key, i), (group.size,))
        for i, (name, group) in enumerate(graph.groups.items())
    }


def as_given(graph: Graph, leaves: Leaves, scores: Mapping[str, Any]) -> Scores:
    """What was measured, as it is."""
    return {name: jnp.asarray(scores[name]) for name in graph.groups}


CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion(partial(magnitude, power=1)),
    "l2": Criterion(partial(magnitude, power=2)),
    "fpgm": Criterion(fpgm),
    "lamp": Criterion(lamp),
    "norm_scale": Criterion(norm_scale),
    "taylor": Criterion(taylor, "grads", "the gradient of the loss at params"),
    "fisher": Criterion(as_given, "fisher", "fisher_energy(loss, graph)(params, x, y)"),
    "activation": Criterion(as_given, "energy", "activation_energy(fn, graph)(params, x)"),
    "apoz": Criterion(apoz, "zeros", "zero_share(fn, graph)(params, x)"),
    "reconstruction": Criterion(reconstruction, "grams", "gram_matrices(fn, graph)(params, x)"),
    "selectivity": Criterion(selectivity, "selectivity", "class_selectivity(fn, graph, classes)(params, x, labels)"),
    "random": Criterion(random, "key", "jax.random.key(seed)"),
}
"""Every criterion by name: its function, and what it needs besides the parameters."""


def unexpressed(gram: Any, ridge: float) -> jax.Array:
    """For each unit min over c of |xᵢ - Σⱼ cⱼ xⱼ|² + λ |c|², `float32[units]`.

    By the inverse of a partitioned matrix it is 1 / ((G + λ I)⁻¹)ᵢᵢ - λ.

    Args:
        gram: `[units, units]`, the inner products of the units.
        ridge: λ relative to the mean energy of the units.
    """
    gram = jnp.asarray(gram, jnp.float32)
    size = gram.shape[0]
    scale = jnp.trace(gram) / size
    scale = jnp.where(scale > 0, scale, 1)
    factor = jax.scipy.linalg.cho_factor(gram / scale + ridge * jnp.eye(size))
    inverse = jnp.diagonal(jax.scipy.linalg.cho_solve(factor, jnp.eye(size)))
    return scale * jnp.maximum(1 / inverse - ridge, 0)


def residual_energy(gram: Any, order: Any, ridge: float = RIDGE) -> jax.Array:
    """The share of the energy of units that their first k cannot express by least squares, `float32[units + 1]`.

    For all k from none to all of them at once: G = L Lᵀ, and what is left of units i ≥ k is Σ_{i, j ≥ k} Lᵢⱼ².

    Args:
        gram: `[units, units]`, the inner products of the units.
        order: `int[units]`, the units in the order in which they are kept.
        ridge: relative to the mean energy of the units.
    """
    gram = jnp.asarray(gram, jnp.float32)
    scale = jnp.maximum(jnp.trace(gram), jnp.finfo(jnp.float32).tiny)
    sorted_ = gram[order][:, order] / scale + ridge / len(gram) * jnp.eye(len(gram))
    square = jnp.square(jnp.linalg.cholesky(sorted_))
    left = jnp.diagonal(square[::-1, ::-1].cumsum(0).cumsum(1))[::-1]
    return jnp.append(left / left[0], 0)


def trained(graph: Graph) -> Iterator[tuple[str, int, list[Member]]]:
    """Each group with its size and those of its members that are trained."""
    return _members(graph, lambda m: graph.leaves[m.path].trainable)


def per_unit(values: Any, member: Member, size: int) -> jax.Array:
    """Sum an array over all but the member's axis, then over the positions of each unit: [size]."""
    return _per_unit(values, member.units, member.axis, size)


@partial(jax.jit, static_argnums=(2, 3))
def _per_unit(values: jax.Array, units: jax.Array, axis: int, size: int) -> jax.Array:
    return spread(values.sum(tuple(d for d in range(values.ndim) if d != axis)), units, size)


@partial(jax.jit, static_argnums=2)
def spread(along: Any, index: Any, size: int) -> jax.Array:
    """Sum values at positions into the units that stand there, -1 for none: [size]."""
    return jnp.zeros(size, along.dtype).at[jnp.where(index < 0, size, index)].add(along, mode="drop")


def filters(kernel: Any, member: Member, size: int) -> jax.Array:
    """The weights of each unit as a row, `[size, weights]`; those of one unit are in the order of their positions."""
    there = np.flatnonzero(member.units >= 0)
    order = there[np.argsort(member.units[there], kind="stable")]
    return jnp.moveaxis(jnp.asarray(kernel), member.axis, 0)[order].reshape(size, -1)


def _distances(rows: jax.Array) -> jax.Array:
    """Euclidean distances of all rows, without an array of rows × rows × columns."""
    rows = (rows - rows.mean(0)).astype(jnp.float32)
    gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.diagonal(gram)
    apart = jnp.maximum(square[:, None] + square[None, :] - 2 * gram, 0)
    return jnp.sqrt(jnp.where(jnp.eye(len(rows), dtype=bool), 0, apart))


def _members(graph: Graph, wanted: Callable[[Member], bool]) -> Iterator[tuple[str, int, list[Member]]]:
    for name, group in graph.groups.items():
        yield name, group.size, [m for m in group.members if wanted(m)]


def _is_kernel(graph: Graph, member: Member) -> bool:
    leaf = graph.leaves[member.path]
    return leaf.trainable and len(leaf.shape) > 1


def _or_l2(graph: Graph, leaves: Leaves, found: Scores) -> Scores:
    if found.keys() >= graph.groups.keys():
        return {name: found[name] for name in graph.groups}
    plain = magnitude(graph, leaves, 2)
    return {name: found.get(name, plain[name]) for name in graph.groups}
