"""What `gate` guards: derivatives by fences, kernels by what may be read, and what its flags leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import engine, models
from treesurgeon.engine.primitives import fence, forward_only, readable

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5)).astype(np.float32)
P = {
    "a": {"w": RNG.normal(size=(5, 6)).astype("f"), "b": RNG.normal(size=6).astype("f")},
    "c": {"w": RNG.normal(size=(6, 7)).astype("f"), "b": RNG.normal(size=7).astype("f")},
    "d": {"w": RNG.normal(size=(7, 2)).astype("f")},
}


def model(p, x):
    x = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"])
    return jnp.tanh(x @ p["c"]["w"] + p["c"]["b"]) @ p["d"]["w"]


GRAPH = engine.trace(model, P, X)
PLAN = engine.Plan({"a": [0, 2, 3], "c": [1, 6]})
MASKS = GRAPH.masks(PLAN)
STACK = jax.tree.map(lambda m: np.stack([m, np.ones_like(m)]), MASKS)


def spoiled(value, removed=True):
    """The parameters with `value` in the removed slices, or in one entry that is kept."""
    params = jax.tree.map(np.array, P)
    if removed:
        params["a"]["w"][:, [1, 4, 5]] = params["a"]["b"][[1, 4, 5]] = params["c"]["w"][[1, 4, 5]] = value
        params["c"]["w"][:, [0, 2, 3, 4, 5]] = params["d"]["w"][[0, 2, 3, 4, 5]] = value
    else:
        params["c"]["w"][2, 6] = value
    return params


def test_fence_acts_on_derivatives_alone():
    mask = np.array([True, False, True])
    x = np.arange(6.0, dtype="f").reshape(2, 3)

    def fenced(x, mask=mask):
        return fence(x, mask, (1,))

    np.testing.assert_array_equal(jax.jit(fenced)(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: fenced(x * x).sum())(x), 2 * x * mask)
    np.testing.assert_array_equal(jax.jvp(fenced, (x,), (np.ones_like(x),))[1], np.ones_like(x) * mask)
    nans = np.full_like(x, np.nan)
    np.testing.assert_array_equal(jax.vjp(fenced, x)[1](nans)[0], np.where(mask, nans, 0))
    transposed = jax.linear_transpose(fenced, x)
    np.testing.assert_array_equal(transposed(nans)[0], np.where(mask, nans, 0))
    masks = np.stack([mask, ~mask])
    many = jax.vmap(jax.grad(lambda x, m: fenced(x, m).sum()), (None, 0))(x, masks)
    np.testing.assert_array_equal(many, np.broadcast_to(masks[:, None], (2, 2, 3)))
    summed = jax.grad(lambda x: jax.vmap(lambda m: fenced(x, m))(masks).sum())(x)
    np.testing.assert_array_equal(summed, np.ones_like(x))
    each = jax.vmap(jax.grad(lambda x: fenced(x).sum()), 1, 1)(np.stack([x, x], 1))
    np.testing.assert_array_equal(each, np.stack([np.ones_like(x) * mask] * 2, 1))
    assert "select" not in jax.jit(fenced).lower(x).as_text()


def test_what_of_a_kernel_may_be_read():
    kernel = np.ones((3, 2, 4), "f")
    kernel[0, 0, 0], kernel[1, 1, 1], kernel[2, 1, 3] = np.inf, np.nan, -np.inf
    summed = np.array([True, False, True])
    dims = ((0,), (0,), (2, 1))
    keep, bad = jax.jit(lambda k, m: readable(k, m, m, dims))(kernel, summed)
    np.testing.assert_array_equal(keep, np.broadcast_to(summed[:, None, None], kernel.shape))
    assert bad.shape == (4, 2)
    assert not bad.any()

    stack = np.stack([summed, ~summed])
    keep, bad = jax.vmap(lambda m: readable(kernel, m, m, dims), out_axes=(None, 0))(stack)
    np.testing.assert_array_equal(keep, np.isfinite(kernel))
    want = (~np.isfinite(kernel) & stack[:, :, None, None]).any(1).transpose(0, 2, 1)
    np.testing.assert_array_equal(bad, want)

    own = jax.vmap(lambda k, m: readable(k, m, m, dims))(np.stack([kernel, kernel]), stack)
    np.testing.assert_array_equal(own[0], np.broadcast_to(stack[:, :, None, None], (2, *kernel.shape)))
    assert (
        jax.grad(lambda k: jnp.where(readable(k, summed, summed, dims)[0], k, 0).sum())(np.ones_like(kernel)).sum()
        == 16
    )


@pytest.mark.parametrize("junk", [1e30, np.inf, np.nan])
def test_a_population_reads_no_junk_and_says_where_it_would(junk):
    gated = engine.gate(model, GRAPH)
    clean = gated(P, MASKS, X)
    out = jax.vmap(lambda m: gated(spoiled(junk), m, X))(STACK)
    np.testing.assert_allclose(out[0], clean, rtol=1e-5, atol=1e-6)
    if not np.isfinite(junk):
        assert np.isnan(out[1]).all()
    kept = spoiled(junk, removed=False)
    if np.isnan(junk):
        for got in (gated(kept, MASKS, X), jax.vmap(lambda m: gated(kept, m, X))(STACK)[0]):
            assert np.isnan(got).all()
    else:  # one plan's masks leave what is kept as it is: tanh of an infinity is one
        got = gated(kept, MASKS, X)
        small = engine.narrow(model, GRAPH, PLAN)(engine.cut(kept, GRAPH, PLAN), X)
        np.testing.assert_allclose(got, small, rtol=1e-5, atol=1e-6)


def test_a_gate_without_gradients_has_the_same_values_and_refuses_derivatives():
    gated, forward = engine.gate(model, GRAPH), engine.gate(model, GRAPH, gradients=False)
    for params in (P, spoiled(np.nan)):
        np.testing.assert_array_equal(forward(params, MASKS, X), gated(params, MASKS, X))
        np.testing.assert_array_equal(*(jax.vmap(lambda m, f=f, p=params: f(p, m, X))(STACK) for f in (forward, gated)))
    for derive in (
        jax.grad(lambda p: forward(p, MASKS, X).sum()),
        jax.jit(jax.grad(lambda p: forward(p, MASKS, X).sum())),
        lambda p: jax.jvp(lambda p: forward(p, MASKS, X), (p,), (p,)),
        lambda p: jax.vmap(jax.grad(lambda p, m: forward(p, m, X).sum()), (None, 0))(p, STACK),
    ):
        with pytest.raises(engine.NarrowError, match=r"differentiate gate\(fn, graph\) instead"):
            derive(P)
    assert forward_only(np.arange(3), "no").tolist() == [0, 1, 2]
    frozen = jax.grad(lambda x: (x + jax.lax.stop_gradient(forward(P, MASKS, X))).sum())(jnp.zeros(()))
    assert frozen == 8


def test_known_finite_parameters_are_not_looked_at():
    plain, trusting = engine.gate(model, GRAPH), engine.gate(model, GRAPH, finite=True)
    noisy = spoiled(1e30)
    np.testing.assert_array_equal(trusting(noisy, MASKS, X), plain(P, MASKS, X))
    grads = [engine.cut(jax.grad(lambda p, f=f: f(p, MASKS, X).sum())(noisy), GRAPH, PLAN) for f in (trusting, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *grads)
    jaxprs = [str(jax.make_jaxpr(jax.vmap(lambda m, f=f: f(P, m, X)))(STACK)) for f in (trusting, plain)]
    assert ["is_finite" in text for text in jaxprs] == [False, True]


def test_what_lies_before_the_first_masked_sum_is_computed_once():
    """Without gradients the kernel that makes the units, norm and activation are the same for all candidates."""
    module = models.resnet(20, 10, (4, 8, 8))
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), "float32")
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    fn, _ = engine.from_linen(module, {})
    graph = engine.trace(fn, params, x)
    masks = {"units": {"layer3_2/conv1": np.ones(8, bool)}}

    def late(**flags):
        """What is computed for each candidate."""
        gated = engine.gate(fn, graph, **flags)
        parts = engine.split(lambda p, x, m: gated(p, m, x), params, x, masks)
        known = jax.eval_shape(parts.early, jax.eval_shape(parts.once, params), x)
        jaxpr = jax.make_jaxpr(parts.late)(jax.eval_shape(parts.once, params), known, masks)
        return [eqn.primitive.name for eqn in jaxpr.eqns]

    assert late().count("conv_general_dilated") == 2
    assert late(gradients=False).count("conv_general_dilated") == 1  # the one that reads the units


def test_constant_kernels_are_shared_by_a_population():
    """A blur behind pruned channels stays one kernel, not one for each candidate."""
    blur = np.tile((np.outer([1, 2, 1], [1, 2, 1]) / 16)[:, :, None, None], (1, 1, 1, 6)).astype("f")

    def blurred(p, x):
        x, dims = x @ p["a"], ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, blur, (2, 2), "SAME", dimension_numbers=dims, feature_group_count=6)
        return x.mean((1, 2)) @ p["b"]

    p, x = {"a": P["a"]["w"], "b": P["c"]["w"]}, RNG.normal(size=(2, 8, 8, 5)).astype("f")
    graph = engine.trace(blurred, p, x)
    plan = engine.Plan({"a": [0, 1, 3]})
    one, gated = graph.masks(plan), engine.gate(blurred, graph)
    stack = jax.tree.map(lambda m: np.stack([m, np.ones_like(m)]), one)
    junk = {"a": np.where(np.isin(np.arange(6), [0, 1, 3]), p["a"], np.inf).astype("f"), "b": p["b"]}
    many = jax.vmap(gated, (None, 0, None))
    np.testing.assert_allclose(many(junk, stack, x)[0], gated(p, one, x), rtol=1e-5, atol=1e-6)
    convs = [e for e in jax.make_jaxpr(many)(p, stack, x).eqns if e.primitive.name == "conv_general_dilated"]
    assert [e.params["feature_group_count"] for e in convs] == [6]


def test_a_constant_kernel_that_is_not_finite_is_read_where_units_are_kept_alone():
    table = np.where(np.arange(6)[:, None] == 4, np.inf, np.ones((6, 2))).astype("f")

    def fn(p, x):
        return (x @ p["a"]["w"]) @ table @ np.ones((2, 1), "f")

    params = {"a": {"w": P["a"]["w"]}}
    graph = engine.trace(fn, params, X)
    plan = engine.Plan({"a": [0, 2]})
    want = engine.narrow(fn, graph, plan)(engine.cut(params, graph, plan), X)
    masks = graph.masks(plan)
    np.testing.assert_allclose(engine.gate(fn, graph)(params, masks, X), want, rtol=1e-5, atol=1e-5)
    stack = jax.tree.map(lambda m: m[None], masks)
    np.testing.assert_allclose(jax.vmap(lambda m: engine.gate(fn, graph)(params, m, X))(stack)[0], want, rtol=1e-5)
