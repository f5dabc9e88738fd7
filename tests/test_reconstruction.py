"""Reconstruction, refit and split: against NumPy, against each other, and on models of the zoo."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laws import draw, random_plan
from zoo import C, D, conv, dense

from treesurgeon import engine, models
from treesurgeon.engine import Plan, PlanError
from treesurgeon.engine.linear import linear
from treesurgeon.engine.reconstruction import solve_map
from treesurgeon.engine.refit import ridge_fit
from treesurgeon.search.evaluate import with_leaves

RNG = np.random.default_rng(0)


def rows(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def close(a, b, tol=1e-4):
    scale = float(np.abs(b).max()) + 1e-6
    np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tol)


MODELS = {
    "resnet": (models.resnet(20, 3, (4, 6, 8)), (16, 8, 8, 3)),
    "vit": (
        models.vit(num_classes=3, width=12, layers=((2, 4, 4, 16), (3, 4, 4, 16)), patch=2, scale=0.5),
        (16, 8, 8, 3),
    ),
}
SOME = [pytest.param(name, marks=pytest.mark.slow) if name == "vit" else name for name in MODELS]


def test_a_map_is_the_ridge_solution_of_numpy():
    have, want, kept = rows(50, 6), rows(50, 6), np.array([1, 1, 0, 1, 0, 1], bool)
    have = have * kept
    weight = 0.1 * (have**2).sum() / kept.sum()
    x = have[:, kept].astype(np.float64)
    pull = np.diag(kept.astype(float))[:, kept]
    expected = np.zeros((6, 6))
    expected[:, kept] = np.linalg.solve(x.T @ x + weight * np.eye(4), x.T @ want + weight * pull.T).T
    close(solve_map(have, want, kept, 0.1), expected)


def test_units_that_others_repeat_are_reconstructed_exactly():
    params = draw({"a": D(5, 6), "b": D(6, 3)}, 0, np.float32)
    weights = np.array(params["a"]["w"])
    weights[:, 3] = 2 * weights[:, 1]
    params["a"] = {"w": weights, "b": np.zeros(6, np.float32)}

    def fn(p, x):
        return dense(p["b"], jnp.maximum(dense(p["a"], x), 0))

    x = rows(64, 5)
    graph = engine.trace(fn, params, x)
    plan = Plan({next(iter(graph.groups)): [0, 1, 2, 4, 5]})
    masks = graph.masks(plan)
    learn = engine.reconstruct(fn, graph, ridge=1e-6)
    _, maps = learn(params, masks, learn.targets(params, x), x)
    fresh = rows(32, 5)
    close(engine.gate(fn, graph)(params, masks | {"maps": maps}, fresh), fn(params, fresh), 1e-3)


@pytest.mark.parametrize("name", SOME)
def test_maps_under_gate_are_maps_in_kernels(name):
    fn, params, graph, x = build(name)
    learn = engine.reconstruct(fn, graph)
    targets = jax.jit(learn.targets)(params, x)
    plan = random_plan(graph, 0)
    masks = graph.masks(plan)
    out, maps = jax.jit(learn)(params, masks, targets, x)
    gated = jax.jit(engine.gate(fn, graph))(params, masks | {"maps": maps}, x)
    small = engine.cut(engine.fold(params, graph, maps), graph, plan)
    close(gated, out)
    close(jax.jit(engine.narrow(fn, graph, plan))(small, x), gated, 1e-3)


@pytest.mark.parametrize("name", SOME)
def test_each_rung_comes_nearer_to_the_dense_model(name):
    fn, params, graph, x = build(name)
    plan = Plan({g: np.arange(max(1, v.size * 2 // 3)) for g, v in graph.groups.items()})
    masks, dense = graph.masks(plan), jax.jit(fn)(params, x)
    learn = engine.reconstruct(fn, graph)
    _, maps = jax.jit(learn)(params, masks, jax.jit(learn.targets)(params, x), x)
    gate = jax.jit(engine.gate(fn, graph))
    fit = engine.refit(fn, graph, plan)
    small = engine.cut(params, graph, plan)
    _, small = jax.jit(fit)(small, jax.jit(fit.targets)(params, x), x)

    def off(out):
        return float(jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense))

    plain = off(gate(params, masks, x))
    assert off(gate(params, masks | {"maps": maps}, x)) < 0.8 * plain
    assert off(jax.jit(engine.narrow(fn, graph, plan))(small, x)) < 0.8 * plain


def test_nothing_removed_changes_nothing():
    fn, params, graph, x = build("resnet")
    masks = graph.masks(Plan())
    learn = engine.reconstruct(fn, graph)
    out, _ = jax.jit(lambda p: learn(p, masks, learn.targets(p, x), x))(params)
    close(out, jax.jit(fn)(params, x), 1e-3)
    fit = engine.refit(fn, graph, Plan())
    out, same = jax.jit(lambda p: fit(p, fit.targets(p, x), x))(params)
    close(out, jax.jit(fn)(params, x), 1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * (1 + abs(b).max())), same, params)


@pytest.mark.parametrize("use", ["bias", "bias twice", "no bias", "scalar bias"])
def test_a_bias_takes_what_the_kernel_cannot(use):
    """Where a removed unit's mean is not zero; the last kernel's fit is checked against NumPy's."""
    params = draw({"a": D(5, 6), "b": D(6, 3), "c": D(1, 1)}, 0, np.float32)

    def fn(p, x):
        h = jnp.maximum(dense(p["a"], x) + 1, 0) @ p["b"]["w"]
        bias = {"no bias": 0, "scalar bias": p["c"]["b"]}.get(use, p["b"]["b"])
        return h + bias if use != "bias twice" else h + bias + jnp.sin(bias)

    x = rows(256, 5)
    graph = engine.trace(fn, params, x)
    plan = Plan({next(iter(graph.groups)): [0, 1, 4, 5]})
    fit = engine.refit(fn, graph, plan, ridge=1e-6)
    small = engine.cut(params, graph, plan)
    out, new = fit(small, fit.targets(params, x), x)
    close(engine.narrow(fn, graph, plan)(new, x), out)
    features = np.maximum(x @ np.asarray(new["a"]["w"]) + np.asarray(new["a"]["b"]) + 1, 0)
    wanted = np.maximum(x @ params["a"]["w"] + params["a"]["b"] + 1, 0) @ params["b"]["w"]
    if use == "bias":
        features = np.concatenate([features, np.ones((len(x), 1))], 1)
        wanted = wanted + params["b"]["b"]
    expected = features @ np.linalg.lstsq(features, wanted, rcond=None)[0]
    if use != "bias":
        expected = expected + np.asarray(fn(params, x)) - wanted
    close(out, expected, 1e-3)


@pytest.mark.parametrize("name", SOME)
def test_refit_under_masks_is_refit_cut(name):
    fn, params, graph, x = build(name)
    plan = random_plan(graph, 1)
    fit, learn = engine.refit(fn, graph, plan), engine.refit_masked(fn, graph)
    out, small = jax.jit(lambda p: fit(engine.cut(p, graph, plan), fit.targets(p, x), x))(params)
    masked, leaves = jax.jit(lambda p, m: learn(p, m, learn.targets(p, x), x))(params, graph.masks(plan))
    close(masked, out, 2e-3)
    new = with_leaves(params, leaves)
    close(jax.jit(engine.gate(fn, graph))(new, graph.masks(plan), x), masked)
    close(jax.jit(engine.narrow(fn, graph, plan))(engine.cut(new, graph, plan), x), out, 2e-3)
    for a, b in zip(jax.tree.leaves(engine.cut(new, graph, plan)), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3 * (1 + float(abs(b).max())))


@pytest.mark.parametrize("verb", [engine.reconstruct, engine.refit_masked])
def test_the_teacher_sets_the_targets(verb):
    fn, params, graph, x = build("vit")

    def doubled(p, x):
        return fn(p, 2 * x)

    own, taught, other = (
        jax.jit(verb(f, graph, **more).targets)(params, x)
        for f, more in ((fn, {}), (fn, {"teacher": doubled}), (doubled, {}))
    )
    jax.tree.map(np.testing.assert_array_equal, taught, other)
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(taught), strict=True)
    assert max(float(jnp.abs(a - b).max()) for a, b in pairs) > 0.1


def test_heads_are_left_alone_where_asked():
    fn, params, graph, x = build("resnet")
    plan = random_plan(graph, 0)
    fit = engine.refit(fn, graph, plan, heads=False)
    known = set(jax.eval_shape(fit.targets, params, x))
    assert set(jax.eval_shape(engine.refit(fn, graph, plan).targets, params, x)) - known == {"params/linear/kernel"}


def test_maps_vmap_over_masks():
    fn, params, graph, x = build("resnet")
    plans = [random_plan(graph, seed) for seed in (0, 1)]
    stack = jax.tree.map(lambda *m: np.stack(m), *(graph.masks(plan) for plan in plans))
    learn = engine.reconstruct(fn, graph)
    targets = jax.jit(learn.targets)(params, x)
    out, _ = jax.jit(jax.vmap(lambda m: learn(params, m, targets, x)))(stack)
    alone = jax.jit(lambda m: learn(params, m, targets, x))
    for i, plan in enumerate(plans):
        close(out[i], alone(graph.masks(plan))[0], 1e-3)


def test_maps_that_do_not_fit():
    fn, params, graph, x = build("resnet")
    group = next(iter(graph.groups))
    with pytest.raises(PlanError, match="no contraction"):
        engine.gate(fn, graph)(params, {"maps": {"params/nothing[0]": {group: np.eye(3)}}}, x)
    learn = engine.reconstruct(fn, graph)
    _, maps = jax.eval_shape(lambda p: learn(p, graph.masks(Plan()), learn.targets(p, x), x), params)
    name, known = next(iter(maps.items()))
    with pytest.raises(PlanError, match="expected shape"):
        engine.gate(fn, graph)(params, {"maps": {name: {g: np.eye(3) for g in known}}}, x)
    with pytest.raises(PlanError, match="axis of a leaf"):
        engine.fold(params, graph, {"kernel": {group: np.eye(3)}})


# Contractions as products of matrices: what `refit` solves.

CONVOLUTIONS = {
    "plain": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 1), "padding": "VALID"},
    "dilated": {"window_strides": (1, 1), "padding": ((2, 1), (0, 3)), "rhs_dilation": (2, 1)},
    "transposed": {"window_strides": (1, 1), "padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 2)},
    "grouped": {"window_strides": (1, 2), "padding": "SAME", "feature_group_count": 2},
    "depthwise": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
    "torch": {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_product_of_matrices(name):
    given = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | CONVOLUTIONS[name]
    torch = given["dimension_numbers"][0] == "NCHW"
    groups = given.get("feature_group_count", 1)
    x = rows(2, 4, 7, 6) if torch else rows(2, 7, 6, 4)
    kernel = rows(6, 4, 3, 2) if torch else rows(3, 2, 4 // groups, 8)
    check(lambda x, k: lax.conv_general_dilated(x, k, **given), x, kernel, 1)


@pytest.mark.parametrize(
    ("numbers", "left", "right", "at"),
    [
        ((((2,), (0,)), ((), ())), (2, 3, 4), (4, 5), 1),
        ((((1, 2), (1, 0)), ((), ())), (2, 3, 4), (4, 3, 5, 2), 1),
        ((((0,), (1,)), ((), ())), (4, 5), (3, 4), 0),
    ],
)
def test_a_dot_is_a_product_of_matrices(numbers, left, right, at):
    a, b = rows(*left), rows(*right)
    x, kernel = (a, b) if at == 1 else (b, a)
    check(lambda x, k: lax.dot_general(x, k, numbers) if at == 1 else lax.dot_general(k, x, numbers), x, kernel, at)


def check(fn, x, kernel, at):
    (eqn,) = jax.make_jaxpr(fn)(x, kernel).eqns

    class Named:
        name = eqn.primitive.name

    found = linear(Named, at, eqn.params, kernel.shape)
    features = found.features(x, kernel, np.arange)
    matrices = found.matrices(kernel)
    product = np.einsum("gri,gio->rgo", features, matrices).reshape(features.shape[1], -1)
    close(product, found.results(fn(x, kernel)))
    np.testing.assert_array_equal(found.kernel(matrices, kernel), kernel)


def test_ridge_fit_is_that_of_numpy():
    x, old, y = rows(40, 5), rows(5, 3), rows(40, 3)
    weight = 0.1 * (x**2).sum() / 5
    close(ridge_fit(x, old, y, 0.1), np.linalg.solve(x.T @ x + weight * np.eye(5), x.T @ y + weight * old))


# Split.


def test_a_split_function_is_the_function_and_its_parts_do_their_share():
    def fn(params, x, late):
        first = conv(x, params["a"])
        second = conv(jnp.where(late["m"], first, 0), params["b"])
        return second, first.mean(), params["a"].sum()

    params = draw({"a": C(3, 3, 4), "b": C(3, 4, 4)}, 0, np.float32)
    x, late = rows(2, 6, 6, 3), {"m": np.array([1, 0, 1, 1], bool)}
    parts = engine.split(fn, params, x, late)
    assert parts.varies == (True, False, False)
    fixed = parts.once(params)
    known = parts.early(fixed, x)
    jax.tree.map(close, parts.late(fixed, known, late), fn(params, x, late))
    counts = [
        str(jax.make_jaxpr(part)(*given)).count("conv_general_dilated[")
        for part, given in ((parts.once, (params,)), (parts.early, (fixed, x)), (parts.late, (fixed, known, late)))
    ]
    assert counts == [0, 1, 1]


@cache
def build(name):
    module, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    fn, params = engine.from_linen(module, module.init(jax.random.key(1), x[:1]))
    return fn, params, engine.trace(fn, params, x[:1]), x
