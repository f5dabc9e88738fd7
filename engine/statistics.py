"""Running averages of batch statistics, of any model: which leaves they are, and new values for them.

No layer needs to be known by name. A training step maps an average to `old · m + new · (1 - m)`, which is linear in
the old value: its derivative is the momentum `m`, and one step from zero, divided by `1 - m`, is the statistic of the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.errors import StructureError
from treesurgeon.engine.jaxprs import named_leaves, path_name

Train = Callable[..., tuple[Any, Any]]


def momenta(train: Train, variables: Any, *args: Any) -> dict[str, float]:
    """The share of its old value that each running average keeps in one step of training, by the leaf's path.

    What is not an average (its update is not `old · m + new`, with one `m` from 0 to below 1) is left out.

    Args:
        train: `(variables, *args) -> (output, updates)`; updates are new values of a part of the variables, such as
            `{"batch_stats": …}`, or of none.
        variables: pytree of arrays.
        args: the other arguments of `train`, such as images `[N, H, W, C]` and a key; any values do.

    Raises:
        StructureError: an update that is not at a leaf of the variables.
    """
    updates = jax.eval_shape(train, variables, *args)[1]
    names = list(named_leaves(updates))
    if not names:
        return {}
    flat, structure = jax.tree_util.tree_flatten_with_path(variables)
    at = {path_name(path): i for i, (path, _) in enumerate(flat)}
    _check(set(names), at)
    leaves = [leaf for _, leaf in flat]

    def update(averages: dict[str, Any]) -> Any:
        new = [averages.get(path_name(path), leaf) for (path, _), leaf in zip(flat, leaves, strict=True)]
        return train(jax.tree_util.tree_unflatten(structure, new), *args)[1]

    found = {name: leaves[at[name]] for name in names if jnp.issubdtype(leaves[at[name]].dtype, jnp.floating)}
    floats = {name: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for name, leaf in found.items()}

    @jax.jit
    def respond(given: dict[str, Any], moves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        new, slopes = (named_leaves(tree) for tree in jax.jvp(update, (given,), (moves,)))
        return {name: new[name] for name in given}, {name: slopes[name] for name in given}

    def averages(moved: Collection[str]) -> dict[str, float]:
        """Those of the moved leaves that follow their own old values alone, while these all move."""
        ones = {name: jnp.full_like(leaf, name in moved) for name, leaf in floats.items()}
        steps = {name: one * (1 + jnp.abs(floats[name]).max(initial=0)) for name, one in ones.items()}
        new, slopes = respond(floats, ones)
        after, _ = respond(jax.tree.map(jnp.add, floats, steps), ones)
        found = {name: _momentum(slopes[name], new[name], after[name], steps[name]) for name in moved}
        return {name: momentum for name, momentum in found.items() if momentum is not None}

    out = averages(floats)
    new, _ = respond(floats, jax.tree.map(jnp.zeros_like, floats))
    moving = [name for name in floats if not np.array_equal(new[name], floats[name], equal_nan=True)]
    if len(moving) < len(floats):  # some are as they were: frozen, so that what comes behind reads them
        out |= averages(moving)
    for name in moving:  # what reads another of them
        if name not in out:
            out |= averages([name])
    return {name: out[name] for name in floats if name in out}


def _momentum(slope: Any, new: Any, after: Any, step: Any) -> float | None:
    """The share that is kept of an old value, None if the new one is no average of it and of something else.

    Args:
        slope: the derivative of the new value.
        new, after: the new value before and after a step of the old one; a derivative that was stopped differs.
        step: that step.
    """
    slope, new, after, step = (np.asarray(x, np.float64) for x in (slope, new, after, step))
    if not slope.size or np.ptp(slope) >= 1e-6 or not 0 <= slope.flat[0] < 1 - 1e-6:
        return None
    momentum = float(slope.flat[0])
    allowed = 1e-3 * step.max() + 1e-5 * np.abs(new).max()
    return None if np.any(np.abs(after - new - momentum * step) > allowed) else momentum


def reestimate(train: Train, momenta: Mapping[str, float]) -> Callable[..., Any]:
    """A function `(variables, *args) -> variables` with every running average replaced by the statistic of one batch.

    The cheapest repair of a pruned network: B. Li et al.: "EagleEye: fast sub-net evaluation for efficient neural
    network pruning", ECCV 2020, arXiv 2007.02491.

    Args:
        train: as in `momenta`, or a transformation of it (`narrow(train, …)`, `gate(train, …)`); the variables are then
            those that it takes.
        momenta: what `momenta` returned for the dense model.
    """

    def zeroed(path: Any, leaf: Any) -> Any:
        return jnp.zeros_like(leaf) if path_name(path) in momenta else leaf

    def fresh(variables: Any, *args: Any) -> Any:
        if not momenta:
            return variables
        _, updates = train(jax.tree_util.tree_map_with_path(zeroed, variables), *args)
        new = named_leaves(updates)

        def one(path: Any, leaf: Any) -> Any:
            name = path_name(path)
            if name not in momenta:
                return leaf
            if name not in new:
                raise StructureError(f"reestimate: {name} has a momentum, but `train` returns no update for it")
            return (new[name] / (1 - momenta[name])).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(one, variables)

    return fresh


def _check(names: set[str], at: Mapping[str, int]) -> None:
    unknown = sorted(names - set(at))
    if unknown:
        raise StructureError(
            f"momenta: `train` returns an update at {unknown[0]}, which is no leaf of the variables; return the new "
            "values under the paths of the old ones, as {'batch_stats': …}"
        )
