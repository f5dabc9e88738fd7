"""Genomes, widths and ties: `decode` against a slow oracle with sets and sorted lists."""

import itertools
from dataclasses import dataclass, field
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.engine import Plan
from treesurgeon.search import space as spaces
from treesurgeon.search import ties as tying


@dataclass(frozen=True)
class Group:
    name: str
    size: int
    members: tuple = ()


@dataclass(frozen=True)
class Block:
    name: str
    parent: str | None = None


@dataclass(frozen=True)
class Graph:
    groups: dict
    blocks: dict
    ties: dict = field(default_factory=dict)


def graph(sizes, blocks=(), ties=None):
    """`blocks`: names, or (name, parent); `ties`: block -> rows (a, units, b, units)."""
    pairs = [b if isinstance(b, tuple) else (b, None) for b in blocks]
    rows = {b: tuple((a, np.asarray(u), c, np.asarray(v)) for a, u, c, v in r) for b, r in (ties or {}).items()}
    return Graph(
        groups={n: Group(n, s) for n, s in sizes.items()},
        blocks={n: Block(n, p) for n, p in pairs},
        ties={n: rows.get(n, ()) for n, _ in pairs},
    )


def random_scores(g, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.exponential(size=group.size) for n, group in g.groups.items()}


def masks_of(space, genome):
    """What `decode` gives; what it leaves out is kept."""
    masks = jax.tree.map(np.asarray, space.decode(genome))
    return {"units": {g: np.ones(n, bool) for g, n in space.sizes.items()} | masks["units"], "blocks": masks["blocks"]}


# --- the oracle -------------------------------------------------------------------------------------------


def slow_decode(g, space, scores, protected, genome):
    """Bundles by merging sets; each decided by its least unit that no active tie enters."""
    names = list(g.groups)
    level = {n: int(space.widths[n][genome[i]]) for i, n in enumerate(space.groups)}
    keep = {n: level.get(n, g.groups[n].size) for n in names}
    dropped = [b for i, b in enumerate(space.blocks) if not genome[len(space.groups) + i]]
    edges = [
        ((a, int(u)), (b, int(v)))
        for block in dropped
        for a, us, b, vs in g.ties[block]
        for u, v in zip(us, vs, strict=True)
        if (a, int(u)) != (b, int(v))
    ]
    bundle = {(n, u): {(n, u)} for n in names for u in range(g.groups[n].size)}
    for a, b in edges:
        joined = bundle[a] | bundle[b]
        for unit in joined:
            bundle[unit] = joined
    entered = {b for _, b in edges}
    place = {unit: (unit in entered, names.index(unit[0]), unit[1]) for unit in bundle}
    worth, shares = {}, {}
    touched = [n for n in names if any(n in (row[0], row[2]) for b in space.blocks for row in g.ties[b])]
    total = sum(g.groups[n].size for n in touched)
    for n in names:
        mean = np.mean(scores[n]) if n in scores else 1
        shares[n] = scores.get(n, np.ones(g.groups[n].size)) / mean
        for u, s in enumerate(shares[n]):
            worth[n, u] = int(np.floor(s * (tying.TOTAL / total))) if n in touched else 0
    roots = {frozenset(b): min(b, key=place.__getitem__) for b in bundle.values()}
    kept = set()
    for n in names:
        mine = [b for b, root in roots.items() if root[0] == n]
        order = sorted(range(g.groups[n].size), key=lambda u, n=n: (-shares[n][u], u))
        mine.sort(key=lambda b: (-sum(worth[x] for x in b), order.index(roots[b][1])))
        count = -(-keep[n] * len(mine) // g.groups[n].size)
        for b in mine[:count]:
            kept |= b
    for b in roots:
        if any(n in protected for n, _ in b):
            kept |= b
    lonely = [n for n in names if not any((n, u) in kept for u in range(g.groups[n].size))]
    for n in lonely:
        best = min(range(g.groups[n].size), key=lambda u, n=n: (-shares[n][u], u))
        kept |= bundle[n, best]
    return {n: np.array([(n, u) in kept for u in range(g.groups[n].size)]) for n in names}, edges


@st.composite
def problems(draw):
    """Graphs with whole, partial, permuted, chained and self ties; scores; protection; a genome."""
    sizes = {"g0": 3, "g1": 5, "g2": 8, "g3": 1, "g4": 5}  # fixed, so that a shape compiles once
    names = list(sizes)
    ties = {f"chain{i}": [(a, [0], b, [0])] for i, (a, b) in enumerate(itertools.pairwise(names))}
    for i in range(draw(st.integers(0, 3))):
        rows = []
        for _ in range(draw(st.integers(1, 2))):
            a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
            count = draw(st.integers(1, min(sizes[a], sizes[b])))
            u = draw(st.permutations(range(sizes[a])))[:count]
            v = draw(st.permutations(range(sizes[b])))[:count]
            rows.append((a, u, b, v))
        ties[f"b{i}"] = rows
    g = graph(sizes, ["free", *ties], ties)
    protected = set(draw(st.lists(st.sampled_from(names), max_size=1)))
    whole = st.integers(0, 5).map(float)
    scores = {n: np.array(draw(st.lists(whole, min_size=s, max_size=s))) + 0.5 for n, s in sizes.items()}
    space = spaces.build(g, scores, protected=protected, multiple=1)
    seed = draw(st.integers(0, 2**32 - 1))
    genomes = np.random.default_rng(seed).integers(0, space.cardinality, (4, len(space.cardinality)))
    return g, space, scores, protected, genomes


@settings(deadline=None, max_examples=40)
@given(problems())
def test_decode_equals_the_slow_oracle_and_keeps_its_promises(problem):
    g, space, scores, protected, genomes = problem
    for genome in genomes:
        check(g, space, scores, protected, genome, masks_of(space, genome))


def check(g, space, scores, protected, genome, masks):
    expected, edges = slow_decode(g, space, scores, protected, genome)
    for (a, u), (b, v) in edges:
        assert masks["units"][a][u] == masks["units"][b][v], "an active tie is violated"
    assert set(masks["units"]) == set(g.groups)
    for name, mask in masks["units"].items():
        assert mask.dtype == bool
        assert mask.shape == (g.groups[name].size,)
        assert mask.any(), "a group is empty"
        assert name not in protected or mask.all()
        if not any(name in (a, b) for (a, _), (b, _) in edges):
            wanted = g.groups[name].size
            if name in space.groups:
                wanted = space.widths[name][genome[space.groups.index(name)]]
            assert mask.sum() == wanted, "a group that nothing ties misses its level"
            assert scores[name][mask].min() >= scores[name][~mask].max(initial=-1)
        np.testing.assert_array_equal(mask, expected[name])
    bits = dict(zip(space.blocks, genome[len(space.groups) :] > 0, strict=True))
    assert {b: bool(m) for b, m in masks["blocks"].items()} == bits


def test_a_population_under_jit_equals_the_loop_without():
    whole = range(6)
    g = graph(
        dict.fromkeys("abc", 6),
        ["ab", "bc"],
        {"ab": [("a", whole, "b", whole)], "bc": [("b", whole, "c", whole)]},
    )
    space = spaces.build(g, random_scores(g))
    genomes = np.random.default_rng(0).integers(0, space.cardinality, (4, len(space.cardinality)))
    stacked = jax.jit(jax.vmap(space.decode))(genomes)
    for i, genome in enumerate(genomes):
        one = masks_of(space, genome)
        assert jax.tree.all(jax.tree.map(lambda s, m, i=i: np.array_equal(s[i], m), stacked, one))


# --- by hand ----------------------------------------------------------------------------------------------


def test_tied_groups_rank_jointly_and_keep_the_entrys_level():
    """The design's sentence: a half and another half do not become a quarter."""
    g = graph({"a": 4, "b": 4}, ["cut"], {"cut": [("a", range(4), "b", range(4))]})
    scores = {"a": np.array([4.0, 3, 2, 1]), "b": np.array([1.0, 2, 30, 4])}
    space = spaces.build(g, scores)
    half = space.encode({"a": 2, "b": 3})
    assert masks_of(space, half)["units"]["a"].tolist() == [True, True, False, False]
    assert masks_of(space, half)["units"]["b"].tolist() == [False, True, True, True]
    dropped = masks_of(space, space.encode({"a": 2, "b": 3}, drop={"cut"}))["units"]
    assert dropped["a"].tolist() == dropped["b"].tolist() == [True, False, True, False]


def test_a_chain_of_dropped_blocks_has_the_first_entrys_level():
    whole = range(8)
    ties = {"ab": [("a", whole, "b", whole)], "bc": [("b", whole, "c", whole)]}
    g = graph({"c": 8, "b": 8, "a": 8}, ["bc", "ab"], ties)  # an order that does not help
    space = spaces.build(g, random_scores(g))
    widths = {"a": 3, "b": 5, "c": 7}
    masks = masks_of(space, space.encode(widths, drop={"ab", "bc"}))["units"]
    assert masks["a"].sum() == 3
    assert (masks["a"] == masks["b"]).all()
    assert (masks["b"] == masks["c"]).all()
    later = masks_of(space, space.encode(widths, drop={"bc"}))["units"]
    assert [int(later[n].sum()) for n in "abc"] == [3, 5, 5]


def test_partial_ties_leave_the_other_units_their_own_share():
    g = graph({"a": 4, "b": 8}, ["cut"], {"cut": [("a", range(4), "b", range(2, 6))]})
    space = spaces.build(g, random_scores(g))
    masks = masks_of(space, space.encode({"a": 2, "b": 4}, drop={"cut"}))["units"]
    assert masks["a"].sum() == 2
    assert (masks["b"][2:6] == masks["a"]).all()
    assert masks["b"][[0, 1, 6, 7]].sum() == 2


def test_an_exit_that_no_kept_unit_reaches_gets_its_best_one():
    g = graph({"a": 8, "b": 2}, ["cut"], {"cut": [("a", [6, 7], "b", [0, 1])]})
    scores = {"a": np.array([9.0] * 6 + [0, 0]), "b": np.array([0.1, 0.2])}
    masks = masks_of(space := spaces.build(g, scores), space.encode({"a": 1}, drop={"cut"}))["units"]
    assert masks["b"].any()
    assert (masks["a"][6:] == masks["b"]).all()


def test_a_protected_exit_is_kept_whole_and_so_is_what_is_tied_to_it():
    g = graph({"a": 4, "b": 4}, ["cut"], {"cut": [("a", range(4), "b", range(4))]})
    space = spaces.build(g, random_scores(g), protected={"b"})
    assert space.groups == ("a",)
    assert masks_of(space, space.encode({"a": 1}, drop={"cut"}))["units"]["a"].all()
    assert masks_of(space, space.encode({"a": 1}))["units"]["a"].sum() == 1
    assert "b" not in space.decode(space.dense_genome())["units"]  # what cannot change is no mask


def test_huge_scores_and_no_scores_do_not_overflow():
    g = graph({"a": 600, "b": 600}, ["cut"], {"cut": [("a", range(600), "b", range(600))]})
    peak = np.zeros(600)
    peak[17] = 1e30
    space = spaces.build(g, {"a": peak, "b": peak})
    masks = masks_of(space, space.encode({"a": 1, "b": 1}, drop={"cut"}))["units"]
    assert masks["a"][17]
    assert masks["a"].sum() == space.widths["a"][-1]
    flat = spaces.build(g, {"a": np.zeros(600), "b": -peak})
    assert not masks_of(flat, flat.encode({"a": 1}, drop={"cut"}))["units"]["a"][17]


# --- levels, names, plans ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        (64, None, [64, 56, 48, 40, 32, 24, 16, 8]),
        (16, None, [16, 14, 12, 10, 8, 6, 4, 2]),
        (10, None, [10, 9, 8, 6, 5, 4, 3, 1]),
        (3, None, [3, 2, 1]),
        (2, None, [2, 1]),
        (1, None, [1]),
        (20, 8, [20, 16, 8]),
        (4, 8, [4]),
    ],
)
def test_widths_are_rounded_distinct_and_never_zero(size, multiple, expected):
    assert spaces._widths(size, spaces.LEVELS, multiple).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 16) | st.none(), st.lists(st.floats(0.01, 1), max_size=6))
def test_every_width_is_in_range_and_a_multiple(size, multiple, levels):
    widths = spaces._widths(size, levels, multiple).tolist()
    assert widths[0] == size
    assert widths == sorted(set(widths), reverse=True)
    assert all(1 <= w <= size for w in widths)
    step = multiple or (8 if size >= 64 else 4 if size >= 32 else 2 if size >= 16 else 1)
    assert all(w % step == 0 for w in widths[1:])
    for f in levels:  # the nearest multiple there is
        wanted = Fraction(f) * size
        reachable = [w for w in {size, *range(step, size + 1, step)} if w <= size]
        assert min(abs(w - wanted) for w in widths) <= min(abs(w - wanted) for w in reachable) + step


@pytest.fixture
def small():
    g = graph({"stem": 8, "mid": 8, "one": 1, "out": 4}, ["outer", ("inner", "outer"), "last"])
    return g, spaces.build(g, random_scores(g), protected={"stem", "last"})


def test_the_space_leaves_out_the_protected_the_enclosed_and_the_indivisible(small):
    _, space = small
    assert space.groups == ("mid", "out")
    assert space.blocks == ("outer",)
    assert space.cardinality.tolist() == [8, 4, 2]
    masks = space.decode([7, 3, 0])
    assert set(masks["units"]) == {"mid", "out"}
    assert {b: bool(m) for b, m in masks["blocks"].items()} == {"outer": False}


def test_named_blocks_are_searched_even_inside_others(small):
    g, _ = small
    assert spaces.build(g, random_scores(g), blocks={"inner"}).blocks == ("inner",)


def test_the_dense_genome_keeps_everything(small):
    _, space = small
    assert all(m.all() for kind in masks_of(space, space.dense_genome()).values() for m in kind.values())
    plan = space.to_plan(space.dense_genome())
    assert isinstance(plan, Plan)
    assert not plan.keep
    assert not plan.drop
    assert space.describe(space.dense_genome()) == "everything kept"
    assert (space.encode() == space.dense_genome()).all()


def test_a_plan_says_what_the_masks_say(small):
    _, space = small
    genome = space.encode({"mid": 3, "out": 4}, drop={"outer"})
    plan, masks = space.to_plan(genome), masks_of(space, genome)
    assert set(plan.keep) == {"mid"}
    assert plan.keep["mid"].tolist() == np.flatnonzero(masks["units"]["mid"]).tolist()
    assert plan.drop == {"outer"}
    assert space.describe(genome) == "mid 8→3; without outer"


def test_seeds_are_genomes_of_the_space_and_start_dense(small):
    _, space = small
    seeds = space.seeds()
    assert (seeds[0] == space.dense_genome()).all()
    assert ((seeds >= 0) & (seeds < space.cardinality)).all()
    assert len(np.unique(seeds, axis=0)) == len(seeds) > 4
    assert (seeds[:, 2] == 1).all()


def test_a_long_description_is_cut_short():
    g = graph({f"g{i}": 8 for i in range(9)}, ["cut"])
    space = spaces.build(g, random_scores(g))
    text = space.describe(space.encode(dict.fromkeys(g.groups, 4)))
    assert text == "g0 8→4, g1 8→4, g2 8→4, g3 8→4 and 5 more"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (["conv1", "layer1_0/conv1", "layer1_1/conv1", "layer2_0/conv1", "layer2_1/conv1", "layer3_0/conv1",
          "layer3_1/conv1"], {"conv1", "layer1_0/conv1", "layer1_1/conv1", "layer1_1"}),
        (["hidden_0", "hidden_1", "hidden_2"], {"hidden_0"}),
        (["only"], {"only"}),
        ([], set()),
    ],
)  # fmt: skip
def test_the_first_stage(sizes, expected):
    g = graph(dict.fromkeys(sizes, 4), ["layer1_1", "layer2_1"])
    assert spaces.first_stage(g) == expected


def build(**changes):
    g = graph({"a": 4}, ["cut"])
    return spaces.build(g, **{"scores": {"a": np.arange(4.0)}, **changes})


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: build(scores={}), "none for group 'a'; rank its 4 units, or protect it"),
        (lambda: build(scores={"a": np.ones(3)}), r"group 'a': expected shape \[4\], got \[3\]"),
        (lambda: build(scores={"a": [0, np.nan, 1, 2]}), r"'a': unit 1 has nan \(1 of 4 are not finite\)"),
        (lambda: build(scores={"b": np.ones(3)}), "no group is named 'b'; there are 1, such as a"),
        (lambda: build(protected={"aa"}), "no group or block is named 'aa'; there are 2, such as a"),
        (lambda: build(blocks={"cat"}), "no block is named 'cat'; there are 1, such as cut"),
        (lambda: build(protected={"a", "cut"}), "nothing to search: the graph has 1 groups and 1 blocks"),
        (lambda: build(levels=(0.5, 0)), "levels are shares above 0"),
        (lambda: build().encode({"b": 2}), "no searched group is named 'b'"),
        (lambda: build().to_plan([0]), r"genome: expected 2 genes, got shape \[1\]"),
        (lambda: build().describe([9, 1]), r"gene 0 \(a\): expected 0 to 3, got 9"),
    ],
)
def test_errors(action, message):
    with pytest.raises(spaces.SpaceError, match=message):
        action()


def test_decode_compiles_once_for_a_population(small):
    decode = jax.jit(jax.vmap(small[1].decode))
    for seed in range(3):
        decode(jnp.asarray(np.random.default_rng(seed).integers(0, small[1].cardinality, (6, 3)), jnp.int32))
    assert decode._cache_size() == 1
