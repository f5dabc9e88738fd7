"""Solve a program for its axes: run every equation's rule once, and follow the divisors of means.

`sum(x) / 64` and `mean(x)` are the same jaxpr: a sum, then a division by a literal. Where constant-folded dataflow ties
a divisor to a sum over exactly the axes whose sizes multiply to it (or, for deviations from a mean, to it less one:
`ddof=1`), the divisor follows the axes when they shrink.

Values that depend on constants alone are never narrowed themselves: each use of one has axes of its own, and takes the
positions it needs from the wide value. So a table that two places share does not couple them, and what computes a
table needs no rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from jax.core import Tracer

from treesurgeon.engine.aligning import unify
from treesurgeon.engine.axes import Axis, Reason, atoms, fresh
from treesurgeon.engine.constants import Constants
from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.engine.jaxprs import (
    Eqn,
    Literal,
    Operand,
    Program,
    is_float,
    is_key,
    jvp_program,
    own_rule,
    vjp_program,
    wiring,
)
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
SQUARES = {"square", "integer_pow", "mul", "abs", "real", "conj", "select_n"}  # of deviations, with what goes with it


@dataclass(frozen=True)
class Divisor:
    """A divisor (or, `inverse`, a factor 1/n) tied to the number of positions of `axes`, less `ddof`."""

    operand: int
    axes: tuple[Axis, ...]
    ddof: int
    inverse: bool


@dataclass(eq=False)
class Solution:
    """The axes of every value of a program, its divisors by equation, and the solutions of call bodies.

    `constant` marks the values that depend on nothing; `uses[i, k]` are the axes of operand k of equation i where that
    is one of them. `untied` has, by equation, the operand that is a constant and divides or multiplies a sum over some
    axes, and these, where it is not how many positions were summed. `lengths` holds the axis along which a `scan`
    steps, `known` constants that were computed before, `rules` derivative rules that may relate axes in ways of their
    own. `given` are inputs of a body that are constants outside: what depends on them alone is `settled`, and serves as
    constant indices.
    """

    program: Program
    axes: list[Axes]
    constant: list[bool]
    uses: dict[tuple[int, int], Axes] = field(default_factory=dict)
    divisors: dict[int, Divisor] = field(default_factory=dict)
    untied: dict[int, tuple[int, tuple[Axis, ...]]] = field(default_factory=dict)
    bodies: dict[int, tuple[Solution, ...]] = field(default_factory=dict)
    lengths: dict[int, Axis] = field(default_factory=dict)
    known: dict[int, Any] = field(init=False)
    rules: dict[int, Solution] = field(default_factory=dict)
    given: Mapping[int, Callable[[], np.ndarray | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = dict(self.program.consts)

    @cached_property
    def settled(self) -> list[bool]:
        """Which values depend on nothing but what is given."""
        return constants(self.program, self.given) if self.given else self.constant

    @cached_property
    def makers(self) -> dict[int, int]:
        """The equation that computes each value."""
        return {v: i for i, eqn in enumerate(self.program.eqns) for v in eqn.outs}

    def tables(self) -> Constants:
        """The values that depend on nothing, for one run."""
        return Constants(self.program, self.makers, self.known)

    @cached_property
    def at_hand(self) -> Constants:
        """The same, as arrays at hand."""
        return self.tables()

    def of(self, operand: Operand) -> Axes:
        """The axes of a value."""
        return () if isinstance(operand, Literal) else self.axes[operand]

    def operands(self, i: int) -> list[Axes]:
        """The axes of the operands of equation `i`."""
        return [self.uses.get((i, k), self.of(v)) for k, v in enumerate(self.program.eqns[i].ins)]

    def fixed(self, i: int) -> bool:
        """Whether equation `i` computes a constant."""
        outs = self.program.eqns[i].outs
        return bool(outs) and self.constant[outs[0]]

    def site(self, i: int) -> Site:
        """Equation `i` as its rule sees it, results included."""
        return self._site(i, [self.axes[v] for v in self.program.eqns[i].outs])

    def settles(self, operand: Operand) -> bool:
        """Whether an operand is settled."""
        return isinstance(operand, Literal) or self.settled[operand]

    def value(self, operand: Operand) -> np.ndarray | None:
        """An operand that is settled, as an array at hand."""
        if isinstance(operand, Literal):
            return np.asarray(operand.value)
        if not self.settled[operand]:
            return None
        for v in self.at_hand.inputs(operand):
            found = self.given[v]()
            if found is None:
                return None
            self.known[v] = found
        found = self.at_hand.concrete(operand)
        return found if isinstance(found, np.ndarray) else None  # an array of keys is none

    def _site(self, i: int, outs: Sequence[Axes] = ()) -> Site:
        program, eqn = self.program, self.program.eqns[i]
        return Site(
            eqn,
            eqn.params,
            self.operands(i),
            [program.aval(v).shape for v in eqn.ins],
            [program.avals[v].shape for v in eqn.outs],
            outs,
            lambda k: self.value(eqn.ins[k]),
        )


@dataclass
class _Sums:
    """What is a sum, over which axes; what is a mean, what deviates from one, and sums of that; scalar constants."""

    axes: dict[int, tuple[Axis, ...]] = field(default_factory=dict)
    means: set[int] = field(default_factory=set)
    deviations: set[int] = field(default_factory=set)
    spreads: set[int] = field(default_factory=set)
    scalars: dict[int, Any] = field(default_factory=dict)


def solve(
    program: Program,
    inputs: Sequence[Axes],
    rules: bool = True,
    given: Mapping[int, Callable[[], np.ndarray | None]] | None = None,
) -> Solution:
    """Find the axes of every value, given those of the inputs; refines and pins their atoms.

    Without `rules` the derivative rules of custom calls are left aside: a rule may well call its own function. `given`
    has inputs that are constants outside.
    """
    solution = Solution(program, [()] * len(program.avals), constants(program), given=given or {})
    sums = _Sums()
    for v, axes in zip(program.inputs, inputs, strict=True):
        solution.axes[v] = axes
    for v, value in program.consts.items():
        solution.axes[v] = _new(program, v)
        if np.ndim(value) == 0 and not isinstance(value, Tracer):
            sums.scalars[v] = value
    for i, eqn in enumerate(program.eqns):
        if solution.fixed(i):
            for v in eqn.outs:
                solution.axes[v] = _new(program, v)
            _fold(eqn, sums.scalars)
            continue
        for k, v in enumerate(eqn.ins):
            if isinstance(v, int) and solution.constant[v]:
                solution.uses[i, k] = _new(program, v)
        if eqn.bodies:
            outs = _solve_call(solution, i, rules)
        else:
            site = solution._site(i)
            rule = lookup(eqn.name)
            outs = rule.axes(site) if rule else pin_all(site, f"no rule for the primitive `{eqn.name}`")
        for v, axes in zip(eqn.outs, outs, strict=True):
            solution.axes[v] = axes
        _follow_sums(i, eqn, solution, sums)
    return solution


def constants(program: Program, given: Iterable[int] = ()) -> list[bool]:
    """Which values depend on neither inputs, but for those given, nor anything outside the program."""
    out = [False] * len(program.avals)
    for v in (*program.consts, *given):
        out[v] = True
    for eqn in program.eqns:
        fixed = not (eqn.effects or eqn.across) and all(not isinstance(v, int) or out[v] for v in eqn.ins)
        for v in eqn.outs:
            out[v] = fixed
    return out


def _new(program: Program, v: int) -> Axes:
    return tuple(fresh(n) for n in program.avals[v].shape)


def _solve_call(solution: Solution, i: int, rules: bool) -> list[Axes]:
    """The programs inside an equation, solved; what is carried is one value, what branches return is one value."""
    eqn = solution.program.eqns[i]
    wires = wiring(eqn)
    why = Reason(f"the iterations or branches of `{eqn.name}` split this axis differently", eqn.where)
    operands = solution.operands(i)
    inner = [axes[1:] if k in wires.mapped_ins else axes for k, axes in enumerate(operands)]
    bodies = tuple(
        solve(body, [inner[k] for k in ins], rules, _given(solution, eqn, body, ins))
        for body, ins in zip(eqn.bodies, wires.ins, strict=True)
    )
    solution.bodies[i] = bodies
    if rules and own_rule(eqn):
        with suppress(Underivable):  # what has no derivative relates nothing by one
            solution.rules[i] = derivative_rule(eqn, bodies[0])
    outs: list[Axes | None] = [None] * len(eqn.outs)
    for j, k in wires.carried.items():
        outs[j] = operands[k]
    for body, places in zip(bodies, wires.outs, strict=True):
        for v, j in zip(body.program.outputs, places, strict=True):
            if j is None:  # the axes of a loop's test, if any, are the leading ones of all that it carries
                for k in wires.carried.values():
                    join(body.of(v), operands[k][: len(body.of(v))], why)
                continue
            known = outs[j]
            if known is None:
                outs[j] = body.of(v)
            else:
                join(known, body.of(v), why)
    if eqn.name == "scan":
        solution.lengths[i] = along = fresh(eqn.params["length"])
        for k in wires.mapped_ins:
            unify(along, operands[k][0], why)
        for j in wires.mapped_outs:
            outs[j] = (along, *(outs[j] or ()))
    return [axes or () for axes in outs]


def _given(
    solution: Solution, eqn: Eqn, body: Program, ins: Sequence[int]
) -> dict[int, Callable[[], np.ndarray | None]]:
    """The inputs of a body that are the same integers each time it runs, if they are constants outside."""
    wires, out = wiring(eqn), {}
    changing = {*wires.carried.values(), *wires.mapped_ins}
    for v, k in zip(body.inputs, ins, strict=True):
        aval, operand = body.avals[v], eqn.ins[k]
        same = k not in changing and aval.shape == solution.program.aval(operand).shape  # else a device has a part
        if same and not is_float(aval) and not is_key(aval) and solution.settles(operand):
            out[v] = partial(solution.value, operand)
    return out


class Underivable(TreesurgeonError):
    """A derivative rule that raises when it is traced; the message is its own."""


def _traced_rule(trace: Callable[[Eqn, Sequence[int]], Program], eqn: Eqn, chosen: Sequence[int]) -> Program:
    try:
        return trace(eqn, chosen)
    except Exception as error:  # the rule is the user's: anything may come
        raise Underivable(f"{eqn.where}: the derivative rule of `{eqn.name}` raises {error!r}") from error


def derived(eqn: Eqn, body: Solution) -> list[int]:
    """The operands of a custom call that its rule has derivatives for: numbers, but for those that it closes over."""
    first = eqn.params.get("num_consts", 0)
    return [k for k, v in enumerate(body.program.inputs) if k >= first and is_float(body.program.avals[v])]


def derivative_rule(eqn: Eqn, body: Solution) -> Solution:
    """The derivative rule of a custom call, solved: each derivative has the axes of what it is the derivative of."""
    why = Reason(f"the derivative rule of `{eqn.name}` splits this axis differently", eqn.where)
    inputs, outputs = body.program.inputs, body.program.outputs
    axes = [body.axes[v] for v in inputs]
    chosen = derived(eqn, body)
    if eqn.name == "custom_jvp_call":
        rule = solve(_traced_rule(jvp_program, eqn, chosen), [*axes, *(axes[k] for k in chosen)], rules=False)
        of = [*map(body.of, outputs), *map(body.of, outputs)]
    else:
        cotangents = [body.of(v) for v in outputs if is_float(body.program.aval(v))]
        rule = solve(_traced_rule(vjp_program, eqn, chosen), [*axes, *cotangents], rules=False)
        of = [axes[k] for k in chosen]
    for v, known in zip(rule.program.outputs, of, strict=True):
        join(known, rule.of(v), why)
    return rule


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


def _follow_sums(i: int, eqn: Eqn, solution: Solution, found: _Sums) -> None:
    first, out = eqn.ins[0] if eqn.ins else None, eqn.outs[0] if eqn.outs else None
    if not isinstance(out, int):
        return
    summed = found.axes.get(first, ()) if isinstance(first, int) else ()
    read = {v for v in eqn.ins if isinstance(v, int)}
    if eqn.name == "reduce_sum":
        axes = solution.operands(i)[0]
        found.axes[out] = summed + tuple(axes[d] for d in eqn.params["axes"])
        if first in found.deviations or first in found.spreads:
            found.spreads.add(out)
    elif eqn.name in SUM_PASSES:
        if summed:
            found.axes[out] = summed
        for kind in (found.means, found.deviations, found.spreads):
            if first in kind:
                kind.add(out)
    elif (eqn.name == "sub" and found.means & read) or (eqn.name in SQUARES and found.deviations & read):
        found.deviations.add(out)
    elif eqn.name in ("div", "mul") and len(eqn.ins) == 2:
        for at in (1,) if eqn.name == "div" else (0, 1):
            source = eqn.ins[1 - at]
            value = _scalar(eqn.ins[at], found.scalars)
            axes = found.axes.get(source, ()) if isinstance(source, int) else ()
            if axes and value is not None:
                real = np.real(value) if np.imag(value) == 0 else np.nan
                if divisor := _tied(at, axes, float(real), eqn.name == "mul", source in found.spreads):
                    solution.divisors[i] = divisor
                    found.means.add(out)
                else:
                    solution.untied[i] = (at, axes)
                return


def _tied(at: int, axes: tuple[Axis, ...], value: float, inverse: bool, spread: bool) -> Divisor | None:
    size = math.prod(axis.size for axis in axes)
    if not isinstance(size, int) or size < 2 or not any(True for axis in axes for _ in atoms(axis)):
        return None
    if inverse and value == 0.5:  # of squares, energies, divergences; `jnp.mean` divides
        return None
    for ddof in (0, 1) if spread else (0,):
        n = size - ddof
        if math.isclose(value * n, 1.0, rel_tol=1e-6) if inverse else value == n:
            return Divisor(at, axes, ddof, inverse)
    return None


def join(a: Axes, b: Axes, why: Any) -> None:
    """Unify the axes of two arrays of one shape."""
    for x, y in zip(a, b, strict=True):
        unify(x, y, why)
