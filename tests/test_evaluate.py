"""The evaluator against a plain loop: one candidate, one image batch at a time, nothing shared."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import engine
from treesurgeon.search import chunking
from treesurgeon.search.chunking import fitting_chunk
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import Evaluator, batches, calibrate, with_leaves
from treesurgeon.search.space import build
from treesurgeon.search.subject import random_subject
from treesurgeon.search.tasks import CLASSIFICATION

RNG = np.random.default_rng(0)
COUNT = 11


@cache
def setup():
    subject = random_subject("digits_cnn", stages=((6, 6), (8,)), residual=(0, 6), hidden=12)
    space = build(subject.graph, {name: RNG.random(group.size) for name, group in subject.graph.groups.items()})
    genomes = np.stack([space.dense_genome(), *(RNG.integers(0, space.cardinality) for _ in range(4))]).astype(np.int32)
    images = RNG.normal(size=(COUNT, 8, 8, 1)).astype(np.float32)
    split = Split(images, RNG.integers(0, 10, COUNT).astype(np.int32), np.arange(COUNT), ("x",), "")
    return subject, jax.jit(jax.vmap(space.decode))(genomes), batches(split, 4), split


def rows(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.mark.parametrize(
    ("reconstruct", "cached"), [pytest.param("kernels", True, marks=pytest.mark.slow), ("maps", True), ("none", False)]
)
def test_populations_score_as_a_plain_loop_does(reconstruct, cached):
    subject, masks, data, split = setup()
    calibration = jnp.asarray(RNG.normal(size=(32, 8, 8, 1)), jnp.float32)
    evaluator = Evaluator(
        subject, rows(masks, 0), calibration, data, chunk=2, reconstruct=reconstruct, cache_bytes=None if cached else 0
    )
    assert evaluator.cached is cached
    losses, wrong, apart = evaluator(masks)
    again = evaluator(masks, limit=2)[0]
    assert evaluator.compiled == 2
    assert losses.shape == wrong.shape == apart.shape == (5, COUNT)
    np.testing.assert_array_equal(np.isnan(again).sum(1), COUNT - 8)
    np.testing.assert_array_equal(again[:, :8], losses[:, :8])

    @jax.jit
    def alone(masks):
        stats, maps = calibrate(subject, masks, subject.variables, calibration, reconstruct)
        gated = engine.gate(subject.infer, subject.graph)
        return gated(with_leaves(subject.variables, stats), {**masks, "maps": maps}, split.images)

    dense = subject.infer(subject.variables, split.images)
    dense = jax.nn.softmax(dense * CLASSIFICATION.sharpness(dense, np.eye(10)[split.labels], np.ones(COUNT)))
    for i in range(5):
        logits = alone(rows(masks, i))
        logits *= CLASSIFICATION.sharpness(logits[:4], np.eye(10)[split.labels[:4]], np.ones(4))
        loss, miss = CLASSIFICATION.losses(logits, split.labels), CLASSIFICATION.wrong(logits, split.labels)
        np.testing.assert_allclose(losses[i], loss, rtol=2e-3, atol=2e-3)
        assert (wrong[i] == miss).mean() > 0.9
        distance = (dense * (jnp.log(dense) - jax.nn.log_softmax(logits))).sum(-1)
        np.testing.assert_allclose(apart[i], distance, rtol=2e-3, atol=2e-3)


def test_the_sharpness_is_the_one_with_the_least_loss():
    logits = np.array(RNG.normal(size=(40, 3)), np.float32)
    labels = (logits + 0.5 * RNG.normal(size=(40, 3))).argmax(1)
    weights = (np.arange(40) < 30).astype(np.float32)

    def loss(factor):
        return (CLASSIFICATION.losses(factor * logits, labels) * weights).sum()

    found = float(CLASSIFICATION.sharpness(logits, np.eye(3)[labels], weights))
    assert loss(found) <= min(map(loss, np.geomspace(0.02, 60, 400))) + 1e-4
    np.testing.assert_allclose(CLASSIFICATION.sharpness(10 * logits, np.eye(3)[labels], weights), found / 10, rtol=1e-3)
    assert CLASSIFICATION.sharpness(logits, np.eye(3)[logits.argmax(1)], weights) > 60  # no finite one is best
    assert CLASSIFICATION.sharpness(logits, np.eye(3)[logits.argmin(1)], weights) < 0.02


def test_candidates_that_are_out_are_shown_no_more_images():
    subject, masks, data, _ = setup()
    evaluator = Evaluator(subject, rows(masks, 0), None, data, chunk=2)
    seen = []

    def keep(losses):
        seen.append(losses.shape[1])
        return np.arange(5) % 2 == 0

    losses, wrong, _ = evaluator(masks, keep)
    assert seen == [4, 8, COUNT]
    assert np.isnan(losses).sum(1).tolist() == [0, COUNT - 4, 0, COUNT - 4, 0]
    assert wrong[1, 4:].all()
    np.testing.assert_allclose(losses[0], evaluator(rows(masks, np.array([0])))[0][0], rtol=1e-5)


def test_chunks_waste_little():
    subject = setup()[0]
    most = fitting_chunk(subject, 1)
    assert most == 8
    for population in range(1, 40):
        size = fitting_chunk(subject, 1, population)
        waste = [-(-population // each) * each for each in range(1, most + 1)]
        assert -(-population // size) * size == min(waste)
        assert size == max(each for each in range(1, most + 1) if waste[each - 1] == min(waste))


@pytest.mark.parametrize(("backend", "size"), [("cpu", 1), ("gpu", 8)])
def test_on_a_cpu_chunks_stay_in_the_cache(monkeypatch, backend, size):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(chunking, "memory", lambda: 2**35)
    assert fitting_chunk(random_subject("resnet20"), 128) == size


def test_half_precision_is_near():
    subject, masks, data, _ = setup()
    exact, half = (
        Evaluator(subject, rows(masks, 0), None, data, chunk=5, precision=p)(masks)[0] for p in ("float32", "bfloat16")
    )
    assert 0 < np.abs(exact - half).max() < 0.1 * np.abs(exact).max()
