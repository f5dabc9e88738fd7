"""Domain shift: the test holds its level and has power, the measure is the distance it says, advice follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

from treesurgeon import engine
from treesurgeon.search import shift
from treesurgeon.search.data import DataError, sample_images
from treesurgeon.search.shift import hellinger, norm_distance, two_sample
from treesurgeon.search.sources import Source
from treesurgeon.search.subject import Subject, with_momenta

RNG = np.random.default_rng(0)


def test_the_level_holds_where_both_samples_are_alike():
    """Few images and more features than images: what overfits most."""
    scale = np.geomspace(0.1, 10, 15)
    values = [two_sample(*(RNG.exponential(size=(2, 20, 15)) * scale)) for _ in range(200)]
    p_values, areas = np.array(values).T
    assert 2 <= (p_values <= 0.05).sum() <= 20  # 10 expected; outside has a chance of 0.2 %
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    assert abs(areas.mean() - 0.5) < 0.03


@pytest.mark.slow
def test_it_finds_shifts_of_mean_and_more_images_find_smaller_ones():
    def share_found(by, count):
        found = 0
        for _ in range(15):
            source, target = RNG.normal(size=(2, count, 10))
            found += two_sample(source, target + by / np.sqrt(10))[0] <= 0.05
        return found / 15

    assert share_found(1.5, 60) > 0.9
    assert share_found(0.7, 30) < 0.7 < share_found(0.7, 300)
    p_value, auc = two_sample(*np.split(RNG.normal(size=(100, 10)) + 9 * (np.arange(100) > 49)[:, None], 2))
    assert (p_value < 1e-6, auc) == (True, 1.0)


def test_the_distance_of_normal_distributions_by_integration():
    at = np.linspace(-40, 40, 200_001)
    for m, v, n, w in ((0, 1, 0, 1), (0, 1, 2, 1), (0, 1, 0, 9), (1, 4, -2, 0.5)):
        p, q = stats.norm.pdf(at, m, np.sqrt(v)), stats.norm.pdf(at, n, np.sqrt(w))
        wanted = ((np.sqrt(p) - np.sqrt(q)) ** 2).sum() * (at[1] - at[0]) / 2
        assert hellinger(m, v, n, w) == pytest.approx(wanted, abs=1e-4)
    assert hellinger(0.0, 0.0, 0.0, 0.0) == 0  # dead channels


class Normed(nn.Module):
    norms: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        if self.norms:
            x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def made(norms=True):
    """A model whose running statistics are those of standard normal images, and such images."""
    module = Normed(norms)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    subject = with_momenta(Subject(engine.ModelSpec("mine:Normed", (8, 8, 1), {}), module, variables, 3))
    x = RNG.normal(size=(512, 8, 8, 1)).astype(np.float32)
    fitted = engine.reestimate(subject.train, subject.momenta)(variables, x, jax.random.key(0))
    return Subject(subject.spec, module, fitted, 3, subject.momenta), x


@pytest.fixture(scope="module")
def normed():
    return made()


def setting(subject, images, source=None):
    train = type("Split", (), {"images": images, "__len__": lambda self: len(self.images)})()
    roles = type("Roles", (), {"train": train})
    return type("Setting", (), {"subject": subject, "roles": roles, "source_images": source, "original": None})


def test_norm_statistics_tell_shifts_of_the_inputs(normed):
    subject, _ = normed
    alike = RNG.normal(size=(200, 8, 8, 1)).astype(np.float32)
    moved = alike, alike + 0.3, 3 * alike + 5
    same, shifted, far = (norm_distance(subject, images) for images in moved)
    assert 0 <= same < 0.02 < shifted < far
    found = {
        "mean": subject.variables["batch_stats"]["bn"]["mean"],
        "var": subject.variables["batch_stats"]["bn"]["var"],
    }
    x = np.asarray(nn.Conv(6, (3, 3)).apply({"params": subject.variables["params"]["stem"]}, moved[2]))
    wanted = hellinger(found["mean"], found["var"], x.mean((0, 1, 2)), x.var((0, 1, 2)))
    assert far == pytest.approx(np.sqrt(wanted.mean()), rel=0.05)
    said = [shift.look(setting(subject, images)) for images in moved]
    assert [each.advice for each in said] == ["same", "shifted", "far"]
    assert [(each.method, each.images) for each in said] == 3 * [("norm statistics", 200)]
    assert "training from scratch" in said[2].sentence
    for each in said:
        assert "a measure and no test" in each.sentence
        assert "p =" not in each.sentence
        assert each.p_value is None


def test_with_source_images_it_is_a_test(normed):
    subject, x = normed
    alike = RNG.normal(size=(300, 8, 8, 1)).astype(np.float32)
    said = [shift.look(setting(subject, images, x)) for images in (alike, alike + 0.1, 3 * alike + 5)]
    assert [each.advice for each in said] == ["same", "shifted", "far"]
    assert said[0].p_value > 0.05 > said[1].p_value > said[2].p_value
    assert 0 < said[0].distance < said[1].distance < 0.3 < said[2].distance < 1
    assert all(each.images == 300 for each in said)
    assert "two-sample test on 300 images each, p = " in said[2].sentence


def test_with_source_images_and_no_point_to_look_at(monkeypatch):
    subject, x = made(norms=False)
    monkeypatch.setattr(engine, "points", lambda *args: ())
    said = shift.look(setting(subject, x, x))
    assert (said.method, said.advice) == ("none", "unknown")
    assert "no head and no block" in said.sentence


def test_without_norms_and_without_source_images_nothing_is_said():
    subject, x = made(norms=False)
    said = shift.look(setting(subject, x))
    assert (said.method, said.advice, said.distance) == ("none", "unknown", None)
    assert "--source-data enables a test" in said.sentence


def test_images_are_sampled_from_all_splits():
    images = {"a": np.arange(30.0).reshape(30, 1, 1, 1), "b": np.arange(100.0, 120).reshape(20, 1, 1, 1)}
    source = Source(
        "plain", {"a": 30, "b": 20}, ("x",), lambda s: np.zeros(len(images[s]), int), lambda s, i: images[s][i]
    )
    sampled = sample_images(source, 25, input_shape=(1, 1, 1), mean=(1.0,), std=(2.0,))
    found = np.asarray(sampled.images).reshape(-1) * 2 + 1
    assert len(set(found)) == len(found) == 25
    assert 5 < (found >= 100).sum() < 15
    assert set(found) <= set(np.concatenate([x.reshape(-1) for x in images.values()]))
    assert len(sample_images(source, 99, input_shape=(1, 1, 1))) == 50
    with pytest.raises(DataError, match="it has no images"):
        sample_images(Source("none", {"a": 0}, ("x",), lambda s: np.zeros(0, int), lambda s, i: i), 5, input_shape=(1,))
