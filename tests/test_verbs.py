"""`cut`, `narrow` and `gate` where programs and callers are odd: counter-examples found so far, and every message."""

import os
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax import export, lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as S
from laws import Bench, draw, leaves_of, random_plan
from subjects import SUBJECTS
from zoo import C, D, conv, dense

from treesurgeon import engine
from treesurgeon.engine import NarrowError, Plan, PlanError, StructureError, TreesurgeonError

P = draw({"s": D(5, 6), "a": D(6, 6), "c": D(6, 2)}, 0, np.float32)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(4, 5)).astype(np.float32), np.array([0, 1, 0, 1])


def model(p, x):
    h = jnp.tanh(dense(p["s"], x))
    h = h + jnp.tanh(dense(p["a"], h))
    return dense(p["c"], h)


def loss(p, x, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(model(p, x)), y[:, None], 1).mean()


GRAPH = engine.trace(model, P, X)
KEEP, DROP = Plan({"s": [0, 2, 3]}), Plan({"s": [0, 2, 3]}, {"a"})
MODELS = ["mlp", "digits_cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg11", "resnet20"))]
UNITS = GRAPH.masks(KEEP)["units"]


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6), a, b)


def agree(fn, params, *args, seeds=(0, 1)):
    """Trace, and compare narrow with gate under plans."""
    graph = engine.trace(fn, params, *args)
    for seed in seeds:
        plan = random_plan(graph, seed)
        close(
            jax.jit(engine.narrow(fn, graph, plan))(engine.cut(params, graph, plan), *args),
            jax.jit(engine.gate(fn, graph))(params, graph.masks(plan), *args),
        )
    return graph


# A graph serves other functions of the same parameters.


@pytest.mark.parametrize("plan", [KEEP, DROP])
def test_a_loss_of_the_traced_model(plan):
    small = engine.cut(P, GRAPH, plan)
    value, grads = jax.value_and_grad(engine.narrow(loss, GRAPH, plan))(small, X, Y)
    wide, wide_grads = jax.value_and_grad(engine.gate(loss, GRAPH))(P, GRAPH.masks(plan), X, Y)
    close((value, grads), (wide, engine.cut(wide_grads, GRAPH, plan)))


@pytest.mark.parametrize("plan", [KEEP, DROP])
def test_a_function_that_runs_the_model_twice(plan):
    def two(p, x, y):
        return loss(p, x, y) + loss(p, 2 * x[::-1], y)

    small = engine.cut(P, GRAPH, plan)
    once = engine.narrow(loss, GRAPH, plan)
    want = once(small, X, Y) + once(small, 2 * X[::-1], Y)
    close(engine.narrow(two, GRAPH, plan)(small, X, Y), want)
    close(engine.gate(two, GRAPH)(P, GRAPH.masks(plan), X, Y), want)


def decayed(p, x, y):
    return loss(p, x, y) + sum((leaf**2).sum() for leaf in jax.tree.leaves(p))


def test_weight_decay():
    small = engine.cut(P, GRAPH, KEEP)
    want = engine.narrow(loss, GRAPH, KEEP)(small, X, Y) + sum((leaf**2).sum() for leaf in jax.tree.leaves(small))
    close(engine.narrow(decayed, GRAPH, KEEP)(small, X, Y), want)
    close(engine.gate(decayed, GRAPH)(P, {"units": UNITS}, X, Y), want)


def test_weight_decay_of_a_dropped_block_is_refused():
    message = r"reads a/[bw] outside of the block 'a', which the traced function did not"
    with pytest.raises(NarrowError, match=message):
        engine.narrow(decayed, GRAPH, DROP)(engine.cut(P, GRAPH, DROP), X, Y)
    with pytest.raises(NarrowError, match=message):
        engine.gate(decayed, GRAPH)(P, GRAPH.masks(DROP), X, Y)


def test_a_function_without_the_block():
    def early(p, x):
        return jnp.tanh(dense(p["s"], x)).sum()

    close(
        engine.narrow(early, GRAPH, DROP)(engine.cut(P, GRAPH, DROP), X),
        engine.gate(early, GRAPH)(P, GRAPH.masks(DROP), X),
    )


def test_a_shared_block_that_is_used_another_way():
    def shared(p, x):
        h = jnp.tanh(dense(p["s"], x))
        h = h + jnp.tanh(dense(p["a"], h))
        return dense(p["c"], h) + p["a"]["w"].sum() + p["a"]["b"].sum()

    def other(p, x):
        h = jnp.tanh(dense(p["s"], x))
        return dense(p["c"], h) + dense(p["a"], h).sum()

    graph = agree(shared, P, X)
    plan = Plan({}, graph.blocks.keys())
    assert plan.drop
    with pytest.raises(NarrowError, match=r"is not a block of this function"):
        engine.narrow(other, graph, plan)(engine.cut(P, graph, plan), X)


def test_a_function_that_reads_units_another_way():
    def head(p, h):
        return dense(p["c"], h)

    h = np.ones((4, 6), np.float32)
    with pytest.raises(NarrowError, match="reads group 's' in a way that the traced function did not"):
        engine.narrow(head, GRAPH, KEEP)(engine.cut(P, GRAPH, KEEP), h)
    with pytest.raises(NarrowError, match="so it cannot be gated: trace this function instead"):
        engine.gate(head, GRAPH)(P, {"units": UNITS}, h)


def test_an_unknown_primitive_that_meets_a_pruned_axis():
    def spectrum(p, x):
        return jnp.linalg.qr(jnp.tanh(dense(p["s"], x)))[1].sum()

    with pytest.raises(NarrowError, match="reads group 's' in a way that the traced function did not"):
        engine.narrow(spectrum, GRAPH, KEEP)(engine.cut(P, GRAPH, KEEP), X)


@pytest.mark.parametrize("name", MODELS)
def test_the_inference_graph_serves_training(name):
    bench = Bench(SUBJECTS[f"{name}-train"])
    bench.graph = Bench(SUBJECTS[name]).graph
    plan = random_plan(bench.graph, 1, drop=0.6)
    assert plan.drop
    small, fast = bench.narrowed(plan)
    shapes = leaves_of(jax.eval_shape(fast, small, *bench.args))
    want = {f"1/{path}": x.shape for path, x in leaves_of(small).items() if path.startswith("batch_stats")}
    assert {path: x.shape for path, x in shapes.items() if path.startswith("1/")} == want


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_inference_graph_serves_training_in_numbers(name):
    bench = Bench(SUBJECTS[f"{name}-train"])
    bench.graph = Bench(SUBJECTS[name]).graph
    for seed in range(3):
        bench.law2_and_5(random_plan(bench.graph, seed, drop=0.6))


# Inputs whose axes may shrink.

FREE = engine.trace(model, P, X, free_inputs=["args[0]"])
CHOSEN = Plan({"args[0]": [0, 3], "s": [0, 2, 3]})


def test_a_free_input_comes_whole_or_narrow():
    small, fast = engine.cut(P, FREE, CHOSEN), engine.narrow(model, FREE, CHOSEN)
    assert small["s"]["w"].shape == (2, 3)
    want = engine.gate(model, FREE)(P, FREE.masks(CHOSEN), X)
    assert not np.allclose(want, model(P, X), atol=1e-2)
    close((fast(small, X), fast(small, X[:, [0, 3]])), (want, want))
    close(fast(small, X[:2]), want[:2])
    close(jax.jit(jax.vmap(lambda x: fast(small, x)))(X[:, None]), want[:, None])
    with pytest.raises(TypeError, match="dot_general"):
        fast(small, X[:, :3])


def test_narrowing_a_narrow_input_again():
    small, fast = engine.cut(P, FREE, CHOSEN), engine.narrow(model, FREE, CHOSEN)
    again = engine.trace(fast, small, X[:, [0, 3]], free_inputs=[""])
    second = Plan({"args[0]": [1], "s": [0, 2]})
    both = FREE.then(CHOSEN, second)
    assert both.keep["args[0]"].tolist() == [3]
    smaller = engine.cut(small, again, second)
    close(
        engine.narrow(fast, again, second)(smaller, X[:, [3]]),
        engine.narrow(model, FREE, both)(engine.cut(P, FREE, both), X),
    )


def test_removed_input_features_are_not_read():
    """A missing feature may be NaN; no derivative flows to it."""
    holes = X.copy()
    holes[:, [1, 2, 4]] = np.nan
    masks, small = FREE.masks(CHOSEN), engine.cut(P, FREE, CHOSEN)
    run = jax.value_and_grad(lambda x: engine.gate(loss, FREE)(P, masks, x, Y))
    narrow = jax.value_and_grad(lambda x: engine.narrow(loss, FREE, CHOSEN)(small, x, Y))
    close((*run(holes), *narrow(holes)), run(X) * 2)
    assert (np.asarray(run(holes)[1])[:, [1, 2, 4]] == 0).all()


def test_a_free_input_under_another_name_is_pinned():
    def batched(p, batch):
        return loss(p, batch["x"], batch["y"])

    batch, message = {"x": X, "y": Y}, r"\(an axis of the input args\[0\]/x\); it takes input features that the traced"
    with pytest.raises(NarrowError, match=message):
        engine.narrow(batched, FREE, CHOSEN)(engine.cut(P, FREE, CHOSEN), batch)
    with pytest.raises(NarrowError, match=message):
        engine.gate(batched, FREE)(P, FREE.masks(CHOSEN), batch)
    units = Plan({"s": [0, 2, 3]})
    close(
        engine.narrow(batched, FREE, units)(engine.cut(P, FREE, units), batch),
        engine.narrow(loss, FREE, units)(engine.cut(P, FREE, units), X, Y),
    )


def test_free_inputs_that_are_not_there():
    with pytest.raises(StructureError, match=r"free_inputs names 'x'; the array arguments are args\[0\]"):
        engine.trace(model, P, X, free_inputs=["x"])
    by_name = engine.trace(lambda p, *, x: model(p, x), P, x=X, free_inputs=["x"])
    assert next(iter(by_name.groups)) == "x"


# Callers.


def test_gate_under_transformations():
    gated, masks = engine.gate(model, GRAPH), GRAPH.masks(DROP)
    stack = jax.tree.map(lambda m: np.stack([m, np.ones_like(m)]), masks)
    want = np.stack([gated(P, masks, X), model(P, X)])
    close(jax.jit(jax.vmap(lambda m: gated(P, m, X)))(stack), want)
    close(lax.map(lambda m: gated(P, m, X), stack), want)
    per_candidate = jax.jit(jax.vmap(jax.grad(lambda p, m: gated(p, m, X).sum()), (None, 0)))(P, stack)
    summed = jax.grad(lambda p: jax.vmap(lambda m: gated(p, m, X))(stack).sum())(P)
    close(jax.tree.map(lambda g: g.sum(0), per_candidate), summed)
    forward = jax.jvp(lambda x: gated(P, masks, x).sum(), (X,), (X,))[1]
    close(forward, (jax.grad(lambda x: gated(P, masks, x).sum())(X) * X).sum())
    close(jax.jit(jax.checkpoint(lambda p: gated(p, masks, X)))(P), want[0])
    assert np.isfinite(jax.jit(jax.hessian(lambda x: gated(P, masks, x).sum()))(X[:1])).all()


def test_relu_at_exactly_zero():
    p = {"a": {"w": np.zeros((5, 6), "f"), "b": np.zeros(6, "f")}, "c": {"w": np.ones((6, 2), "f")}}
    for act in (jax.nn.relu, jax.nn.relu6, jax.nn.elu, jax.nn.leaky_relu, lambda h: jnp.maximum(h, 0)):
        fn = lambda p, x, act=act: (act(dense(p["a"], x)) @ p["c"]["w"]).sum()
        graph = engine.trace(fn, p, X)
        plan = Plan({"a": [1, 2]})
        dense_grad = engine.cut(jax.grad(fn)(p, X), graph, plan)
        close(jax.grad(engine.narrow(fn, graph, plan))(engine.cut(p, graph, plan), X), dense_grad)
        close(engine.cut(jax.grad(engine.gate(fn, graph))(p, graph.masks(plan), X), graph, plan), dense_grad)


def test_masks_may_leave_groups_and_blocks_out():
    gated = engine.gate(model, GRAPH)
    close(gated(P, {}, X), model(P, X))
    close(gated(P, {"units": UNITS}, X), gated(P, GRAPH.masks(KEEP), X))
    close(gated(P, {"blocks": {"a": False}}, X), gated(P, GRAPH.masks(Plan({}, {"a"})), X))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"group": {}}, r"expected the keys 'units', 'blocks' and 'maps', got also \['group'\]"),
        ({"units": {"zz": np.ones(6, bool)}}, "names 'zz', which is not in the graph"),
        ({"blocks": {"zz": True}}, "names 'zz', which is not in the graph"),
        ({"units": {"s": np.ones(5, bool)}}, r"expected shape \(6,\), got \(5,\)"),
        ({"units": {"s": np.ones((2, 6), bool)}}, "stacks of masks go through jax.vmap"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(PlanError, match=message):
        engine.gate(model, GRAPH)(P, masks, X)


def test_parameters_that_do_not_fit():
    small = engine.cut(P, GRAPH, DROP)
    with pytest.raises(StructureError, match=r"pass what cut\(params, graph, plan\) returns(.|\n)*a/b: not expected"):
        engine.narrow(model, GRAPH, DROP)(P, X)
    with pytest.raises(StructureError, match=r"the dense pytree that was traced(.|\n)*a/b: expected \(6,\), missing"):
        engine.gate(model, GRAPH)(small, {}, X)
    with pytest.raises(StructureError, match=r"pass the pytree that was traced(.|\n)*s/b: expected \(6,\), got \(3,\)"):
        engine.cut(small, GRAPH, DROP)
    many = {str(i): np.ones(3) for i in range(12)}
    with pytest.raises(StructureError, match="… and "):
        engine.cut(many, GRAPH, DROP)


def test_masks_that_are_not_closed_over_ties():
    """The exit of a dropped block holds zeros where its entry was removed."""
    p = draw({"a": D(5, 6), "b": D(6, 6), "c": D(6, 2)}, 3, np.float32)
    fn = lambda p, x: dense(p["c"], jnp.tanh(dense(p["b"], jnp.tanh(dense(p["a"], x)))))
    graph = engine.trace(fn, p, X)
    entry, exit_ = np.arange(6) < 3, np.isin(np.arange(6), [2, 3, 4])
    masks = {"units": {"a": entry, "b": exit_}, "blocks": {"b": np.asarray(False)}}
    want = dense(p["c"], np.tanh(dense(p["a"], X)) * (entry & exit_))
    close(engine.gate(fn, graph)(p, masks, X), want)


def test_other_batches_and_dtypes():
    small, fast = engine.cut(P, GRAPH, DROP), engine.narrow(model, GRAPH, DROP)
    assert fast(small, np.ones((7, 5), "f")).shape == (7, 2)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small)
    assert fast(half, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    gated = engine.gate(model, GRAPH)(jax.tree.map(jnp.bfloat16, P), {"units": UNITS}, jnp.bfloat16(X))
    assert gated.dtype == jnp.bfloat16
    assert fast(small, X).dtype == np.float32


def test_mappings_of_another_order():
    backwards = OrderedDict((k, OrderedDict(reversed(P[k].items()))) for k in reversed(P))
    close(engine.gate(model, GRAPH)(backwards, {"units": UNITS}, X), engine.gate(model, GRAPH)(P, {"units": UNITS}, X))


def test_static_arguments():
    def fn(p, x, mode="a", *, scale=(1,)):
        return model(p, x) * (2 if mode is True or mode == "a" else 3) * scale[0]

    graph = engine.trace(fn, P, X, "b", scale=(2,))
    small, fast = engine.cut(P, GRAPH, KEEP), engine.narrow(fn, graph, KEEP)
    close(fast(small, X, "a") * 3, fast(small, X, "b") * 2)
    close(fast(small, X, 1) * 2, fast(small, X, True) * 3)  # 1 == True, and yet another program
    close(fast(small, X, scale=[3]), fast(small, X) * 3)


def test_a_function_is_retraced_once_for_each_shape():
    calls = []

    def counted(p, x):
        calls.append(x.shape)
        return model(p, x)

    fast, small = engine.narrow(counted, GRAPH, KEEP), engine.cut(P, GRAPH, KEEP)
    for n in (4, 4, 3, 4, 3):
        fast(small, X[:n])
    assert calls == [(4, 5), (3, 5)]


def test_closures_over_tracers():
    def outer(scale):
        fn = lambda p, x: model(p, x) * scale + scale
        small = engine.narrow(fn, GRAPH, DROP)(engine.cut(P, GRAPH, DROP), X).sum()
        return small + engine.gate(fn, GRAPH)(P, GRAPH.masks(DROP), X).sum()

    slope = outer(1.0)
    close(jax.grad(outer)(2.0), slope)
    close(jax.jit(outer)(2.0), 2 * slope)
    close(jax.vmap(outer)(jnp.arange(3.0)), slope * np.arange(3))


def test_trace_inside_jit():
    @jax.jit
    def whole(p, x):
        graph = engine.trace(model, p, x)
        return engine.narrow(model, graph, KEEP)(engine.cut(p, graph, KEEP), x)

    close(whole(P, X), engine.narrow(model, GRAPH, KEEP)(engine.cut(P, GRAPH, KEEP), X))


@pytest.mark.parametrize("name", ["mlp", pytest.param("digits_cnn", marks=pytest.mark.slow), *MODELS[2:]])
def test_symbolic_batch(name):
    bench = Bench(SUBJECTS[name])
    plan = random_plan(bench.graph, 1)
    small, fast = bench.narrowed(plan)
    x = bench.args[0]
    (b,) = export.symbolic_shape("b")
    exported = export.export(jax.jit(lambda x: fast(small, x)))(jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype))
    for n in (1, 2):
        close(exported.call(x[:n]), jax.jit(fast)(small, x[:n]))


# Pytrees.


class Layer(NamedTuple):
    w: object
    v: object
    none: object = None


def test_containers():
    params = FrozenDict(
        {"l": Layer(P["s"]["w"], P["c"]["w"]), "e": {}, "m": None, "block": {"w": P["a"]["w"]}, "k": 2.0, "n": 3}
    )

    def fn(p, x):
        h = x @ p["l"].w * p["k"]
        h = h + jnp.tanh(h @ p["block"]["w"])
        return h @ p["l"].v * p["n"]

    graph = agree(fn, params, X)
    plan = Plan({"l": [1, 2]}, graph.blocks.keys())
    small = engine.cut(params, graph, plan)
    assert isinstance(small, FrozenDict)
    assert jax.tree.map(np.shape, dict(small)) == {"l": Layer((5, 2), (2, 2)), "e": {}, "m": None, "k": (), "n": ()}
    assert engine.cost(graph, plan).size == 10 + 4 + 2


def test_leaves_of_lists_leave_none_behind():
    params = [P["s"]["w"], P["a"]["w"], P["a"]["w"] + 1, P["c"]["w"]]

    def fn(p, x):
        h = x @ p[0]
        for w in p[1:-1]:
            h = h + jnp.tanh(h @ w)
        return h @ p[-1]

    graph = agree(fn, params, X)
    small = engine.cut(params, graph, Plan({}, {"1"}))
    assert [None if w is None else w.shape for w in small] == [(5, 6), None, (6, 6), (6, 2)]


def test_cut_does_not_copy_what_stays():
    small = engine.cut(P, GRAPH, KEEP)
    assert small["c"]["b"] is P["c"]["b"]
    assert isinstance(small["s"]["w"], np.ndarray)


def test_outputs_that_are_no_arrays():
    def fn(p, x):
        return {"y": model(p, x), "none": None, "three": 3, "half": 0.5, "x": x}

    graph = agree(fn, P, X)
    out = engine.narrow(fn, graph, KEEP)(engine.cut(P, graph, KEEP), X)
    assert out["none"] is None
    assert (int(out["three"]), float(out["half"])) == (3, 0.5)


# Programs.


def test_a_bit_cast_across_widths():
    def apart(p, x):
        return lax.bitcast_convert_type(dense(p["s"], x), jnp.uint8).sum(-1).astype(jnp.float32) @ p["c"]["w"]

    def together(p, x):
        h = dense(p["s"], x).reshape(4, 3, 2).astype(jnp.float16)
        return jnp.nan_to_num(lax.bitcast_convert_type(h, jnp.float32)).max(-1)

    assert [g.size for g in agree(apart, P, X).groups.values()] == [6]
    assert [g.size for g in agree(together, P, X).groups.values()] == [3]


def test_noise_for_a_dropped_block():
    def fn(p, x, key):
        h = dense(p["s"], x)
        y = jnp.tanh(dense(p["a"], h))
        return dense(p["c"], h + jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0))

    graph = agree(fn, P, X, jax.random.key(0))
    assert list(graph.blocks) == ["a"]


def test_dropping_a_block_and_the_one_around_it():
    graph = agree(nested, N, X, seeds=range(4))
    for drop in ({"a"}, {"b"}, {"a", "b"}):
        plan = Plan({}, drop)
        close(
            engine.narrow(nested, graph, plan)(engine.cut(N, graph, plan), X),
            engine.gate(nested, graph)(N, graph.masks(plan), X),
        )


N = draw({"s": D(5, 6), "a": D(6, 6), "b": D(6, 6), "c": D(6, 2)}, 1, np.float32)


def nested(p, x):
    h = jnp.tanh(dense(p["s"], x))
    y = h + jnp.tanh(dense(p["a"], h))
    y = jnp.tanh(y + dense(p["b"], y))
    return dense(p["c"], h + y)


def test_gradients_traced_as_programs():
    """Transposed contractions, batch-grouped convolutions of a backward pass: agree or pin."""
    kernels = draw({"a": C(3, 3, 6), "b": C(3, 6, 4)}, 5, np.float32)
    image = RNG.normal(size=(2, 5, 5, 3)).astype(np.float32)

    def conv_loss(p, x):
        return (conv(jax.nn.relu(conv(x, p["a"])), p["b"]) ** 2).mean()

    def step(p, x):
        grads = jax.grad(loss)(p, x, Y)
        return model(jax.tree.map(lambda w, g: w - 0.1 * g, p, grads), x)

    agree(step, P, X, seeds=(1,))
    for fn, params, x in ((jax.grad(conv_loss), kernels, image), (jax.grad(lambda p, x: loss(p, x, Y)), P, X)):
        graph = engine.trace(fn, params, x)
        plan = random_plan(graph, 1, drop=0)
        close(
            jax.jit(engine.narrow(fn, graph, plan))(engine.cut(params, graph, plan), x),
            engine.cut(jax.jit(engine.gate(fn, graph))(params, graph.masks(plan), x), graph, plan),
        )


def test_linear_algebra_and_statistics_pin():
    def fn(p, x):
        h = dense(p["s"], x)
        gram = h.T @ h + jnp.eye(6)
        return jnp.linalg.solve(gram, p["c"]["w"]).sum(0) + jnp.linalg.eigh(gram)[0].sum() + jnp.median(h, -1).sum()

    assert not agree(fn, P, X).groups


def test_functions_without_a_derivative_are_traced():
    def refuse(*_):
        raise NotImplementedError("no derivative")

    act = jax.custom_vjp(jnp.tanh)
    act.defvjp(refuse, lambda _, g: (g,))
    fn = lambda p, x: dense(p["c"], act(dense(p["s"], x)))
    graph = agree(fn, P, X)
    assert list(graph.groups) == ["s"]
    fast = engine.narrow(fn, graph, KEEP)
    with pytest.raises(Exception, match=r"test_verbs.py:\d+: the derivative rule of `custom_vjp_call` raises Not"):
        jax.grad(lambda p: fast(p, X).sum())(engine.cut(P, graph, KEEP))


def test_forward_mode_through_a_reverse_rule_pins():
    inner = jax.custom_vjp(jnp.tanh)
    inner.defvjp(lambda v: (jnp.tanh(v), v), lambda _, g: (g,))
    outer = jax.custom_jvp(lambda v: inner(v))
    outer.defjvp(lambda v, t: jax.jvp(inner, v, t))
    fn = lambda p, x: dense(p["c"], outer(dense(p["s"], x)))
    graph = agree(fn, P, X)
    assert "custom_lin" in str(graph.pinned["s/w[1]"])
    grads = jax.grad(lambda p: engine.narrow(fn, graph, Plan())(p, X).sum())(P)
    close(grads, jax.grad(lambda p: fn(p, X).sum())(P))


def test_printing_from_inside_pins():
    def fn(p, x):
        h = dense(p["s"], x)
        jax.debug.callback(lambda v: None, h)
        return dense(p["c"], h)

    assert not agree(fn, P, X).groups


@pytest.mark.parametrize("error", [NarrowError, PlanError, StructureError, engine.ArtifactError])
def test_errors_are_ours(error):
    assert issubclass(error, TreesurgeonError)
    assert issubclass(error, ValueError)


def test_the_function_is_traced_once_for_all_verbs_and_plans():
    runs = []

    def counted(p, x):
        runs.append(1)
        return model(p, x)

    graph = engine.trace(counted, P, X)
    for plan in (KEEP, DROP):
        small = engine.cut(P, graph, plan)
        close(jax.jit(engine.narrow(counted, graph, plan))(small, X), engine.narrow(model, GRAPH, plan)(small, X))
        engine.gate(counted, graph)(P, graph.masks(plan), X)
    assert len(runs) == 1
    engine.narrow(counted, graph, KEEP)(engine.cut(P, graph, KEEP), X[:2])
    assert len(runs) == 2  # another shape
    with jax.default_matmul_precision("float32"):
        engine.trace(counted, P, X)
    assert len(runs) == 3  # another way to trace


def test_a_function_that_closes_over_traced_values_is_traced_anew():
    factor = [None]
    small = engine.cut(P, GRAPH, KEEP)

    def scaled(p, x):
        return factor[0] * model(p, x)

    fast = engine.narrow(scaled, GRAPH, KEEP)

    def total(f):
        factor[0] = f
        return fast(small, X).sum()

    want = engine.narrow(model, GRAPH, KEEP)(small, X).sum()
    for f in (2.0, 3.0):
        close(jax.jit(total)(f), f * want)
        close(jax.grad(total)(f), want)


def test_cut_takes_leaves_as_they_come():
    """On the host, on a device, in a program, keys: the slices are the same, and device arrays stay where they are."""

    def fn(params, x):
        draws = jax.vmap(lambda key: jax.random.normal(key, ()))(params["keys"])
        return (x @ params["kernel"] * draws) @ params["out"]

    keys = jax.random.split(jax.random.key(0), 6)
    host = {"kernel": np.arange(24.0, dtype=np.float32).reshape(4, 6), "out": np.ones((6, 2), np.float32), "keys": keys}
    graph = engine.trace(fn, host, np.ones((1, 4), np.float32))
    (group,) = graph.groups
    kept = np.array([1, 4])
    plan = engine.Plan({group: kept})
    want = {"kernel": host["kernel"][:, kept], "out": host["out"][kept], "keys": jax.random.key_data(keys)[kept]}
    on_device = jax.device_put(host, jax.devices()[0])
    ways = {
        "host": engine.cut(host, graph, plan),
        "device": engine.cut(on_device, graph, plan),
        "program": jax.jit(lambda params: engine.cut(params, graph, plan))(on_device),
    }
    for way, found in ways.items():
        found["keys"] = jax.random.key_data(found["keys"])
        jax.tree.map(np.testing.assert_array_equal, found, want)
        assert isinstance(found["kernel"], np.ndarray) == (way == "host")
    assert ways["device"]["kernel"].committed


def test_a_mapping_with_defaults_stays_one():
    p = defaultdict(list, {name: defaultdict(dict, leaf) for name, leaf in P.items()})
    small = engine.cut(p, engine.trace(model, p, X), DROP)
    assert type(small) is type(small["s"]) is defaultdict
    assert (small.default_factory, set(small)) == (list, {"s", "c"})


def test_sums_keep_constants_that_are_no_counts():
    """By NumPy on the units that are left; the laws hold for either reading."""
    p = {"a": RNG.normal(size=(5, 2)), "b": RNG.normal(size=(5, 3))}

    def fn(p, x):
        return (x @ p["a"]).sum(-1) * 1.0 + ((x @ p["b"]) ** 2).sum(-1) / 2 + (x @ p["b"]).var(-1, ddof=1)

    graph, plan = engine.trace(fn, p, X), Plan({"a": [0], "b": [0, 2]})
    a, b = X @ p["a"][:, :1], X @ p["b"][:, [0, 2]]
    want = a.sum(-1) + (b**2).sum(-1) / 2 + b.var(-1, ddof=1)
    close(engine.narrow(fn, graph, plan)(engine.cut(p, graph, plan), X), want)
    close(engine.gate(fn, graph)(p, graph.masks(plan), X), want)


@pytest.mark.parametrize("divide", [lambda h: h / 2, lambda h: h * (1 / 3)], ids=["half", "third"])
def test_a_constant_is_no_count_when_a_narrow_function_is_traced_again(divide):
    def fn(p, x):
        return divide((x @ p["a"]).sum(-1))

    p, kept = {"a": RNG.normal(size=(5, 4))}, [0, 1, 3] if divide(3) == 1 else [0, 1]
    graph = engine.trace(fn, p, X)
    once = engine.narrow(fn, graph, Plan({"a": kept}))
    small = engine.cut(p, graph, Plan({"a": kept}))
    again, first = engine.trace(once, small, X), Plan({"a": [0]})
    close(engine.narrow(once, again, first)(engine.cut(small, again, first), X), divide(X @ p["a"][:, 0]))


def test_a_negative_zero_is_another_argument():
    def fn(p, x, s):
        return model(p, x) * np.copysign(1.0, s)

    narrow, p = engine.narrow(fn, engine.trace(fn, P, X, 0.0), KEEP), engine.cut(P, GRAPH, KEEP)
    close(narrow(p, X, 0.0), -narrow(p, X, -0.0))


@pytest.mark.parametrize("number", [2.0, 3, True, np.float32(2)])
def test_leaves_may_be_plain_numbers(number):
    def fn(p, x):
        return model(p, x) * p["times"]

    p = {**P, "times": number}
    graph = engine.trace(fn, p, X)
    want = engine.narrow(fn, graph, KEEP)(engine.cut(p, graph, KEEP), X)
    close(engine.gate(fn, graph)(p, graph.masks(KEEP), X), want)


def test_settings_of_jax_are_heeded_by_what_was_traced_before():
    def fn(p, x, key):
        return model(p, x) * jax.random.bernoulli(key, 0.5, (4, 2))

    key = jax.random.key(0)
    graph = engine.trace(fn, P, X, key)
    gated, narrow, masks = engine.gate(fn, graph), engine.narrow(fn, graph, Plan()), GRAPH.masks(Plan())
    for setting in (True, False):
        with jax.threefry_partitionable(setting):
            want = fn(P, X, key)
            close(gated(P, masks, X, key), want)
            close(narrow(P, X, key), want)


def test_what_a_platform_alone_can_do_stays_there():
    only = Primitive("only_elsewhere")
    only.def_abstract_eval(lambda x: x)
    mlir.register_lowering(only, lambda ctx, x: [x], platform="cuda")

    def fn(p, x):
        h = dense(p["s"], x)
        here = lambda h: h * h.mean(-1, keepdims=True)
        return dense(p["c"], lax.platform_dependent(h, cuda=lambda h: here(only.bind(h)), default=here))

    pinned = engine.trace(fn, P, X)
    assert "only_elsewhere" in str(pinned.pinned)
    try:
        engine.rules.register("only_elsewhere", engine.rules.lookup("sin"))
        graph = engine.trace(fn, P, X)
        small = jax.jit(engine.narrow(fn, graph, KEEP))(engine.cut(P, graph, KEEP), X)
        close(jax.jit(engine.gate(fn, graph))(P, graph.masks(KEEP), X), small)
    finally:
        del engine.rules.base._RULES["only_elsewhere"]


def synced(p, x):
    """Normalised over the whole batch, whatever part of it is on this device."""
    h = dense(p["s"], x)
    h = h - lax.pmean(h.mean(0), "d")
    h = lax.fori_loop(0, 2, lambda i, h: h + jnp.tanh(dense(p["a"], h)), h)
    still = lax.stop_gradient(h)
    top, low = lax.pmax(still.max(0), "d"), lax.pmin(still.min(0), "d")
    return dense(p["c"], checkpoint_name((h - low) / (top - low), "scaled"))


@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map(check):
    """With JAX's check of what varies between devices, and without; collectives leave units apart."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    def over(fn, *specs):
        return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=S("d"), check_vma=check))

    graph = engine.trace(lambda p, x: jax.vmap(synced, (None, 0), axis_name="d")(p, x[None])[0], P, X)
    assert set(graph.groups) == {"s"}
    small = engine.cut(P, graph, KEEP)
    fast, gated = engine.narrow(synced, graph, KEEP), engine.gate(synced, graph)
    want = jax.vmap(fast, (None, 0), axis_name="d")(small, X[None])[0]
    found = over(fast, S(), S("d"))(small, X)
    close(found, want)
    close(over(lambda p, x: gated(p, graph.masks(KEEP), x), S(), S("d"))(P, X), want)

    def gradient(p, x):
        return jax.grad(lambda p: lax.psum((fast(p, x) ** 2).sum(), "d"))(p)["s"]["w"][None]

    alone = jax.grad(lambda p: (jax.vmap(fast, (None, 0), axis_name="d")(p, X[None]) ** 2).sum())(small)["s"]["w"]
    close(over(gradient, S(), S("d"))(small, X)[0], alone)


def test_where_arrays_are_to_lie_leaves_units_apart():
    where = NamedSharding(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,)), S("d"))

    def fn(p, x):
        return dense(p["c"], lax.with_sharding_constraint(jnp.tanh(dense(p["s"], x)), where))

    graph = engine.trace(fn, P, X)
    assert set(graph.groups) == {"s"}
    small = engine.cut(P, graph, KEEP)
    close(jax.jit(engine.narrow(fn, graph, KEEP))(small, X), engine.gate(fn, graph)(P, graph.masks(KEEP), X))


@jax.custom_jvp
def paired(h, r):
    return jnp.tanh(h), r * 2


paired.defjvp(lambda given, tangents: (paired(*given), tangents))


def summing(p, x):
    """A loss that is carried along, the same on all devices."""
    turn = lambda c, w: ((jnp.tanh(dense(p["a"], c[0]) * w), c[1] + lax.pmean((c[0] ** 2).mean(), "d")), None)
    (h, total), _ = lax.scan(turn, (dense(p["s"], x), jnp.zeros(())), jnp.ones(3))
    return dense(p["c"], h), total


def counting(p, x):
    n, h = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1])), (0, dense(p["s"], x)))
    return dense(p["c"], h), n * 1.0


def choosing(p, x):
    h = dense(p["s"], x)
    ways = (lambda h, r: (h, r + 1.0)), (lambda h, r: (-h, r - 1.0))
    h, r = lax.cond(lax.pmean(h.sum(), "d") > 0, *ways, h, (p["c"]["w"] ** 2).sum())
    return dense(p["c"], h), r


def with_own_rule(p, x):
    h, r = paired(dense(p["s"], x), (p["c"]["w"] ** 2).sum())
    return dense(p["c"], h), r


@pytest.mark.parametrize("fn", [summing, counting, choosing, with_own_rule])
def test_what_is_the_same_on_all_devices_stays_so(fn):
    """What calls carry and return differs between devices where it did, whether a plan touches the call or not."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    over = lambda fn: jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(S(), S("d")), out_specs=(S("d"), S())))
    graph = engine.trace(lambda p, x: jax.vmap(lambda x: fn(p, x), axis_name="d")(x[None]), P, X)
    assert set(graph.groups) == {"s"}
    for plan in (Plan(), KEEP):
        fast, gated = engine.narrow(fn, graph, plan), engine.gate(fn, graph)
        found = over(fast)(engine.cut(P, graph, plan), X)
        masks = {"units": graph.masks(plan)["units"], "blocks": {}}
        close(over(lambda p, x, gated=gated, masks=masks: gated(p, masks, x))(P, X), found)


def test_outputs_are_freed_by_name():
    fn = lambda p, x: {"h": dense(p["s"], x)}
    assert engine.trace(fn, P, X, free_outputs=["h"]).groups
    with pytest.raises(StructureError, match="free_outputs names 'zz'; the outputs are h: pass some of these"):
        engine.trace(fn, P, X, free_outputs=["zz"])
    with pytest.raises(StructureError, match=r"free_outputs takes names, got the string 'h': pass \['h'\]"):
        engine.trace(fn, P, X, free_outputs="h")


def test_inside_shard_map_on_two_devices():
    """Where a collective that is lost or in the wrong place shows."""
    flags = re.sub(r"--xla_force_host\S+", "", os.environ.get("XLA_FLAGS", ""))
    done = subprocess.run(
        [sys.executable, "sharded_verbs.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 10
