"""Cross-validation in the certificate's place: folds, which epoch answers them, and intervals."""

import numpy as np
import pytest
from scipy import stats
from smallrun import small_config

from treesurgeon.search.crossval import cross_validate, deal, fold_count
from treesurgeon.search.metrics import METRICS, Answers
from treesurgeon.search.setting import prepare

SETTINGS = {"folds": 5, "repeats": 3, "seed": 0, "delta": 0.05}


def right(labels, correct):
    """Answers that are right where `correct` says so."""
    return Answers(np.eye(3)[np.where(correct, labels, (labels + 1) % 3)] * 4, labels)


def test_folds_are_stratified_seeded_and_differ_by_repeat():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 20, 5]))
    folds = deal(labels, 5, 0, 0)
    for label, each in ((0, 20), (1, 4), (2, 1)):
        assert np.bincount(folds[labels == label], minlength=5).tolist() == [each] * 5
    assert (deal(labels, 5, 0, 0) == folds).all()
    assert (deal(labels, 5, 0, 1) != folds).any()
    assert (deal(labels, 5, 1, 0) != folds).any()


def test_the_epoch_is_chosen_without_the_images_that_it_answers():
    """Every epoch is right on one fold alone and wrong elsewhere, a last one is right on a quarter of each.

    Whoever looked at the held fold would take its epoch, and seem right on all images.
    """
    labels = np.arange(300) % 3
    at = deal(labels, 5, 0, 0)
    quarter = np.zeros(300, bool)
    for fold in range(5):
        members = np.flatnonzero(at == fold)
        quarter[members[: len(members) // 4 + 1]] = True
    trail = [right(labels, at == fold) for fold in range(5)] + [right(labels, quarter)]
    found = cross_validate(trail, right(labels, np.ones(300, bool)), METRICS["accuracy"], **{**SETTINGS, "repeats": 1})
    assert found.epochs == (5, 5, 5, 5, 5)
    assert found.error == pytest.approx(1 - quarter.mean())


def test_images_that_judge_are_in_every_choice_and_in_no_fold():
    """One epoch is right on the pool and wrong on what judges, the other the other way round."""
    labels, judges = np.arange(120) % 3, 90
    pool = np.arange(120) < 120 - judges
    trail, dense = [right(labels, pool), right(labels, ~pool)], right(labels, np.ones(120, bool))
    for trusted, epoch, error in ((judges, 1, 1.0), (0, 1, 0.25)):
        found = cross_validate(trail, dense, METRICS["accuracy"], **SETTINGS, judges=trusted)
        assert set(found.epochs) == {epoch}
        assert found.error == error
    alone = [each[pool] for each in (*trail, dense)]
    assert cross_validate(alone[:2], alone[2], METRICS["accuracy"], **SETTINGS).error == 0
    folds = [cross_validate([right(labels, ~pool)], dense, METRICS["accuracy"], **SETTINGS, judges=judges)]
    folds.append(cross_validate(alone[1:2], alone[2], METRICS["accuracy"], **SETTINGS))
    assert folds[0] == folds[1]


@pytest.mark.parametrize(("metric", "asked", "count"), [
    ("accuracy", 5, 5), ("accuracy", 500, 96), ("balanced_accuracy", 500, 24), ("balanced_accuracy", 5, 5),
])  # fmt: skip
def test_no_more_folds_than_images(tmp_path, metric, asked, count):
    setting = prepare(small_config(tmp_path, certify=True, cv_folds=asked, metric=metric))
    assert len(setting.roles.search) + len(setting.roles.certify) == 96
    assert fold_count(setting) == count


def test_the_difference_of_frozen_models_is_that_on_the_pool_and_the_interval_is_nadeau_bengios():
    rng = np.random.default_rng(1)
    labels = np.arange(500) % 3
    dense, ours = (right(labels, rng.random(500) < share) for share in (0.9, 0.85))
    metric = METRICS["accuracy"]
    found = cross_validate([ours], dense, metric, **SETTINGS)
    whole = [metric.error(metric.observe(answers)) for answers in (ours, dense)]
    assert found.difference == pytest.approx(whole[0] - whole[1])  # folds of one size
    assert found.dense_error == pytest.approx(whole[1])
    by_fold = []
    for repeat in range(3):
        at = deal(labels, 5, 0, repeat)
        by_fold += [
            float(np.mean(metric.observe(ours[at == k])) - np.mean(metric.observe(dense[at == k]))) for k in range(5)
        ]
    half = stats.t.ppf(0.95, 14) * np.sqrt(np.var(by_fold, ddof=1) * (1 / 15 + 1 / 4))
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half))
    assert found == cross_validate([ours], dense, metric, **SETTINGS)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_can_be_cross_validated(name):
    rng = np.random.default_rng(2)
    labels = np.arange(120) % 3
    dense, ours = (Answers(rng.normal(size=(120, 3)) + k * np.eye(3)[labels], labels) for k in (3, 0.5))
    found = cross_validate([ours, dense], dense, METRICS[name], **SETTINGS)
    assert set(found.epochs) == {1}
    metric = METRICS[name]  # of counted answers, the same ones leave open what no test on so many images shows
    least = 0 if metric.loss else metric.smallest_margin(labels, SETTINGS["delta"])
    assert (found.difference, found.low, found.high) == (0, -least, least)
    assert cross_validate([ours], dense, METRICS[name], **SETTINGS).low > 0


def test_intervals_cover():
    """The true difference lies above the upper end about as rarely as the level says."""
    metric, rng = METRICS["accuracy"], np.random.default_rng(3)
    labels = np.arange(200) % 3
    below = 0
    for _ in range(150):
        dense, ours = (right(labels, rng.random(200) < share) for share in (0.9, 0.85))
        found = cross_validate([ours], dense, metric, **{**SETTINGS, "repeats": 1})
        below += found.high < 0.05
    assert below / 150 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)
