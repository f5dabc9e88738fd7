"""Measurements on the device at hand, and predictions from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from laws import Bench, random_plan
from scipy.optimize import lsq_linear

from treesurgeon import engine
from treesurgeon.engine import Plan
from treesurgeon.search import latency
from treesurgeon.search.latency import Profile, calibrate, features, fit, pick_measured, random_plans
from treesurgeon.search.space import build, first_stage
from treesurgeon.search.subject import random_subject

RNG = np.random.default_rng(0)
GRAPH = Bench({**zoo.ZOO, **zoo.ODD}["nested_residuals"].subject).graph


def chain(p, x):
    for name in sorted(p):
        x = jnp.tanh(x @ p[name])
    return x


def weights(size, depth=4):
    return {f"w{i}": np.zeros((size, size), "f") for i in range(depth)}


def test_memory_counts_arguments_results_and_temporaries():
    params, x = weights(256), np.ones((64, 256), "f")
    found = latency.profile(chain, params, x, 1).memory
    least = 4 * (4 * 256 * 256 + 2 * 64 * 256)
    assert least <= found <= least + 4 * 4 * 64 * 256
    assert latency.profile(chain, weights(512), np.ones((64, 512), "f"), 1).memory > 3 * found


def test_features_by_hand_on_stacks_and_inside_jit():
    plans = [Plan(), *(random_plan(GRAPH, seed) for seed in range(5))]
    dense = engine.cost(GRAPH, Plan())
    rows = []
    for plan in plans:
        cost = engine.cost(GRAPH, plan)
        live = sum(any(not c & plan.drop for c in term.contexts) for term in GRAPH.macs)
        shares = cost.macs / dense.macs, cost.activation_bytes / dense.activation_bytes
        rows.append([*shares, live / len(GRAPH.macs), cost.params / dense.params])
    np.testing.assert_allclose([features(GRAPH, plan) for plan in plans], rows, rtol=1e-6)
    stack = jax.tree.map(lambda *m: np.stack(m), *(GRAPH.masks(plan) for plan in plans))
    np.testing.assert_allclose(jax.jit(lambda m: features(GRAPH, m))(stack), rows, rtol=1e-6)


def test_fit_recovers_what_is_there():
    rows = RNG.random((20, 4))
    truth = np.array([0.5, 3, 0, 1, 0.2])
    values = truth[0] + rows @ truth[1:]
    found = fit("latency", rows, values)
    np.testing.assert_allclose(found.weights, truth, atol=1e-8)
    assert found.errors.max() < 1e-6
    np.testing.assert_allclose(jax.jit(found.predict)(rows.reshape(4, 5, 4)), values.reshape(4, 5), rtol=1e-5)


def test_fit_is_the_best_that_is_not_negative():
    rows, values = RNG.random((15, 4)), 1 + RNG.random(15)
    values += 2 - 2 * rows[:, 1]  # falls with a feature
    design = np.hstack([np.ones((15, 1)), rows]) / values[:, None]
    want = lsq_linear(design, np.ones(15), (0, np.inf)).x
    found = fit("latency", rows, values)
    np.testing.assert_allclose(found.weights, want, atol=1e-5)
    assert found.weights.min() >= 0 == found.weights[2]


def test_the_error_is_of_plans_that_the_fit_has_not_seen():
    rows, values = RNG.random((12, 4)), 1 + RNG.random(12)
    found = fit("memory", rows, values)
    for i in range(12):
        left = np.arange(12) != i
        other = fit("memory", rows[left], values[left])
        assert found.held_out[i] == pytest.approx(float(other.predict(rows[i])), rel=1e-5)
    text = str(found)
    assert f"12 measured plans: on plans not fitted it is off by {np.median(found.errors):.1%} (median)" in text
    assert f"{found.errors.max():.1%} (worst)" in text


def space_of(graph, **given):
    return build(graph, {name: np.arange(group.size) for name, group in graph.groups.items()}, **given)


def test_random_plans_differ_and_stay_in_the_space():
    graph = random_subject("resnet20").graph
    space = space_of(graph, protected=first_stage(graph))
    plans = random_plans(space, 20, 0)
    assert plans[0] == Plan()
    costs = [engine.cost(graph, plan) for plan in plans]  # those that leave a group nothing would be refused
    assert len({cost.params for cost in costs}) > 10
    assert len({plan.drop for plan in plans}) > 2
    assert all(plan.keep.keys() <= {*space.groups, *(space.ties.names if space.ties else ())} for plan in plans)
    assert not first_stage(graph) & {name for plan in plans for name in (*plan.keep, *plan.drop)}
    assert costs == [engine.cost(graph, plan) for plan in random_plans(space, 20, 0)]


@pytest.mark.parametrize("model", ["resnet20", "digits_cnn"])
def test_no_random_plan_empties_a_tied_group(model):
    graph = random_subject(model).graph
    for seed in range(4):
        for plan in random_plans(space_of(graph), 16, seed):
            assert all(mask.any() for mask in graph.masks(plan)["units"].values())


def test_calibration_predicts_memory_of_plans_it_has_not_seen():
    """Memory does not depend on the load of the machine, as times do."""
    params = {"a": np.zeros((64, 256), "f"), "b": np.zeros((256, 256), "f"), "c": np.zeros((256, 8), "f")}
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    x = np.ones((512, 64), "f")
    graph = engine.trace(fn, params, x)
    found = calibrate(fn, graph, params, random_plans(space_of(graph), 8, 0), x, 1)
    assert found.keys() == {"latency", "memory"}
    assert np.median(found["memory"].errors) < 0.1
    plan = Plan({"a": np.arange(100), "b": np.arange(60)})
    real = latency.profile_plan(fn, graph, params, plan, x, 1).memory
    assert float(found["memory"].predict(features(graph, plan))) == pytest.approx(real, rel=0.2)


def test_finalists_are_measured_until_enough_pass():
    measured = {"a": Profile(5, 10), "b": Profile(1, 10), "c": Profile(1, 99), "d": Profile(2, 10), "e": Profile(1, 1)}
    asked = []

    def look(name):
        asked.append(name)
        return measured[name]

    passed, failed = pick_measured("abcde", look, {"latency": 2.0, "memory": 50}, 2)
    assert [name for name, _ in passed] == ["b", "d"]
    assert failed == [("a", measured["a"]), ("c", measured["c"])]
    assert asked == list("abcd")
    assert pick_measured("ac", look, {"latency": 2.0, "memory": 50}, 1)[0] == []
