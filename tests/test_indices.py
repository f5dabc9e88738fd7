"""Constant indices beyond the rows of `test_rules.py`: other calls than the traced one, and pruned models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from laws import Bench, Subject, arr

from treesurgeon import engine
from treesurgeon.engine import Plan, constants

ORDER = np.array([3, 6, 0, 5, 1, 7, 2, 4], np.int32)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5)).astype(np.float32)
P = {"a": RNG.normal(size=(5, 8)).astype(np.float32), "c": RNG.normal(size=(8, 3)).astype(np.float32)}


def hidden(p, x):
    return jnp.tanh(x @ p["a"])


READERS = {
    "reordered": lambda p, x: hidden(p, x)[:, ORDER] @ p["c"],
    "turned round": lambda p, x: hidden(p, x)[:, ::-1] @ p["c"],
    "every other": lambda p, x: hidden(p, x)[:, 1::2] @ p["c"][:4],
    "picked": lambda p, x: jnp.take(hidden(p, x), jnp.array([1, 4, 2]), axis=1) @ p["c"][:3],
    "written to": lambda p, x: hidden(p, x).at[:, :3].multiply(2.0).at[:, ORDER[5:]].set(1.0) @ p["c"],
    "in two axes": lambda p, x: jnp.einsum(
        "bij,ijc->bc", hidden(p, x)[:, ORDER.reshape(2, 4)], p["c"].reshape(2, 4, 3)
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_batches_of_any_size(name):
    """Exported with a symbolic batch, where JAX may write the same index in another way."""
    fn = READERS[name]
    graph = engine.trace(fn, P, X)
    plan = Plan({group.name: np.arange(group.size // 2) for group in graph.groups.values()})
    small, params = engine.narrow(fn, graph, plan), engine.cut(P, graph, plan)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 60
    (n,) = export.symbolic_shape("n")
    exported = export.export(jax.jit(small))(params, jax.ShapeDtypeStruct((n, 5), np.float32))
    np.testing.assert_allclose(exported.call(params, X), small(params, X), rtol=1e-6)
    Bench(Subject(name, fn, jax.tree.map(lambda x: arr(*x.shape), P), (arr(4, 5),))).law2_and_5(plan)


def test_windows_of_one_that_stay():
    """`vmap` of a slice lists starts and keeps an axis of length one for each."""

    def fn(p, x):
        found = jax.vmap(lambda i: lax.dynamic_slice(jax.nn.relu(p["a"]).max(0), (i,), (1,)))(np.array([3, 1, 6]))
        return jnp.tanh(found.sum(-1)) @ p["c"][:3] + 0 * x.sum()

    graph = engine.trace(fn, P, X)
    assert graph.pinned["a[1]"].text == "`gather` indexes this axis"


def test_a_group_that_another_function_ties_to_itself():
    """Its first half to its second: the plan must keep both alike."""
    graph = engine.trace(lambda p, x: hidden(p, x) @ p["c"], P, X)
    pairs = lambda p, x: (hidden(p, x)[:, :4] * hidden(p, x)[:, 4:]).sum(1)
    written = lambda p, x: hidden(p, x).at[:, np.arange(4)].multiply(hidden(p, x)[:, 4:]) @ p["c"]
    for fn in (pairs, written):
        odd, even = Plan({"a": np.array([0, 5])}), Plan({"a": np.array([0, 2, 4, 6])})
        with pytest.raises(engine.NarrowError, match="group 'a'"):
            engine.narrow(fn, graph, odd)(engine.cut(P, graph, odd), X)
        with pytest.raises(engine.NarrowError, match="group 'a'"):
            engine.gate(fn, graph)(P, graph.masks(odd), X)
        kept = np.isin(np.arange(8), [0, 2, 4, 6])
        zeroed = {"a": P["a"] * kept, "c": P["c"] * kept[:, None]}
        found = engine.narrow(fn, graph, even)(engine.cut(P, graph, even), X)
        np.testing.assert_allclose(found, fn(zeroed, X), rtol=1e-5)


def test_a_loop_that_also_reads_what_is_not_known_yet():
    """Under `jit` the mask is a tracer; the indices that go into the loop beside it are constants all the same."""

    def masked(mask):
        def fn(p, x):
            def step(h, w):
                new = jnp.tanh(h @ w["a"])[:, jnp.asarray(ORDER)] @ w["b"]
                return h + jnp.where(mask[:, None], new, 0), None

            return lax.scan(step, x, p)[0]

        return fn

    params = {"a": np.stack([P["a"], -P["a"]]), "b": np.stack([P["a"].T, P["a"].T])}
    mask = np.array([True, False, True, True])
    graph = engine.trace(masked(mask), params, X)
    plan = Plan({"a": np.arange(3)})
    small = engine.cut(params, graph, plan)
    found = jax.jit(lambda p, x, m: engine.narrow(masked(m), graph, plan)(p, x))(small, X, mask)
    np.testing.assert_allclose(found, engine.narrow(masked(mask), graph, plan)(small, X), rtol=1e-5)


def test_two_groups_that_one_table_reorders():
    """A table that goes into a loop from outside does not couple those that are read through it."""
    table = jnp.asarray(ORDER)

    def fn(p, x):
        def step(h, w):
            return h + jnp.tanh(h @ w["a"])[:, table] @ w["b"] + jnp.sin(h @ w["c"])[:, table] @ w["d"], None

        return lax.scan(step, x, p)[0]

    params = {name: np.ones((2, 5, 8) if name in "ac" else (2, 8, 5), np.float32) for name in "abcd"}
    assert {name: group.size for name, group in engine.trace(fn, params, X).groups.items()} == {"a": 8, "c": 8}


def test_names_of_groups_after_pruning():
    """Picked units are `a[0]`, wherever pruning leaves them (law 6)."""
    fn = lambda p, x: hidden(p, x) @ p["c"] + hidden(p, x)[:, np.array([4, 6, 7])].max(1, keepdims=True)
    graph = engine.trace(fn, P, X)
    assert {name: group.size for name, group in graph.groups.items()} == {"a[0]": 3, "a[1]": 5}
    first, later = Plan({"a[1]": np.array([0, 1, 2])}), Plan({"a[0]": np.array([0, 2])})
    once, small = engine.narrow(fn, graph, first), engine.cut(P, graph, first)
    again = engine.trace(once, small, X)
    whole = graph.then(first, later)
    np.testing.assert_allclose(
        engine.narrow(once, again, later)(engine.cut(small, again, later), X),
        engine.narrow(fn, graph, whole)(engine.cut(P, graph, whole), X),
        rtol=1e-5,
    )


def test_reconstruction_reads_units_in_another_order():
    """The maps are those of the function that reads them in theirs."""
    plain = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["c"]
    turned = lambda p, x: jax.nn.relu(x @ p["a"])[:, ORDER] @ p["c"]
    x = RNG.normal(size=(200, 5)).astype(np.float32)
    found = {}
    for fn, params in ((plain, P), (turned, {**P, "c": P["c"][ORDER]})):
        graph = engine.trace(fn, params, x)
        learn, plan = engine.reconstruct(fn, graph), Plan({"a": np.array([0, 2, 3, 6])})
        out, maps = learn(params, graph.masks(plan), learn.targets(params, x), x)
        folded = engine.cut(engine.fold(params, graph, maps), graph, plan)
        np.testing.assert_allclose(engine.narrow(fn, graph, plan)(folded, x), out, atol=1e-4)
        activity = engine.activity_maps(fn, graph)(params, x[:3])["a"]
        found[fn] = maps["c[0]"]["a"], out, activity
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_indices_are_folded_without_compiling(monkeypatch):
    """A program for each small operation and length took longer than all of tracing."""
    bound = []
    monkeypatch.setattr(constants, "bind", lambda eqn, *rest: bound.append(eqn.name) or 1 / 0)
    for index in (ORDER, ORDER - 8, ORDER.astype(np.uint8), list(ORDER), jnp.asarray(ORDER[:3])):
        for fn in (
            lambda p, x, i=index: hidden(p, x)[:, np.asarray(i)].max(1),
            lambda p, x, i=index: hidden(p, x).at[:, np.asarray(i)].set(0).max(1),
        ):
            assert engine.trace(fn, P, X).groups
    assert bound == []


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
def test_modes(mode):
    """Indices outside: those that are clipped are known, those that yield a filling pin."""
    inside = lambda p, x: hidden(p, x).at[:, np.array([5, -1, 2])].get(mode=mode).max(1)
    outside = lambda p, x: hidden(p, x).at[:, np.array([5, 9, 2])].get(mode=mode).max(1)
    assert [group.size for group in engine.trace(inside, P, X).groups.values()] == [3, 5]
    if mode == "clip":
        bench = Bench(Subject(mode, outside, {"a": arr(5, 8)}, (arr(4, 5),)))
        bench.law2_and_5(Plan({"a[0]": np.array([0, 2]), "a[1]": np.array([1, 2])}))
    else:
        assert not engine.trace(outside, P, X).groups


def test_reordered_positions_in_front_of_any_number():
    """Prompts are read in an order of their own, and tokens, of which nobody knows how many, follow them."""

    def fn(p, x):
        lead = [jnp.broadcast_to(p[name][ORDER], (x.shape[0], 8, 5)) for name in ("t", "u")]
        first, second = (jnp.concatenate([one, x], 1) for one in lead)
        return (first * second).sum(1)

    params = {"t": P["a"].T, "u": P["a"].T + 1}
    x = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    graph = engine.trace(fn, params, x)
    plan = Plan({"t": np.array([0, 3, 5])})
    small, cut = engine.narrow(fn, graph, plan), engine.cut(params, graph, plan)
    b, n = export.symbolic_shape("b, n")
    exported = export.export(jax.jit(small))(cut, jax.ShapeDtypeStruct((b, n, 5), np.float32))
    np.testing.assert_allclose(exported.call(cut, x), small(cut, x), rtol=1e-6)
