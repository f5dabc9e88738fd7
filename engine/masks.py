"""From a plan over groups to the positions of an axis: masks, counts, and which unit stands where.

`units` maps a group's name to its mask, bool[size], True = kept; a group that is not named keeps everything. With
`xp=numpy` everything is concrete; with `xp=jax.numpy` it may be traced. `None` stands for True everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from treesurgeon.engine.axes import Atom, Axis, Fixed, Prod, Shuffled, Sum, resolve

Units = Mapping[str, Any]


def axis_mask(axis: Axis, units: Units, xp: Any = np) -> Any:
    """The kept positions of an axis, bool[size], or None where nothing can be removed."""
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        return None
    if isinstance(axis, Atom):
        if axis.label is not None:
            return units.get(axis.label)
        if axis.whole is not None and axis.whole.label is not None:
            mask = units.get(axis.whole.label)
            return None if mask is None else mask[..., axis.offset : axis.offset + axis.size]
        return None
    if isinstance(axis, Shuffled):
        mask = axis_mask(axis.axis, units, xp)
        return None if mask is None else mask[..., axis.order]
    parts = axis.parts if isinstance(axis, Sum) else axis.factors
    masks = [axis_mask(part, units, xp) for part in parts]
    if all(mask is None for mask in masks):
        return None
    full = [xp.ones(part.size, bool) if mask is None else mask for part, mask in zip(parts, masks, strict=True)]
    if isinstance(axis, Sum):
        return xp.concatenate(full)
    out = full[0]
    for mask in full[1:]:
        out = (out[:, None] & mask[None, :]).reshape(-1)
    return out


def axis_key(axis: Axis) -> Hashable:
    """What the mask of an axis depends on: axes of one key keep the same positions."""
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        return axis.size
    if isinstance(axis, Atom):
        whole = axis if axis.label is not None else axis.whole
        return (axis.size, axis.offset, None if whole is None else whole.label)
    if isinstance(axis, Shuffled):
        return (Shuffled, axis_key(axis.axis), axis.order.tobytes())
    parts = axis.parts if isinstance(axis, Sum) else axis.factors
    return (type(axis), *map(axis_key, parts))


def axis_count(axis: Axis, units: Units) -> Any:
    """How many positions of an axis are kept; masks may be stacked along leading axes."""
    axis = resolve(axis)
    if isinstance(axis, Sum):
        return sum(axis_count(part, units) for part in axis.parts)
    if isinstance(axis, Prod):
        return math.prod(axis_count(f, units) for f in axis.factors)
    if isinstance(axis, Shuffled):
        return axis_count(axis.axis, units)
    mask = axis_mask(axis, units)
    if mask is None:
        return axis.size
    return mask.sum(-1)


def unit_index(axis: Axis, label: str) -> np.ndarray:
    """For each position of an axis the unit of group `label` that stands there, -1 where none does: int[size]."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        if axis.label == label:
            return np.arange(axis.size)
        return np.full(axis.size, -1)
    if isinstance(axis, Fixed):
        return np.full(axis.size, -1)
    if isinstance(axis, Sum):
        return np.concatenate([unit_index(part, label) for part in axis.parts])
    if isinstance(axis, Shuffled):
        return unit_index(axis.axis, label)[axis.order]
    out = unit_index(axis.factors[0], label)
    for f in axis.factors[1:]:
        inner = unit_index(f, label)
        out = np.where(out[:, None] >= 0, out[:, None], inner[None, :]).reshape(-1)
    return out


def labels(axis: Axis) -> set[str]:
    """The groups that have units on an axis."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return {axis.label} if axis.label is not None else set()
    parts: tuple[Axis, ...] = ()
    if isinstance(axis, Sum):
        parts = axis.parts
    elif isinstance(axis, Prod):
        parts = axis.factors
    elif isinstance(axis, Shuffled):
        parts = (axis.axis,)
    return set().union(*(labels(part) for part in parts)) if parts else set()


def single_units(axis: Axis) -> list[tuple[str, int] | None] | None:
    """The (group, unit) at each position, None at fixed ones; no list where a position belongs to two groups."""
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        return [None for _ in range(axis.size)] if isinstance(axis.size, int) else None
    if isinstance(axis, Atom):
        return [(axis.label, u) if axis.label is not None else None for u in range(axis.size)]
    if isinstance(axis, Shuffled):
        units = single_units(axis.axis)
        return None if units is None else [units[k] for k in axis.order]
    parts = [single_units(p) for p in (axis.parts if isinstance(axis, Sum) else axis.factors)]
    if any(part is None for part in parts):
        return None
    if isinstance(axis, Sum):
        return [unit for part in parts if part for unit in part]
    out = parts[0] or []
    for part in parts[1:]:
        assert part is not None
        if any(u is not None for u in out) and any(v is not None for v in part):
            return None
        out = [u if u is not None else v for u in out for v in part]
    return out


def alive(contexts: Iterable[Iterable[Any]], bits: Mapping[Any, Any]) -> Any:
    """Whether all blocks of any context are kept, bool[…]; None for always. Blocks without a bit are."""
    out: Any = None
    for context in contexts:
        known = [bits[block] for block in sorted(context) if block in bits]
        if not known:
            return None
        whole = known[0]
        for bit in known[1:]:
            whole = whole & bit
        out = whole if out is None else out | whole
    return out
