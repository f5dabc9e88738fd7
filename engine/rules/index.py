"""Operations that take positions by index: an axis taken whole passes through, one that is indexed is pinned."""

from __future__ import annotations

from typing import Any

from jax import lax

from treesurgeon.engine.axes import Axis, Fixed, pin, unify
from treesurgeon.engine.rules.base import Axes, Kept, Rule, Site, register


def dynamic_slice_axes(site: Site) -> list[Axes]:
    """Axes taken whole pass through; a slice at an index known only at run time pins."""
    why = site.why("a slice at a run-time index of this axis")
    out: list[Axis] = []
    for d, axis in enumerate(site.ins[0]):
        if site.out_shapes[0][d] == site.in_shapes[0][d]:
            out.append(axis)
        else:
            pin(axis, why)
            out.append(Fixed(site.out_shapes[0][d], why))
    return [tuple(out)]


def dynamic_slice_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """The kept length of what is taken."""
    return {"slice_sizes": tuple(kept.size(axis) for axis in site.outs[0])}


def dynamic_update_slice_axes(site: Site) -> list[Axes]:
    """Axes that the update covers whole are the same axes; the others are pinned."""
    why = site.why("an update at a run-time index of this axis")
    operand, update = site.ins[:2]
    for d, (a, b) in enumerate(zip(operand, update, strict=True)):
        if site.in_shapes[0][d] == site.in_shapes[1][d]:
            unify(a, b, why)
        else:
            pin(a, why)
            pin(b, why)
    return [tuple(operand)]


def scatter_axes(site: Site) -> list[Axes]:
    """Window dimensions that the updates cover whole pass through; the others are pinned."""
    numbers = site.params["dimension_numbers"]
    operand, indices, updates = site.ins
    why = site.why("`scatter` indexes this axis")
    pin(indices[-1], why)
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [d for d in range(len(operand)) if d not in gone]
    rest = [k for k in range(len(updates)) if k not in numbers.update_window_dims]
    for axis, k in zip(indices[:-1], rest, strict=True):
        unify(axis, updates[k], why)
    for d, k in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        unify(operand[d], indices[k], why)
    batched = [rest[k] for k in numbers.scatter_indices_batching_dims]
    for k in rest:
        if k not in batched:
            pin(updates[k], why)
    for d, k in zip(windows, numbers.update_window_dims, strict=True):
        if site.in_shapes[0][d] == site.in_shapes[2][k] and d not in numbers.scatter_dims_to_operand_dims:
            unify(operand[d], updates[k], why)
        else:
            pin(operand[d], why)
            pin(updates[k], why)
    for d in numbers.inserted_window_dims:
        pin(operand[d], why)
    return [tuple(operand)]


def gather_axes(site: Site) -> list[Axes]:
    """Window dimensions taken whole pass through; the others, and the index vector, are pinned."""
    numbers = site.params["dimension_numbers"]
    operand, indices = site.ins
    why = site.why("`gather` indexes this axis")
    pin(indices[-1], why)
    for d, k in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unify(operand[d], indices[k], why)
    out: list[Axis | None] = [None] * len(site.out_shapes[0])
    for d, place in zip(_window_dims(site), numbers.offset_dims, strict=True):
        if _whole(site, d):
            out[place] = operand[d]
        else:
            out[place] = Fixed(site.out_shapes[0][place], why)
    for d in range(len(operand)):
        if not _whole(site, d) and d not in numbers.operand_batching_dims:
            pin(operand[d], why)
    batch = iter(indices[:-1])
    return [tuple(next(batch) if axis is None else axis for axis in out)]


def gather_spreads(site: Site) -> list[int]:
    """Axes of the indices: positions there may take the same ones of the operand."""
    numbers = site.params["dimension_numbers"]
    batch = [k for k in range(len(site.out_shapes[0])) if k not in numbers.offset_dims]
    return [place for k, place in enumerate(batch) if k not in numbers.start_indices_batching_dims]


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
    """The kept length of the axes that are taken whole."""
    sizes = list(site.params["slice_sizes"])
    for d, axis in enumerate(site.ins[0]):
        if _whole(site, d):
            sizes[d] = kept.size(axis)
    return {"slice_sizes": tuple(sizes)}


register("dynamic_slice", Rule(dynamic_slice_axes, resize=dynamic_slice_resize))
register("gather", Rule(gather_axes, resize=gather_resize, spreads=gather_spreads))
register("dynamic_update_slice", Rule(dynamic_update_slice_axes))
for _name in ("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"):
    register(_name, Rule(scatter_axes))
