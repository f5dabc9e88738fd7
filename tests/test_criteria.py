"""Each criterion against slow NumPy loops on a network of two layers, and on networks whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from laws import Bench

from treesurgeon import engine
from treesurgeon.engine import CRITERIA, TreesurgeonError, importance, normalise
from treesurgeon.engine.criteria import unexpressed

RNG = np.random.default_rng(1)
UNITS = 6


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


P = {"in": {"w": normal(4, UNITS), "b": normal(UNITS)}, "out": {"w": normal(UNITS, 3), "b": normal(3)}}
X, Y = normal(7, 4), np.arange(7) % 3


def hidden(p, x):
    return jax.nn.relu(x @ p["in"]["w"] + p["in"]["b"])


def fn(p, x):
    return hidden(p, x) @ p["out"]["w"] + p["out"]["b"]


def loss(p, x, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(fn(p, x)), y[:, None], 1).mean()


GRAPH = engine.trace(fn, P, X)
W, V = P["in"]["w"], P["out"]["w"]


def score(criterion, **measured):
    got = importance(criterion, GRAPH, P, **measured)
    assert got.keys() == {"in"}
    return np.asarray(got["in"])


def test_fpgm():
    want = [sum(np.linalg.norm(W[:, i] - W[:, j]) for j in range(UNITS)) / (UNITS - 1) for i in range(UNITS)]
    np.testing.assert_allclose(score("fpgm"), want, rtol=1e-5)


def test_fpgm_looks_at_every_kernel_that_makes_the_units_and_at_no_reader():
    bench = Bench(zoo.ZOO["residual"].subject)
    params = bench.params
    want = np.zeros(6)
    for leaf in ("stem", "c2"):
        kernel = np.asarray(params[leaf], np.float64).reshape(-1, 6)
        for i in range(6):
            want[i] += np.mean([np.linalg.norm(kernel[:, i] - kernel[:, j]) for j in range(6) if j != i])
    np.testing.assert_allclose(importance("fpgm", bench.graph, params)["stem"], want, rtol=1e-4)


def test_fpgm_of_units_that_are_several_positions():
    """A unit is two neighbouring positions of the flattened axis; both are part of its filter."""
    p = {"a": normal(4, 6), "b": normal(3, 2)}
    f = lambda p, x: (x @ p["a"]).reshape(-1, 3, 2).sum(2) @ p["b"]
    graph = engine.trace(f, p, X)
    (name,) = (name for name, group in graph.groups.items() if group.size == 3)
    units = p["a"].reshape(4, 3, 2)
    want = [np.mean([np.linalg.norm(units[:, i] - units[:, j]) for j in range(3) if j != i]) for i in range(3)]
    np.testing.assert_allclose(importance("fpgm", graph, p)[name], want, rtol=1e-5)


def test_lamp():
    size = [(W[:, i] ** 2).sum() + (V[i] ** 2).sum() for i in range(UNITS)]
    want = [s / sum(t for t in size if t >= s) for s in size]
    np.testing.assert_allclose(score("lamp"), want, rtol=1e-5)
    assert score("lamp").max() == 1


def test_lamp_of_equal_units_and_of_none():
    p = {"in": {"w": np.ones((4, 3), "f"), "b": np.ones(3, "f")}, "out": {"w": np.ones((3, 2), "f"), "b": np.ones(2)}}
    graph = engine.trace(fn, p, X)
    np.testing.assert_allclose(importance("lamp", graph, p)["in"], 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(importance("lamp", graph, jax.tree.map(np.zeros_like, p))["in"], 0)


def test_fisher():
    want = np.zeros(UNITS)
    for x, y in zip(X, Y, strict=True):
        g = jax.grad(loss)(P, x[None], y[None])
        for u in range(UNITS):
            slope = (W[:, u] * g["in"]["w"][:, u]).sum() + P["in"]["b"][u] * g["in"]["b"][u]
            want[u] += (slope + (V[u] * g["out"]["w"][u]).sum()) ** 2 / len(X)
    for chunk in (1, 3, 16):
        found = jax.jit(engine.fisher_energy(loss, GRAPH, chunk=chunk))(P, X, Y)
        np.testing.assert_allclose(score("fisher", fisher=found), want, rtol=1e-4)


def test_fisher_passes_over_what_is_not_trained():
    p = {"params": {"w": W, "v": V}, "counts": {"n": np.ones(UNITS, np.int32)}}
    f = lambda p, x: jnp.tanh(x @ p["params"]["w"] * p["counts"]["n"]) @ p["params"]["v"]
    graph = engine.trace(f, p, X)
    (name,) = graph.groups
    found = engine.fisher_energy(lambda p, x: (f(p, x) ** 2).sum(), graph)(p, X)[name]
    want = np.zeros(UNITS)
    for x in X:
        g = jax.grad(lambda w, x=x: (f({**p, "params": w}, x[None]) ** 2).sum())(p["params"])
        want += ((W * g["w"]).sum(0) + (V * g["v"]).sum(1)) ** 2 / len(X)
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_apoz():
    want = [np.mean([float(h) != 0 for h in np.asarray(hidden(P, X))[:, u]]) for u in range(UNITS)]
    assert len(set(want)) > 1
    zeros = jax.jit(engine.zero_share(fn, GRAPH))(P, X)
    np.testing.assert_allclose(score("apoz", zeros=zeros), want, rtol=1e-6)


def test_apoz_is_the_mean_over_positions_and_readers():
    p = {"a": normal(3, 3, 2, 4), "b": normal(1, 1, 4, 5), "c": normal(2 * 2 * 4, 3)}
    x = normal(6, 2, 2, 2)
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
    middle = lambda p, x: jax.nn.relu(conv(x, p["a"]))

    def f(p, x):
        h = middle(p, x)
        return conv(h, p["b"]), jnp.maximum(h - 0.5, 0).reshape(len(x), -1) @ p["c"]

    graph = engine.trace(f, p, x)
    h = np.asarray(middle(p, x))
    want = ((h == 0).mean((0, 1, 2)) + (h <= 0.5).mean((0, 1, 2))) / 2
    np.testing.assert_allclose(engine.zero_share(f, graph)(p, x)["a"], want, rtol=1e-6)


def test_reconstruction():
    h = np.asarray(hidden(P, X), np.float64)
    gram = h.T @ h / len(X)
    ridge = 0.01 * np.trace(gram) / UNITS
    want = []
    for i in range(UNITS):
        rest = np.delete(h, i, 1) / np.sqrt(len(X))
        padded = np.vstack([rest, np.sqrt(ridge) * np.eye(UNITS - 1)])
        target = np.append(h[:, i] / np.sqrt(len(X)), np.zeros(UNITS - 1))
        c = np.linalg.lstsq(padded, target, rcond=None)[0]
        want.append(((padded @ c - target) ** 2).sum() / np.trace(gram))
    grams = jax.jit(engine.gram_matrices(fn, GRAPH))(P, X)
    np.testing.assert_allclose(grams["out/w[0]"]["in"], gram, rtol=1e-5)
    np.testing.assert_allclose(score("reconstruction", grams=grams), want, rtol=1e-3)


def test_reconstruction_spares_units_that_no_other_can_express():
    """Units 0 and 1 are twins, 2 is alone, 3 is dead."""
    w = np.zeros((4, 4), "f")
    w[0, 0] = w[0, 1] = w[1, 2] = 1
    p = {"in": {"w": w, "b": np.zeros(4, "f")}, "out": {"w": normal(4, 3), "b": np.zeros(3, "f")}}
    graph = engine.trace(fn, p, X)
    grams = engine.gram_matrices(fn, graph)(p, X)
    twin, other, alone, dead = np.asarray(importance("reconstruction", graph, p, grams=grams)["in"])
    assert twin == pytest.approx(other)
    assert alone > 10 * twin > 10 * dead == 0


def test_what_is_unexpressed_without_a_ridge_is_the_residual():
    x = RNG.normal(size=(50, 5))
    want = [np.linalg.lstsq(np.delete(x, i, 1), x[:, i], rcond=None)[1][0] for i in range(5)]
    np.testing.assert_allclose(unexpressed(x.T @ x, 0.0), want, rtol=1e-4)
    np.testing.assert_array_equal(unexpressed(np.zeros((3, 3)), 0.01), 0)


def test_random_goes_by_its_key():
    first, again, other = (importance("random", GRAPH, P, key=jax.random.key(k))["in"] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert ((first >= 0) & (first < 1)).all()


def test_random_differs_between_groups():
    bench = Bench(zoo.ZOO["residual"].subject)
    graph = bench.graph
    scores = importance("random", graph, bench.params, key=jax.random.key(0))
    assert {name: s.shape for name, s in scores.items()} == {n: (g.size,) for n, g in graph.groups.items()}
    assert (scores["stem"][:5] != scores["c1"]).all()


@pytest.mark.parametrize("criterion", ["apoz", "reconstruction"])
def test_groups_that_nothing_was_measured_of_have_l2(criterion):
    given = {CRITERIA[criterion].needs: {}}
    np.testing.assert_array_equal(score(criterion, **given), score("l2"))


@pytest.mark.parametrize("name", ["heads", "conv_depthwise_multiplier", "scanned_stack"])
def test_every_criterion_scores_every_unit_of_every_group(name):
    bench = Bench({**zoo.ZOO, **zoo.ODD}[name].subject)
    args = bench.args
    square = lambda p, *args: sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves(bench.fn(p, *args)))
    measures = {
        "grads": jax.grad(square, allow_int=True),
        "energy": engine.activation_energy(bench.fn, bench.graph),
        "fisher": engine.fisher_energy(square, bench.graph),
        "zeros": engine.zero_share(bench.fn, bench.graph),
        "grams": engine.gram_matrices(bench.fn, bench.graph),
        "selectivity": lambda params, *args: engine.class_selectivity(
            lambda params, args: bench.fn(params, *args), bench.graph, 2
        )(params, args, jnp.arange(len(args[0])) % 2),
    }

    @jax.jit
    def every(params, *args):
        measured = {name: measure(params, *args) for name, measure in measures.items()} | {"key": jax.random.key(0)}
        return {criterion: importance(criterion, bench.graph, params, **measured) for criterion in CRITERIA}

    for scores in every(bench.params, *args).values():
        assert scores.keys() == bench.graph.groups.keys()
        for group, values in scores.items():
            assert values.shape == (bench.graph.groups[group].size,)
            assert np.isfinite(values).all()
            assert (values >= 0).all()


# --- who makes the units --------------------------------------------------------------------------------------------


def makers(f, p, x):
    graph = engine.trace(f, p, x)
    return {(m.path, m.axis) for group in graph.groups.values() for m in group.members if m.makes}


def test_makers_are_told_from_readers():
    assert makers(fn, P, X) == {("in/w", 1)}
    transposed = lambda p, x: jnp.tanh(x @ p["a"].T) @ p["b"].T
    assert makers(transposed, {"a": normal(5, 4), "b": normal(3, 5)}, X) == {("a", 0)}


def test_makers_on_square_kernels():
    p = {"a": normal(4, 5), "b": normal(5, 5), "c": normal(5, 3)}

    def straight(p, x):
        h = x @ p["a"]
        return (h + jnp.tanh(h @ p["b"])) @ p["c"]

    def turned(p, x):
        h = x @ p["a"]
        return (h + jnp.tanh(h @ p["b"].T)) @ p["c"]

    def looped(p, x):
        h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x @ p["a"], p["b"])
        return h @ p["c"]

    assert makers(straight, p, X) == {("a", 1), ("b", 1)}
    assert makers(turned, p, X) == {("a", 1), ("b", 0)}
    assert makers(looped, {**p, "b": normal(3, 5, 5)}, X) == {("a", 1), ("b", 2)}


# --- across groups --------------------------------------------------------------------------------------------------


S = {"a": np.array([1.0, 2, 5], "f"), "b": np.array([30.0, 10], "f"), "dead": np.zeros(4, "f")}


@pytest.mark.parametrize(
    ("within", "a", "b", "dead"),
    [
        ("mean", [0.375, 0.75, 1.875], [1.5, 0.5], 0),
        ("max", [0.2, 0.4, 1], [1, 1 / 3], 0),
        ("sum", [0.125, 0.25, 0.625], [0.75, 0.25], 0),
        ("rank", [1 / 3, 2 / 3, 1], [1, 0.5], [1, 0.75, 0.5, 0.25]),
        ("none", [1, 2, 5], [30, 10], 0),
    ],
)
def test_normalise(within, a, b, dead):
    for got in (normalise(S, within), jax.jit(lambda s: normalise(s, within))(S)):
        assert got.keys() == S.keys()
        np.testing.assert_allclose(got["a"], a, rtol=1e-6)
        np.testing.assert_allclose(got["b"], b, rtol=1e-6)
        np.testing.assert_allclose(got["dead"], dead, rtol=1e-6)


@pytest.mark.parametrize("within", ["mean", "max", "rank"])
def test_normalised_scores_do_not_depend_on_scale_or_size(within):
    twice = {"a": np.repeat(S["a"], 2) * 7}
    once = np.asarray(normalise(S, within)["a"])
    assert np.asarray(normalise(twice, within)["a"]).max() == pytest.approx(once.max())
    if within != "rank":
        np.testing.assert_allclose(normalise(twice, within)["a"], np.repeat(once, 2), rtol=1e-6)


def test_messages():
    with pytest.raises(TreesurgeonError, match=r"within='median'; choose one of mean, max, sum, rank, none"):
        normalise(S, "median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TreesurgeonError, match=r"no criterion takes 'gradients'; they take energy"):
        importance("taylor", GRAPH, P, gradients=P)
    for name, row in CRITERIA.items():
        if row.needs:
            with pytest.raises(TreesurgeonError, match=rf"importance\('{name}', …\) needs {row.needs}: "):
                importance(name, GRAPH, P)


def test_residual_energy_is_what_least_squares_leaves():
    x = RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)) + 1
    order = RNG.permutation(6)
    found = engine.residual_energy(x.T @ x, order, ridge=0)
    for k in range(7):
        kept, gone = x[:, order[:k]], x[:, order[k:]]
        left = gone - kept @ np.linalg.lstsq(kept, gone, rcond=None)[0] if k else gone
        np.testing.assert_allclose(found[k], (left**2).sum() / (x**2).sum(), rtol=1e-3, atol=1e-5)
    assert (np.diff(engine.residual_energy(np.zeros((4, 4)), np.arange(4))) <= 0).all()
