"""Baselines: what they start from, what is fitted, and what is said of them."""

import jax
import numpy as np
import pytest
from laws import leaves_of
from orbax.checkpoint import v1 as ocp
from scipy import stats

from treesurgeon import engine, models
from treesurgeon.search import contenders
from treesurgeon.search.config import Config
from treesurgeon.search.contenders import Contrast, contrast, record, scratch, sentence
from treesurgeon.search.metrics import ACCURACY, METRICS, Answers
from treesurgeon.search.paired import interval, score
from treesurgeon.search.setting import make_recipe, prepare
from treesurgeon.search.transfer import head_features
from treesurgeon.search.tuning import Tuned

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A zoo model with random weights on images of four kinds."""
    home = tmp_path_factory.mktemp("baselines")
    variables = models.resolve("mlp").init(jax.random.key(3), np.zeros((1, 8, 8, 1), np.float32))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
    y = np.arange(160) % 4
    x = (RNG.random((4, 8, 8, 1))[y] + 0.15 * RNG.normal(size=(160, 8, 8, 1))).astype(np.float32)
    np.savez(home / "data.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    config = Config(
        "mlp", str(home / "checkpoint"), f"npz:{home / 'data.npz'}", epochs=1, fitted_split=("none",), head="keep"
    )
    return prepare(config)


def plan_of(setting):
    """Half of every group."""
    return engine.Plan({name: np.arange(0, group.size, 2) for name, group in setting.subject.graph.groups.items()})


def test_random_weights_are_as_the_initialiser_makes_them_at_the_small_shapes(setting):
    graph, plan = setting.subject.graph, plan_of(setting)
    dense, small = leaves_of(scratch(setting.subject, engine.Plan(), 0)), leaves_of(scratch(setting.subject, plan, 0))
    shapes = graph.shapes(graph.masks(plan))
    for path, leaf in small.items():
        assert leaf.shape == shapes[path]
        if leaf.ndim < 2:
            np.testing.assert_array_equal(leaf, 0)
        else:
            for found in (leaf, dense[path]):  # flax's default initialiser, LeCun's
                assert found.std() == pytest.approx(np.sqrt(1 / len(found)), rel=0.15)
    before, after = (len(found["params/dense1/kernel"]) for found in (dense, small))
    assert (before, after) == (256, 128)
    assert not any(np.array_equal(leaf, leaves_of(setting.subject.variables)[path]) for path, leaf in dense.items()
                   if leaf.ndim > 1)  # fmt: skip


@pytest.mark.slow
def test_baselines_are_trained_on_the_same_data(setting):
    subject, graph, said = setting.subject, setting.subject.graph, []

    def cost(plan):
        return engine.cost(graph, plan)._asdict()

    plan = plan_of(setting)
    whole = Tuned("dense", engine.Plan(), subject.variables, subject.infer, None, cost(engine.Plan()), subject)
    narrow = engine.narrow(subject.infer, graph, plan)
    small = Tuned("v1", plan, engine.cut(subject.variables, graph, plan), narrow, None, cost(plan), subject)
    found = contenders.train(setting, small, whole, said.append)
    assert list(found) == ["dense fine-tuned", "dense from scratch", "linear probe", "v1 from scratch"]
    assert "--no-baselines" in said[0]
    for name, (model, what) in found.items():
        assert model.name == name
        assert what
        like = small if name.startswith("v1") else whole
        assert model.cost == like.cost
        assert jax.tree.map(np.shape, model.variables) == jax.tree.map(np.shape, like.variables)
        assert (model.fitted is None) == (name == "linear probe")
        logits = np.asarray(model.infer(model.variables, setting.roles.test.images))
        assert np.isfinite(logits).all()
    probe, (kernel, bias) = (
        leaves_of(found["linear probe"][0].variables),
        ("params/linear/kernel", "params/linear/bias"),
    )
    assert all(np.array_equal(leaf, leaves_of(subject.variables)[path]) for path, leaf in probe.items()
               if path not in (kernel, bias))  # fmt: skip
    z = head_features(subject, setting.roles.train)
    right = (z @ probe[kernel] + probe[bias]).argmax(1) == setting.roles.train.labels
    assert right.mean() > 0.9


def test_there_may_be_none():
    said = []
    for changes, words in (({"baselines": False}, ""), ({"epochs": 0}, "--epochs 0")):
        config = Config("m", "c", "d", **{"epochs": 1, **changes})
        setting = type("S", (), {"config": config, "recipe": make_recipe(config, 100)})
        assert contenders.train(setting, None, None, said.append) == {}
        assert words in "".join(said)
    assert sentence(ACCURACY, "v1", 0.5, {}) == ""


# --- what is said -----------------------------------------------------------------------------------------------------


def answers(right, labels):
    """Answers of which the share `right` is right."""
    wrong = RNG.random(len(labels)) >= right
    return Answers(np.eye(4)[np.where(wrong, (labels + 1) % 4, labels)] * 3.0, labels)


@pytest.mark.parametrize(
    "name", ["accuracy", "balanced_accuracy", "cross_entropy", pytest.param("auroc", marks=pytest.mark.slow)]
)
def test_contrasts_have_their_difference_inside_and_turn_round(name):
    metric, labels = METRICS[name], np.arange(160) % 4
    good, bad = (metric.observe(answers(share, labels)) for share in (0.9, 0.7))
    found, back = contrast(metric, good, bad, "good", 1.0), contrast(metric, bad, good, "bad", 1.0)
    assert found.low < found.difference < found.high < 0
    assert found.difference == pytest.approx(metric.error(good) - metric.error(bad))
    assert back.difference == pytest.approx(-found.difference)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-4)


def tango(worse, better, count, margin):
    return stats.norm.cdf(score(worse, better, count, margin)) if -1 < margin < 1 else float(margin < 0)


def test_intervals_are_what_the_tests_leave():
    low, high = interval(lambda m: tango(9, 4, 200, m), lambda m: tango(4, 9, 200, m), 1.0)
    assert tango(9, 4, 200, high) == pytest.approx(0.025, abs=1e-6)
    assert tango(4, 9, 200, -low) == pytest.approx(0.025, abs=1e-6)
    assert -1 < low < 5 / 200 < high < 1
    misses = 0
    for _ in range(200):  # the interval is an interval of its level
        worse, better, _ = RNG.multinomial(150, [0.12, 0.06, 0.82])
        ends = interval(
            lambda m, w=worse, b=better: tango(w, b, 150, m), lambda m, w=worse, b=better: tango(b, w, 150, m), 1.0
        )
        misses += not ends[0] <= 0.06 <= ends[1]
    assert misses <= 20  # 10 expected; more have a chance of 0.1 %


def made(difference, low, high, params=1.0):
    return Contrast("words", params, difference, low, high)


def test_the_sentence_says_who_is_ahead():
    a, b = made(-0.02, -0.03, -0.01), made(-0.01, -0.03, 0.01)
    worse, level = made(0.015, -0.002, 0.03), made(0.0, -0.01, 0.01)
    assert sentence(ACCURACY, "v2", 0.25, {"dense fine-tuned": a, "x": b, "y": worse}) == (
        "On test a baseline is better than v2: dense fine-tuned by 2.00 points (95% interval +1.00 to +3.00), with "
        "100% of the parameters against 25%."
    )
    assert "2 baselines are better than v2: p by 2.00 points" in sentence(ACCURACY, "v2", 0.25, {"p": a, "q": a})
    assert "ahead of v2, which may be chance: x by 1.00 points (95% interval -1.00 to +3.00)" in sentence(
        ACCURACY, "v2", 0.25, {"x": b, "y": worse}
    )
    assert sentence(ACCURACY, "v2", 0.25, {"y": worse}) == (
        "On test none of the 1 baselines is ahead of v2; the nearest is y, behind by 1.50 points (95% interval -0.20 "
        "to +3.00)."
    )
    assert "the nearest is z, level with it." in sentence(ACCURACY, "v2", 0.25, {"y": worse, "z": level})
    entry = record(ACCURACY, "v2", 0.25, {"x": b, "y": worse, "z": level})
    remarks = {name: found["remark"] for name, found in entry["found"].items()}
    assert remarks["x"] == "words; ahead of v2 by 1.00 points (95% interval -1.00 to +3.00) on test"
    assert remarks["y"].startswith("words; behind v2 by 1.50 points")
    assert remarks["z"] == "words; level with v2 on test"
