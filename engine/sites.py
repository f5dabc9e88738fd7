"""Where groups are read: contractions of data with a kernel that is one parameter leaf, used once.

There the units of a group can be written as combinations of one another: a map on the activations is the same as a map
on the kernel's axis, so what is found by looking at activations can be folded into the parameters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.analysis import Analysis
from treesurgeon.engine.axes import Atom, Axis, Prod, Shuffled, Sum, atoms, resolve
from treesurgeon.engine.errors import PlanError
from treesurgeon.engine.flow import kernel_leaves, kernel_operand, shared_kernels
from treesurgeon.engine.jaxprs import bind
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.shape import SHAPE_ONLY
from treesurgeon.engine.solve import Solution

MOVES = ("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim")  # what moves the axes of a leaf


class Place(NamedTuple):
    """Where a group stands on an axis: from `start`, `before` × `size` × `after` positions, the units in the middle.

    `order` has the unit at each place in the middle, where that is not its number.
    """

    start: int
    before: int
    size: int
    after: int
    order: tuple[int, ...] | None = None

    @property
    def stop(self) -> int:
        """The first position behind it."""
        return self.start + self.before * self.size * self.after


@dataclass(frozen=True, eq=False)
class Site:
    """One axis of one kernel, and the axis of the data that it is summed with.

    Attributes:
        name: the kernel's leaf and axis, `path[axis]`.
        eqn: the number of the contraction.
        data: its operand that is data.
        dim: the axis of that operand.
        kernel_dim: the axis of the other operand.
        places: where each group stands on the axis.
    """

    name: str
    eqn: int
    data: int
    dim: int
    kernel_dim: int
    places: Mapping[str, Place]


def find_sites(analysis: Analysis, paths: Sequence[str]) -> dict[int, list[Site]]:
    """The sites of a solved function, by contraction."""
    program, solution, kinds = analysis.program, analysis.solution, analysis.kinds
    shared = shared_kernels(program, kinds)
    uses = kernel_uses(analysis)
    out: dict[int, list[Site]] = {}
    for i in live_eqns(analysis):
        eqn = program.eqns[i]
        kernel = kernel_operand(eqn, kinds)
        if kernel is None or not shared.values[kernel]:
            continue
        (leaf, *others) = kinds.leaves[kernel] or (None,)
        if others or leaf is None or uses[leaf] != 1:
            continue
        rule, site = lookup(eqn.name), solution.site(i)
        assert rule is not None
        assert rule.contraction is not None
        contraction = rule.contraction(site)
        data = 0 if eqn.ins[1] == kernel else 1
        pairs = list(zip(contraction.lhs, contraction.rhs, strict=True))
        for dim, kernel_dim in pairs if data == 0 else [(b, a) for a, b in pairs]:
            axis = leaf_axis(solution, kernel, program.inputs[leaf], kernel_dim)
            if site.in_shapes[data][dim] != site.in_shapes[1 - data][kernel_dim] or axis is None:
                continue  # the groups of a grouped convolution are not mixed
            if places := places_of(site.ins[data][dim]):
                found = Site(f"{paths[leaf]}[{axis}]", i, data, dim, kernel_dim, places)
                out.setdefault(i, []).append(found)
    return out


def live_eqns(analysis: Analysis) -> list[int]:
    """The equations that something needs."""
    return [i for i, contexts in enumerate(analysis.uses.eqns) if contexts is not None]


def kernel_uses(analysis: Analysis) -> Counter[int]:
    """In how many equations each leaf is a kernel, by leaf number."""
    program, kinds = analysis.program, analysis.kinds
    return Counter(leaf for i in live_eqns(analysis) for leaf in kernel_leaves(program, i, kinds))


def sampled(count: int, most: int) -> np.ndarray:
    """Numbers of the rows that a fit looks at: all, or `most` of them at random, always the same."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def leaf_axis(solution: Solution, v: int, leaf: int, dim: int, through: Collection[str] = SHAPE_ONLY) -> int | None:
    """The axis of a leaf that is axis `dim` of a value, None where more than `through` lies between them."""
    chain = []
    while v != leaf:
        eqn = solution.program.eqns[solution.makers[v]] if v in solution.makers else None
        if eqn is None or eqn.name not in through or not isinstance(eqn.ins[0], int):
            return None
        if eqn.name in MOVES:
            chain.append(eqn)
        v = eqn.ins[0]
    shape = solution.program.avals[leaf].shape
    if not chain:
        return dim
    if not all(isinstance(n, int) for n in shape):
        return None
    with jax.ensure_compile_time_eval():
        index: Any = jnp.arange(math.prod(shape)).reshape(shape)
        for eqn in reversed(chain):
            (index,) = bind(eqn, eqn.params, [index])
    size = index.shape[dim]
    along = np.arange(size).reshape([size if d == dim else 1 for d in range(index.ndim)])
    for axis, position in enumerate(np.unravel_index(np.asarray(index), shape)):
        if shape[axis] == size and (position == along).all():
            return axis
    return None


def places_of(axis: Axis) -> dict[str, Place]:
    """Where the groups that stand once on an axis, whole, stand."""
    axis = resolve(axis)
    found: list[tuple[str, Place]] = []
    start = 0
    for part in axis.parts if isinstance(axis, Sum) else (axis,):
        if not isinstance(part.size, int):
            return {}
        factors = part.factors if isinstance(part, Prod) else (part,)
        sizes = [f.size for f in factors]
        for k, f in enumerate(factors):
            units = f.axis if isinstance(f, Shuffled) else f
            if isinstance(units, Atom) and units.label is not None:
                order = tuple(f.order.tolist()) if isinstance(f, Shuffled) else None
                place = Place(start, math.prod(sizes[:k]), f.size, math.prod(sizes[k + 1 :]), order)
                found.append((units.label, place))
        start += part.size
    count = Counter(atom.label for atom in atoms(axis))
    return {label: place for label, place in found if count[label] == 1}


def units_last(x: Any, dim: int, place: Place) -> Any:
    """The part of `x` that holds a group, its units in their order as the last axis."""
    block = jax.lax.slice_in_dim(x, place.start, place.stop, axis=dim)
    wide = block.reshape(*x.shape[:dim], place.before, place.size, place.after, *x.shape[dim + 1 :])
    last = jnp.moveaxis(wide, dim + 1, -1)
    return last if place.order is None else last[..., np.argsort(place.order)]


def rows(x: Any, dim: int, place: Place) -> Any:
    """The units of a group as columns: `[everything else, size]`."""
    return units_last(x, dim, place).reshape(-1, place.size)


def apply_map(x: Any, dim: int, place: Place, matrix: Any) -> Any:
    """Replace the units of a group by combinations of them: unit j becomes the sum over i of `matrix[j, i]` unit i."""
    mixed = units_last(x, dim, place) @ matrix.astype(x.dtype).T
    if place.order is not None:
        mixed = mixed[..., np.asarray(place.order)]
    mixed = jnp.moveaxis(mixed, -1, dim + 1)
    mixed = mixed.reshape(*x.shape[:dim], place.stop - place.start, *x.shape[dim + 1 :])
    if place.start == 0 and place.stop == x.shape[dim]:
        return mixed
    head = jax.lax.slice_in_dim(x, 0, place.start, axis=dim)
    tail = jax.lax.slice_in_dim(x, place.stop, x.shape[dim], axis=dim)
    return jnp.concatenate([head, mixed, tail], dim)


def check_maps(maps: Mapping[str, Any], found: Mapping[int, Sequence[Site]]) -> None:
    """Raise a `PlanError` where maps name what is not among the sites, or have another shape."""
    there = {site.name: site.places for sites in found.values() for site in sites}
    for name, known in maps.items():
        for group, matrix in known.items():
            if group not in there.get(name, {}):
                raise PlanError(
                    f"masks['maps'][{name!r}][{group!r}]: this function has no contraction that reads the group there "
                    f"through a kernel of its own"
                )
            size = there[name][group].size
            if np.shape(matrix) != (size, size):
                raise PlanError(
                    f"masks['maps'][{name!r}][{group!r}]: expected shape {(size, size)}, got {np.shape(matrix)}"
                )
