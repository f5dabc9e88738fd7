"""Truncated finalists: which depths are chosen, what they are, and a search in which one of them is selected."""

import csv
import json
from dataclasses import replace

import fewer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import leaves_of
from orbax.checkpoint import v1 as ocp

from treesurgeon import engine, models
from treesurgeon.engine.shortened import HEAD
from treesurgeon.search import Config, RunError, contenders, depth, hidden, run, truncating
from treesurgeon.search.budget import Budget
from treesurgeon.search.setting import prepare
from treesurgeon.search.state import States
from treesurgeon.search.survey import Cut, survey
from treesurgeon.search.truncating import choose, depth_of, headed
from treesurgeon.search.tuning import Tuned

fewer_layers = fewer.fewer_layers
RNG = np.random.default_rng(0)


def cut(at, params, error, macs=100):
    return Cut(at, 8, {"params": params, "macs": macs}, 1, 1 - error, 0.1, (error * (1 - error) / 100) ** 0.5)


WHOLE = cut("before linear", 100, 0.2)


@pytest.mark.parametrize(
    ("cuts", "limits", "want"),
    [
        # One standard error of 0.2 on 100 images is 0.04; b is beaten by the smaller a.
        ([cut("a", 30, 0.23), cut("b", 40, 0.235), cut("c", 50, 0.22), WHOLE], {}, ["a", "c"]),
        ([cut("a", 30, 0.25), cut("c", 50, 0.22), WHOLE], {}, ["c"]),
        ([cut("a", 30, 0.5), cut("c", 50, 0.4), WHOLE], {}, ["c"]),  # none is as good: the nearest
        ([cut("a", 30, 0.1), cut("b", 40, 0.09), cut("c", 50, 0.08), WHOLE], {}, ["a", "b"]),
        ([cut("a", 30, 0.1, macs=90), cut("b", 40, 0.08, macs=60), WHOLE], {"macs": 70}, ["b"]),
        ([cut("a", 100, 0.1), WHOLE], {}, []),  # nothing is saved
        ([WHOLE], {}, []),
        ([cut("a", 30, 0.1), WHOLE], {"latency": 1e-9}, ["a"]),  # that is measured later
    ],
)
def test_the_smallest_depths_that_are_enough_are_chosen(cuts, limits, want):
    budget = Budget(None, limits, {}, {})
    assert [found.point for found in choose(cuts, budget, 2)] == want


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of random weights and images that shallow features tell apart."""
    home = tmp_path_factory.mktemp("truncating")
    variables = models.resolve("digits_cnn").init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
    kinds = RNG.random((3, 8, 8, 1))
    y = np.arange(900) % 3
    x = (kinds[y] + 0.2 * RNG.normal(size=(900, 8, 8, 1))).astype(np.float32)
    np.savez(home / "three.npz", x_all=x, y_all=y, label_names=np.array(["one", "two", "three"]))
    return home


def config(place, **changes):
    given = {"model": "digits_cnn", "checkpoint": str(place / "checkpoint"), "data": f"npz:{place / 'three.npz'}",
             "out": str(place / "out"), "fitted_split": ("none",), "shares": (0.2, 0.2, 0.3, 0.3),
             "population": 4, "generations": 1, "search_images": 32, "calibration_images": 8, "refit_images": 32,
             "finalists": 1, "epochs": 1, "reconstruct": "none", "epsilon": 0.1, "eta": 0.1,
             "baselines": False, "formats": False}  # fmt: skip
    return Config(**{**given, **changes})


@pytest.fixture(scope="module")
def setting(place):
    """Nothing is estimated anew."""
    return prepare(config(place, calibration_images=0))


def test_a_head_is_fitted_to_what_stands_at_the_point(place, setting, monkeypatch):
    said = []
    cuts = survey(setting.subject, setting.roles, 3)
    assert [found.point for found in cuts] == list(
        engine.points(setting.subject.infer, setting.subject.graph, setting.subject.spec.example)
    )
    sizes = [found.params for found in cuts]
    assert sizes == sorted(sizes)
    assert sizes[-1] == engine.cost(setting.subject.graph, engine.Plan()).params
    subject = headed(setting, cuts[1].point, Budget(None, {}, {}, {}), said.append)
    assert engine.cost(subject.graph, engine.Plan())._asdict() == cuts[1].cost
    old, new = leaves_of(setting.subject.variables), leaves_of(subject.variables)
    for path in new.keys() - {f"params/{HEAD}/kernel", f"params/{HEAD}/bias"}:
        np.testing.assert_array_equal(new[path], old[path])
    roles = setting.roles
    right = np.asarray(subject.infer(subject.variables, roles.search.images)).argmax(1) == roles.search.labels
    assert right.mean() > 0.9
    # It can be trained from scratch, at its own shapes.
    fresh = contenders.scratch(subject, engine.Plan(), 0)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, subject.variables)
    assert np.isfinite(subject.infer(fresh, roles.search.images[:2])).all()
    kernel = f"params/{HEAD}/kernel"
    assert leaves_of(fresh)[kernel].std() == pytest.approx(1 / np.sqrt(len(new[kernel])), rel=0.3)
    # A hidden layer, where that is better.
    monkeypatch.setattr(hidden, "choose", lambda linear, heads, x, y, task: heads[0])
    plain = Budget(None, {}, {}, {})
    deep = headed(setting, cuts[1].point, plain, said.append)
    assert said[-1] == f"{cuts[1].point}: its head has 16 hidden units, which are better on search than none"
    assert deep.spec.hidden == 16
    whole = Tuned("t1", engine.Plan(), deep.variables, deep.infer, None, {}, deep)
    assert depth_of(whole) == f"up to {cuts[1].point}, a hidden layer of 16"
    right = np.asarray(deep.infer(deep.variables, roles.search.images)).argmax(1) == roles.search.labels
    assert right.mean() > 0.9
    tight = Budget(None, {"params": float(cuts[1].cost["params"])}, {}, {})
    assert headed(setting, cuts[1].point, tight, said.append).spec.hidden == 0
    assert "not within the budget" in said[-1]
    monkeypatch.undo()
    # With statistics estimated anew, the features are other ones.
    fresh = headed(replace(setting, config=config(place, head_widths=(0,))), cuts[1].point, plain, said.append)
    assert np.abs(
        leaves_of(fresh.variables)["batch_stats/stage1_0/bn/mean"] - old["batch_stats/stage1_0/bn/mean"]
    ).max()


@pytest.mark.slow
def test_a_truncation_is_selected_saved_and_loaded(place):
    said = []
    outcome = run(config(place), said.append)
    assert any("depths tried with linear heads" in str(line) for line in said)
    with (place / "out" / "front.csv").open() as file:
        front = {row["variant"]: row for row in csv.DictReader(file)}
    assert {"v1", "t1"} <= front.keys()
    assert front["t1"]["description"].startswith("up to ")
    assert any("→" in row["description"] for name, row in front.items() if name.startswith("t"))
    model = engine.load(outcome.path)
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    assert manifest["selected"].startswith("t"), manifest["verdict"]
    assert manifest["certificate"]["passed"]
    assert manifest["model"]["at"]
    setting = prepare(config(place))
    logits = np.asarray(model(setting.roles.test.images))
    right = (logits.argmax(1) == setting.roles.test.labels).mean()
    assert right == pytest.approx(manifest["metrics"][manifest["selected"]]["test_accuracy"])
    page = (place / "out" / "report.html").read_text()
    assert "cut in depth" in page
    again = run(config(place), said.append)  # it is complete, and shown from its manifest
    assert again.sentence == outcome.sentence
    assert said[-1].startswith("this run is complete")


def test_a_truncation_comes_with_the_widths_of_a_variant_as_well(place, tmp_path, monkeypatch):
    setting, said = prepare(config(place, epochs=0, truncations=1, head_widths=(0,), out=str(tmp_path))), []
    graph = setting.subject.graph
    plan = engine.Plan({name: np.arange(max(1, group.size // 2)) for name, group in graph.groups.items()})
    none = Budget(None, {}, {}, {})
    deep, narrow = truncating.truncations(setting, none, States(tmp_path / "state"), said.append, plan)
    with (setting.config.directory / "depth.csv").open() as file:
        depths = [row["point"] for row in csv.DictReader(file)]
    assert depths == list(engine.points(setting.subject.infer, setting.subject.graph, setting.subject.spec.example))
    assert [deep.name, narrow.name] == ["t1", "t2"]
    assert deep.subject is narrow.subject
    assert not deep.plan.keep
    assert narrow.plan.keep.keys() == {name for name in graph.groups if name in narrow.subject.graph.groups}
    assert 0 < len(narrow.plan.keep) < len(plan.keep)
    assert narrow.cost["params"] < 0.6 * deep.cost["params"]
    assert depth_of(narrow).startswith(depth_of(deep) + "; ")
    assert "→" in depth_of(narrow)
    test = setting.roles.test
    logits = np.asarray(narrow.infer(narrow.variables, test.images))
    assert (logits.argmax(1) == test.labels).mean() > 0.6
    engine.save(tmp_path / "saved", narrow.subject.spec, narrow.variables, narrow.plan, module=narrow.subject.module)
    np.testing.assert_allclose(engine.load(tmp_path / "saved")(test.images), logits, rtol=1e-5, atol=1e-5)
    tight = Budget(graph, {"memory": 1.0}, {}, {"memory": np.zeros(1)})
    assert truncating.truncations(setting, tight, States(tmp_path / "state"), said.append, plan) == []
    assert said[-1] == f"{depth_of(narrow)} is not within the budget as measured"
    monkeypatch.setattr(truncating, "profile", None)  # it was measured: a resumed run does not do it again
    assert truncating.truncations(setting, tight, States(tmp_path / "state"), said.append, plan) == []


def test_what_a_plan_says_about_a_part_of_the_model(setting):
    graph = setting.subject.graph
    first = next(iter(graph.groups))
    block = next(iter(graph.blocks))
    plan = engine.Plan({first: np.arange(graph.groups[first].size), "elsewhere": np.arange(2)}, frozenset({block, "x"}))
    assert truncating.restricted(plan, graph) == engine.Plan({}, frozenset({block}))


def test_a_model_that_cannot_be_cut_anywhere(place, setting, monkeypatch):
    said = []
    for module in (truncating, depth):
        monkeypatch.setattr(module, "survey", lambda *_: [])
    given = config(place)
    assert truncating.truncations(setting, Budget(None, {}, {}, {}), States(place / "none"), said.append) == []
    assert said == ["no truncation: the model has no boundary of blocks"]
    with pytest.raises(RunError, match="digits_cnn: it has no boundary of blocks"):
        depth.depth(depth.Depth(given.model, given.checkpoint, given.data, fitted_split=("none",)), said.append)


@pytest.mark.slow
def test_none_where_they_are_not_asked_for(place):
    said = []
    run(config(place, truncations=0, out=str(place / "none"), epochs=0, certify=False), said.append)
    assert not any("depths tried" in str(line) for line in said)
