"""With a budget, more candidates than finalists are refitted, and the best of them on `search` go on."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from smallrun import small_config

from treesurgeon import engine
from treesurgeon.search import finalists, pipeline, shortlist
from treesurgeon.search.budget import Budget
from treesurgeon.search.config import Config
from treesurgeon.search.evolve import Scored
from treesurgeon.search.finalists import Pick, appraise, prepared, shortlisted
from treesurgeon.search.latency import Profile
from treesurgeon.search.setting import prepare
from treesurgeon.search.shortlist import chosen
from treesurgeon.search.state import States


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(tmp_path_factory.mktemp("shortlist"), macs=0.5, shortlist=4)


def test_appraisal_is_the_loss_of_the_refitted_model_at_its_best_temperature(config):
    setting = prepare(config)
    subject, search = setting.subject, setting.roles.search
    graph = subject.graph
    plans = [engine.Plan({name: np.arange(kept) for name in graph.groups}) for kept in (4, 8)]
    losses = []
    for plan in plans:
        loss, found = appraise(setting, Pick("", plan))
        losses.append(loss)
        small = prepared(setting, subject, plan)
        jax.tree.map(np.testing.assert_array_equal, small, found.variables)
        logits = np.asarray(engine.narrow(subject.infer, graph, plan)(small, search.images), np.float64)
        by_factor = []
        for factor in np.geomspace(0.01, 100, 400):
            shifted = factor * logits - (factor * logits).max(1, keepdims=True)
            chances = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
            by_factor.append(-chances[np.arange(len(logits)), search.labels].mean())
        assert loss == pytest.approx(min(by_factor), rel=1e-3)
    assert losses[0] != losses[1]


def test_the_best_go_on_and_what_is_not_a_number_goes_last():
    said = []
    assert chosen(np.array([0.7, np.nan, 0.5, 0.6]), 3, "refitted, loss on search", said.append) == [2, 3, 0]
    assert said == ["4 candidates refitted, loss on search 0.5000 to nan: 3 go on (--shortlist)"]


@pytest.mark.parametrize(("given", "count"), [(None, 2), (2, 2), (1, 2), (7, 7)])
def test_its_length(given, count):
    assert shortlisted(Config("mlp", "x", "digits", finalists=2, shortlist=given)) == count


def test_what_was_measured_is_not_measured_again(config, monkeypatch, tmp_path):
    """A resumed run goes on with the same candidates, though times differ."""
    setting = prepare(config)
    graph = setting.subject.graph
    space = pipeline.build_space(setting, {name: np.arange(group.size) for name, group in graph.groups.items()})
    budget = Budget(graph, {"latency": 2.0}, {"latency": 9.0}, {"latency": np.zeros(0)})
    genomes = np.stack([space.cardinality - 1, space.cardinality // 2]).astype(np.int32)
    front = Scored(genomes, np.array([[0.5, 0.1], [0.5, 0.2]]), np.zeros(2))
    times = iter([1.0, 1.5, 9.0])
    monkeypatch.setattr(finalists, "profile_plan", lambda *given: Profile(next(times), 0))
    first, again = (
        finalists.picked_once(setting, space, budget, front, States(tmp_path / "state"), lambda line: None)
        for _ in range(2)
    )
    for found in (first, again):
        assert [measured for _, measured in found] == [{"latency": 1.0}, {"latency": 1.5}]
        np.testing.assert_array_equal([genome for genome, _ in found], genomes)
    assert next(times) == 9.0


def test_appraisal_after_fine_tuning_leaves_the_candidate_as_it_starts(config):
    setting = prepare(config)
    plan = engine.Plan({name: np.arange(8) for name in setting.subject.graph.groups})
    before, start = appraise(setting, Pick("", plan))
    after, same = appraise(setting, Pick("", plan), 2, start)
    assert same is start
    assert after < before
    assert appraise(setting, Pick("", plan), 2)[0] == after


def test_the_better_half_is_fine_tuned_and_the_best_of_it_goes_on(config, tmp_path):
    """And the same again where it was measured before."""
    setting = prepare(replace(config, epochs=2, finalists=1, distill=0.0))
    groups = setting.subject.graph.groups
    picks = [Pick("", engine.Plan({name: np.arange(kept) for name in groups})) for kept in (4, 8, 12, 16)]
    refitted = [appraise(setting, pick)[0] for pick in picks]
    half = np.argsort(refitted)[:2]
    wanted = min(half, key=lambda i: appraise(setting, picks[i], 1)[0])
    for again in (False, True):
        best, made = shortlist.halved(setting, picks, States(tmp_path / "state"), None, lambda line: None)
        assert best == [wanted]
        assert made.keys() == (set() if again else set(range(4)))


@pytest.mark.parametrize(("epochs", "rounds"), [(0, [0]), (2, [0, 1])])
def test_a_run_halves_the_shortlist(config, monkeypatch, tmp_path, epochs, rounds):
    """The last are the best when they are refitted, the first of these when they are fine-tuned."""
    config = replace(config, out=str(tmp_path / "run"), epochs=epochs, baselines=False, finalists=1)
    said, seen = [], []

    def appraised(setting, picks, which, epochs, crew, made):
        seen.append((epochs, [picks[i].plan for i in which]))
        return [float(k if epochs else -i) for k, i in enumerate(which)]

    monkeypatch.setattr(shortlist, "appraised", appraised)
    outcome = pipeline.run(config, said.append)
    assert [epochs for epochs, _ in seen] == rounds
    plans = seen[0][1]
    assert 3 <= len(plans) <= 4
    lines = [line for line in said if line.endswith("go on (--shortlist)")]
    assert lines[0].startswith(f"{len(plans)} candidates refitted")
    if epochs:
        assert lines[1].startswith("2 candidates fine-tuned for an epoch")
        assert seen[1][1] == plans[-1:-3:-1]
    cost = engine.cost(prepare(config).subject.graph, plans[-1]).params
    assert {row.params for row in outcome.lines if row.variant != "dense"} == {cost}
