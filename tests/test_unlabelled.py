"""Images without labels: which they are, what is fitted to them, and what is learnt from them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from smallrun import small_config

from treesurgeon import engine
from treesurgeon.engine import TreesurgeonError
from treesurgeon.search import DataError, run
from treesurgeon.search.augment import flip_crop
from treesurgeon.search.config import Config
from treesurgeon.search.crossval import pool
from treesurgeon.search.data import open_source, sample_images, split_roles
from treesurgeon.search.evaluate import measurer
from treesurgeon.search.finalists import Pick, fine_tuned, variant
from treesurgeon.search.finetune import FitResult, Recipe, fit, objective
from treesurgeon.search.pipeline import build_space
from treesurgeon.search.scoring import make_evaluator
from treesurgeon.search.setting import make_recipe, prepare
from treesurgeon.search.start import energies
from treesurgeon.search.streaming import Streamed
from treesurgeon.search.subject import random_subject
from treesurgeon.search.tasks import TASKS
from treesurgeon.search.teaching import how_taught
from treesurgeon.search.tuning import tune
from treesurgeon.search.unlabelled import answers, beside, judging, scoring, taught, weight

RNG = np.random.default_rng(0)


def known(setting):
    return replace(setting, taught=taught(setting)["logits"])


def images_of(split):
    return {image.tobytes() for image in np.asarray(split.images)}


@pytest.fixture
def source(tmp_path):
    x = RNG.random((60, 4, 4, 1)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x_train=x[:40], y_train=np.arange(40) % 2, x_test=x[40:], y_test=np.arange(20) % 2)
    return open_source(f"npz:{tmp_path / 'data.npz'}")


@pytest.mark.parametrize(("count", "found"), [(1, 1), (7, 7), (30, 30), (60, 30)])
def test_images_that_have_a_role_are_left_out(source, count, found):
    roles = split_roles(source, ("train",), input_shape=(4, 4, 1), caps={"train": 10})
    split = sample_images(source, count, input_shape=(4, 4, 1), roles=roles)
    assert len(split) == found  # 60, less 10 of train and the 20 of the other split
    assert len(images_of(split)) == found
    for role in ("train", "search", "certify", "test"):
        assert not images_of(split) & images_of(getattr(roles, role))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_bytes_are_known_again_as_floats(tmp_path, dtype):
    x = RNG.integers(0, 256, (60, 4, 4, 1)).astype(np.uint8)
    np.savez(tmp_path / "bytes.npz", x=x, y=np.arange(60) % 2)
    np.savez(tmp_path / "floats.npz", x=np.concatenate([(x / 255).astype(dtype), RNG.random(x.shape).astype(dtype)]))
    roles = split_roles(open_source(f"npz:{tmp_path / 'bytes.npz'}"), (), input_shape=(4, 4, 1))
    more = open_source(f"npz:{tmp_path / 'floats.npz'}", labelled=False)
    found = sample_images(more, 120, input_shape=(4, 4, 1), roles=roles)
    assert sorted(found.indices) == list(range(60, 120))


def test_labels_may_be_missing(tmp_path):
    x = RNG.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "alone.npz", x_train=x, x_test=x[:2] // 2)
    np.savez(tmp_path / "odd.npz", x=x, y=np.full((9, 2), np.nan))
    for i, image in enumerate(x):
        path = tmp_path / "files" / ("" if i < 2 else "deep/er") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for spec, count in (
        (f"npz:{tmp_path}/alone.npz", 8),
        (f"npz:{tmp_path}/odd.npz", 6),
        (f"folder:{tmp_path}/files", 6),
    ):
        assert len(sample_images(open_source(spec, labelled=False), 99, input_shape=(5, 4, 3))) == count
        if spec.startswith("npz"):
            with pytest.raises(DataError):
                open_source(spec)
    resized = sample_images(
        open_source(f"folder:{tmp_path}/files", None, (3, 3, 1), labelled=False), 9, input_shape=(3, 3, 1)
    )
    assert resized.images.shape == (6, 3, 3, 1)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="expected images below"):
        open_source(f"folder:{tmp_path}/none", labelled=False)
    np.savez(tmp_path / "labels.npz", y=np.zeros(3))
    with pytest.raises(DataError, match="expected arrays"):
        open_source(f"npz:{tmp_path}/labels.npz", labelled=False)


def test_the_choice_is_the_seeds_and_labels_do_not_matter(source):
    first, again, other = (sample_images(source, 20, input_shape=(4, 4, 1), seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images)
    assert images_of(first) != images_of(other)
    assert not first.labels.any()


@pytest.mark.parametrize(("count", "found"), [(3, 3), (20, 20), (29, 20)])
def test_the_same_image_is_taken_once(tmp_path, count, found):
    x = RNG.random((20, 4, 4, 1)).astype(np.float32)
    np.savez(tmp_path / "again.npz", x=np.concatenate([x, x[:9]]))
    split = sample_images(open_source(f"npz:{tmp_path / 'again.npz'}", labelled=False), count, input_shape=(4, 4, 1))
    assert len(split) == len(images_of(split)) == found


def test_where_all_have_a_role_there_is_an_error(source):
    roles = split_roles(source, (), input_shape=(4, 4, 1))
    with pytest.raises(DataError, match="all of its 60 images are in train, search, certify or test"):
        sample_images(source, 5, input_shape=(4, 4, 1), roles=roles)


@pytest.mark.parametrize(("rows", "beside", "steps"), [(10, 25, 4), (10, 3, 3), (3, 50, 7)])
def test_an_epoch_goes_over_the_larger_part_and_over_the_other_again(rows, beside, steps):
    seen = []

    def loss(p, batch, key):
        parts = batch["x"], batch["u"]
        jax.debug.callback(lambda *x: seen.append([part.tolist() for part in x]), *parts, ordered=True)
        return jnp.sum(p["w"] ** 2), None

    recipe = Recipe(epochs=2, batch_size=4, beside=8)
    given = {"x": np.arange(rows)}, recipe, jax.random.key(0), lambda p: (0.0, 0.0)
    fit(loss, {"w": jnp.ones(2)}, {"w": True}, *given, beside={"u": np.arange(beside)})
    jax.effects_barrier()
    assert len(seen) == 2 * steps
    for part, count, size in ((0, rows, 4), (1, beside, 8)):
        taken = [row for batch in seen[:steps] for row in batch[part]]
        assert len(taken) == steps * min(size, count)
        assert set(taken) == set(range(count))
        times = np.bincount(taken)
        assert times.max() - times.min() <= 1


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_loss_is_that_of_the_labels_and_the_divergence_of_the_rest(name):
    task, kernel = TASKS[name], RNG.normal(size=(4, 3)).astype(np.float32)
    x, more = RNG.normal(size=(2, 5, 4)).astype(np.float32)
    answered = RNG.normal(size=(5, 3)).astype(np.float32)
    y = {"classification": np.arange(5) % 3, "multilabel": np.eye(3)[np.arange(5) % 3], "regression": x[:, :3]}[name]
    calls = []

    def train(p, x, key):
        calls.append(x.shape)
        return x @ p, None

    loss = objective(train, task=task, temperature=2.0, unlabelled=0.75)
    batch = {"x": x, "y": jnp.asarray(y), "unlabelled": more}
    both, _ = loss(kernel, batch | {"taught": answered}, jax.random.key(0))
    labels = task.losses(jnp.asarray(x @ kernel), jnp.asarray(y)).mean()
    rest = 4 * task.divergence(jnp.asarray(answered / 2), jnp.asarray(more @ kernel / 2)).mean()
    assert both == pytest.approx(float(0.25 * labels + 0.75 * rest), rel=1e-5)
    agreed, _ = loss(kernel, batch | {"taught": more @ kernel}, jax.random.key(0))
    assert agreed == pytest.approx(float(labels) / 4, rel=1e-5)
    assert calls == [(10, 4), (10, 4)]  # one pass, so that norms see all of a batch
    alone, _ = objective(train, task=task, temperature=2.0, unlabelled=1.0, distill=0.5)(
        kernel, batch | {"taught": answered}, jax.random.key(0)
    )
    assert alone == pytest.approx(float(rest), rel=1e-5)
    assert calls[2:] == [(5, 4)]


def test_they_are_mirrored_and_nothing_else_is_done_to_them():
    x = RNG.normal(size=(40, 8, 8, 1)).astype(np.float32)
    seen = []

    def train(p, x, key):
        seen.append(np.asarray(x))
        return x.reshape(len(x), -1)[:, :3] * p, None

    batch = {"x": x[:4], "y": jnp.zeros(4, jnp.int32), "unlabelled": x[4:], "taught": jnp.zeros((36, 3))}
    for mirror in (False, True):
        objective(train, augment=flip_crop, mirror=mirror)(jnp.ones(3), batch, jax.random.key(0))
    (_, plain), (_, moved) = (np.split(each, [4]) for each in seen)
    assert np.array_equal(plain, x[4:])
    turned = [np.array_equal(a, b[:, ::-1]) for a, b in zip(moved, x[4:], strict=True)]
    assert 5 < sum(turned) < 31
    assert all(np.array_equal(a, b) != t for a, b, t in zip(moved, x[4:], turned, strict=True))


def test_the_teacher_is_the_mean_of_both_statistics_and_of_mirror_images(source):
    subject = random_subject("resnet20")
    x = RNG.normal(size=(6, 32, 32, 3)).astype(np.float32)
    split = replace(sample_images(source, 6, input_shape=(4, 4, 1)), images=x)
    mirror = replace(split, images=x[:, :, ::-1])
    fresh = engine.reestimate(subject.train, subject.momenta)(subject.variables, x, jax.random.key(0))
    logits = [np.asarray(subject.infer(v, x)) for v in (subject.variables, fresh)]
    plain = answers(subject, split, x, mirrored=False)
    np.testing.assert_allclose(plain, np.mean(logits, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(answers(subject, split, x[:0], mirrored=False), logits[0], rtol=1e-3, atol=1e-4)
    both = answers(subject, split, x, mirrored=True)
    np.testing.assert_allclose(both, answers(subject, mirror, x, mirrored=True), rtol=1e-3, atol=1e-4)
    assert np.abs(both - plain).max() > 1e-3


def test_the_fine_tuned_dense_model_is_one_of_the_teachers(tmp_path):
    setting = prepare(with_more(tmp_path, epochs=1))
    tuned = jax.tree.map(lambda leaf: 1.5 * leaf, setting.subject.variables)
    logits = [setting.subject.infer(v, setting.unlabelled.images) for v in (setting.subject.variables, tuned)]
    alone = taught(setting)["logits"]
    for epoch in (0, 1):  # after none it is the dense model itself
        found = taught(replace(setting, teacher=FitResult(tuned, (), epoch)))["logits"]
        wanted = np.mean(logits, 0) if epoch else alone
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert np.abs(found - alone).max() > 1e-2


def with_more(home, **changes):
    config = small_config(home, **changes)
    np.savez(home / "more.npz", x=RNG.random((300, 8, 8, 1)).astype(np.float32), y=np.zeros(300, np.int32))
    return replace(config, unlabelled=f"npz:{home / 'more.npz'}")


def test_what_needs_no_labels_is_fitted_to_them(tmp_path):
    config = with_more(tmp_path)
    setting = prepare(config)
    train = np.asarray(setting.roles.train.images)
    assert len(setting.unlabelled) == 300
    assert np.array_equal(setting.calibration(10), train[:10])
    assert np.array_equal(setting.calibration(100), np.concatenate([train, setting.unlabelled.images[-20:]]))
    assert len(setting.calibration(1000)) == 380
    assert setting.recipe.steps == 10  # 300 images, 32 a batch
    assert setting.recipe.epochs == 0
    assert weight(setting) == 300 / 380
    assert weight(prepare(replace(config, unlabelled_weight=0.25))) == 0.25


@pytest.mark.parametrize(("changes", "expected"), [
    ({"max_train": 30}, 1.0),
    ({"max_train": 31}, 300 / 331),
    ({"max_train": 30, "distill": 0.0}, 300 / 330),
    ({"max_train": 30, "baselines": False}, 300 / 330),
    ({"max_train": 30, "epochs": 0}, 300 / 330),
    ({"max_train": 30, "unlabelled_weight": 0.5}, 0.5),
])  # fmt: skip
def test_few_labels_beside_many_images_are_the_teachers(tmp_path, changes, expected):
    setting = prepare(with_more(tmp_path, **({"epochs": 1} | changes)))
    assert weight(setting) == expected
    assert ("unlabelled images alone" in how_taught(setting)) == (expected == 1)


def test_kernels_and_rankings_and_scores_change_with_them(tmp_path):
    setting = known(prepare(with_more(tmp_path, refit_images=300, calibration_images=200)))
    alone = replace(setting, unlabelled=None, taught=None)
    graph = setting.subject.graph
    plan = engine.Plan({name: np.arange(group.size // 2) for name, group in graph.groups.items()})
    assert not same(*(variant(each, "v1", Pick("", plan)).variables for each in (setting, alone)))
    scores = {name: np.arange(group.size) for name, group in graph.groups.items()}
    space = build_space(setting, scores)
    curves = [energies(each, space) for each in (setting, alone)]
    assert not same(*curves)
    masks = jax.tree.map(lambda mask: mask[None], graph.masks(plan))
    losses = [make_evaluator(each, space)(masks)[0] for each in (setting, alone)]
    assert not np.array_equal(*losses)


def test_finalists_learn_from_them_and_plain_baselines_do_not(tmp_path):
    setting = known(prepare(with_more(tmp_path, epochs=1, distill=0.0)))
    start = variant(setting, "v1", Pick("", engine.Plan()))
    said = []
    both, plain = (tune(setting, start, said.append, unlabelled=each) for each in (True, False))
    assert not same(both.variables, plain.variables)
    assert same(fine_tuned(setting, start, said.append).variables, both.variables)
    alone = replace(setting, unlabelled=None, taught=None)
    assert same(tune(alone, start, said.append, unlabelled=True).variables, plain.variables)
    weightless = replace(setting, config=replace(setting.config, unlabelled_weight=0.0))
    assert not same(tune(weightless, start, said.append, unlabelled=True).variables, both.variables)


def same(one, two):
    return jax.tree.all(jax.tree.map(np.array_equal, one, two))


@pytest.mark.parametrize(("wanted", "unlabelled", "held"), [
    (512, 300, 60), (512, 90, 18), (72, 300, 8), (64, 300, 0), (32, 300, 0), (512, 4, 0),
])  # fmt: skip
def test_some_are_held_out_where_search_has_few(tmp_path, wanted, unlabelled, held):
    """At most one in five, and no more than candidates would be scored on."""
    config = with_more(tmp_path, epochs=1, search_images=wanted)
    setting = known(prepare(replace(config, unlabelled_images=unlabelled)))
    assert len(setting.roles.search) == 64
    assert setting.held == held
    learnt, taught_ = beside(setting).values()
    assert np.array_equal(learnt, setting.unlabelled.images[held:])
    assert np.array_equal(taught_, setting.taught[held:])
    assert weight(setting) == (unlabelled - held) / (unlabelled - held + 80)
    judges = judging(setting)
    assert len(judges) == 64 + held
    assert np.array_equal(judges.images[:64], setting.roles.search.images)
    assert np.array_equal(judges.labels[:64], setting.roles.search.labels)
    assert np.array_equal(judges.images[64:], setting.unlabelled.images[:held])
    assert np.array_equal(judges.labels[64:], setting.taught[:held].argmax(1))
    assert setting.recipe.steps == max(5, -(-(unlabelled - held) // 32))


def test_the_best_epoch_is_by_search_and_those_held_out(tmp_path):
    """What learns from labels alone is judged on these alone; the pool of a cross-validation holds all of them."""
    setting = known(prepare(with_more(tmp_path, epochs=3, search_images=512)))
    start, said = variant(setting, "v1", Pick("", engine.Plan())), []
    both, plain = (tune(setting, start, said.append, unlabelled=each) for each in (True, False))
    for model, judges in ((both, judging(setting)), (plain, setting.roles.search)):
        kept = model.fitted.history[model.fitted.best_epoch]
        assert kept.search_error == min(epoch.search_error for epoch in model.fitted.history)
        assert measurer(model.infer, judges)(model.variables) == (kept.search_loss, kept.search_error)
    assert (both.judges, plain.judges) == ("search and 60 unlabelled images", "search")
    assert "on search and 60 unlabelled images" in said[0]
    answered = pool(setting)
    assert len(answered) == len(setting.roles.search) + len(setting.roles.certify) + 60
    assert np.array_equal(answered.images[-60:], setting.unlabelled.images[:60])
    assert np.array_equal(answered.labels[-60:], setting.taught[:60].argmax(1))


def test_the_baselines_take_as_many_steps(tmp_path):
    setting = prepare(with_more(tmp_path, epochs=3))
    assert (len(setting.roles.train), setting.recipe.batch_size, setting.recipe.steps) == (80, 16, 10)
    even = replace(setting, recipe=replace(setting.recipe, steps=5))
    more = replace(setting, recipe=replace(setting.recipe, steps=12, patience=2))
    assert even.labelled == replace(setting.recipe, steps=None)
    assert setting.labelled == replace(setting.recipe, steps=None, epochs=6)
    assert more.labelled == replace(setting.recipe, steps=None, epochs=8, patience=5)  # 36 steps and 24, five an epoch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_other_tasks_and_a_new_head(tmp_path, name):
    config = with_more(tmp_path, epochs=1, baselines=False)
    with np.load(tmp_path / "data.npz") as found:
        data = dict(found)
    for split in ("train", "test"):
        y = data[f"y_{split}"]
        data[f"y_{split}"] = {
            "multilabel": np.stack([y > 1, y % 2, y < 3], 1).astype(int), "regression": y + 0.5,
        }[name]  # fmt: skip
    np.savez(tmp_path / "other.npz", **data)
    outcome = run(
        replace(config, data=f"npz:{tmp_path / 'other.npz'}", head="auto", search_images=100), lambda line: None
    )
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    assert manifest["task"] == name
    assert manifest["data"]["images"]["unlabelled"] == 300


def test_images_on_disk_are_the_same(tmp_path):
    config = with_more(tmp_path)
    for i, image in enumerate(RNG.integers(0, 256, (20, 8, 8)).astype(np.uint8)):
        (tmp_path / "files").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
    config = replace(config, unlabelled=f"folder:{tmp_path / 'files'}", epochs=1)
    held, streamed = (known(prepare(config, hold)) for hold in (None, 0))
    assert isinstance(streamed.unlabelled.images, Streamed)
    assert np.array_equal(held.calibration(100), streamed.calibration(100))
    assert np.array_equal(held.taught, streamed.taught)
    start = variant(held, "v1", Pick("", engine.Plan()))
    one, two = (tune(each, start, lambda line: None, unlabelled=True).variables for each in (held, streamed))
    assert same(one, two)


def test_candidates_are_scored_on_them_where_search_is_small(tmp_path):
    setting = known(prepare(with_more(tmp_path, search_images=150)))
    search, split = setting.roles.search, scoring(setting)
    rest = setting.unlabelled
    assert len(search) < 150
    assert len(split) == 150
    labels = {image.tobytes(): label for image, label in zip(search.images, search.labels, strict=True)}
    decided = dict(zip([image.tobytes() for image in rest.images], setting.taught.argmax(1), strict=True))
    for image, label in zip(split.images, split.labels, strict=True):
        assert (labels | decided)[image.tobytes()] == label
    assert sum(image.tobytes() in labels for image in split.images) == len(search)
    assert 0 < sum(image.tobytes() in labels for image in split.images[:75]) < len(search)
    assert scoring(prepare(replace(setting.config, search_images=32))).images.shape == search.images.shape


@pytest.mark.parametrize(("name", "wanted"), [
    ("classification", [1, 0]), ("multilabel", [[0, 1], [1, 0]]), ("regression", [[-1, 2], [3, -4]]),
])  # fmt: skip
def test_what_outputs_amount_to(name, wanted):
    found = TASKS[name].decided(np.array([[-1.0, 2.0], [3.0, -4.0]]))
    assert found.tolist() == wanted
    assert found.dtype == (np.int32 if name == "classification" else np.float32)


def test_the_recipe_counts_the_steps_of_both():
    config = Config("m", "c", "d")
    assert (make_recipe(config, 133).steps, make_recipe(config, 133).epochs) == (9, 9)
    for unlabelled, steps, epochs in ((5000, 157, 6), (50000, 1563, 2), (133, 9, 9), (134, 9, 30)):
        recipe = make_recipe(config, 133, unlabelled)
        assert (recipe.steps, recipe.epochs) == (steps, epochs)


def test_a_run_learns_from_them_and_says_so(tmp_path):
    config, said = with_more(tmp_path, epochs=2, augment="flip", truncations=1, search_images=200), []
    outcome = run(config, said.append)
    assert any("300 images without labels" in line for line in said)
    assert "unlabelled" in json.loads((config.directory / "config.json").read_text())["data"]
    metrics = json.loads((outcome.path / "manifest.json").read_text())["metrics"]
    assert "240 images of" in (outcome.path / "README.md").read_text()
    assert "on search and unlabelled images" in (config.directory / "report.html").read_text()
    assert metrics["dense fine-tuned"] != metrics["dense, unlabelled too"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"unlabelled": "npz:absent.npz"}, "absent.npz"), ({"unlabelled": "npz:{home}/data.npz"}, "train, search, certify"),
    ({"unlabelled_images": 0}, "--unlabelled-images 0: expected at least 1"),
    ({"unlabelled_weight": 1.5}, "--unlabelled-weight from 0 to 1"),
    ({"unlabelled_weight": 0.5}, "--unlabelled, which is not given"),
])  # fmt: skip
def test_bad_input(tmp_path, changes, message):
    changes = {k: v.format(home=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    config = replace(small_config(tmp_path), **changes)
    with pytest.raises(TreesurgeonError, match=message):
        run(config, lambda line: None)
    assert not config.directory.exists()
