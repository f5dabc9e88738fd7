"""Stating that axes are the same, and taking them apart.

`unify(a, b)` states that position i of one axis and position i of the other live and die together. It refines
atoms until both sides agree: an atom is bound to whatever stands opposite, split into a sum where a segment ends
inside it, split into a product where a factor does. What cannot be aligned is pinned: bound to `Fixed`, with a
reason. Binding is monotone (an atom is bound once, pinning is final), so the order of the statements changes how
fine the atoms are, never whether the result is safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np

from treesurgeon.engine.axes import (
    WHOLE,
    Atom,
    Axis,
    Fixed,
    Prod,
    Reason,
    Shuffled,
    Size,
    Sum,
    atoms,
    fresh,
    is_shuffled,
    pin,
    product,
    resolve,
    separated,
    shuffled,
    spelled,
    total,
)


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
        _bind(a, b, why)
    elif isinstance(b, Atom):
        _bind(b, a, why)
    elif (is_shuffled(a) or is_shuffled(b)) and _alike(a, b):
        return
    elif isinstance(a, Shuffled):
        _unify_shuffled(a, b, why)
    elif isinstance(b, Shuffled):
        _unify_shuffled(b, a, why)
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


def _bind(atom: Atom, axis: Axis, why: Reason) -> None:
    if any(other is atom for other in atoms(axis)):  # its units in another order, or twice
        pin(axis, why)
    else:
        atom.bound = axis


def _alike(a: Axis, b: Axis) -> bool:
    """Whether the same units stand at the same positions, however the axes are written."""
    left, right = (spelled(axis) if isinstance(axis.size, int) else None for axis in (a, b))
    if left is None or right is None or left.keys() != right.keys():
        return False
    return all((units == right[atom]).all() for atom, units in left.items())


def _unify_shuffled(a: Shuffled, b: Axis, why: Reason) -> None:
    if isinstance(b, Shuffled) and (a.order == b.order).all():
        unify(a.axis, b.axis, why)
    elif isinstance(a.axis, Atom):
        _bind(a.axis, shuffled(b, np.argsort(a.order)), why)
    elif isinstance(b, Shuffled) and isinstance(b.axis, Atom):
        _bind(b.axis, shuffled(a, np.argsort(b.order)), why)
    elif isinstance(b, Sum):
        _unify_sums(b, a, why)
    elif isinstance(a.axis, Sum):
        _unify_sums(a.axis, shuffled(b, np.argsort(a.order)), why)
    else:
        pin(a, why)
        pin(b, why)


def _unify_sums(a: Sum, b: Axis, why: Reason) -> None:
    left, right = list(a.parts[::-1]), list(b.parts[::-1] if isinstance(b, Sum) else (b,))
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
    if isinstance(axis, Shuffled):
        return select(axis, np.arange(n), why), select(axis, np.arange(n, axis.size), why)
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


def segment(axis: Axis, start: int, n: int, why: Reason) -> Axis:
    """`n` positions of an axis from `start` on; see `cut_at`."""
    head, _ = cut_at(axis, start + n, why)
    return cut_at(head, start, why)[1]


def select(axis: Axis, positions: np.ndarray, why: Reason) -> Axis:
    """These positions of an axis in this order, none of them twice; splits atoms where it must, or pins them.

    An atom is split into those and the others in this order wherever they stand, so that a pruned model's groups come
    in the order of the dense one's.
    """
    axis = resolve(axis)
    n = len(positions)
    if n == 0:
        return Fixed(0, WHOLE)
    if isinstance(axis, Shuffled):
        return select(axis.axis, axis.order[positions], why)
    if isinstance(axis, Fixed):
        return Fixed(n, axis.why)
    if n == axis.size:
        return shuffled(axis, positions)
    if isinstance(axis, Sum):
        return _select_sum(axis, positions, why)
    if isinstance(axis, Prod) and (grid := separated(positions, axis.factors[-1].size)) is not None:
        return product((select(product(axis.factors[:-1]), grid[0], why), select(axis.factors[-1], grid[1], why)))
    if isinstance(axis, Atom) and axis.label is None and axis.whole is None:
        rest = np.setdiff1d(np.arange(axis.size), positions)
        chosen, others = (_part(axis, 0, size, why) for size in (n, len(rest)))
        for part in (chosen, others):
            if isinstance(part, Atom):
                part.picked = True
        axis.bound = shuffled(total((chosen, others)), np.argsort(np.concatenate([positions, rest])))
        return chosen
    if (positions == np.arange(positions[0], positions[0] + n)).all():
        return segment(axis, positions[0], n, why)
    pin(axis, why)
    return Fixed(n, why)


def _select_sum(axis: Sum, positions: np.ndarray, why: Reason) -> Axis:
    parts: list[Axis] = []
    places = np.empty(len(positions), int)
    start = done = 0
    for part in axis.parts:
        here = np.flatnonzero((positions >= start) & (positions < start + part.size))
        places[here] = done + np.arange(len(here))
        parts.append(select(part, positions[here] - start, why))
        start, done = start + part.size, done + len(here)
    return shuffled(total(parts), places)


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
    elif isinstance(axis, Shuffled) and isinstance(axis.axis, Atom) and axis.size % n == 0:
        major, minor = fresh(axis.size // n), fresh(n)
        axis.axis.bound = shuffled(product((major, minor)), np.argsort(axis.order))
        return major, minor
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


def regroup(merged: Axis, sizes: Sequence[Size], why: Reason) -> list[Axis]:
    """A product of axes as one axis for each of these sizes; pins what does not divide so."""
    if len(sizes) < 2:
        return [merged] * len(sizes)
    if not all(isinstance(n, int) for n in sizes):
        pin(merged, why)
        return [Fixed(n, why) for n in sizes]
    pieces: list[Axis] = []
    for size in reversed(sizes[1:]):
        merged, minor = factor(merged, size, why)
        pieces.append(minor)
    return [merged, *reversed(pieces)]
