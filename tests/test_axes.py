"""The axis algebra against an oracle that enumerates positions.

A drawn program makes axes from atoms by joining, cutting, merging and factoring, and states that pairs are the same.
The oracle keeps, for every axis, what its mask must be in terms of the masks of the axes it was made from.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.engine import aligning
from treesurgeon.engine import axes as ax
from treesurgeon.engine.masks import axis_count, axis_mask, labels, single_units, unit_index

WHY = ax.Reason("a test", "here.py:1")
quiet = settings(deadline=None, derandomize=True, database=None, max_examples=300)


class Drawn:
    """Axes, and what must hold between them once all statements are made; `steps` are the statements."""

    def __init__(self, axes):
        self.axes = list(axes)
        self.claims = []  # (left, right): functions of `mask` that must agree
        self.steps, self.given = [], len(self.axes)

    def add(self, axis, claim=None):
        self.axes.append(axis)
        if claim is not None:
            self.claims.append((lambda mask: mask(axis), claim))

    def do(self, op, *args):
        """A statement about axes, which are given by number."""
        self.steps.append((op, *args))
        getattr(self, op)(*(self.axes[k] if isinstance(k, int) else k for k in args))

    def concat(self, a, b):
        self.add(ax.total([a, b]), lambda mask: np.concatenate([mask(a), mask(b)]))

    def pad(self, a, sizes):
        low, high = map(ax.fresh, sizes)
        self.add(ax.total([low, a, high]), lambda mask: np.concatenate([mask(low), mask(a), mask(high)]))

    def cut(self, a, at):
        (n,) = at
        head, tail = aligning.cut_at(a, n, WHY)
        self.add(head, lambda mask: mask(a)[:n])
        self.add(tail, lambda mask: mask(a)[n:])

    def shuffle(self, a, order):
        self.add(ax.shuffled(a, order), lambda mask: mask(a)[order])

    def select(self, a, chosen):
        self.add(aligning.select(a, chosen, WHY), lambda mask: mask(a)[chosen])

    def merge(self, a, b):
        self.add(ax.product([a, b]), lambda mask: outer(mask(a), mask(b)))

    def factor(self, a, by):
        major, minor = aligning.factor(a, *by, WHY)
        self.add(major)
        self.add(minor)
        self.claims.append((lambda mask: mask(a), lambda mask: outer(mask(major), mask(minor))))

    def unify(self, a, b):
        aligning.unify(a, b, WHY)
        self.claims.append((lambda mask: mask(a), lambda mask: mask(b)))

    def pin(self, a):
        ax.pin(a, WHY)


def outer(a, b):
    return (a[:, None] & b[None, :]).reshape(-1)


@st.composite
def programs(draw, products=True):
    p = Drawn(ax.fresh(draw(st.integers(1, 8))) for _ in range(draw(st.integers(2, 4))))
    ops = ["concat", "cut", "pad", "unify", "unify", "pin", "shuffle", "select"]
    ops += ["merge", "factor", "unify"] if products else []
    for op in draw(st.lists(st.sampled_from(ops), max_size=9)):
        a, b = (draw(st.integers(0, len(p.axes) - 1)) for _ in range(2))
        n, m = p.axes[a].size, p.axes[b].size
        if (op == "concat" and n + m <= 40) or (op == "merge" and n * m <= 40):
            p.do(op, a, b)
        elif op == "pad":
            p.do(op, a, (draw(st.integers(0, 3)), draw(st.integers(0, 3))))
        elif op == "cut":
            p.do(op, a, (draw(st.integers(0, n)),))
        elif op in ("shuffle", "select"):
            order = np.array(draw(st.permutations(range(n))), int)
            p.do(op, a, order if op == "shuffle" else order[: draw(st.integers(0, n))])
        elif op == "factor" and n:
            p.do(op, a, (draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])),))
        elif op == "unify":
            equal = [k for k, c in enumerate(p.axes) if c.size == n]
            p.do(op, a, equal[draw(st.integers(0, len(equal) - 1))])
        elif op == "pin" and draw(st.booleans()):
            p.do(op, a)
    return p


def label_all(axes):
    free = {}
    for axis in axes:
        for atom in ax.atoms(axis):
            free.setdefault(atom, f"g{len(free)}")
    for atom, name in free.items():
        atom.label = name
    return {name: atom.size for atom, name in free.items()}


def mask_of(units):
    def mask(axis):
        found = axis_mask(axis, units)
        return np.ones(axis.size, bool) if found is None else found

    return mask


@given(programs(), st.integers(0, 2**32 - 1))
@quiet
def test_every_statement_holds_under_every_mask(p, seed):
    sizes = label_all(p.axes)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        units = {name: rng.random(n) < 0.6 for name, n in sizes.items()}
        mask = mask_of(units)
        for left, right in p.claims:
            assert left(mask).tolist() == right(mask).tolist()
        for axis in p.axes:
            assert mask(axis).shape == (axis.size,)
            assert axis_count(axis, units) == mask(axis).sum()


@given(programs())
@quiet
def test_stating_it_again_is_no_news(p):
    """The same statements about groups that are known, as in a function that is traced again, change nothing."""
    again = Drawn(p.axes[: p.given])
    label_all(p.axes)
    own = [atom for axis in again.axes for atom in ax.atoms(axis)]
    for op, *args in p.steps:
        again.do(op, *args)
    for atom in own:
        assert ax.resolve(atom) is atom, "a known group was split or pinned"


@given(programs(products=False))
@quiet
def test_nothing_is_coupled_that_was_not_stated(p):
    """Without products the finest solution is a union-find over positions; the engine must be as fine."""
    # positions of unbound leaves of the finished axes against the connections stated on the way
    parent: dict = {}

    def find(x):
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    program = replay(p)
    for a, b in program["pairs"]:
        parent[find(a)] = find(b)
    label_all(p.axes)
    unit_of: dict = {}
    for axis, positions in zip(p.axes, program["positions"], strict=True):
        for unit, position in zip(single_units(axis), positions, strict=True):
            if unit is not None:
                assert find(unit_of.setdefault(unit, position)) == find(position), "two units became one"


def replay(p):
    """The positions of each axis, and which are one, by reading each axis through single-unit masks of its claims."""
    # Every claim equates masks: position i of one side with position i of the other. Identity masks tell which.
    number = {id(axis): k for k, axis in enumerate(p.axes)}
    positions = [[(number[id(axis)], i) for i in range(axis.size)] for axis in p.axes]
    extra = len(p.axes)
    pairs = []

    def spell(axis):
        nonlocal extra
        if id(axis) not in number:
            number[id(axis)] = extra
            extra += 1
        return np.array([(number[id(axis)], i) for i in range(axis.size)] or np.zeros((0, 2)), int)

    for left, right in p.claims:
        for a, b in zip(left(spell), right(spell), strict=True):
            pairs.append((tuple(a.tolist()), tuple(b.tolist())))
    return {"positions": positions, "pairs": pairs}


@given(programs(), st.integers(0, 2**32 - 1))
@quiet
def test_unit_index_and_labels_agree_with_masks(p, seed):
    sizes = label_all(p.axes)
    rng = np.random.default_rng(seed)
    for axis in p.axes:
        for name in sizes if axis.size else ():
            index = unit_index(axis, name)
            assert (name in labels(axis)) == bool((index >= 0).any())
            if sizes[name] == 0:
                continue
            units = {name: rng.random(sizes[name]) < 0.5}
            want = np.array([i < 0 or units[name][i] for i in index], bool)
            twice = axis_mask(axis, units)
            if single_units(axis) is not None:  # else one position may hold two units of a group
                assert (np.ones(axis.size, bool) if twice is None else twice).tolist() == want.tolist()


@given(programs())
@quiet
def test_normal_form(p):
    for axis in p.axes:
        axis = ax.resolve(axis)
        assert ax.same(axis, axis)
        parts = axis.parts if isinstance(axis, ax.Sum) else axis.factors if isinstance(axis, ax.Prod) else ()
        assert not any(type(part) is type(axis) for part in parts)
        assert not any(isinstance(a, ax.Fixed) and isinstance(b, ax.Fixed) for a, b in itertools.pairwise(parts))
        assert ax.resolve(axis) is axis


def test_single_positions_are_fixed():
    assert isinstance(ax.fresh(1), ax.Fixed)
    assert isinstance(ax.fresh(0), ax.Fixed)
    assert ax.fresh(3).size == 3


def test_heads_refine():
    merged, heads, width = ax.fresh(6), ax.fresh(2), ax.fresh(3)
    aligning.unify(merged, ax.product([heads, width]), WHY)
    assert list(ax.atoms(merged)) == [heads, width]


def test_a_cut_row_pins_only_itself():
    rows, columns = ax.fresh(4), ax.fresh(3)
    head, tail = aligning.cut_at(ax.product([rows, columns]), 4, WHY)
    assert (head.size, tail.size) == (4, 8)
    assert sum(atom.size for atom in ax.atoms(rows)) == 2  # rows 2 and 3; row 0 is single, row 1 is cut


def test_what_pins_single_positions_is_told():
    axis, rows = ax.fresh(4), ax.fresh(3)
    rest = axis
    for _ in range(3):
        _, rest = aligning.cut_at(rest, 1, WHY)
    assert str(ax.fixed_reason(axis)) == "its positions were split one by one (here.py:1)"
    aligning.cut_at(ax.product([rows, ax.fresh(2)]), 3, WHY)
    assert str(ax.fixed_reason(rows)) == "its positions were split one by one (here.py:1)"
    pair = ax.product([ax.fresh(2), ax.fresh(4)])
    aligning.cut_at(pair, 6, WHY)
    joined = ax.total([ax.fresh(1), ax.fresh(1)])
    assert str(ax.fixed_reason(joined)) == "single positions end to end carry no choice"
    assert ax.fixed_reason(ax.total([ax.fresh(1), joined, ax.Fixed(2, WHY)])) is WHY


def test_products_with_nothing_are_nothing():
    empty = [ax.product([ax.fresh(a), ax.fresh(b), ax.fresh(c)]) for a, b, c in [(2, 0, 3), (4, 3, 0), (0, 2, 5)]]
    for a, b in itertools.combinations(empty, 2):
        aligning.unify(a, b, WHY)
    assert all(isinstance(axis, ax.Fixed) and axis.size == 0 for axis in empty)


def test_numpy_integers_are_integers():
    head, tail = aligning.cut_at(ax.fresh(7), np.int64(3), WHY)
    assert type(head.size) is int
    assert type(tail.size) is int


def test_what_does_not_divide_is_pinned_with_its_reason():
    axis = ax.fresh(6)
    major, minor = aligning.factor(axis, 4, WHY)
    assert ax.fixed_reason(axis) is WHY
    assert minor.size == 4
    assert major.size == 1
    assert str(WHY) == "a test (here.py:1)"
    assert str(ax.Reason("bare")) == "bare"


def test_symbolic_sizes_are_fixed():
    from jax import export

    (b,) = export.symbolic_shape("b")
    axis = ax.fresh(b)
    assert isinstance(axis, ax.Fixed)
    assert axis_mask(axis, {}) is None
    assert not list(ax.atoms(ax.product([axis, ax.Fixed(2, WHY)])))


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 2)), ((4, 3), (6, 2)), ((2, 2, 3), (4, 3)), ((12,), (2, 6))])
def test_products_of_other_shapes(a, b):
    left, right = (ax.product([ax.fresh(n) for n in sizes]) for sizes in (a, b))
    aligning.unify(left, right, WHY)
    sizes = label_all([left, right])
    rng = np.random.default_rng(0)
    for _ in range(8):
        units = {name: rng.random(n) < 0.6 for name, n in sizes.items()}
        assert mask_of(units)(left).tolist() == mask_of(units)(right).tolist()
