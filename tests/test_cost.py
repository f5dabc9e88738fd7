"""Costs against counts by hand, on plans, on masks, on stacks of masks, in and out of jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from laws import Bench, count_macs, random_plan

from treesurgeon import engine
from treesurgeon.engine import Plan


def traced(name):
    return Bench({**zoo.ZOO, **zoo.ODD}[name].subject).graph


def test_by_hand():
    graph = traced("residual")
    dense = engine.cost(graph, Plan())
    sizes = 9 * 3 * 6 + 9 * 6 * 5 + 9 * 5 * 6 + 6 * 2 + 2
    pixels = 2 * 4 * 4
    assert dense.size == dense.params == sizes
    assert dense.macs == pixels * (9 * 3 * 6 + 9 * 6 * 5 + 9 * 5 * 6) + 2 * 6 * 2
    itemsize = 8 if jax.config.jax_enable_x64 else 4
    assert dense.activation_bytes == itemsize * (pixels * (6 + 5 + 6) + 2 * 2)
    small = engine.cost(graph, Plan({"stem": [0, 1, 2], "c1": [4]}))
    assert small.size == 9 * 3 * 3 + 9 * 3 * 1 + 9 * 1 * 3 + 3 * 2 + 2
    assert small.macs == pixels * (9 * 3 * 3 + 9 * 3 * 1 + 9 * 1 * 3) + 2 * 3 * 2
    dropped = engine.cost(graph, Plan({"stem": [0, 1, 2]}, {"c1"}))
    assert dropped.size == 9 * 3 * 3 + 3 * 2 + 2
    assert dropped.macs == pixels * 9 * 3 * 3 + 2 * 3 * 2
    assert all(type(n) is int for n in dense)


def test_grouped_and_depthwise():
    graph = traced("conv_depthwise_multiplier")
    pixels = 2 * 4 * 4
    assert engine.cost(graph, Plan()).macs == pixels * (9 * 3 * 4 + 9 * 12 + 12 * 2)
    assert engine.cost(graph, Plan({"c1": [1, 2], "d": [0]})).macs == pixels * (9 * 3 * 2 + 9 * 2 + 2 * 2)


def test_statistics_are_not_trainable():
    params = {
        "params": {"w": np.ones((5, 6), "f"), "n": np.ones(6, np.int32)},
        "batch_stats": {"mean": np.ones(6, "f")},
    }
    fn = lambda p, x: jnp.tanh(x @ p["params"]["w"] * p["params"]["n"] - p["batch_stats"]["mean"]).sum(-1)
    graph = engine.trace(fn, params, np.ones((2, 5), "f"))
    assert engine.cost(graph, Plan())[:2] == (42, 30)
    (name,) = graph.groups
    assert engine.cost(graph, Plan({name: [0, 1]}))[:2] == (14, 10)


STACKED = ["residual", "nested_residuals", "heads", "dense_net", "shared_layer_with_other_between"]


@pytest.mark.parametrize("name", STACKED)
def test_stacks_of_masks(name):
    graph = traced(name)
    plans = [random_plan(graph, seed) for seed in range(6)]
    stack = jax.tree.map(lambda *m: np.stack(m).reshape(2, 3, *m[0].shape), *(graph.masks(p) for p in plans))
    one_by_one = np.array([engine.cost(graph, p) for p in plans]).reshape(2, 3, 4)
    together = np.stack(engine.cost(graph, stack), -1)
    assert (together == one_by_one).all()
    compiled = jax.jit(lambda m: engine.cost(graph, m))(stack)
    assert (np.stack(compiled, -1) == one_by_one).all()
    assert all(jnp.issubdtype(c.dtype, jnp.integer) for c in compiled)
    mapped = jax.vmap(jax.vmap(lambda m: engine.cost(graph, m)))(stack)
    assert (np.stack(mapped, -1) == one_by_one).all()


@pytest.mark.parametrize("name", STACKED)
def test_contractions(name):
    graph = traced(name)
    plans = [Plan(), *(random_plan(graph, seed) for seed in range(5))]
    left = [sum(any(not c & p.drop for c in term.contexts) for term in graph.macs) for p in plans]
    assert [engine.contractions(graph, p) for p in plans] == left
    stack = jax.tree.map(lambda *m: np.stack(m), *(graph.masks(p) for p in plans))
    for found in (engine.contractions(graph, stack), jax.jit(lambda m: engine.contractions(graph, m))(stack)):
        assert (np.broadcast_to(found, len(plans)) == left).all()


def test_counts_beyond_int32():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    s = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    graph = engine.trace(fn, {"a": s(50, 4000), "b": s(4000, 4000)}, s(1000, 50))
    exact = 1000 * (50 * 4000 + 4000 * 4000)
    assert engine.cost(graph, Plan()).macs == exact
    traced_macs = jax.jit(lambda m: engine.cost(graph, m))(graph.masks(Plan())).macs
    assert abs(float(traced_macs) - exact) <= 1e-6 * exact


def loop(p, x):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x)


def test_macs_inside_loops():
    graph = engine.trace(loop, {"w": np.ones((5, 5), "f")}, np.ones((2, 5), "f"))
    assert engine.cost(graph, Plan()).macs == 3 * 2 * 5 * 5


def test_what_many_blocks_read_goes_with_the_last_of_them():
    names = [f"{j:02d}" for j in range(70)]

    def fn(p, x, t):
        c, h = t @ p["t"], x @ p["i"]
        for name in names:
            h = h + jnp.tanh(h @ p["w"][name] + c)
        return h @ p["o"]

    p = {k: np.ones((5, 2), "f") for k in "ti"} | {"o": np.ones((2, 2), "f")}
    p["w"] = {name: np.ones((2, 2), "f") for name in names}
    x = np.ones((3, 5), "f")
    graph = engine.trace(fn, p, x, x)
    everything = Plan({}, graph.blocks)
    small = engine.cut(p, graph, everything)
    assert set(small) == {"i", "o"}
    narrow = jax.make_jaxpr(engine.narrow(fn, graph, everything))(small, x, x)
    assert engine.cost(graph, everything).macs == count_macs(narrow)
    one_left = Plan({}, set(list(graph.blocks)[1:]))
    assert engine.cost(graph, one_left).macs == count_macs(narrow) + 3 * 5 * 2 + 3 * 2 * 2


def test_the_oracle_itself():
    x, w = np.ones((2, 4, 4, 3), "f"), np.ones((3, 3, 3, 8), "f")
    assert count_macs(jax.make_jaxpr(lambda x, w: jax.nn.relu(zoo.conv(x, w)))(x, w)) == 2 * 16 * 9 * 3 * 8
    assert count_macs(jax.make_jaxpr(jax.jit(lambda a, b: a @ b))(np.ones((2, 3)), np.ones((3, 5)))) == 30


@pytest.mark.parametrize(("masks", "message"), [
    ({"units": {"absent": np.ones(6, bool)}}, "'absent', which is not in the graph"),
    ({"units": {"stem": np.ones(2, bool)}}, r"expected shape \(6,\), got \(2,\)"),
    ({"blocks": {"absent": np.True_}}, "'absent', which is not in the graph"),
])  # fmt: skip
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(engine.PlanError, match=message):
        engine.cost(traced("residual"), masks)


def test_what_masks_leave_out_is_kept():
    graph = traced("residual")
    half = np.array([2, 0, 0, 1, 0, 5])  # any number but 0 keeps
    assert engine.cost(graph, {}) == engine.cost(graph, Plan())
    assert engine.cost(graph, {"units": {"stem": half}}) == engine.cost(graph, Plan({"stem": [0, 3, 5]}))
