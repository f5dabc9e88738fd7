"""Operations that act on each position alone: the axes of all operands are the same axes.

Operands broadcast implicitly: a scalar or a size-1 axis says nothing about the axis it meets.
"""

from __future__ import annotations

from treesurgeon.engine.axes import WHOLE, Fixed, pin
from treesurgeon.engine.rules.base import Axes, Rule, Site, fixed_axes, register

NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul name ne neg
    nextafter not one_minus_square optimization_barrier or polygamma polynomial population_count pow pvary real
    reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh threefry2x32 xor
    zeta
""".split()


def axes(site: Site) -> list[Axes]:
    """Unify, dimension by dimension, every operand axis that is not broadcast."""
    if len(site.out_shapes) > 1 and site.eqn.name != "threefry2x32":  # each operand on its own: optimization_barrier
        return [tuple(operand) for operand in site.ins]
    out = []
    for d, size in enumerate(site.out_shapes[0]):
        met = [
            operand[d]
            for operand, shape in zip(site.ins, site.in_shapes, strict=True)
            if shape and not (isinstance(shape[d], int) and shape[d] == 1)
        ]
        for other in met[1:]:
            site.unify(met[0], other, f"the two sides of `{site.eqn.name}` split this axis differently")
        out.append(met[0] if met else Fixed(size, WHOLE))
    return [tuple(out)] * len(site.out_shapes)


def bitcast_axes(site: Site) -> list[Axes]:
    """Between widths, the last axis holds the pieces of one number: it stays."""
    whole, shape = site.ins[0], site.out_shapes[0]
    if len(shape) < len(whole):
        pin(whole[-1], site.why("`bitcast_convert_type` joins this axis into one number"))
    return [(*whole[: len(shape)], *fixed_axes(shape[len(whole) :], site.why("the bytes of a number")))]


def across_axes(site: Site) -> list[Axes]:
    """Over devices each position is reduced alone; an axis that `vmap` gave a name to is reduced, and pinned."""
    mapped = {axis for axis in site.params["axes"] if isinstance(axis, int)}
    for operand in site.ins:
        for d in mapped:
            pin(operand[d], site.why(f"`{site.eqn.name}` reduces this axis"))
    return [tuple(axis for d, axis in enumerate(operand) if d not in mapped) for operand in site.ins]


for _name in NAMES:
    register(_name, Rule(axes, broadcasts=True))
register("bitcast_convert_type", Rule(bitcast_axes))
for _name in ("psum", "psum_invariant", "pmax", "pmin"):
    register(_name, Rule(across_axes))
