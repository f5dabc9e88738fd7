"""With a budget, more candidates than finalists are refitted, and the best of them on `search` go on."""

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from treesurgeon import engine, models
from treesurgeon.search import pipeline
from treesurgeon.search.config import Config
from treesurgeon.search.finalists import appraise, chosen, prepared, shortlisted
from treesurgeon.search.setting import prepare


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A zoo model with random weights on images of four kinds."""
    home, rng = tmp_path_factory.mktemp("shortlist"), np.random.default_rng(0)
    variables = models.resolve("mlp").init(jax.random.key(3), np.zeros((1, 8, 8, 1), np.float32))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
    y = np.arange(240) % 4
    x = (rng.random((4, 8, 8, 1))[y] + 0.15 * rng.normal(size=(240, 8, 8, 1))).astype(np.float32)
    np.savez(home / "data.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    return Config(
        "mlp", str(home / "checkpoint"), f"npz:{home / 'data.npz'}", out=str(home / "run"), fitted_split=("train",),
        head="keep", macs=0.5, population=8, generations=2, search_images=32, calibration_images=16, refit_images=64,
        finalists=2, shortlist=4, epochs=0, certify=False, formats=False, pictures=False, protect=("none",),
    )  # fmt: skip


def test_appraisal_is_the_loss_of_the_refitted_model_at_its_best_temperature(config):
    setting = prepare(config)
    subject, search = setting.subject, setting.roles.search
    graph = subject.graph
    plans = [engine.Plan({name: np.arange(kept) for name in graph.groups}) for kept in (4, 8)]
    losses = []
    for plan in plans:
        loss, found = appraise(setting, plan)
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
    assert chosen(np.array([0.7, np.nan, 0.5, 0.6]), 3, said.append) == [2, 3, 0]
    assert said == ["4 candidates refitted, loss on search 0.5000 to nan: 3 go on (--shortlist)"]


@pytest.mark.parametrize(("given", "count"), [(None, 2), (2, 2), (1, 2), (7, 7)])
def test_its_length(given, count):
    assert shortlisted(Config("mlp", "x", "digits", finalists=2, shortlist=given)) == count


def test_a_run_refits_them_and_fine_tunes_the_best(config, monkeypatch):
    said, seen = [], []

    def appraised(setting, plans, crew, made):
        seen.extend(plans)
        return [float(-i) for i in range(len(plans))]  # the last is the best

    monkeypatch.setattr(pipeline, "appraised", appraised)
    outcome = pipeline.run(config, said.append)
    (line,) = [line for line in said if "candidates refitted" in line]
    assert line.startswith(f"{len(seen)} candidates refitted")
    assert line.endswith("2 go on (--shortlist)")
    assert 2 < len(seen) <= 4
    costs = {engine.cost(prepare(config).subject.graph, plan).params for plan in seen[-2:]}
    assert {row.params for row in outcome.lines if row.variant != "dense"} == costs
