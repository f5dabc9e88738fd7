"""Operations that take positions by index.

An axis taken whole passes through. Constant indices (numbers or lists without repeats) take a segment of an axis, or
some of its positions in an order of their own; indices that are known only at run time pin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from treesurgeon.engine.aligning import regroup, segment, select, unify
from treesurgeon.engine.axes import Axis, Fixed, Reason, Size, pin
from treesurgeon.engine.rules.base import Axes, Kept, Rule, Site, register


class Taken(NamedTuple):
    """What constant indices take.

    Either `starts`: where what is taken of each axis of the operand starts. Or `positions` of axis `dim` of it, one for
    each index: an array of the shape that indices have but for their last axis.
    """

    starts: Mapping[int, int] | None = None
    dim: int = -1
    positions: np.ndarray = np.zeros(0, int)

    def segment(self, axis: Axis, d: int, n: Size, why: Reason) -> Axis | None:
        """The `n` positions that are taken of axis `d`; None if that is not known."""
        if self.starts is None or not isinstance(axis.size, int):
            return None
        return segment(axis, self.starts[d], n, why)

    def picked(self, axis: Axis, why: Reason) -> list[Axis]:
        """What is taken of axis `dim`, an axis for each of the array of indices."""
        return regroup(select(axis, self.positions.reshape(-1), why), self.positions.shape, why)


NOTHING = Taken()


def _taken(
    site: Site, sizes: Mapping[int, Size], indexed: Sequence[int], gone: Sequence[int], batching: Sequence[int]
) -> Taken:
    """What the indices of a `gather` or `scatter` take, where that is constant.

    Args:
        site: the equation; its second operand are the indices.
        sizes: how many positions of each axis of the operand one index takes.
        indexed: the axes that are indexed, in the order of an index.
        gone: those of which it takes one position, which are no axes of what is taken.
        batching: those that go with an axis of the indices.
    """
    *batch, _ = site.in_shapes[1]
    whole = [site.in_shapes[0][d] for d in indexed]
    if batching or not indexed or not all(isinstance(n, int) for n in (*whole, *batch)):
        return NOTHING
    if batch and (len(indexed) != 1 or indexed[0] not in gone or math.prod(batch) > whole[0]):
        return NOTHING
    found = site.known(1)
    if found is None:
        return NOTHING
    last = np.array([n - sizes[d] for n, d in zip(whole, indexed, strict=True)], np.int64)
    if site.params["mode"] == lax.GatherScatterMode.CLIP and found.dtype.kind == "i":
        found = np.clip(found, 0, last)
    if (found < 0).any() or (found > last).any():
        return NOTHING
    found = found.astype(int)
    if not batch:
        return Taken(dict.fromkeys(sizes, 0) | dict(zip(indexed, found.tolist(), strict=True)))
    return Taken(None, indexed[0], found[..., 0]) if len(np.unique(found)) == found.size else NOTHING


def _before(kept: Kept, axis: Axis, position: int) -> int:
    """How many of the positions of an axis before this one are kept."""
    mask = kept.mask(axis)
    return position if mask is None else int(mask[:position].sum())


def _renumber(
    site: Site, kept: Kept, values: list[Any], taken: Taken, indexed: Sequence[int], listed: Sequence[Axis]
) -> list[Any]:
    """The operands with constant indices counted in kept positions; `listed` are the axes of what they pick."""
    operand = site.ins[0]
    if taken.starts is not None:
        new = [_before(kept, operand[d], taken.starts[d]) for d in indexed]
    elif taken is not NOTHING:
        positions, mask = taken.positions, kept.mask(operand[taken.dim])
        for k, axis in enumerate(listed):
            if (here := kept.mask(axis)) is not None:
                positions = np.compress(here, positions, axis=k)
        new = (positions if mask is None else (np.cumsum(mask) - 1)[positions])[..., None]
    else:
        return values
    return [values[0], np.asarray(new, values[1].dtype), *values[2:]]


def _constant_starts(site: Site, first: int, sizes: Sequence[Size]) -> dict[int, int]:
    """Where what is taken of an axis starts, by axis, of those whose start is constant; one a scalar operand."""
    out = {}
    for d, (whole, n) in enumerate(zip(site.in_shapes[0], sizes, strict=True)):
        start = site.known(first + d) if isinstance(whole, int) and isinstance(n, int) and n != whole else None
        if start is not None and (start.dtype.kind == "i" or start <= whole - n):
            out[d] = int(np.clip(start, 0, whole - n))
    return out


def _restart(site: Site, kept: Kept, values: list[Any], first: int, starts: Mapping[int, int]) -> list[Any]:
    """The operands with constant starts counted in kept positions."""
    values = list(values)
    for d, start in starts.items():
        new = _before(kept, site.ins[0][d], start)
        values[first + d] = np.asarray(new, jnp.result_type(values[first + d]))
    return values


def dynamic_slice_axes(site: Site) -> list[Axes]:
    """Axes taken whole pass through; of others a slice at a constant index is a segment, any other pins."""
    sizes, why = site.out_shapes[0], site.why("a slice at a run-time index of this axis")
    starts = _constant_starts(site, 1, sizes)
    out: list[Axis] = []
    for d, axis in enumerate(site.ins[0]):
        if sizes[d] == site.in_shapes[0][d]:
            out.append(axis)
        elif d in starts:
            out.append(segment(axis, starts[d], sizes[d], why))
        else:
            pin(axis, why)
            out.append(Fixed(sizes[d], why))
    return [tuple(out)]


def dynamic_slice_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """The kept length of what is taken."""
    return {"slice_sizes": tuple(kept.size(axis) for axis in site.outs[0])}


def dynamic_slice_renumber(site: Site, kept: Kept, values: list[Any]) -> list[Any]:
    """Constant starts in kept positions."""
    return _restart(site, kept, values, 1, _constant_starts(site, 1, site.out_shapes[0]))


def dynamic_update_slice_axes(site: Site) -> list[Axes]:
    """Axes that the update covers whole are the same axes; at a constant index it covers a segment, any other pins."""
    why = site.why("an update at a run-time index of this axis")
    operand, update = site.ins[:2]
    starts = _constant_starts(site, 2, site.in_shapes[1])
    for d, (a, b) in enumerate(zip(operand, update, strict=True)):
        if site.in_shapes[0][d] == site.in_shapes[1][d]:
            unify(a, b, why)
        elif d in starts:
            unify(segment(a, starts[d], site.in_shapes[1][d], why), b, why)
        else:
            pin(a, why)
            pin(b, why)
    return [tuple(operand)]


def dynamic_update_slice_renumber(site: Site, kept: Kept, values: list[Any]) -> list[Any]:
    """Constant starts in kept positions."""
    return _restart(site, kept, values, 2, _constant_starts(site, 2, site.in_shapes[1]))


def scatter_axes(site: Site) -> list[Axes]:
    """Window dimensions that the updates cover whole pass through, and what constant indices take; others pin."""
    numbers = site.params["dimension_numbers"]
    operand, indices, updates = site.ins
    why, taken = site.why("`scatter` indexes this axis"), _scattered(site)
    pin(indices[-1], why)
    rest = _listed(site)
    if taken is NOTHING:  # constants are taken at the positions where they are needed, see `_renumber`
        for axis, k in zip(indices[:-1], rest, strict=True):
            unify(axis, updates[k], why)
    for d, k in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        unify(operand[d], indices[k], why)
    passed = {rest[k] for k in numbers.scatter_indices_batching_dims}
    windows = _windows(site)
    for d, k in windows.items():
        size = site.in_shapes[2][k]
        if site.in_shapes[0][d] == size and d not in numbers.scatter_dims_to_operand_dims:
            unify(operand[d], updates[k], why)
        elif (part := taken.segment(operand[d], d, size, why)) is not None:
            unify(part, updates[k], why)
        else:
            pin(operand[d], why)
            pin(updates[k], why)
    for d in numbers.inserted_window_dims:
        if d == taken.dim:
            for part, k in zip(taken.picked(operand[d], why), rest, strict=True):
                unify(part, updates[k], why)
            passed.update(rest)
        elif taken.segment(operand[d], d, 1, why) is None:
            pin(operand[d], why)
    for k in rest:
        if k not in passed:
            pin(updates[k], why)
    return [tuple(operand)]


def _windows(site: Site) -> dict[int, int]:
    """The axes of the updates of a `scatter` by those of the operand that they are windows of."""
    numbers = site.params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [d for d in range(len(site.in_shapes[0])) if d not in gone]
    return dict(zip(windows, numbers.update_window_dims, strict=True))


def _listed(site: Site) -> list[int]:
    """The axes of the updates of a `scatter` that are those of the indices."""
    windows = site.params["dimension_numbers"].update_window_dims
    return [k for k in range(len(site.in_shapes[2])) if k not in windows]


def _scattered(site: Site) -> Taken:
    numbers, windows = site.params["dimension_numbers"], _windows(site)
    sizes = {d: site.in_shapes[2][windows[d]] if d in windows else 1 for d in range(len(site.in_shapes[0]))}
    indexed, gone = numbers.scatter_dims_to_operand_dims, numbers.inserted_window_dims
    return _taken(site, sizes, indexed, gone, numbers.operand_batching_dims)


def scatter_renumber(site: Site, kept: Kept, values: list[Any]) -> list[Any]:
    """Constant indices in kept positions."""
    indexed = site.params["dimension_numbers"].scatter_dims_to_operand_dims
    return _renumber(site, kept, values, _scattered(site), indexed, [site.ins[2][k] for k in _listed(site)])


def gather_axes(site: Site) -> list[Axes]:
    """Window dimensions taken whole pass through, and what constant indices take; others, and the index vector, pin."""
    numbers, sizes = site.params["dimension_numbers"], site.params["slice_sizes"]
    operand, indices = site.ins
    why, taken = site.why("`gather` indexes this axis"), _gathered(site)
    pin(indices[-1], why)
    for d, k in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unify(operand[d], indices[k], why)
    out: list[Axis | None] = [None] * len(site.out_shapes[0])
    places = dict(zip(_window_dims(site), numbers.offset_dims, strict=True))
    listed: Sequence[Axis] = indices[:-1]
    for d, axis in enumerate(operand):
        if d in numbers.operand_batching_dims:
            continue
        if d == taken.dim:  # constants are taken at the positions where they are needed, see `_renumber`
            listed = taken.picked(axis, why)
            continue
        part = axis if _whole(site, d) else taken.segment(axis, d, sizes[d], why)
        if part is None:
            pin(axis, why)
        if d in places:
            out[places[d]] = Fixed(sizes[d], why) if part is None else part
    batch = iter(listed)
    return [tuple(next(batch) if axis is None else axis for axis in out)]


def gather_spreads(site: Site) -> list[int]:
    """Axes of the indices: positions there may take the same ones of the operand."""
    numbers = site.params["dimension_numbers"]
    return [p for k, p in enumerate(_batch_places(site)) if k not in numbers.start_indices_batching_dims]


def _batch_places(site: Site) -> list[int]:
    """The axes of the result of a `gather` that are those of the indices."""
    windows = site.params["dimension_numbers"].offset_dims
    return [place for place in range(len(site.out_shapes[0])) if place not in windows]


def _gathered(site: Site) -> Taken:
    numbers = site.params["dimension_numbers"]
    sizes = dict(enumerate(site.params["slice_sizes"]))
    gone = numbers.collapsed_slice_dims
    return _taken(site, sizes, numbers.start_index_map, gone, numbers.operand_batching_dims)


def _window_dims(site: Site) -> list[int]:
    numbers = site.params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    return [d for d in range(len(site.in_shapes[0])) if d not in gone]


def _whole(site: Site, d: int) -> bool:
    numbers = site.params["dimension_numbers"]
    taken = bool(site.params["slice_sizes"][d] == site.in_shapes[0][d]) and d in _window_dims(site)
    clamped = site.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return taken and (clamped or d not in numbers.start_index_map)  # a whole axis has one start that is in bounds


def gather_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """The kept length of the windows."""
    sizes, numbers = list(site.params["slice_sizes"]), site.params["dimension_numbers"]
    for d, place in zip(_window_dims(site), numbers.offset_dims, strict=True):
        sizes[d] = kept.size(site.outs[0][place])
    return {"slice_sizes": tuple(sizes)}


def gather_renumber(site: Site, kept: Kept, values: list[Any]) -> list[Any]:
    """Constant indices in kept positions."""
    indexed = site.params["dimension_numbers"].start_index_map
    return _renumber(site, kept, values, _gathered(site), indexed, [site.outs[0][k] for k in _batch_places(site)])


register("dynamic_slice", Rule(dynamic_slice_axes, resize=dynamic_slice_resize, renumber=dynamic_slice_renumber))
register("gather", Rule(gather_axes, resize=gather_resize, renumber=gather_renumber, spreads=gather_spreads))
register("dynamic_update_slice", Rule(dynamic_update_slice_axes, renumber=dynamic_update_slice_renumber))
for _name in ("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"):
    register(_name, Rule(scatter_axes, renumber=scatter_renumber))
