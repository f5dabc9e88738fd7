"""Running averages of batch statistics, of any model: which leaves they are, and new values for them.

No layer needs to be known by name. A training step maps an average to `old · m + new · (1 - m)`, which is linear in
the old value: its derivative is the momentum `m`, and one step from zero, divided by `1 - m`, is the statistic of the
batch. A finite step must show the same slope, since a derivative may have been stopped on the way.
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
        args: the other arguments of `train`, such as images `[N, H, W, C]` and a key. Values that are all alike,
            as zeros are, may leave an average as it is: it then counts as frozen.

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
    averaged = {name: at[name] for name in names if jnp.issubdtype(leaves[at[name]].dtype, jnp.floating)}
    try:
        found = _momenta(train, structure, list(map(_widened, leaves)), averaged, args)
    except TypeError:  # it insists on its own dtypes, as a loop does that carries an average
        found = _momenta(train, structure, leaves, averaged, args)
    return {name: found[name] for name in averaged if name in found}


def _widened(leaf: Any) -> Any:
    """A leaf with enough bits for a momentum."""
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if narrow else leaf


def _momenta(train: Train, structure: Any, leaves: list[Any], at: Mapping[str, int], args: tuple) -> dict[str, float]:
    """The momenta of leaves, of which `at` says which are averages; each on its own where together they are none."""
    floats = {name: leaves[i] for name, i in at.items()}

    @jax.jit
    def respond(given: dict[str, Any], moves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        def update(given: dict[str, Any]) -> Any:
            new = list(leaves)
            for name, value in given.items():
                new[at[name]] = value
            return train(jax.tree_util.tree_unflatten(structure, new), *args)[1]

        new, slopes = (named_leaves(tree) for tree in jax.jvp(update, (given,), (moves,)))
        return {name: new[name] for name in given}, {name: slopes[name] for name in given}

    def following(moved: Collection[str]) -> dict[str, float]:
        """Those of the moved leaves that follow their own old values alone, while these all move."""
        ones = {name: jnp.full_like(leaf, name in moved) for name, leaf in floats.items()}
        steps = {name: one * (1 + jnp.abs(floats[name]).max(initial=0)) for name, one in ones.items()}
        new, slopes = respond(floats, ones)
        after, _ = respond(jax.tree.map(jnp.add, floats, steps), ones)
        each = {name: _momentum(slopes[name], new[name], after[name], steps[name]) for name in moved}
        return {name: momentum for name, momentum in each.items() if momentum is not None}

    out = following(floats)
    new, _ = respond(floats, jax.tree.map(jnp.zeros_like, floats))
    moving = [name for name in floats if not np.array_equal(new[name], floats[name], equal_nan=True)]
    if len(moving) < len(floats):  # some are as they were: frozen, so that what comes behind reads them
        out |= following(moving)
    for name in moving:  # what reads another of them
        if name not in out:
            out |= following([name])
    return out


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
    allowed = 1e-3 * step.max() + 1e-5 * np.abs(new).max()  # float32's rounding, of the step and of the value
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
