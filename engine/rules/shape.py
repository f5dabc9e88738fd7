"""Operations that move positions about without computing: reshape, transpose, pad, slice, concatenate, broadcast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from treesurgeon.engine.aligning import cut_at, factor, regroup, segment, unify
from treesurgeon.engine.axes import Axis, Fixed, Size, fresh, pin, product, total
from treesurgeon.engine.jaxprs import Literal
from treesurgeon.engine.rules.base import Axes, Kept, Rule, Site, pin_all, register


def broadcast_axes(site: Site) -> list[Axes]:
    """Operand axes go where `broadcast_dimensions` says; new and widened axes are free: any size serves."""
    source = dict(zip(site.params["broadcast_dimensions"], range(len(site.ins[0])), strict=True))
    shape = site.out_shapes[0]
    out = []
    for d, size in enumerate(shape):
        i = source.get(d)
        kept = i is not None and site.in_shapes[0][i] == size
        out.append(site.ins[0][i] if kept and i is not None else fresh(size))
    return [tuple(out)]


def reshape_axes(site: Site) -> list[Axes]:
    """Merging axes makes a product, splitting one factors it; unchanged axes pass through."""
    order = site.params.get("dimensions") or range(len(site.ins[0]))  # a transpose comes first
    axes, old, new = [site.ins[0][d] for d in order], [site.in_shapes[0][d] for d in order], site.out_shapes[0]
    why = site.why("`reshape` splits this axis where no boundary runs")
    if any(_is(n, 0) for n in old):
        return pin_all(site, "a `reshape` of nothing")
    out: list[Axis] = []
    try:
        for (i0, i), (j0, j) in _runs(old, new):
            out += regroup(product(axes[i0:i]), new[j0:j], why)
    except jax.errors.InconclusiveDimensionOperation:
        return pin_all(site, "a `reshape` of symbolic sizes that cannot be compared")
    return [tuple(out)]


def _is(size: Size, n: int) -> bool:
    return isinstance(size, int) and size == n


def _runs(old: Sequence[Size], new: Sequence[Size]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The shortest runs of old and new axes that hold the same number of positions."""
    i = j = 0
    while i < len(old) and j < len(new):
        i0, j0, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left <= right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        yield (i0, i), (j0, j)
    if i < len(old) or j < len(new):  # what is left over has size 1
        yield (i, len(old)), (j, len(new))


def squeeze_axes(site: Site) -> list[Axes]:
    """Size-1 axes go."""
    rank = len(site.ins[0])
    gone = {d % rank for d in site.params["dimensions"]}
    return [tuple(axis for d, axis in enumerate(site.ins[0]) if d not in gone)]


def expand_axes(site: Site) -> list[Axes]:
    """Size-1 axes come."""
    rank = len(site.out_shapes[0])
    new = {d % rank for d in site.params["dimensions"]}
    rest = iter(site.ins[0])
    return [tuple(fresh(1) if d in new else next(rest) for d in range(rank))]


def transpose_axes(site: Site) -> list[Axes]:
    """Axes change places."""
    return [tuple(site.ins[0][d] for d in site.params["permutation"])]


def concatenate_axes(site: Site) -> list[Axes]:
    """The joined axis is a sum of segments; the others are the same axes."""
    along = site.params["dimension"]
    why = site.why("the operands of `concatenate` split this axis differently")
    for operand in site.ins[1:]:
        for d, axis in enumerate(operand):
            if d != along:
                unify(site.ins[0][d], axis, why)
    joined = total(operand[along] for operand in site.ins)
    return [tuple(joined if d == along else axis for d, axis in enumerate(site.ins[0]))]


def pad_axes(site: Site) -> list[Axes]:
    """Padding adds segments that are free to shrink; interior and negative padding pin."""
    why = site.why("interior or negative padding of this axis")
    out: list[Axis] = []
    for axis, size, (low, high, interior) in zip(
        site.ins[0], site.out_shapes[0], site.params["padding_config"], strict=True
    ):
        low, high = int(low), int(high)
        if not any((low, high, interior)):
            out.append(axis)
        elif interior or low < 0 or high < 0 or not isinstance(size, int):
            pin(axis, why)
            out.append(Fixed(size, why))
        else:
            out.append(total((fresh(low), axis, fresh(high))))
    return [tuple(out)]


def pad_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """As much padding on each side as the plan keeps of it."""
    config = []
    for d, (low, high, interior) in enumerate(site.params["padding_config"]):
        mask = None if min(low, high) < 0 else kept.mask(site.outs[0][d])
        if mask is not None:
            low, high = int(mask[:low].sum()), int(mask[len(mask) - high :].sum())
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


def pad_spreads(site: Site) -> list[int]:
    """All axes, unless the filling is a number: its derivative is the sum over them, less that over the operand."""
    return [] if isinstance(site.eqn.ins[1], Literal) else list(range(len(site.out_shapes[0])))


def slice_axes(site: Site) -> list[Axes]:
    """A contiguous slice is a segment of the axis; one of every k positions is a factor of it."""
    p = site.params
    strides = p["strides"] or (1,) * len(site.ins[0])
    why = site.why("a strided slice of this axis")
    out: list[Axis] = []
    for d, axis in enumerate(site.ins[0]):
        start, limit = p["start_indices"][d], p["limit_indices"][d]
        if site.in_shapes[0][d] == site.out_shapes[0][d]:
            out.append(axis)
        elif strides[d] != 1 and isinstance(axis.size, int) and axis.size == strides[d] * site.out_shapes[0][d]:
            major, minor = factor(axis, strides[d], why)
            pin(minor, why)
            out.append(major)
        elif strides[d] != 1 or not isinstance(axis.size, int):
            pin(axis, why)
            out.append(Fixed(site.out_shapes[0][d], why))
        else:
            out.append(segment(axis, start, limit - start, why))
    return [tuple(out)]


def slice_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """The same segment, counted in kept positions."""
    starts, limits = list(site.params["start_indices"]), list(site.params["limit_indices"])
    strides = site.params["strides"] or (1,) * len(starts)
    for d, axis in enumerate(site.ins[0]):
        mask = kept.mask(axis)
        if mask is not None and strides[d] != 1:
            limits[d] = int(mask.sum())
        elif mask is not None:
            starts[d], limits[d] = int(mask[: starts[d]].sum()), int(mask[: limits[d]].sum())
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def split_axes(site: Site) -> list[Axes]:
    """Consecutive segments of one axis."""
    along, rest = site.params["axis"], site.ins[0][site.params["axis"]]
    out = []
    for size in site.params["sizes"]:
        segment, rest = cut_at(rest, size, site.why("`split` takes this axis apart"))
        out.append(tuple(segment if d == along else axis for d, axis in enumerate(site.ins[0])))
    return out


def split_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """The kept length of each segment."""
    return {"sizes": tuple(kept.size(out[site.params["axis"]]) for out in site.outs)}


def broadcast_spreads(site: Site) -> list[int]:
    """New and widened axes."""
    source = dict(zip(site.params["broadcast_dimensions"], site.in_shapes[0], strict=True))
    return [d for d, size in enumerate(site.out_shapes[0]) if source.get(d, 0) != size]


def stack_axes(site: Site) -> list[Axes]:
    """The operands are one array, stacked along a new axis that stays."""
    along, why = site.params["axis"], site.why("`stack` makes this axis of its operands")
    first = site.ins[0]
    for operand in site.ins[1:]:
        for a, b in zip(first, operand, strict=True):
            unify(a, b, site.why("the operands of `stack` split this axis differently"))
    return [(*first[:along], Fixed(len(site.ins), why), *first[along:])]


def unstack_axes(site: Site) -> list[Axes]:
    """The positions of one axis, which stays, as arrays."""
    along = site.params["axis"]
    pin(site.ins[0][along], site.why("`unstack` makes an array of each position of this axis"))
    return [tuple(axis for d, axis in enumerate(site.ins[0]) if d != along)] * len(site.out_shapes)


def tile_axes(site: Site) -> list[Axes]:
    """A tiled axis is [copies × positions]; any number of copies serves."""
    pairs = zip(site.ins[0], site.params["reps"], strict=True)
    return [tuple(axis if reps == 1 else product((fresh(reps), axis)) for axis, reps in pairs)]


def tile_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """The copies that are kept."""
    pairs = zip(site.ins[0], site.outs[0], strict=True)
    return {"reps": tuple(kept.size(out) // max(kept.size(axis), 1) for axis, out in pairs)}


def tile_spreads(site: Site) -> list[int]:
    """Axes of which there are copies."""
    return [d for d, reps in enumerate(site.params["reps"]) if reps > 1]


def _sizes(name: str):
    def resize(site: Site, kept: Kept) -> dict[str, Any]:
        return {name: tuple(kept.size(axis) for axis in site.outs[0])}

    return resize


register("broadcast_in_dim", Rule(broadcast_axes, resize=_sizes("shape"), spreads=broadcast_spreads))
register("reshape", Rule(reshape_axes, resize=_sizes("new_sizes")))
register("squeeze", Rule(squeeze_axes))
register("expand_dims", Rule(expand_axes))
register("transpose", Rule(transpose_axes))
register("concatenate", Rule(concatenate_axes))
register("pad", Rule(pad_axes, resize=pad_resize, spreads=pad_spreads))
register("slice", Rule(slice_axes, resize=slice_resize))
register("split", Rule(split_axes, resize=split_resize))
register("stack", Rule(stack_axes))
register("unstack", Rule(unstack_axes))
register("tile", Rule(tile_axes, resize=tile_resize, spreads=tile_spreads))

SHAPE_ONLY = frozenset({"reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "copy_p"})
