"""Sums of products: `dot_general` and `conv_general_dilated`."""

from __future__ import annotations

import math
from typing import Any

from treesurgeon.engine.aligning import factor, unify
from treesurgeon.engine.axes import Axis, Fixed, pin
from treesurgeon.engine.rules.base import Axes, Contraction, Kept, Rule, Site, pin_all, register


def dot_axes(site: Site) -> list[Axes]:
    """Paired axes are the same axes; the result has batch axes, then the left operand's, then the right's."""
    (lc, rc), (lb, rb) = site.params["dimension_numbers"]
    lhs, rhs = site.ins
    for i, j in [*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)]:
        site.unify(lhs[i], rhs[j], "the two sides of a contraction split this axis differently")
    return [
        tuple(
            [lhs[i] for i in lb]
            + [axis for i, axis in enumerate(lhs) if i not in (*lc, *lb)]
            + [axis for j, axis in enumerate(rhs) if j not in (*rc, *rb)]
        )
    ]


def dot_contraction(site: Site) -> Contraction:
    """Which axes of the operands survive, and where."""
    (lc, rc), (lb, rb) = site.params["dimension_numbers"]
    left = [i for i in range(len(site.in_shapes[0])) if i not in (*lc, *lb)]
    right = [j for j in range(len(site.in_shapes[1])) if j not in (*rc, *rb)]
    lhs_out = {i: k for k, i in enumerate([*lb, *left])}
    rhs_out = {j: k for k, j in enumerate(rb)} | {j: len(lb) + len(left) + k for k, j in enumerate(right)}
    return Contraction(tuple(lc), tuple(rc), lhs_out, rhs_out)


def _conv_dims(site: Site) -> tuple[Any, Any, Any]:
    numbers = site.params["dimension_numbers"]
    return numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec


def conv_axes(site: Site) -> list[Axes]:
    """Input features are [groups × per group] against the kernel's per-group inputs; outputs likewise."""
    if site.params["batch_group_count"] != 1:
        return pin_all(site, "a convolution with batch groups")
    lhs_spec, rhs_spec, out_spec = _conv_dims(site)
    lhs, rhs = site.ins
    groups = site.params["feature_group_count"]
    why = site.why("the kernel and the input of a convolution split this axis differently")
    window = site.why("a convolution slides over this axis")
    features, inputs, outputs = lhs[lhs_spec[1]], rhs[rhs_spec[1]], rhs[rhs_spec[0]]
    if groups == 1:
        unify(features, inputs, why)
    else:
        in_groups, per_group = factor(features, inputs.size, why)
        out_groups, _ = factor(outputs, outputs.size // groups, why)
        unify(per_group, inputs, why)
        unify(in_groups, out_groups, why)
    out: list[Axis] = [Fixed(n, window) for n in site.out_shapes[0]]
    out[out_spec[0]], out[out_spec[1]] = lhs[lhs_spec[0]], outputs
    for i, j in zip(lhs_spec[2:], rhs_spec[2:], strict=True):
        pin(lhs[i], window)
        pin(rhs[j], window)
    return [tuple(out)]


def conv_resize(site: Site, kept: Kept) -> dict[str, Any]:
    """The number of groups that stay."""
    groups = site.params["feature_group_count"]
    if groups == 1:
        return {}
    lhs_spec, rhs_spec, _ = _conv_dims(site)
    features, inputs = kept.size(site.ins[0][lhs_spec[1]]), kept.size(site.ins[1][rhs_spec[1]])
    return {"feature_group_count": features // inputs}


def conv_contraction(site: Site) -> Contraction:
    """The feature axes are contracted, and the window with them."""
    lhs_spec, rhs_spec, out_spec = _conv_dims(site)
    window = math.prod(site.in_shapes[1][j] for j in rhs_spec[2:])
    lhs_out = {lhs_spec[0]: out_spec[0]} | dict(zip(lhs_spec[2:], out_spec[2:], strict=True))
    return Contraction((lhs_spec[1],), (rhs_spec[1],), lhs_out, {rhs_spec[0]: out_spec[1]}, window)


register("dot_general", Rule(dot_axes, contraction=dot_contraction))
register("conv_general_dilated", Rule(conv_axes, resize=conv_resize, contraction=conv_contraction))
