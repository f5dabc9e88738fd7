"""Operations that run along axes: reductions, scans, windows, and those whose result is a position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from treesurgeon.engine.aligning import unify
from treesurgeon.engine.axes import Axis, Fixed, fresh, pin, shuffled
from treesurgeon.engine.rules.base import Axes, Mix, Rule, Site, fixed_axes, pin_all, register


def reduction(identity: str) -> Rule:
    """The axes `axes` go; removed positions are given the reduction's identity first."""

    def axes(site: Site) -> list[Axes]:
        gone = site.params["axes"]
        return [tuple(axis for d, axis in enumerate(site.ins[0]) if d not in gone)]

    return Rule(axes, mixes=lambda site: [Mix(0, tuple(site.params["axes"]), identity)])


def pinning(dims: Callable[[Site], tuple[int, ...]], text: str, drop: bool = False) -> Rule:
    """Axes that the operation cannot lose positions of; the others pass through (all operands alike)."""

    def axes(site: Site) -> list[Axes]:
        fast = dims(site)
        why = site.why(text)
        first = site.ins[0]
        for operand in site.ins[1:]:
            for a, b in zip(first, operand, strict=True):
                unify(a, b, site.why(f"the operands of `{site.eqn.name}` split this axis differently"))
        for d in fast:
            pin(first[d], why)
        out = tuple(axis for d, axis in enumerate(first) if not (drop and d in fast))
        return [
            tuple(a if shape[d] == a.size else Fixed(shape[d], why) for d, a in enumerate(out))
            for shape in site.out_shapes
        ]

    return Rule(axes)


def window_axes(site: Site) -> list[Axes]:
    """Windows slide over some axes, which are pinned; an axis with a trivial window passes through."""
    p = site.params
    why = site.why("a window slides over this axis")
    rank = len(site.out_shapes[0])
    base = p.get("base_dilation", (1,) * rank)
    plain = [
        p["window_dimensions"][d] == 1
        and p["window_strides"][d] == 1
        and base[d] == 1
        and tuple(p["padding"][d]) == (0, 0)
        for d in range(rank)
    ]
    out: list[Axis] = []
    for d, size in enumerate(site.out_shapes[0]):
        if plain[d]:
            out.append(site.ins[0][d])
        else:
            pin(site.ins[0][d], why)
            out.append(Fixed(size, why))
    return [tuple(out)]


def general_window_axes(site: Site) -> list[Axes]:
    """`reduce_window` with a computation of the user's: one array and its initial value, or all pinned."""
    return window_axes(site) if len(site.out_shapes) == 1 else pin_all(site, "a window over several arrays")


def rev_axes(site: Site) -> list[Axes]:
    """The axes `dimensions` run backwards."""
    why, out = site.why("`rev` turns this axis round"), list(site.ins[0])
    for d in site.params["dimensions"]:
        if isinstance(out[d].size, int):
            out[d] = shuffled(out[d], np.arange(out[d].size)[::-1])
        else:
            pin(out[d], why)
    return [tuple(out)]


def cumulative(identity: str) -> Rule:
    """Running sums and the like: removed positions are given the identity, and the results there are not read."""

    def axes(site: Site) -> list[Axes]:
        return [tuple(site.ins[0])]

    def along(site: Site) -> tuple[int, ...]:
        return (site.params["axis"],)

    return Rule(axes, mixes=lambda site: [Mix(0, along(site), identity)], spreads=along)


def fft_axes(site: Site) -> list[Axes]:
    """The transformed axes, the last ones, stay."""
    why, n = site.why("a Fourier transform of this axis"), len(site.params["fft_lengths"])
    lead = len(site.ins[0]) - n
    for axis in site.ins[0][lead:]:
        pin(axis, why)
    return [(*site.ins[0][:lead], *fixed_axes(site.out_shapes[0][lead:], why))]


def random_axes(site: Site) -> list[Axes]:
    """Noise stands at positions of the dense array: drawn wide, then sliced, so kept units keep their noise."""
    shape = site.out_shapes[0]
    out = [fresh(n) for n in shape]
    why = site.why(f"the operands of `{site.eqn.name}` split this axis differently")
    for operand in site.ins:  # an array of keys, and what goes with each
        for d, axis in enumerate(operand):
            if d < len(shape) and axis.size == shape[d]:
                unify(out[d], axis, why)
            elif axis.size != 1:
                pin(axis, site.why(f"`{site.eqn.name}` makes one key of this axis"))
    return [tuple(out)]


for _name, _identity in {
    "reduce_sum": "zero",
    "reduce_prod": "one",
    "reduce_max": "lowest",
    "reduce_min": "highest",
    "reduce_and": "bits",
    "reduce_or": "zero",
    "reduce_xor": "zero",
}.items():
    register(_name, reduction(_identity))
for _name in ("argmax", "argmin"):
    register(
        _name,
        pinning(lambda s: tuple(s.params["axes"]), f"`{_name}` yields positions of this axis", drop=True),
    )
for _name, _identity in {
    "cumsum": "zero",
    "cumprod": "one",
    "cummax": "lowest",
    "cummin": "highest",
    "cumlogsumexp": "lowest",
}.items():
    register(_name, cumulative(_identity))
register("top_k", pinning(lambda s: (s.params.get("axis", len(s.ins[0]) - 1),), "`top_k` picks positions of this axis"))
register("fft", Rule(fft_axes))
register("sort", pinning(lambda s: (s.params["dimension"],), "`sort` runs along this axis"))
register("rev", Rule(rev_axes))
for _name in ("reduce_window_sum", "reduce_window_max", "reduce_window_min"):
    register(_name, Rule(window_axes))
register("reduce_window", Rule(general_window_axes))
for _name in ("random_bits", "random_split", "random_fold_in", "random_wrap", "random_unwrap", "random_clone"):
    register(_name, Rule(random_axes, positional=True))
