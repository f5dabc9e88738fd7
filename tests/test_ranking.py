"""Which criterion ranks which group: each single half against a model cut and run by itself."""

import csv
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smallrun import small_config

from treesurgeon import engine
from treesurgeon.search import pipeline, ranking
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import batches
from treesurgeon.search.pool import Pool
from treesurgeon.search.setting import prepare
from treesurgeon.search.space import build
from treesurgeon.search.state import States
from treesurgeon.search.subject import random_subject
from treesurgeon.search.sweep import Sweep, moved
from treesurgeon.search.tasks import CLASSIFICATION
from treesurgeon.search.ties import ranking as places

RNG = np.random.default_rng(0)


def test_the_better_half_is_the_one_that_moves_the_answers_less():
    subject = random_subject("mlp")
    graph = subject.graph
    energy = jax.jit(engine.activation_energy(subject.infer, graph))(
        subject.variables, jnp.asarray(RNG.normal(size=(64, *subject.spec.input_shape)), jnp.float32)
    )
    up = {name: np.asarray(score) for name, score in energy.items()}
    scores = {"worst": {name: -score for name, score in up.items()}, "best": up}
    spaces = {name: build(graph, each) for name, each in scores.items()}
    images = RNG.normal(size=(40, *subject.spec.input_shape)).astype(np.float32)
    labels = np.array(subject.infer(subject.variables, images).argmax(-1), np.int32)
    data = batches(Split(images, labels, np.arange(40), ("x",), ""), 32)
    sweep = Sweep(subject, spaces["worst"], None, data, reconstruct="none")
    found = ranking.moves(spaces, sweep)
    assert list(found) == list(spaces["worst"].groups)
    dense = subject.infer(subject.variables, data.images[0])
    for name, space in spaces.items():
        column = list(spaces).index(name)
        for group in space.groups:
            plan = space.to_plan(space.encode({group: space.sizes[group] // 2}))
            small = engine.cut(subject.variables, graph, plan)
            logits = engine.narrow(subject.infer, graph, plan)(small, data.images[0])
            wanted = moved(CLASSIFICATION, dense, logits, data.labels[0], data.weights[0])
            np.testing.assert_allclose(found[group][column], wanted, rtol=1e-3, atol=1e-6)
    assert set(ranking.choose(found, tuple(spaces), spaces["best"]).values()) == {"best"}


def test_groups_that_are_ranked_jointly_share_a_criterion():
    found = {
        "a": np.array([1.0, 2.0]),
        "b": np.array([3.0, 1.0]),
        "c": np.array([1.0, 5.0]),
        "d": np.array([np.nan, 2.0]),
    }
    space = SimpleNamespace(ties=SimpleNamespace(names=("a", "b")))
    assert ranking.choose(found, ("l1", "l2"), space) == {"a": "l2", "b": "l2", "c": "l1", "d": "l2"}
    free = ranking.choose(found, ("l1", "l2"), SimpleNamespace(ties=None))
    assert free == {"a": "l1", "b": "l2", "c": "l1", "d": "l2"}
    assert ranking.sentence(free) == "units are ranked by what moves the answers least: 2 by l1, 2 by l2"


def test_a_run_ranks_each_group_by_its_own(tmp_path):
    """And when it is resumed likewise."""
    setting = prepare(small_config(tmp_path, criteria=("random", "l2", "activation")))
    groups, said = setting.subject.graph.groups, []
    (tmp_path / "run").mkdir()
    spaces = [
        pipeline.ranked(setting, States(tmp_path / "run" / "state"), said.append, Pool(), None)[0] for _ in range(2)
    ]
    tried = States(tmp_path / "run" / "state").arrays("criteria", dict)
    with (tmp_path / "run" / "groups.csv").open() as file:
        written = {row["group"]: row["criterion"] for row in csv.DictReader(file)}
    assert written.keys() == groups.keys()
    for name in groups:
        criterion = written[name]
        assert setting.config.criteria.index(criterion) == tried[name].argmin()
        for space in spaces:
            np.testing.assert_array_equal(space.ranks[name], places(ranking.rank(setting, criterion)[name]))
    assert said[0] == said[1]
    assert said[0].startswith("units are ranked by what moves the answers least: ")


@pytest.mark.parametrize(
    ("criteria", "why"), [(("l1", "l3"), "--criteria l3: expected one of l1, l2"), (("l1", "l1"), "named twice")]
)
def test_what_is_no_choice_is_refused(criteria, why):
    with pytest.raises(RunError, match=why):
        Config(model="mlp", data="digits", checkpoint="x", criteria=criteria).check()
