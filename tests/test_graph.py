"""What `trace` finds (the zoo's data), plans and every message about them, ties, masks, the printed table."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Bench, arr, draw
from regressions import REGRESSIONS
from subjects import SUBJECTS

from treesurgeon import engine
from treesurgeon.engine import Plan, PlanError, StructureError


def traced(name):
    return Bench({**zoo.ZOO, **zoo.ODD, **REGRESSIONS}[name].subject).graph


@pytest.mark.parametrize("name", zoo.ZOO)
def test_groups_and_blocks_of_the_zoo(name):
    case, graph = zoo.ZOO[name], traced(name)
    found = {n: (g.size, {(m.path, m.axis) for m in g.members}) for n, g in graph.groups.items()}
    assert found == case.groups
    if case.blocks is not None:
        assert tuple(graph.blocks) == case.blocks
    if case.divisors is not None:
        assert len(graph.divisors) == case.divisors
        assert all(line.startswith("zoo.py:") for line in graph.divisors)
    for axis, why in case.pinned.items():
        assert why in str(graph.pinned[axis])


def test_members_say_which_unit_stands_where():
    graph = traced("conv_depthwise_multiplier")
    members = {(g, m.path): m.units for g, group in graph.groups.items() for m in group.members}
    assert members["c1", "d"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert members["d", "d"].tolist() == [0, 1, 2] * 4
    padded = {m.path: m.units.tolist() for m in traced("residual_zero_padded").groups["stem"].members}
    assert padded["c2"] == [-1, -1, 0, 1, 2, 3, -1, -1, -1]


# Plans.


def dense_graph():
    return traced("dense_chain")


@pytest.mark.parametrize(
    ("keep", "drop", "message"),
    [
        ({"a": [True, False]}, (), "a bool mask m becomes np.flatnonzero(m)"),
        ({"a": [[1]]}, (), "expected a 1-d array of unit numbers, got shape (1, 1)"),
        ({"a": [1.0, 2.0]}, (), "of float64"),
        ({"a": [2, 1]}, (), "must be sorted without repeats: pass np.unique(units)"),
        ({"a": [1, 1]}, (), "must be sorted without repeats"),
        ({"a": np.array([200, 0], np.uint8)}, (), "must be sorted without repeats"),
        ({"a": [[1], [2, 3]]}, (), "expected a 1-d array of unit numbers; NumPy says"),
        ({}, "c1", "Plan.drop takes a set of block names, got the string 'c1'"),
    ],
)
def test_plans_that_are_no_plans(keep, drop, message):
    with pytest.raises(PlanError) as error:
        Plan(keep, drop)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("dense_chain", Plan({"a": []}), "empties the group: keep at least one of its 6 units"),
        ("dense_chain", Plan({"a": [0, 6]}), "units run from 0 to 5, got 0 to 6"),
        ("dense_chain", Plan({"a": [-1, 3]}), "units run from 0 to 5, got -1 to 3"),
        ("dense_chain", Plan({"aa": [1]}), "names the group 'aa', which is not there; did you mean 'a'?"),
        ("dense_chain", Plan({}, {"a"}), "Plan.drop names the block 'a', which is not there; this graph has no blocks"),
        ("residual", Plan({}, {"c2"}), "did you mean 'c1'?"),
        (
            "chain_of_one_width",
            Plan({"stem": [0, 1], "l1": [2, 3]}, {"l1"}),
            "dropping blocks ties group 'stem' to groups that keep other units, and nothing is left",
        ),
    ],
)
def test_plans_that_do_not_fit(name, plan, message):
    graph = traced(name)
    for use in (graph.masks, lambda plan: engine.cost(graph, plan), lambda plan: engine.narrow(len, graph, plan)):
        with pytest.raises(PlanError) as error:
            use(plan)
        assert message in str(error.value)


def test_errors_are_ours():
    assert issubclass(PlanError, engine.TreesurgeonError)
    assert issubclass(PlanError, ValueError)


def test_ties_close_over_chains_of_drops():
    graph = traced("chain_of_one_width")
    keep = {"stem": [0, 1, 2, 3], "l1": [1, 2, 3, 4], "l2": [2, 3, 4, 5], "l3": [0, 1, 2, 3, 4]}

    def kept(drop):
        return {n: np.flatnonzero(m).tolist() for n, m in graph.masks(Plan(keep, drop))["units"].items()}

    assert kept(set()) == keep
    assert kept({"l1"}) == {**keep, "stem": [1, 2, 3], "l1": [1, 2, 3]}
    assert kept({"l1", "l2"}) == {**keep, "stem": [2, 3], "l1": [2, 3], "l2": [2, 3]}
    assert kept({"l1", "l3"}) == {"stem": [1, 2, 3], "l1": [1, 2, 3], "l2": [2, 3, 4], "l3": [2, 3, 4]}


def test_ties_where_a_unit_stands_at_several_positions():
    """Heads of 4 units share their units: without the block, unit 1 of a head is unit 1, 5 and 9 of the stream."""
    graph = traced("heads_that_an_input_scales")
    (name,) = (name for name, ties in graph.ties.items() if ties)

    def kept(keep):
        return {n: np.flatnonzero(m).tolist() for n, m in graph.masks(Plan(keep, {name}))["units"].items()}

    assert kept({"e": [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]}) == {"e": [0, 1, 2, 4, 5, 6, 8, 9, 10], "v": [0, 1, 2]}
    assert kept({"e": [1, 5, 9], "v": [0, 1]}) == {"e": [1, 5, 9], "v": [1]}
    with pytest.raises(PlanError, match="nothing is left"):
        kept({"e": [4, 5, 6, 7, 8, 9, 10, 11]})


@given(st.data())
@settings(deadline=None, derandomize=True, database=None, max_examples=50)
def test_closure_is_the_largest_closed_keep(data):
    """Against brute force: units joined by any chain of dropped blocks are kept together or not at all."""
    graph = CHAIN
    keep = {n: data.draw(st.sets(st.integers(0, 5), min_size=1)) for n in graph.groups}
    drop = data.draw(st.sets(st.sampled_from(list(graph.blocks))))
    joined = {n: {n} for n in graph.groups}
    for block in drop:
        for tie in graph.ties[block]:
            whole = joined[tie.entry] | joined[tie.exit]
            for n in whole:
                joined[n] = whole
    want = {n: sorted(set.intersection(*(keep[o] for o in joined[n]))) for n in graph.groups}
    plan = Plan({n: sorted(u) for n, u in keep.items()}, drop)
    if all(want.values()):
        assert {n: np.flatnonzero(m).tolist() for n, m in graph.masks(plan)["units"].items()} == want
        assert {n: u.tolist() for n, u in graph.closed(plan).keep.items()} == want
    else:
        with pytest.raises(PlanError):
            graph.masks(plan)


CHAIN = traced("chain_of_one_width")


def test_half_of_a_sum_over_two_units_is_no_mean():
    p, x = {"a": np.ones((3, 2), np.float32)}, np.ones((4, 3), np.float32)
    means = (lambda h: h.mean(-1), lambda h: h.sum(-1) / 2)
    others = (lambda h: 0.5 * h.sum(-1), lambda h: h.sum(-1) * 0.5, lambda h: h.sum(-1) / 4)
    for follow, functions in ((True, means), (False, others)):
        for f in functions:
            assert bool(engine.trace(lambda p, x, f=f: f(x @ p["a"]), p, x).divisors) is follow
    wide = {"a": np.ones((3, 8), np.float32)}
    assert engine.trace(lambda p, x: (x @ p["a"]).sum(-1) * 0.125, wide, x).divisors


def test_a_later_plan_of_another_model_is_refused():
    with pytest.raises(PlanError, match="keeps unit 3 of group 'stem', of which the first one leaves 2"):
        CHAIN.then(Plan({"stem": [1, 4]}), Plan({"stem": [0, 3]}))


def test_composed_plans():
    first, later = Plan({"stem": [1, 3, 4], "l2": [0, 2]}), Plan({"stem": [0, 2], "l3": [1]}, {"l3"})
    both = CHAIN.then(first, later)
    kept = {n: u.tolist() for n, u in both.keep.items() if n != "l1"}
    assert kept == {"stem": [1, 4], "l2": [0, 2], "l3": [1]}
    assert both.drop == {"l3"}


def test_composed_plans_count_the_steps_of_a_stack_anew():
    graph = traced("scanned_stack")
    steps = graph.steps["layers[]"]
    assert steps == ("layers[0]", "layers[1]", "layers[2]")
    assert graph.then(Plan(drop={steps[0]}), Plan(drop={steps[0]})).drop == {steps[0], steps[1]}
    assert graph.then(Plan(drop={steps[1]}), Plan(drop={steps[1]})).drop == {steps[1], steps[2]}


def test_masks_shapes_and_indices():
    graph = traced("residual")
    plan = Plan({"stem": [0, 2, 5]}, {"c1"})
    masks = graph.masks(plan)
    assert masks["units"]["stem"].tolist() == [True, False, True, False, False, True]
    assert masks["units"]["c1"].all()
    assert masks["blocks"] == {"c1": np.asarray(False)}
    assert graph.shapes(masks) == {"c1": None, "c2": None, "head/b": (2,), "head/w": (3, 2), "stem": (3, 3, 3, 3)}
    assert graph.indices(masks)["head/w"][0].tolist() == [0, 2, 5]


def test_nested_blocks_know_what_is_around_them():
    graph = traced("nested_residuals")
    assert {n: b.parent for n, b in graph.blocks.items()} == {"b": "a", "a": None, "d": None}
    assert graph.around("b") == ["a"]
    for drop in itertools.chain.from_iterable(itertools.combinations(graph.blocks, k) for k in range(4)):
        gone = {path for path, shape in graph.shapes(graph.masks(Plan({}, drop))).items() if shape is None}
        want = {leaf for b in drop for leaf in graph.blocks[b].leaves}
        assert gone == want


def test_shared_layers_make_blocks_that_drop_apart():
    graph = traced("shared_layer_with_other_between")
    assert [(b.turn, b.turns) for b in graph.blocks.values()] == [(0, 2), (1, 2)]
    one, both = (graph.shapes(graph.masks(Plan({}, drop))) for drop in ({"b[0]"}, {"b[0]", "b[1]"}))
    assert one["b/w"] == (6, 6)
    assert both["b/w"] is None


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit", ["attention", "attention+norm1", "mlp"]),
        ("bert", ["attention", "mlp"]),
        ("mixer", ["tokens", "channels"]),
        ("llama-tied", ["attention", "attention+norm1", "down", "down+gate+norm2+up"]),
    ],
)
def test_blocks_are_named_by_the_modules_that_they_are(name, blocks):
    found = list(Bench(SUBJECTS[name]).graph.blocks)
    assert [block.removeprefix("layer0/") for block in found if block.startswith("layer0/")] == blocks


# Tracing.


def test_print():
    text = str(traced("residual"))
    for part in ("2 groups", "stem", "c1[2], c2[3]", "1 blocks", "c1, c2", "pinned axes", "the input args[0]"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110
    assert "2x6    b/b, b/w  (inside a)" in str(traced("nested_residuals"))
    assert "divisors follow their axis" in str(traced("layer_norm"))
    assert "8 - 1 follows a" in str(traced("variance_ddof"))


def test_structs_do():
    structs = {"a": jax.ShapeDtypeStruct((5, 6), "float32"), "b": jax.ShapeDtypeStruct((6, 2), "float32")}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    graph = engine.trace(fn, structs, jax.ShapeDtypeStruct((3, 5), "float32"))
    small = engine.cut(structs, graph, Plan({"a": [1, 4]}))
    assert jax.tree.map(lambda s: s.shape, small) == {"a": (5, 2), "b": (2, 2)}
    assert isinstance(small["a"], jax.ShapeDtypeStruct)


def test_no_leaves():
    with pytest.raises(StructureError, match="params has no array leaves"):
        engine.trace(lambda p, x: x, {}, np.ones(3))


def test_two_leaves_with_one_path():
    with pytest.raises(StructureError, match="two leaves have one path"):
        engine.trace(lambda p: p["a/b"], {"a/b": np.ones(2), "a": {"b": np.ones(2)}})


def test_group_of_a_bare_array():
    graph = engine.trace(lambda w, x: jnp.tanh(x @ w).sum(-1), draw(arr(5, 6), 0, np.float32), np.ones((2, 5), "f"))
    assert [g.size for g in graph.groups.values()] == [6]


def test_haikus_module_paths_are_whole():
    """Its parameter paths hold a `~` that no scope has; without the part before it, modules would share one name."""

    def fn(p, x):
        for i in range(3):
            with jax.named_scope("net"), jax.named_scope(f"block_{i}"), jax.named_scope("linear"):
                x = jnp.tanh(x @ p[f"net/block_{i}/~/linear"]["w"])
        return x

    widths = (5, 2, 6, 3)
    p = {f"net/block_{i}/~/linear": {"w": np.ones((widths[i], widths[i + 1]), np.float32)} for i in range(3)}
    graph = engine.trace(fn, p, np.ones((2, 5), np.float32))
    assert list(graph.groups) == ["net/block_0/~/linear", "net/block_1/~/linear"]
