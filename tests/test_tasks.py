"""Labels that are several for an image, and numbers: losses, data, metrics, heads, and whole searches."""

import csv
import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ownmodel import own_model
from sklearn import metrics as sklearn_metrics
from sklearn.datasets import load_digits

from treesurgeon import engine
from treesurgeon.search import Config, DataError, RunError, open_source, run, split_roles
from treesurgeon.search.cli import main
from treesurgeon.search.crossval import cross_validate, deal
from treesurgeon.search.data import ROLES
from treesurgeon.search.heads import best_binary, best_head, logistic, quick_head
from treesurgeon.search.hidden import choose, hidden
from treesurgeon.search.metrics import METRICS, Answers, MetricError, pick_metric
from treesurgeon.search.records import images_again
from treesurgeon.search.setting import prepare
from treesurgeon.search.tasks import TASKS, Units
from treesurgeon.search.transfer import in_units

MODEL = """
from flax import linen as nn


class Tiny(nn.Module):
    num_classes: int = 1

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        for i in range(2):
            h = nn.Conv(8, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(x + nn.BatchNorm(use_running_average=not training, name=f"bn{i}")(h))
        return nn.Dense(self.num_classes, name="head")(nn.relu(nn.Dense(16, name="hidden")(x.reshape(x.shape[0], -1))))
"""
MULTILABEL, REGRESSION = TASKS["multilabel"], TASKS["regression"]
SMALL = {"population": 4, "generations": 1, "search_images": 64, "calibration_images": 16, "refit_images": 64,
         "finalists": 1, "epochs": 2, "learning_rate": 0.05, "reconstruct": "none", "max_train": 300, "formats": False,
         "fitted_split": ("none",), "batch_size": 32}  # fmt: skip


def targets(task, rng, count=64, outputs=3):
    if task.name == "classification":
        return rng.integers(0, outputs, count)
    if task.name == "multilabel":
        return (rng.random((count, outputs)) < 0.4).astype(np.float32)
    return rng.normal(size=(count, outputs)).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of the user's own with one output, and digits with labels and with numbers."""
    home = tmp_path_factory.mktemp("tasks")
    own_model(home, MODEL, (8, 8, 1), "tasked")
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    several = np.stack([y % 2 == 0, y > 4, np.isin(y, (0, 6, 8, 9))], 1)
    names = np.array(["even", "large", "loop"])
    np.savez(home / "several.npz", x=x, y=several, label_names=names)
    ink = 200 + 30 * x.sum((1, 2, 3))  # far from mean 0 and variance 1
    np.savez(home / "numbers.npz", x=x, y=ink.astype(np.float32))
    np.savez(home / "whole.npz", x=x, y=y)
    return home


def config(place, data, **changes):
    given = {"model": "tasked:Tiny", "checkpoint": str(place / "checkpoint"), "data": f"npz:{place / data}.npz"}
    return Config(**{**SMALL, **given, "out": str(place / "out" / data), **changes})


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_losses_divergences_and_sharpness(task):
    rng = np.random.default_rng(0)
    outputs, others = (2 * rng.normal(size=(64, 3)).astype(np.float32) for _ in range(2))
    labels, weights = targets(task, rng), np.ones(64)
    outputs += 2 * np.asarray(task.wanted(labels, 3))
    np.testing.assert_allclose(task.losses(outputs, labels), task.exact_losses(outputs, labels), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(task.divergence(outputs, outputs), 0, atol=1e-6)
    assert (np.asarray(task.divergence(outputs, others)) > 0).all()
    # The divergence is what the expected loss rises by when the answers change.
    if task.name != "classification":
        expected = task.expected(jnp.asarray(outputs))
        rise = task.losses(jnp.asarray(others), expected) - task.losses(jnp.asarray(outputs), expected)
        np.testing.assert_allclose(task.divergence(outputs, others), rise, rtol=1e-4, atol=1e-5)
    factor = float(task.sharpness(jnp.asarray(outputs), task.wanted(labels, 3), weights))
    losses = [float(task.losses(jnp.asarray(outputs * s), labels).mean()) for s in (factor, factor * 0.9, factor * 1.1)]
    assert factor == 1 if task is REGRESSION else losses[0] <= min(losses)


def test_strata_hold_enough_images_and_rare_labels_have_their_own():
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 4)) < [0.5, 0.3, 0.05, 0.005]).astype(np.float32)
    strata = MULTILABEL.strata(labels)
    assert np.unique(strata, return_counts=True)[1].min() >= 8
    rare = labels[:, 2] > 0
    assert len(set(strata[rare & (labels[:, 3] == 0)])) == 1
    numbers = rng.normal(size=(100, 1)).astype(np.float32)
    bins = REGRESSION.strata(numbers)
    assert np.unique(bins, return_counts=True)[1].tolist() == [10] * 10
    assert all(numbers[bins == i].max() < numbers[bins == i + 1].min() for i in range(9))


def test_folds_share_out_the_images_that_have_labels():
    labels = np.zeros((61, 2))
    labels[:4, 0], labels[4:7, 1] = 1, 1
    assert len(set(MULTILABEL.strata(labels))) == 1  # too few of any for roles
    for seed in range(20):
        at = deal(MULTILABEL.fold_strata(labels), 3, seed, 0)
        assert all(labels[at == fold].any() for fold in range(3))


@pytest.mark.parametrize("name", ["f1", "auroc"])
def test_folds_without_a_label_are_left_out(name):
    """One image has a label: the fold that has it says all there is to say."""
    labels = np.zeros((40, 2))
    labels[3, 0] = 1
    logits = np.random.default_rng(0).normal(size=(40, 2))
    right, wrong = (Answers(logits + factor * (labels - 0.5), labels, MULTILABEL) for factor in (20, -20))
    found = cross_validate([wrong], right, METRICS[name], folds=2, repeats=4, seed=0, delta=0.05)
    assert found.difference > 0.4
    assert np.isfinite([found.low, found.high, found.dense_error]).all()
    assert np.isnan(METRICS[name].error(METRICS[name].observe(wrong[np.arange(4, 40)])))


def test_a_label_that_is_not_a_number_is_wrong():
    labels = np.array([[0.0, 0, 1]])
    assert MULTILABEL.wrong(np.array([[np.nan, -1, 1]]), labels) == pytest.approx(1 / 3)
    assert MULTILABEL.wrong(jnp.array([[jnp.nan, jnp.nan, jnp.nan]]), labels) == 1


# --- data -------------------------------------------------------------------------------------------------------------


def test_rows_of_labels_and_numbers_are_read(place):
    source = open_source(f"npz:{place / 'several.npz'}")
    assert (source.task, source.label_names, source.named) == ("multilabel", ("even", "large", "loop"), True)
    roles = split_roles(source, ())
    assert roles.task == MULTILABEL
    assert roles.test.labels.dtype == np.float32
    share = [getattr(roles, role).labels.mean(0) for role in ROLES]
    np.testing.assert_allclose(share, np.tile(source.read_labels("all").mean(0), (4, 1)), atol=0.06)
    x, y = load_digits(return_X_y=True)
    np.testing.assert_allclose(roles.test.images[:, ..., 0] * 16, x.reshape(-1, 8, 8)[roles.test.indices])
    np.testing.assert_array_equal(roles.test.labels[:, 0], y[roles.test.indices] % 2 == 0)
    source = open_source(f"npz:{place / 'numbers.npz'}")
    assert (source.task, source.label_names) == ("regression", ("value",))
    assert split_roles(source, ()).train.labels.shape[1] == 1


def test_whole_numbers_are_numbers_only_where_it_is_said(place):
    assert open_source(f"npz:{place / 'whole.npz'}").task == "classification"
    source = open_source(f"npz:{place / 'whole.npz'}", task="regression")
    assert (source.task, source.num_classes, source.read_labels("all").dtype) == ("regression", 1, np.float32)
    roles = split_roles(source, (), caps={"train": 100})
    assert len(roles.train) == 100


@pytest.mark.parametrize("stored", [lambda y: y.astype(float), lambda y: np.eye(10)[y].astype(bool)])
def test_classes_in_another_form_are_classes_where_it_is_said(tmp_path, stored):
    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "other.npz", x=x.reshape(-1, 8, 8), y=stored(y))
    source = open_source(f"npz:{tmp_path / 'other.npz'}", task="classification")
    assert (source.num_classes, source.task) == (10, "classification")
    np.testing.assert_array_equal(source.read_labels("all"), y)


@pytest.mark.parametrize("task", ["multilabel", "classification", "regression", None])
def test_rows_of_0_and_1_may_be_stored_as_floating_point_numbers(tmp_path, task):
    rows = np.eye(3, dtype=np.float32)[np.arange(40) % 3]
    np.savez(tmp_path / "rows.npz", x=np.zeros((40, 4, 4)), y=rows)
    if task is None:
        with pytest.raises(DataError, match="rows of 0 and 1, stored as floating-point ones: pass --task multilabel"):
            open_source(f"npz:{tmp_path / 'rows.npz'}")
        return
    source = open_source(f"npz:{tmp_path / 'rows.npz'}", task=task)
    assert (source.task, source.num_classes) == (task, 3)
    np.testing.assert_array_equal(source.read_labels("all"), rows.argmax(1) if task == "classification" else rows)


@pytest.mark.parametrize(
    ("labels", "task", "words"),
    [
        (np.full((40, 3), 2), None, "0 or 1"),
        (np.full((40, 2), np.nan), None, "finite numbers"),
        (np.arange(40), "multilabel", "rows of 0 and 1"),
        (np.zeros((40, 2)), "classification", "whole numbers"),
        (np.array(["a", "b"] * 20), "regression", "needs numbers"),
        (np.zeros((40, 2, 2)), None, r"labels y \[N\]"),
        (np.array([["a", "b"]] * 40), None, "labels of 0 and 1"),
    ],
)
def test_bad_labels_are_refused_with_a_reason(tmp_path, labels, task, words):
    np.savez(tmp_path / "bad.npz", x=np.random.default_rng(0).random((40, 4, 4, 1)), y=labels)
    with pytest.raises(DataError, match=words):
        split_roles(open_source(f"npz:{tmp_path / 'bad.npz'}", task=task), ())


def test_splits_with_labels_of_two_kinds_are_refused(tmp_path):
    x = np.zeros((8, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "two.npz", x_train=x, y_train=np.arange(8), x_test=x, y_test=np.zeros((8, 2), int))
    with pytest.raises(DataError, match="of one kind in all splits, got y_train int64"):
        open_source(f"npz:{tmp_path / 'two.npz'}")


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_labels_and_numbers_are_the_usual_ones():
    rng = np.random.default_rng(0)
    labels = targets(MULTILABEL, rng, 200, 4)
    answers = Answers(rng.normal(size=(200, 4)).astype(np.float32) + labels, labels, MULTILABEL)
    chosen = answers.logits > 0
    wanted = {
        "label_accuracy": 1 - sklearn_metrics.hamming_loss(labels > 0, chosen),
        "f1": sklearn_metrics.f1_score(labels, chosen, average="macro"),
        "auroc": sklearn_metrics.roc_auc_score(labels, answers.logits, average="macro"),
        "cross_entropy": np.mean(
            [sklearn_metrics.log_loss(labels[:, k], 1 / (1 + np.exp(-answers.logits[:, k]))) for k in range(4)]
        ),
    }
    for name, value in wanted.items():
        metric = METRICS[name]
        assert metric.score(metric.error(metric.observe(answers))) == pytest.approx(value, abs=1e-6)
    numbers = targets(REGRESSION, rng, 400, 2)
    numbers = (numbers - numbers.mean(0)) / numbers.std(0)
    answers = Answers(numbers + 0.3 * rng.normal(size=numbers.shape).astype(np.float32), numbers, REGRESSION)
    metric = METRICS["r2"]
    found = metric.score(metric.error(metric.observe(answers)))
    assert found == pytest.approx(sklearn_metrics.r2_score(numbers, answers.logits), abs=1e-5)


@pytest.mark.parametrize("name", ["label_accuracy", "f1", "auroc", "r2"])
def test_tests_of_labels_and_numbers_see_what_is_there(name):
    rng = np.random.default_rng(1)
    task = REGRESSION if name == "r2" else MULTILABEL
    labels = targets(task, rng, 2000, 3)
    signal = labels if name == "r2" else 4 * labels - 2
    noise = rng.normal(size=labels.shape)
    metric = METRICS[name]
    dense, alike, worse = (
        metric.observe(Answers(signal + spread * noise, labels, task))
        for spread in (0.5, 0.51, 2.0 if name != "r2" else 1)
    )
    assert metric.compare(alike, dense).p_value(0.1) < 0.05
    assert metric.compare(worse, dense).p_value(0.01) > 0.5
    assert 0 < metric.smallest_margin(labels, 0.05) < 0.05
    # What passes by agreeing everywhere passes at the smallest margin, not far below it.
    least = metric.smallest_margin(labels, 0.05)
    assert metric.compare(dense, dense).p_value(1.1 * least) <= 0.05 < metric.compare(dense, dense).p_value(0.8 * least)


def test_a_metric_is_for_some_tasks_and_auto_is_one_that_fits():
    assert [pick_metric("auto", task).name for task in TASKS.values()] == ["accuracy", "label_accuracy", "r2"]
    with pytest.raises(MetricError, match="--metric accuracy is not for regression: expected one of r2"):
        pick_metric("accuracy", REGRESSION)
    with pytest.raises(MetricError, match="there is none such"):
        pick_metric("beauty", MULTILABEL)


def test_labels_that_a_role_lacks_are_refused_where_each_counts_alike():
    labels = np.zeros((10, 2))
    labels[:5, 0] = 1
    with pytest.raises(MetricError, match="'b' is on no image of test"):
        METRICS["auroc"].check({"train": labels[:, ::-1] * 0 + labels[:, :1], "test": labels}, ["a", "b"])


# --- heads ------------------------------------------------------------------------------------------------------------


def test_heads_for_labels_are_logistic_ones_side_by_side():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 5)).astype(np.float32)
    labels = (x[:, :3] + 0.5 * rng.normal(size=(120, 3)) > 0.2).astype(np.float32)
    found = best_binary(x, labels, penalties=(1e-2,))
    for k in range(3):
        alone = logistic(x, labels[:, k].astype(int), 2, 1e-2, free=[1])
        np.testing.assert_allclose(found.kernel[:, k], alone.kernel[:, 0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.bias[k], alone.bias[0], rtol=1e-3, atol=1e-4)
    for head in (best_head(MULTILABEL, x, labels, 3), quick_head(MULTILABEL, x, labels, 3)):
        assert MULTILABEL.wrong(np.asarray(head(x)), labels).mean() < 0.2


@pytest.mark.parametrize("task", [MULTILABEL, REGRESSION], ids=["multilabel", "regression"])
def test_a_hidden_layer_is_taken_where_the_targets_need_it(task):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200, 6)).astype(np.float32)
    curved = np.stack([x[:, 0] * x[:, 1], np.abs(x[:, 2]) - 0.8], 1)
    y = ((curved > 0) if task is MULTILABEL else curved / curved.std(0)).astype(np.float32)
    linear, deep = best_head(task, x[:800], y[:800], 2), hidden(x[:800], y[:800], 2, [32], task=task)
    assert choose(linear, deep, x[800:], y[800:], task) is deep[0]
    flat = x @ rng.normal(size=(6, 2)) / np.sqrt(6)
    y = ((flat > 0) if task is MULTILABEL else flat).astype(np.float32)
    linear, deep = best_head(task, x[:800], y[:800], 2), hidden(x[:800], y[:800], 2, [32], task=task)
    assert choose(linear, deep, x[800:], y[800:], task) is None


# --- whole searches ---------------------------------------------------------------------------------------------------


def test_units_turn_numbers_and_heads_there_and_back(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    values = np.random.default_rng(0).normal(50, 9, (30, 2)).astype(np.float32)
    units = Units.of(values)
    np.testing.assert_allclose(units.standardised(values).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(units.standardised(values).std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(units.inverse().standardised(units.standardised(values)), values, rtol=1e-5)
    assert Units.of(np.full((5, 1), 7.0)).scale == (1.0,)
    # A checkpoint that returns numbers already goes in, and comes out, as it is.
    setting = prepare(config(place, "numbers", head="keep"))
    raw = prepare(config(place, "whole", task="regression", head="keep"))
    x = setting.roles.test.images[:16]
    assert setting.units is not None
    back = in_units(setting.subject, setting.subject.variables, setting.units)
    answers = np.asarray(setting.subject.infer(back, x))
    assert raw.units is not None
    np.testing.assert_allclose(
        answers, raw.subject.infer(in_units(raw.subject, raw.subject.variables, raw.units), x), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        setting.subject.infer(setting.subject.variables, x), setting.units.standardised(answers), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("data", [pytest.param("several", marks=pytest.mark.slow), "numbers"])
def test_a_search_on_labels_or_numbers(place, data, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    lines = []
    more = {"eta": 0.2} if data == "numbers" else {"gap_max": 0.3, "baselines": False}
    outcome = run(config(place, data, head="fit", epsilon=0.2, **more), say=lines.append)
    model = engine.load(outcome.path, allow_import=True)
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    task = MULTILABEL if data == "several" else REGRESSION
    name = "label_accuracy" if data == "several" else "r2"
    assert (manifest["task"], manifest["metric"]) == (task.name, name)
    if data == "several":
        assert manifest["verdict"]["certified"]
        assert "and its gap is less than 30 points, at level 0.05" in manifest["certificate"]["sentence"]
    assert any(line.startswith(task.name) for line in lines)
    test = images_again(manifest, "test", f"npz:{place / data}.npz", "")
    answers = np.asarray(model(test.images))
    if data == "numbers":  # in the units of the data
        values = np.load(place / "numbers.npz")["y"][test.indices]
        score = 1 - ((answers[:, 0] - values) ** 2).mean() / manifest["units"]["scale"][0] ** 2
        least = 0.8
    else:
        score, least = ((answers > 0) == (test.labels > 0)).mean(), 0.75
    claimed = manifest["metrics"][manifest["selected"]][f"test_{name}"]
    assert score == pytest.approx(claimed, abs=2e-3)
    assert claimed > least
    main(["verify", str(outcome.path), "--data", f"npz:{place / data}.npz", "--allow-import"])
    assert "Verified" in capsys.readouterr().out
    page = (place / "out" / data / "report.html").read_text()
    assert ("1 - R²" if data == "numbers" else "label accuracy") in page
    main(["depth", "--model", "tasked:Tiny", "--checkpoint", str(place / "checkpoint"), "--data",
          f"npz:{place / data}.npz", "--fitted-split", "none", "--out", str(place / f"depth-{data}")])  # fmt: skip
    assert f"{task.score} against depth" in (place / f"depth-{data}/depth.svg").read_text()
    with (place / f"depth-{data}/depth.csv").open(newline="") as file:
        shares = [float(row["search_accuracy"]) for row in csv.DictReader(file)]
    assert 0.2 < max(shares) <= 1


def test_what_needs_classes_says_so(place, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(RunError, match="--criterion selectivity is about classes"):
        prepare(config(place, "several", criterion="selectivity"))
    with pytest.raises(MetricError, match="--metric accuracy is not for multilabel"):
        prepare(config(place, "several", metric="accuracy"))
    data = ["--data", f"npz:{place / 'several'}.npz", "--fitted-split", "none"]
    with pytest.raises(SystemExit) as ended:
        main(["insight", "tasked:Tiny", "--checkpoint", str(place / "checkpoint"), *data])
    assert ended.value.code == 2
    assert "where each image has one" in capsys.readouterr().err


def test_a_classifier_of_known_classes_gets_a_new_head_for_as_many_labels(place):
    from treesurgeon.search.transfer import match_labels

    source = dataclasses.replace(open_source(f"npz:{place / 'several.npz'}"), named=False)
    assert match_labels(source, 3, ("cat", "dog", "bird")).replaced
    assert not match_labels(source, 3, None).replaced
    assert match_labels(source, 3, ("cat", "dog", "bird"), "keep").replaced is False


def test_batches_carry_their_task_through_transformations(place):
    from treesurgeon.search.evaluate import batches

    data = batches(split_roles(open_source(f"npz:{place / 'several.npz'}"), ()).test, 32)
    assert data.labels.shape[2:] == (3,)
    assert jax.tree.map(lambda leaf: leaf, data).task == MULTILABEL


# --- TFDS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS dataset by the kind of its labels, prepared without a network."""
    import tensorflow_datasets as tfds

    kinds = {
        "sequence": (tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b", "c"])), [[0, 2], [], [1]]),
        "number": (tfds.features.Tensor(shape=(), dtype=np.float32), [0.5, 1.5, 2.5]),
        "rows": (tfds.features.Tensor(shape=(2,), dtype=np.uint8), [[0, 1], [1, 1], [0, 0]]),
        "unnamed": (tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.int64)), [[1], [2], [3]]),
    }

    class Kinds(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in kinds]
        code_path = None

        def _info(self):
            image = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.float32)
            features = tfds.features.FeaturesDict({"image": image, "label": kinds[self.builder_config.name][0]})
            return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, label in enumerate(kinds[self.builder_config.name][1]):
                yield i, {"image": np.full((4, 4, 1), i, np.float32), "label": label}

    found = {}
    for name in kinds:
        builder = Kinds(config=name, data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
        skip = tfds.download.ComputeStatsMode.SKIP
        how = tfds.download.DownloadConfig(compute_stats=skip, try_download_gcs=False)
        builder.download_and_prepare(download_config=how)
        found[name] = f"tfds-dir:{builder.data_dir}"
    return found


def test_tfds_holds_labels_and_numbers(prepared):
    def by_image(name):
        source = open_source(prepared[name])
        order = source.read_images("train", np.arange(3))[:, 0, 0, 0].argsort()
        return source, source.read_labels("train")[order].tolist()

    source, labels = by_image("sequence")
    assert (source.task, source.label_names, source.named) == ("multilabel", ("a", "b", "c"), True)
    assert labels == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    source, labels = by_image("number")
    assert (source.task, source.label_names, labels) == ("regression", ("value",), [[0.5], [1.5], [2.5]])
    source, labels = by_image("rows")
    assert (source.task, source.label_names, labels) == ("multilabel", ("0", "1"), [[0, 1], [1, 1], [0, 0]])
    with pytest.raises(DataError, match="a sequence of named classes"):
        open_source(prepared["unnamed"])
