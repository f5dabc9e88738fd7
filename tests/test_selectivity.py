"""Selectivity and participation ratio against slow loops, and on networks whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import engine

RNG = np.random.default_rng(4)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_activity_is_the_mean_over_positions_and_readers_of_each_example():
    p = {"a": normal(3, 3, 2, 4), "b": normal(1, 1, 4, 5), "c": normal(2 * 2 * 4, 3)}
    x = normal(6, 2, 2, 2)
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
    middle = lambda p, x: jax.nn.relu(conv(x, p["a"]))

    def f(p, x):
        h = middle(p, x)
        return conv(h, p["b"]), (h - 0.5).reshape(len(x), -1) @ p["c"]

    graph = engine.trace(f, p, x)
    h = np.asarray(middle(p, x))
    want = (np.abs(h).mean((1, 2)) + np.abs(h - 0.5).mean((1, 2))) / 2
    found = jax.jit(engine.unit_activity(f, graph))(p, x)
    assert found.keys() == {"a"}
    np.testing.assert_allclose(found["a"], want, rtol=1e-5)


def index_by_loops(activity, labels):
    out = []
    for unit in activity.T:
        means = [unit[labels == k].mean() for k in np.unique(labels)]
        best = int(np.argmax(means))
        most, others = means[best], np.mean([m for k, m in enumerate(means) if k != best])
        out.append((most - others) / (most + others) if most + others > 0 else 0)
    return out


def test_the_index_is_the_papers():
    activity, labels = np.abs(normal(40, 7)), np.r_[np.zeros(5), RNG.integers(0, 4, 35)].astype(int)
    activity[:, 3] = 0
    found = engine.selectivity_index(engine.class_means(activity, labels, 6))  # two classes have no example
    np.testing.assert_allclose(found, index_by_loops(activity, labels), rtol=1e-5, atol=1e-7)
    assert found[3] == 0


def test_units_for_one_class_for_two_for_all_for_none():
    """Unit 0 answers to class 0 alone, 1 to 0 and 1, 2 to all alike, 3 to none."""
    p = {"in": {"w": np.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]], np.float32)}, "out": {"w": normal(4, 3)}}
    f = lambda p, x: jax.nn.relu(x @ p["in"]["w"]) @ p["out"]["w"]
    x, labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]], np.array([0, 1, 2, 0])
    graph = engine.trace(f, p, x)
    found = engine.class_selectivity(f, graph, 3)(p, x, labels)
    np.testing.assert_allclose(found["in"], [1, 1 / 3, 0, 0], atol=1e-6)
    scores = engine.importance("selectivity", graph, p, selectivity=found)
    np.testing.assert_array_equal(scores["in"], found["in"])
    assert not np.isnan(engine.class_selectivity(f, graph, 3)(p, x[:1], labels[:1])["in"]).any()  # one class alone


def test_what_no_kernel_reads_has_l2():
    p = {"w": normal(3, 5)}
    f = lambda p, x: (x @ p["w"]).sum(1)
    x = normal(4, 3)
    graph = engine.trace(f, p, x)
    found = engine.class_selectivity(f, graph, 2)(p, x, np.array([0, 1, 0, 1]))
    assert found == {}
    scores = engine.importance("selectivity", graph, p, selectivity=found)
    np.testing.assert_array_equal(scores["w"], engine.importance("l2", graph, p)["w"])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_participation_ratio(scale):
    spread = np.linalg.qr(RNG.normal(size=(50, 6)))[0]
    spread = np.linalg.qr(spread - spread.mean(0))[0]  # orthonormal and centred
    ratio = lambda x: float(engine.participation_ratio(scale * (x + 3)))
    assert ratio(spread) == pytest.approx(6, rel=1e-4)
    assert ratio(spread[:, :1] * np.ones((1, 6))) == pytest.approx(1, rel=1e-4)
    uneven = spread * np.sqrt([4.0, 2, 1, 1, 0, 0])
    assert ratio(uneven) == pytest.approx(8**2 / (16 + 4 + 1 + 1), rel=1e-4)
    assert float(engine.participation_ratio(jnp.ones((5, 3)) * scale)) == 0
