"""What a plan costs, as exact functions of its masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.graph import Branches, Graph, Plan, Term, Work, check_masks
from treesurgeon.engine.masks import alive, axis_count


class Cost(NamedTuple):
    """Costs of one plan, or of a stack of masks (then each has the stack's leading axes).

    Attributes:
        size: all array elements of the cut pytree.
        params: the trainable ones: floating-point leaves, those of the `params` collection where there is one.
        macs: multiply-accumulates of all contractions of the traced call, its whole batch; of a condition those of
            the branch that has most of them. Programs inside primitives without a rule (`shard_map`) are not counted.
        activation_bytes: bytes of the outputs of all contractions of the traced call (the "activations" of
            Radosavovic et al., "Designing network design spaces", CVPR 2020, times the item size).
    """

    size: Any
    params: Any
    macs: Any
    activation_bytes: Any


def cost(graph: Graph, plan: Plan | Mapping[str, Any]) -> Cost:
    """The cost of a plan, or of masks; works inside jit, and on masks stacked along leading axes.

    Concrete (NumPy) masks give exact integers. Traced masks give int32 where the dense model's count fits, else int64
    with x64 enabled, else float32 (relative error below 1e-6).

    Args:
        graph: the traced graph.
        plan: a plan, or masks as `graph.masks` gives them; what they leave out is kept.

    Raises:
        PlanError: the plan or the masks do not fit the graph.
    """
    masks = _masks(graph, plan)
    leaves = [*masks["units"].values(), *masks["blocks"].values()]
    concrete = not any(isinstance(mask, jax.Array) for mask in leaves)
    sizes = [
        (Term(1, leaf.axes, leaf.contexts or frozenset([frozenset()])), leaf.trainable)
        for leaf in graph.leaves.values()
    ]

    units = graph.positions(masks)

    def count(work: Sequence[Work]) -> Any:
        return _count(work, units, masks["blocks"], concrete)

    return Cost(
        count([term for term, _ in sizes]),
        count([term for term, trainable in sizes if trainable]),
        count(graph.macs),
        count(graph.activations),
    )


def contractions(graph: Graph, plan: Plan | Mapping[str, Any]) -> Any:
    """How many contractions of the traced call are left, those in the body of a loop once; as `cost` counts."""
    masks = _masks(graph, plan)
    concrete = not any(isinstance(mask, jax.Array) for mask in masks["blocks"].values())
    return _count(_ones(graph.macs), {}, masks["blocks"], concrete)


def _masks(graph: Graph, plan: Plan | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    units, blocks = check_masks(graph, graph.masks(plan) if isinstance(plan, Plan) else plan, stacked=True)
    return {"units": units, "blocks": blocks}


def _ones(work: Sequence[Work]) -> tuple[Work, ...]:
    """Work that counts each of its terms once."""
    return tuple(
        Branches(tuple(map(_ones, item.options))) if isinstance(item, Branches) else Term(1, (), item.contexts)
        for item in work
    )


def _count(work: Sequence[Work], units: Mapping[str, Any], blocks: Mapping[str, Any], concrete: bool) -> Any:
    dense = _dense(work)
    if concrete:
        dtype: Any = np.int64
    elif dense < 2**31:
        dtype = jnp.int32
    else:
        dtype = jnp.int64 if jax.config.read("jax_enable_x64") else jnp.float32
    out = _sum(work, units, blocks, dtype)
    return int(out) if concrete and not isinstance(out, int) and out.ndim == 0 else out


def _dense(work: Sequence[Work]) -> Any:
    """The count of the dense model."""
    total = 0
    for item in work:
        if isinstance(item, Branches):
            total += max(map(_dense, item.options))
        else:
            total += item.scale * math.prod(axis.size for axis in item.axes)
    return total


def _sum(work: Sequence[Work], units: Mapping[str, Any], blocks: Mapping[str, Any], dtype: Any) -> Any:
    total: Any = 0
    constant: Any = 0
    for item in work:
        if isinstance(item, Branches):
            options = [_sum(option, units, blocks, dtype) for option in item.options]
            if all(isinstance(option, int) for option in options):
                constant += max(options)
            else:
                xp = jnp if any(isinstance(option, jax.Array) for option in options) else np
                total = total + reduce(xp.maximum, [xp.asarray(option, dtype) for option in options])
            continue
        amount: Any = 1
        scale = item.scale
        for axis in item.axes:
            n = axis_count(axis, units)
            if isinstance(n, int):
                scale *= n
            else:
                amount = amount * n.astype(dtype)
        kept = alive(item.contexts, blocks)
        if kept is not None:
            amount = amount * kept.astype(dtype)
        if isinstance(amount, int):
            constant += scale
        else:
            total = total + amount * np.asarray(scale, dtype)
    return constant if isinstance(total, int) else total + np.asarray(constant, dtype)
