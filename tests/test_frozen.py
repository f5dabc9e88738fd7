"""What variants are compared with, and which of them the images do not tell apart."""

import json
from dataclasses import replace
from unittest.mock import Mock

import fewer
import numpy as np
import pytest
from smallrun import small_config
from test_truncating import config, furnished

from treesurgeon import engine
from treesurgeon.search import RunError, conclusion, frozen, run
from treesurgeon.search.judging import Answers
from treesurgeon.search.metrics import METRICS
from treesurgeon.search.records import DENSE, images_again, open_run
from treesurgeon.search.selection import PLAIN, Finalist
from treesurgeon.search.setting import prepare
from treesurgeon.search.tasks import TASKS
from treesurgeon.search.tuning import Tuned, untouched

fewer_layers = fewer.fewer_layers
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint whose labels are others than the data's."""
    return furnished(tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="module")
def setting(place):
    return prepare(config(place, epsilon=0.5))  # which certify can show


def answers(split, wrong):
    """Logits of a model that gets the first so many images wrong, or those at some places."""
    logits = np.zeros((len(split), 3), np.float32)
    logits[np.arange(len(split)), split.labels] = 1
    logits[wrong] = np.roll(logits[wrong], 1, axis=1)
    return Answers(logits, split.labels, split.task)


def test_alike_is_a_paired_test_at_one_standard_error(setting, monkeypatch):
    split = setting.roles.search

    def finalist(wrong):
        model = Tuned("", engine.Plan(), wrong, None, None, {}, setting.subject)
        return Finalist("", {}, 0.0, len(wrong) / len(split), model)

    monkeypatch.setattr(frozen, "answering", lambda infer, split: lambda wrong: answers(split, wrong))
    some = lambda *places: finalist(np.array(places, int))
    best = some(*range(10))
    assert frozen.alike(setting, best, best)
    assert frozen.alike(setting, some(*range(5, 16)), best)  # loses six, gains five
    assert not frozen.alike(setting, some(*range(5, 30)), best)  # loses twenty, gains five
    assert not frozen.alike(setting, some(*range(12)), best)  # loses two, gains none
    for _ in range(20):
        mine, theirs = (RNG.random(len(split)) < share for share in (0.3, 0.25))
        worse, better = (mine & ~theirs).sum(), (theirs & ~mine).sum()
        apart = (worse - better) / np.sqrt(max(worse + better, 1))  # in standard errors
        if abs(apart - 1) > 0.25:
            given = finalist(np.flatnonzero(mine)), finalist(np.flatnonzero(theirs))
            assert frozen.alike(setting, *given) == (apart < 1)


def test_where_a_cross_validation_takes_its_place_both_splits_tell(place, monkeypatch):
    setting = prepare(config(place, epsilon=1e-6))
    roles, seen = setting.roles, []

    def answering(infer, split):
        seen.append(split)
        return lambda wrong: answers(split, wrong)

    monkeypatch.setattr(frozen, "answering", answering)
    model, best = (Finalist("", {}, 0, 0, replace(untouched(setting), variables=np.arange(k))) for k in (11, 10))
    assert frozen.alike(setting, model, best)
    assert frozen.loss(setting, model) > frozen.loss(setting, best)
    assert {len(split) for split in seen} == {len(roles.search) + len(roles.certify)}


def test_a_loss_decides_alone(place, monkeypatch):
    setting = prepare(config(place, metric="cross_entropy"))
    monkeypatch.setattr(frozen, "answering", None)
    worse, better = (Finalist("", {}, 0, error, None) for error in (0.3001, 0.3))
    assert not frozen.alike(setting, worse, better)
    assert frozen.alike(setting, better, better)


@pytest.mark.parametrize("name", ["balanced_accuracy", "label_accuracy", "f1", "auroc"])
def test_every_metric_tells_what_is_clear_and_leaves_open_what_is_not(name):
    several = name == "label_accuracy"
    task = TASKS["multilabel" if several else "classification"]
    labels = np.arange(300) % 3
    wanted = np.eye(3, dtype=np.float32)[labels]
    metric = METRICS[name]

    def seen(noise, seed):
        logits = 2 * wanted + noise * np.random.default_rng(seed).normal(size=wanted.shape)
        return metric.observe(Answers(logits, wanted if several else labels, task))

    one, other, far = seen(1.0, 0), seen(1.0, 1), seen(3.0, 2)
    assert metric.alike(one, one)
    assert metric.alike(one, other) or metric.alike(other, one)
    assert not metric.alike(far, one)
    assert metric.alike(one, far)


def test_a_run_within_a_budget_asks_both(tmp_path, monkeypatch):
    """Of what the images leave open (here all), that of the lowest loss (here the largest)."""
    alike = Mock(return_value=True)
    monkeypatch.setattr(conclusion, "alike", alike)
    monkeypatch.setattr(conclusion, "loss", lambda setting, model: -model.cost["macs"])
    outcome = run(small_config(tmp_path, macs=0.9, generations=1), lambda line: None)
    macs = {row["variant"]: int(row["macs"]) for row in open_run(outcome.path.parent).tables["front"]}
    chosen = json.loads((outcome.path / "manifest.json").read_text())["selected"]
    assert macs[chosen] == max(macs.values()) > min(macs.values())
    assert "no lower loss" in outcome.sentence
    assert alike.called


def test_what_variants_are_compared_with(place, setting):
    assert setting.head
    assert setting.tuned_reference
    undone = {"recipe": replace(setting.recipe, epochs=0)}
    for changes in ({"config": replace(setting.config, reference="dense")}, undone):
        other = replace(setting, **changes)
        assert not other.tuned_reference
        assert frozen.reference(other).name == "dense"
    own = replace(setting, head=None)
    assert not own.tuned_reference
    assert replace(own, config=replace(own.config, reference="fine-tuned")).tuned_reference
    with pytest.raises(RunError, match="--reference fine-tuned: with --epochs 0 nothing is fine-tuned"):
        config(place, reference="fine-tuned", epochs=0).check()


def test_where_nothing_passes_the_fine_tuned_dense_model_is_selected(place, tmp_path):
    """Without teacher or baselines as well; a resumed run says the same."""
    said = []
    given = config(place, out=str(tmp_path / "run"), epsilon=0.02, eta=1e-6, gap_max=1e-9, baselines=False,
                   pictures=False, truncations=0, epochs=2, distill=0, shares=(0.2, 0.2, 0.5, 0.1))  # fmt: skip
    outcome = run(given, said.append)
    assert "variants are compared with the dense model as it is once it is fine-tuned (--reference)" in said
    assert not any(line.startswith("finalists learn") for line in map(str, said))
    model = engine.load(outcome.path)
    manifest = model.manifest
    assert (manifest["selected"], manifest["reference"]) == (PLAIN, PLAIN)
    assert [line.variant for line in outcome.lines] == ["dense", PLAIN, "v1"]
    assert [line.selected for line in outcome.lines] == [False, True, False]
    assert outcome.sentence.startswith(("Certified: nothing smaller than the fine-tuned", "The fine-tuned dense model"))
    test = images_again(manifest, "test", given.data, "")
    score = (np.asarray(model(test.images)).argmax(1) == test.labels).mean()
    assert score == pytest.approx(manifest["metrics"][PLAIN]["test_accuracy"])
    assert score > 0.9
    found = open_run(outcome.path.parent)
    assert found.reference == "the fine-tuned dense model"
    assert found.selected["variant"] == PLAIN
    assert {row["variant"] for row in found.tables["curves"]} == {PLAIN, "v1"}
    again = run(given, lambda line: None)
    assert again.lines == outcome.lines
    assert json.loads((outcome.path / "manifest.json").read_text())["certificate"]["valid"] == (found.status == DENSE)
