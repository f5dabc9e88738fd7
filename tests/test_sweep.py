"""The sweep against a loop that computes every candidate whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import engine
from treesurgeon.search import sensitivity
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import batches, calibrate, with_leaves
from treesurgeon.search.space import build
from treesurgeon.search.subject import random_subject
from treesurgeon.search.sweep import Sweep, moved, partition, touches
from treesurgeon.search.tasks import CLASSIFICATION

RNG = np.random.default_rng(0)


def setup(model):
    subject = random_subject(model)
    shape = subject.spec.input_shape
    space = build(subject.graph, {name: RNG.random(group.size) for name, group in subject.graph.groups.items()})
    images = RNG.normal(size=(40, *shape)).astype(np.float32)
    labels = np.array(subject.infer(subject.variables, images).argmax(-1), np.int32)
    labels[:15] = RNG.integers(0, 10, 15)
    return subject, space, batches(Split(images, labels, np.arange(40), ("x",), ""), 32)


@pytest.mark.parametrize(
    ("model", "reconstruct"),
    [
        ("mlp", "maps"),
        pytest.param("digits_cnn", "maps", marks=pytest.mark.slow),
        pytest.param("digits_cnn", "kernels", marks=pytest.mark.slow),
        pytest.param("digits_cnn", "none", marks=pytest.mark.slow),
        pytest.param("resnet20", "maps", marks=pytest.mark.slow),
    ],
)
def test_the_sweep_finds_what_whole_evaluations_find(model, reconstruct):
    subject, space, data = setup(model)
    calibration = jnp.asarray(RNG.normal(size=(64, *subject.spec.input_shape)), jnp.float32)
    sweep = Sweep(subject, space, calibration, data, reconstruct=reconstruct, parts=3, chunk=4)
    assert sorted(g for part in sweep.parts for g in part.genes) == list(range(len(space.cardinality)))

    @jax.jit
    def whole(genome):
        masks = space.decode(genome)
        stats, maps = calibrate(subject, masks, subject.variables, calibration, reconstruct)
        gated = engine.gate(subject.infer, subject.graph)
        return gated(with_leaves(subject.variables, stats), {**masks, "maps": maps}, data.images[0])

    start = space.dense_genome()
    for _ in range(2):
        probed = sensitivity.probes(space, start)
        probed = probed[RNG.permutation(len(probed))[:12]]
        found = sweep(start, probed)
        logits = whole(start)
        wanted = [moved(CLASSIFICATION, logits, whole(each), data.labels[0], data.weights[0]) for each in probed]
        # Least squares in float32 differ by as much between one candidate alone and one of a vmapped chunk.
        np.testing.assert_allclose(found, wanted, rtol=2e-2 if reconstruct == "kernels" else 5e-3, atol=1e-5)
        start = probed[int(np.argmax(found))]
    assert 0 < sweep.compiled <= len(sweep.parts)
    with pytest.raises(ValueError, match="one gene"):
        sweep(space.dense_genome(), np.stack([space.dense_genome()]))


def test_what_moves_answers_is_no_scale():
    logits = RNG.normal(size=(50, 10)).astype(np.float32) * 3
    labels, weights = logits.argmax(1), np.ones(50)
    labels[:10] = RNG.integers(0, 10, 10)
    assert moved(CLASSIFICATION, logits, 7 * logits, labels, weights) < 1e-6
    near, far = (logits + size * RNG.normal(size=logits.shape) for size in (0.1, 1.0))
    assert (
        1e-6
        < moved(CLASSIFICATION, logits, near, labels, weights)
        < moved(CLASSIFICATION, logits, far, labels, weights)
    )


SLOW = [pytest.param(model, marks=pytest.mark.slow) for model in ("resnet20", "vgg11")]


@pytest.mark.parametrize("model", ["digits_cnn", *SLOW])
def test_genes_change_the_leaves_they_are_said_to(model):
    _, space, _ = setup(model)
    dense = space.decode(space.dense_genome())
    told = touches(space, dense)
    for _ in range(20):
        genome = RNG.integers(0, space.cardinality)
        i = int(RNG.integers(len(genome)))
        other = genome.copy()
        other[i] = (genome[i] + 1) % space.cardinality[i]
        pairs = zip(*(jax.tree.leaves(space.decode(each)) for each in (genome, other)), strict=True)
        changed = {k for k, (a, b) in enumerate(pairs) if not np.array_equal(a, b)}
        assert changed <= told[i]


def test_partitions_are_the_best_there_are():
    work = RNG.integers(1, 50, 7).astype(float)
    found = partition(work, 3)
    assert sorted(i for part in found for i in part) == list(range(7))
    cost = sum(max(work[part]) * len(part) for part in found)
    order = np.sort(work)[::-1]
    best = min(order[0] * a + order[a] * (b - a) + order[b] * (7 - b) for a in range(1, 6) for b in range(a + 1, 7))
    assert cost == best
    assert len(partition(work[:2], 5)) == 2
