"""The axis algebra: what an axis is made of, and when two axes are the same.

An axis is an expression over *atoms*:

    Atom              a run of units that nothing has split yet; a prunable group, once tracing is done
    Fixed(n, why)     n positions that stay whatever the plan says
    Sum(parts)        segments laid end to end: what `concatenate` and `pad` make
    Prod(factors)     a row-major product: what merging axes by `reshape` makes
    Shuffled(axis)    the positions of an axis in another order: what `rev` and a constant list of indices make

`aligning.py` states that axes are the same; here are their normal forms.

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

import numpy as np

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
    `picked` parts were split off by a list of positions: which stands first may be another one in a pruned model.
    """

    size: int
    bound: Axis | None = None
    label: str | None = None
    whole: Atom | None = None
    offset: int = 0
    picked: bool = False
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


@dataclass(frozen=True, eq=False)
class Shuffled:
    """The positions of an axis in another order: position i is position `order[i]` of `axis`, int[size]."""

    axis: Axis
    order: np.ndarray

    @property
    def size(self) -> int:
        """As many as the axis has."""
        return len(self.order)


Axis: TypeAlias = Atom | Fixed | Sum | Prod | Shuffled

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
    """A row-major product in normal form: flat, no size-1 factors, neighbouring fixed factors joined, or nothing."""
    flat: list[Axis] = []
    for factor in factors:
        factor = resolve(factor)
        for f in factor.factors if isinstance(factor, Prod) else (factor,):
            if isinstance(f.size, int) and f.size == 0:
                return Fixed(0, WHOLE)
            if isinstance(f.size, int) and f.size == 1:
                continue
            if flat and isinstance(f, Fixed) and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * f.size, flat[-1].why)
            else:
                flat.append(f)
    if not flat:
        return Fixed(1, WHOLE)
    return flat[0] if len(flat) == 1 else Prod(tuple(flat), math.prod(f.size for f in flat))


def shuffled(axis: Axis, order: np.ndarray) -> Axis:
    """An axis in another order, in normal form: segments or factors that only change places are a sum or product."""
    axis, order = resolve(axis), np.asarray(order)
    if isinstance(axis, Shuffled):
        return shuffled(axis.axis, axis.order[order])
    if isinstance(axis, Fixed) or (order == np.arange(len(order))).all():
        return axis
    if isinstance(axis, Prod) and (places := _transposed([f.size for f in axis.factors], order)) is not None:
        return product(axis.factors[k] for k in places)
    if isinstance(axis, Prod) and (grid := separated(order, axis.factors[-1].size)) is not None:
        return product((shuffled(product(axis.factors[:-1]), grid[0]), shuffled(axis.factors[-1], grid[1])))
    if isinstance(axis, Sum):
        starts = np.cumsum([0, *(part.size for part in axis.parts)])
        place = np.searchsorted(starts, order, side="right") - 1
        runs = np.split(order, np.flatnonzero(np.diff(place)) + 1)
        if len(runs) == len(axis.parts):
            found = [int(np.searchsorted(starts, run[0], side="right")) - 1 for run in runs]
            return total(shuffled(axis.parts[k], run - starts[k]) for k, run in zip(found, runs, strict=True))
    return Shuffled(axis, order)


def separated(positions: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows and columns, in rows of `n`, that all these positions are, row by row; None if they are no grid."""
    rows, columns = np.divmod(positions, n)
    wide = int(np.argmax(rows != rows[0])) or len(rows)
    rows, columns = rows[::wide], columns[:wide]
    grid = (rows[:, None] * n + columns).ravel()
    return (rows, columns) if np.array_equal(grid, positions) else None


def _transposed(sizes: list[int], order: np.ndarray) -> list[int] | None:
    """The order of a product's factors whose positions come in this order, if there is one."""
    strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    places: list[int] = []
    for _ in sizes:  # the fastest first
        step = order[math.prod(sizes[k] for k in places)] - order[0]
        if step not in strides or strides.index(step) in places:
            return None
        places.insert(0, strides.index(step))
    same = np.arange(len(order)).reshape(sizes).transpose(places).ravel() == order
    return places if same.all() else None


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
    if isinstance(axis, Shuffled):
        inner = resolve(axis.axis)
        return axis if inner is axis.axis else shuffled(inner, axis.order)
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
    elif isinstance(axis, Shuffled):
        yield from atoms(axis.axis)


def in_order(axis: Axis) -> list[Atom]:
    """The free atoms of an axis in an order that plans do not change: as they stand, or as they were made."""
    found = list(atoms(axis))
    return sorted(found, key=lambda atom: atom.serial) if any(atom.picked for atom in found) else found


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
    if isinstance(axis, Shuffled):
        return fixed_reason(axis.axis)
    for part in axis.parts if isinstance(axis, Sum) else axis.factors if isinstance(axis, Prod) else ():
        if reason := fixed_reason(part):
            return reason
    return None


def spelled(axis: Axis) -> dict[Atom, np.ndarray] | None:
    """The unit of each atom at every position, -1 where it has none: int[size]; None if it has two at one position."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return {axis.whole or axis: axis.offset + np.arange(axis.size)}
    if isinstance(axis, Shuffled):
        inner = spelled(axis.axis)
        return None if inner is None else {atom: units[axis.order] for atom, units in inner.items()}
    parts = axis.parts if isinstance(axis, Sum) else axis.factors if isinstance(axis, Prod) else ()
    out: dict[Atom, np.ndarray] = {}
    start, sizes = 0, [part.size for part in parts]
    for k, part in enumerate(parts):
        inner = spelled(part)
        if inner is None or (isinstance(axis, Prod) and not inner.keys().isdisjoint(out)):
            return None
        for atom, units in inner.items():
            if isinstance(axis, Sum):
                out.setdefault(atom, np.full(axis.size, -1))[start : start + part.size] = units
            else:
                out[atom] = np.tile(np.repeat(units, math.prod(sizes[k + 1 :])), math.prod(sizes[:k]))
        start += part.size
    return out


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
    if isinstance(a, Shuffled) and isinstance(b, Shuffled):
        return bool((a.order == b.order).all()) and same(a.axis, b.axis)
    return False


def is_shuffled(axis: Axis) -> bool:
    """Whether a part of an axis is in another order."""
    axis = resolve(axis)
    parts = axis.parts if isinstance(axis, Sum) else axis.factors if isinstance(axis, Prod) else ()
    return isinstance(axis, Shuffled) or any(map(is_shuffled, parts))
