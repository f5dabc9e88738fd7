"""The axis algebra: what an axis is made of, and when two axes are the same.

An axis is an expression over *atoms*:

    Atom              a run of units that nothing has split yet; a prunable group, once tracing is done
    Fixed(n, why)     n positions that stay whatever the plan says
    Sum(parts)        segments laid end to end: what `concatenate` and `pad` make
    Prod(factors)     a row-major product: what merging axes by `reshape` makes

`unify(a, b)` states that position i of one axis and position i of the other live and die together. It refines
atoms until both sides agree: an atom is bound to whatever stands opposite, split into a sum where a segment ends
inside it, split into a product where a factor does. What cannot be aligned is pinned: bound to `Fixed`, with a
reason. Binding is monotone (an atom is bound once, pinning is final), so the order of the statements changes how
fine the atoms are, never whether the result is safe.

Size-1 factors carry no choice (removing the only unit empties the axis), so they are `Fixed` and drop out of
products; empty parts drop out of sums. Sizes may be symbolic dimensions (`jax.export`): those are `Fixed`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeAlias

Size: TypeAlias = Any  # int, or a symbolic dimension of jax.export


@dataclass(frozen=True)
class Reason:
    """Why an axis is pinned, and the source line that pinned it."""

    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


@dataclass(frozen=True, eq=False)
class Fixed:
    """`size` positions that no plan removes."""

    size: Size
    why: Reason


_serial = itertools.count()


@dataclass(eq=False)
class Atom:
    """A run of `size` interchangeable-looking units. `bound` is what it turned out to be, if anything.

    `label` is set on the atoms of a finished graph's groups; `offset` is the place of a split-off part inside `whole`.
    """

    size: int
    bound: Axis | None = None
    label: str | None = None
    whole: Atom | None = None
    offset: int = 0
    serial: int = field(default_factory=lambda: next(_serial))


@dataclass(frozen=True, eq=False)
class Sum:
    """Segments laid end to end."""

    parts: tuple[Axis, ...]
    size: Size


@dataclass(frozen=True, eq=False)
class Prod:
    """A row-major product of factors, the slowest first."""

    factors: tuple[Axis, ...]
    size: Size


Axis: TypeAlias = Atom | Fixed | Sum | Prod

WHOLE = Reason("a single position carries no choice")
SINGLES = Reason("single positions end to end carry no choice")


def fresh(size: Size) -> Axis:
    """A new axis about which nothing is known yet."""
    if not isinstance(size, Integral):
        return Fixed(size, Reason("a symbolic size"))
    n = int(size)
    return Atom(n) if n > 1 else Fixed(n, WHOLE)


def total(parts: Iterable[Axis]) -> Axis:
    """Segments end to end, in normal form: flat, no empty parts, neighbouring fixed parts joined."""
    flat: list[Axis] = []
    for part in parts:
        part = resolve(part)
        for p in part.parts if isinstance(part, Sum) else (part,):
            if isinstance(p.size, int) and p.size == 0:
                continue
            if flat and isinstance(p, Fixed) and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size + p.size, _telling(flat[-1].why, p.why))
            else:
                flat.append(p)
    if not flat:
        return Fixed(0, WHOLE)
    return flat[0] if len(flat) == 1 else Sum(tuple(flat), sum(p.size for p in flat))


def _telling(a: Reason, b: Reason) -> Reason:
    """Of the reasons of two fixed parts the one that says more."""
    known = [why for why in (a, b) if why not in (WHOLE, SINGLES)]
    return known[0] if known else SINGLES


def product(factors: Iterable[Axis]) -> Axis:
    """A row-major product in normal form: flat, no size-1 factors, neighbouring fixed factors joined."""
    flat: list[Axis] = []
    for factor in factors:
        factor = resolve(factor)
        for f in factor.factors if isinstance(factor, Prod) else (factor,):
            if isinstance(f.size, int) and f.size == 1:
                continue
            if flat and isinstance(f, Fixed) and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * f.size, flat[-1].why)
            else:
                flat.append(f)
    if not flat:
        return Fixed(1, WHOLE)
    return flat[0] if len(flat) == 1 else Prod(tuple(flat), math.prod(f.size for f in flat))


def resolve(axis: Axis) -> Axis:
    """The axis with every bound atom replaced by what it is bound to."""
    if isinstance(axis, Atom):
        if axis.bound is None:
            return axis
        axis.bound = resolve(axis.bound)
        return axis.bound
    if isinstance(axis, Sum):
        parts = [resolve(p) for p in axis.parts]
        return axis if all(p is q for p, q in zip(parts, axis.parts, strict=True)) else total(parts)
    if isinstance(axis, Prod):
        factors = [resolve(f) for f in axis.factors]
        return axis if all(p is q for p, q in zip(factors, axis.factors, strict=True)) else product(factors)
    return axis


def atoms(axis: Axis) -> Iterator[Atom]:
    """The free atoms of an axis, in order, with repeats."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        yield axis
    elif isinstance(axis, Sum):
        for part in axis.parts:
            yield from atoms(part)
    elif isinstance(axis, Prod):
        for factor in axis.factors:
            yield from atoms(factor)


def pin(axis: Axis, why: Reason) -> None:
    """Make every position of the axis stay, for the reason given."""
    for atom in list(atoms(axis)):
        if atom.bound is None:
            atom.bound = Fixed(atom.size, why)


def fixed_reason(axis: Axis) -> Reason | None:
    """The reason of the first fixed part, if the axis has one."""
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        return axis.why
    for part in axis.parts if isinstance(axis, Sum) else axis.factors if isinstance(axis, Prod) else ():
        if reason := fixed_reason(part):
            return reason
    return None


def same(a: Axis, b: Axis) -> bool:
    """Whether two axes are known to keep the same positions under every plan."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return True
    if isinstance(a, Fixed) and isinstance(b, Fixed):
        return bool(a.size == b.size)
    if isinstance(a, Sum) and isinstance(b, Sum) and len(a.parts) == len(b.parts):
        return all(same(p, q) for p, q in zip(a.parts, b.parts, strict=True))
    if isinstance(a, Prod) and isinstance(b, Prod) and len(a.factors) == len(b.factors):
        return all(same(p, q) for p, q in zip(a.factors, b.factors, strict=True))
    return False


def unify(a: Axis, b: Axis, why: Reason) -> None:
    """State that two axes of equal size keep the same positions; `why` is the reason given where that pins."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if isinstance(a, Fixed):
        pin(b, a.why)
    elif isinstance(b, Fixed):
        pin(a, b.why)
    elif isinstance(a, Atom) and isinstance(b, Atom):
        older, newer = (a, b) if _rank(a) <= _rank(b) else (b, a)
        newer.bound = older
    elif isinstance(a, Atom):
        a.bound = b
    elif isinstance(b, Atom):
        b.bound = a
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _unify_sums(a, b, why)
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _unify_products(a, b, why)
    else:
        series, grid = (a, b) if isinstance(a, Sum) else (b, a)
        assert isinstance(grid, Prod)
        major, minor = factor(series, math.prod(f.size for f in grid.factors[1:]), why)
        unify(minor, product(grid.factors[1:]), why)
        unify(major, grid.factors[0], why)


def _rank(atom: Atom) -> tuple[bool, int]:
    return (atom.label is None and atom.whole is None, atom.serial)


def _unify_sums(a: Sum, b: Sum, why: Reason) -> None:
    left, right = list(a.parts[::-1]), list(b.parts[::-1])
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if x.size > y.size:
            x, rest = cut_at(x, y.size, why)
            left.append(rest)
        elif y.size > x.size:
            y, rest = cut_at(y, x.size, why)
            right.append(rest)
        unify(x, y, why)


def _unify_products(a: Prod, b: Prod, why: Reason) -> None:
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if x.size > y.size and x.size % y.size == 0:
            rest, x = factor(x, y.size, why)
            left.append(rest)
        elif y.size > x.size and y.size % x.size == 0:
            rest, y = factor(y, x.size, why)
            right.append(rest)
        elif x.size != y.size:
            for rest in (x, y, *left, *right):
                pin(rest, why)
            return
        unify(x, y, why)


def cut_at(axis: Axis, n: int, why: Reason) -> tuple[Axis, Axis]:
    """The first `n` positions of an axis and the others, 0 <= n <= size; splits atoms where it must.

    Only the source line of `why` is used: a piece of one position is pinned, and so is a row that is cut in two.
    """
    axis = resolve(axis)
    n = int(n) if isinstance(n, Integral) else n  # `jnp.split` passes NumPy integers
    if n == 0 or n == axis.size:
        nothing = Fixed(0, WHOLE)
        return (nothing, axis) if n == 0 else (axis, nothing)
    if isinstance(axis, Fixed):
        return Fixed(n, axis.why), Fixed(axis.size - n, axis.why)
    if isinstance(axis, Atom):
        head, tail = _part(axis, 0, n, why), _part(axis, n, axis.size - n, why)
        axis.bound = total((head, tail))
        return head, tail
    if isinstance(axis, Sum):
        before: list[Axis] = []
        for i, part in enumerate(axis.parts):
            if n <= part.size:
                head, tail = cut_at(part, n, why)
                return total([*before, head]), total([tail, *axis.parts[i + 1 :]])
            n -= part.size
            before.append(part)
        raise AssertionError("cut beyond the end of an axis")
    major, minor = axis.factors[0], product(axis.factors[1:])
    row, column = divmod(n, minor.size)
    above, rest = cut_at(major, row, why)
    if column == 0:
        return product((above, minor)), product((rest, minor))
    at, below = cut_at(rest, 1, why)
    pin(at, Reason("a row of it was cut in two", why.where))
    head, tail = cut_at(minor, column, why)
    return total((product((above, minor)), head)), total((tail, product((below, minor))))


def _part(atom: Atom, offset: int, size: int, why: Reason) -> Axis:
    if size == 1:
        return Fixed(1, Reason("its positions were split one by one", why.where))
    if atom.label is not None:
        return Atom(size, whole=atom, offset=offset)
    if atom.whole is not None:
        return Atom(size, whole=atom.whole, offset=atom.offset + offset)
    return Atom(size)


def factor(axis: Axis, n: int, why: Reason) -> tuple[Axis, Axis]:
    """The axis as (major, minor) with a minor factor of size `n`; pins what does not divide so."""
    axis = resolve(axis)
    if n == axis.size:
        return Fixed(1, WHOLE), axis
    if n == 1:
        return axis, Fixed(1, WHOLE)
    if isinstance(axis, Atom):
        major, minor = fresh(axis.size // n), fresh(n)
        if axis.size % n == 0:
            axis.bound = product((major, minor))
            return major, minor
    elif isinstance(axis, Sum) and axis.size % n == 0:
        return _factor_sum(axis, n, why)
    elif isinstance(axis, Prod):
        last, others = axis.factors[-1], product(axis.factors[:-1])
        if n % last.size == 0:
            major, minor = factor(others, n // last.size, why)
            return major, product((minor, last))
        if last.size % n == 0:
            major, minor = factor(last, n, why)
            return product((others, major)), minor
    pin(axis, why)
    return Fixed(axis.size // n, why), Fixed(n, why)


def _factor_sum(axis: Sum, n: int, why: Reason) -> tuple[Axis, Axis]:
    if all(part.size % n == 0 for part in axis.parts):
        pairs = [factor(part, n, why) for part in axis.parts]
        for _, minor in pairs[1:]:
            unify(pairs[0][1], minor, why)
        return total(major for major, _ in pairs), resolve(pairs[0][1])
    rows: list[Axis] = []
    rest: Axis = axis
    while rest.size:
        row, rest = cut_at(rest, n, why)
        rows.append(row)
    for row in rows[1:]:
        unify(rows[0], row, why)
    return Fixed(len(rows), why), resolve(rows[0])
