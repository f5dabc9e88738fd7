"""Solve a program for its axes: run every equation's rule once, and follow the divisors of means.

`sum(x) / 64` and `mean(x)` are the same jaxpr: a sum, then a division by a literal. Where constant-folded dataflow ties
a divisor to a sum over exactly the axes whose sizes multiply to it (or to it less one: `ddof=1`), the divisor follows
the axes when they shrink.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.core import Tracer

from treesurgeon.engine.axes import Axis, atoms, fresh, unify
from treesurgeon.engine.jaxprs import Eqn, Literal, Operand, Program
from treesurgeon.engine.rules import Site, lookup
from treesurgeon.engine.rules.base import Axes, pin_all

SCALAR_OPS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
}
UNIFORM_OPS = {"convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy"}
SUM_PASSES = UNIFORM_OPS | {"transpose", "stop_gradient"}


@dataclass(frozen=True)
class Divisor:
    """A divisor (or, `inverse`, a factor 1/n) tied to the number of positions of `axes`, less `ddof`."""

    operand: int
    axes: tuple[Axis, ...]
    ddof: int
    inverse: bool


@dataclass(eq=False)
class Solution:
    """The axes of every value of a program, its divisors by equation, and the solutions of call bodies."""

    program: Program
    axes: list[Axes]
    divisors: dict[int, Divisor] = field(default_factory=dict)
    bodies: dict[int, Solution] = field(default_factory=dict)

    def of(self, operand: Operand) -> Axes:
        """The axes of an operand."""
        return () if isinstance(operand, Literal) else self.axes[operand]

    def site(self, i: int) -> Site:
        """Equation `i` as its rule sees it, results included."""
        return make_site(self, self.program.eqns[i], outs=[self.axes[v] for v in self.program.eqns[i].outs])


def make_site(solution: Solution, eqn: Eqn, outs: Sequence[Axes] = ()) -> Site:
    """An equation as its rule sees it."""
    program = solution.program
    return Site(
        eqn,
        eqn.params,
        [solution.of(v) for v in eqn.ins],
        [program.aval(v).shape for v in eqn.ins],
        [program.avals[v].shape for v in eqn.outs],
        outs,
    )


def solve(program: Program, inputs: Sequence[Axes]) -> Solution:
    """Find the axes of every value, given those of the inputs; refines and pins their atoms."""
    solution = Solution(program, [()] * len(program.avals))
    sums: dict[int, tuple[Axis, ...]] = {}
    scalars: dict[int, Any] = {}
    for v, axes in zip(program.inputs, inputs, strict=True):
        solution.axes[v] = axes
    for v, value in program.consts.items():
        solution.axes[v] = tuple(fresh(n) for n in program.avals[v].shape)
        if np.ndim(value) == 0 and not isinstance(value, Tracer):
            scalars[v] = value
    for i, eqn in enumerate(program.eqns):
        if eqn.body is not None:
            body = solve(eqn.body, [solution.of(v) for v in eqn.ins])
            solution.bodies[i] = body
            outs = [body.of(v) for v in eqn.body.outputs]
        else:
            site = make_site(solution, eqn)
            rule = lookup(eqn.name)
            outs = rule.axes(site) if rule else pin_all(site, f"no rule for the primitive `{eqn.name}`")
        for v, axes in zip(eqn.outs, outs, strict=True):
            solution.axes[v] = axes
        _fold(eqn, scalars)
        _follow_sums(i, eqn, solution, sums, scalars)
    return solution


def _scalar(operand: Operand, scalars: dict[int, Any]) -> Any:
    return operand.value if isinstance(operand, Literal) else scalars.get(operand)


def _fold(eqn: Eqn, scalars: dict[int, Any]) -> None:
    """Evaluate what is computed from scalar constants alone."""
    if eqn.name not in SCALAR_OPS and eqn.name not in UNIFORM_OPS:
        return
    values = [_scalar(v, scalars) for v in eqn.ins]
    if not values or any(v is None or not np.issubdtype(np.asarray(v).dtype, np.number) for v in values):
        return
    with np.errstate(all="ignore"):
        scalars[eqn.outs[0]] = SCALAR_OPS[eqn.name](*values) if eqn.name in SCALAR_OPS else values[0]


def _follow_sums(
    i: int, eqn: Eqn, solution: Solution, sums: dict[int, tuple[Axis, ...]], scalars: dict[int, Any]
) -> None:
    first = eqn.ins[0] if eqn.ins else None
    summed = sums.get(first, ()) if isinstance(first, int) else ()
    if eqn.name == "reduce_sum":
        axes = solution.of(eqn.ins[0])
        sums[eqn.outs[0]] = summed + tuple(axes[d] for d in eqn.params["axes"])
    elif eqn.name in SUM_PASSES and summed:
        sums[eqn.outs[0]] = summed
    elif eqn.name in ("div", "mul") and len(eqn.ins) == 2:
        for at in (1,) if eqn.name == "div" else (0, 1):
            source = eqn.ins[1 - at]
            value = _scalar(eqn.ins[at], scalars)
            axes = sums.get(source, ()) if isinstance(source, int) else ()
            if axes and value is not None:
                if divisor := _tied(at, axes, float(value), inverse=eqn.name == "mul"):
                    solution.divisors[i] = divisor
                return


def _tied(at: int, axes: tuple[Axis, ...], value: float, inverse: bool) -> Divisor | None:
    size = math.prod(axis.size for axis in axes)
    if not isinstance(size, int) or not any(True for axis in axes for _ in atoms(axis)):
        return None
    for ddof in (0, 1):
        n = size - ddof
        if n > 0 and (math.isclose(value * n, 1.0, rel_tol=1e-6) if inverse else value == n):
            return Divisor(at, axes, ddof, inverse)
    return None


def join(a: Axes, b: Axes, why: Any) -> None:
    """Unify the axes of two arrays of one shape."""
    for x, y in zip(a, b, strict=True):
        unify(x, y, why)
