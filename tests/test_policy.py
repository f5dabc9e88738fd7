"""What fine-tuning leaves alone, how fast the rest learns, and what is done to its images."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from laws import leaves_of
from test_finetune import DATA, SGD, evaluate, params, train_apply, trainable

from treesurgeon import engine
from treesurgeon.search.augment import check_augment, flip_crop
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.finetune import fit, objective
from treesurgeon.search.policy import EVERYTHING, held, make_policy
from treesurgeon.search.setting import make_recipe
from treesurgeon.search.subject import Subject, random_subject

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def subject():
    return random_subject("digits_cnn", stages=((6, 6), (8,)), residual=(0, 6), hidden=12)


def image(subject):
    return jax.ShapeDtypeStruct((1, *subject.spec.input_shape), "float32")


class Backwards(nn.Module):
    """Names that do not tell the order."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="z")(x))
        for name in "yab":
            x = x + nn.relu(nn.Conv(4, (3, 3), name=name)(x))
        return nn.Dense(3, name="m")(x.mean((1, 2)))


def test_levels_go_by_the_dataflow():
    module = Backwards()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    subject = Subject(engine.ModelSpec("mine:Backwards", (8, 8, 1), {}), module, variables, 3)
    found = engine.levels(subject.infer, subject.graph, image(subject))
    assert {path.split("/")[1]: level for path, level in found.items()} == {"z": 0, "y": 1, "a": 2, "b": 3, "m": 4}


def test_a_level_is_what_a_truncation_needs_and_an_earlier_one_does_not(subject):
    x = image(subject)
    found, seen, level = engine.levels(subject.infer, subject.graph, x), set(), -1
    for point in engine.points(subject.infer, subject.graph, x):
        more = set(engine.truncate(subject.infer, subject.graph, point, x).leaves) - seen
        level += bool(more)
        assert {found[path] for path in more} <= {level}
        seen |= more
    head = set(found) - seen
    assert head == {"params/linear/kernel", "params/linear/bias"}
    assert {found[path] for path in head} == {level + 1}


def test_what_is_frozen(subject):
    found = engine.levels(subject.infer, subject.graph, image(subject))
    assert make_policy(subject, (), 1.0) == EVERYTHING
    assert make_policy(subject, ("2",), 1.0).frozen == {path for path, level in found.items() if level < 2}
    some = make_policy(subject, ("stage1_0", "params/linear"), 1.0).frozen
    assert some == {path for path in found if "stage1_0/" in path or path.startswith("params/linear")}
    assert any(path.startswith("batch_stats") for path in some)
    last = max(found.values())
    rates = make_policy(subject, ("1",), 0.5).rates
    assert set(rates) == {path for path, leaf in subject.graph.leaves.items() if leaf.trainable and found[path] >= 1}
    assert all(rate == 0.5 ** (last - found[path]) for path, rate in rates.items())
    assert rates["params/linear/kernel"] == 1


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("99",), r"--freeze 99: the model has \d levels"),
        (("stage1",), "--freeze stage1: no parameter's path begins so; expected a number of levels or a path such as "),
        (("params",), "leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen(subject, freeze, message):
    with pytest.raises(RunError, match=message):
        make_policy(subject, freeze, 1.0)


def test_frozen_leaves_stay_bit_for_bit_and_so_do_their_statistics(subject):
    policy = make_policy(subject, ("2",), 0.5)
    flags, rates = policy.leaves(subject.graph, subject.variables)
    data = {"x": RNG.random((24, 8, 8, 1), np.float32), "y": np.arange(24) % 10}
    scores = iter([(1.0, 1.0), (0.5, 0.5)])
    loss = objective(held(subject.train, policy.frozen))
    recipe = type(SGD)(epochs=1, batch_size=12, weight_decay=0.1)
    start, key = subject.variables, jax.random.key(0)
    result = fit(loss, start, flags, data, recipe, key, lambda _: next(scores), rates=rates)
    assert result.best_epoch == 1
    before, after = leaves_of(start), leaves_of(result.params)
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert policy.frozen <= same
    kernels = {path for path in before if path.endswith("kernel") or path.startswith("batch_stats")}
    assert kernels - policy.frozen
    assert not (kernels - policy.frozen) & same


def test_rates_scale_the_steps_of_each_leaf():
    start = params()
    rates = jax.tree.map(lambda _: 1.0, start)
    rates["params"]["dense"]["bias"], rates["params"]["scale"] = 0.25, 0.0
    loss, seen = objective(train_apply), []

    def watched(p):
        seen.append(p["params"])
        return evaluate(p)

    recipe = type(SGD)(epochs=1, batch_size=50)
    for factors in (None, rates):
        fit(loss, start, trainable(start), DATA, recipe, jax.random.key(0), watched, rates=factors)
    plain, scaled = (jax.tree.map(lambda a, b: b - a, seen[i], seen[i + 1]) for i in (0, 2))
    np.testing.assert_array_equal(scaled["dense"]["kernel"], plain["dense"]["kernel"])
    np.testing.assert_allclose(scaled["dense"]["bias"], 0.25 * plain["dense"]["bias"], rtol=1e-6)
    assert np.abs(plain["scale"]).max() >= 0
    np.testing.assert_array_equal(scaled["scale"], 0)


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_images_are_crops_of_themselves_mirrored_or_not():
    x = RNG.random((40, 16, 16, 2), np.float32)
    out = np.asarray(jax.jit(flip_crop)(jax.random.key(1), x))
    assert out.shape == x.shape
    found = set()
    for image, moved in zip(x, out, strict=True):
        hits = []
        for flipped in (False, True):
            padded = np.pad(image[:, ::-1] if flipped else image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
            hits += [(flipped, top, left) for top in range(5) for left in range(5)
                     if np.array_equal(padded[top : top + 16, left : left + 16], moved)]  # fmt: skip
        (hit,) = hits
        found.add(hit)
    assert {flipped for flipped, _, _ in found} == {False, True}
    assert {top for _, top, _ in found} == {left for _, _, left in found} == set(range(5))
    np.testing.assert_array_equal(out, flip_crop(jax.random.key(1), x))
    assert not np.array_equal(out, flip_crop(jax.random.key(2), x))


def test_the_teacher_sees_the_augmented_images():
    key, x = jax.random.key(0), jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    student, dense = params(), jax.tree.map(lambda leaf: leaf + 1, params())

    def apply(p, x):
        return train_apply(p, x, None)[0]

    def augment(key, x):
        return x + jax.random.normal(key, x.shape)

    loss = objective(train_apply, distill=1.0, temperature=2.0, augment=augment, teacher=apply)
    value, _ = loss(student, {"x": x, "y": jnp.zeros(6, jnp.int32), "dense": dense}, key)
    moved = augment(jax.random.split(key)[1], x)
    soft, ours = (jax.nn.log_softmax(apply(p, moved) / 2) for p in (dense, student))
    assert float(value) == pytest.approx(float(4 * (jnp.exp(soft) * (soft - ours)).sum(-1).mean()), rel=1e-5)
    plain, _ = objective(train_apply, augment=augment)(student, {"x": x, "y": jnp.zeros(6, jnp.int32)}, key)
    wanted = optax.softmax_cross_entropy_with_integer_labels(apply(student, moved), jnp.zeros(6, jnp.int32)).mean()
    assert float(plain) == pytest.approx(float(wanted))


def test_only_images_are_augmented():
    check_augment("none", (7,))
    check_augment("flip-crop", (2, 2, 1))
    for shape in ((7,), (1, 7, 1)):
        with pytest.raises(RunError, match=r"--augment flip-crop changes .* the model takes inputs \["):
            check_augment("flip-crop", shape)
    with pytest.raises(RunError, match="--augment blur: expected one of none, flip, flip-crop"):
        check_augment("blur", (8, 8, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 0.0}, "--layer-decay above 0"),
        ({"layer_decay": 1.5}, "at most 1"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"scratch_epochs": 0}, "--scratch-epochs"),
        ({"scratch_learning_rate": 0.0}, "--scratch-learning-rate must be above 0"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(RunError, match=message):
        Config("m", "c", "d", **changes).check()


def test_flags_reach_the_recipe():
    given = {"optimizer": "adamw", "patience": 2, "learning_rate": 0.003, "clip": 0.0, "weight_decay": 0.1}
    recipe = make_recipe(Config("m", "c", "d", **given), 100)
    assert {name: getattr(recipe, name) for name in given} == given | {"clip": None}
    plain = make_recipe(Config("m", "c", "d"), 100)
    assert (plain.optimizer, plain.patience) == ("sgd", None)
    with pytest.raises(RunError, match="--patience 0: expected at least 1"):
        Config("m", "c", "d", patience=0).check()
