"""Images that stay on disk: the same, bit for bit, as those in memory, and the next ones are there in time."""

import multiprocessing
import os
import pickle
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from treesurgeon import engine, models
from treesurgeon.search import DataError
from treesurgeon.search.data import open_source, split_roles
from treesurgeon.search.evaluate import Evaluator, answering, batches
from treesurgeon.search.finetune import Recipe, fit, objective
from treesurgeon.search.space import build
from treesurgeon.search.streaming import Ahead, Feed, Streamed, tail
from treesurgeon.search.subject import Subject
from treesurgeon.search.unlabelled import merged

SHAPE = (6, 5, 3)


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    """Of one folder of images, those in memory and those on disk."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 30)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, SHAPE, np.uint8)).save(root / split / name / f"{i}.png")
    source = open_source(f"folder:{root}")
    like = {"input_shape": SHAPE, "mean": (0.3, 0.4, 0.5), "std": (0.2,)}
    return split_roles(source, ("train",), **like), split_roles(source, ("train",), **like, hold=0)


def test_they_are_the_same(roles):
    held, streamed = roles
    assert held.fingerprints == streamed.fingerprints
    for name in ("train", "search", "certify", "test"):
        mine, theirs = getattr(held, name).images, getattr(streamed, name).images
        assert isinstance(mine, np.ndarray)
        assert isinstance(theirs, Streamed)
        assert theirs.shape == mine.shape
        assert theirs.dtype == mine.dtype
        np.testing.assert_array_equal(np.asarray(theirs), mine)
        np.testing.assert_array_equal(getattr(held, name).digests, getattr(streamed, name).digests)
    mine, theirs = held.search.images, streamed.search.images
    for rows in (3, slice(2, 7), np.array([[3, 1], [1, 5]]), slice(0, 0)):
        np.testing.assert_array_equal(theirs[rows], mine[rows])
    both = [merged(each.search, each.certify).images for each in (streamed, held)]
    assert isinstance(both[0], Streamed)
    np.testing.assert_array_equal(*both)
    assert isinstance(tail(theirs, 3), Streamed)
    np.testing.assert_array_equal(tail(theirs, 3), tail(mine, 3))
    np.testing.assert_array_equal(tail(mine, 3), mine[3:])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(theirs))[:3], mine[:3])


@pytest.fixture(scope="module")
def subject():
    """A small model of these images."""
    module = models.mlp((8,), num_classes=2)
    variables = module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    return Subject(engine.ModelSpec("mlp", SHAPE, {"widths": (8,), "num_classes": 2}), module, variables, 2)


@pytest.mark.parametrize("cached", [True, False])
def test_candidates_score_the_same(roles, subject, cached):
    rng = np.random.default_rng(0)
    space = build(subject.graph, {name: rng.random(group.size) for name, group in subject.graph.groups.items()})
    masks = jax.vmap(space.decode)(np.stack([rng.integers(0, space.cardinality) for _ in range(3)]).astype(np.int32))
    one = jax.tree.map(lambda leaf: leaf[0], masks)
    found = []
    for split in (roles[0].search, roles[1].search):
        data = batches(split, 5)
        evaluator = Evaluator(subject, one, None, data, chunk=2, cache_bytes=None if cached else 0)
        assert evaluator.cached is cached
        found.append([evaluator(masks), evaluator(masks, limit=2)])
    assert isinstance(data.images, Feed)
    assert data.images.shape == (5, 5, *SHAPE)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_model_answers_and_learns_the_same(roles, subject):
    found = []
    for each in roles:
        answer = answering(subject.infer, each.search, batch=7)
        result = fit(
            objective(lambda v, x, key: (subject.infer(v, x), None)),
            subject.variables,
            jax.tree.map(lambda _: True, subject.variables),
            {"x": each.train.images, "y": each.train.labels},
            Recipe(epochs=2, batch_size=16),
            jax.random.key(0),
            lambda v, answer=answer: (float(answer(v).losses.mean()), 0.0),
        )
        found.append((result.params, [epoch.search_loss for epoch in result.history], answer(result.params).logits))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_next_one_is_made_while_this_one_is_used():
    made, second = [], threading.Event()

    def make(key):
        made.append(key)
        if key == 1:
            second.set()
        if key == 3:
            raise DataError("three is damaged")
        return key * 10

    ahead = Ahead(make)
    assert ahead(0, 1) == 0
    assert second.wait(20)  # nobody has asked for it yet
    assert ahead(1, 2) == 10
    assert ahead(5, 3) == 50  # another one than foreseen
    with pytest.raises(DataError, match="damaged"):
        ahead(3)
    assert made[:2] == [0, 1]
    assert made.count(1) == 1
    assert ahead.waited > 0


@pytest.mark.slow
def test_a_process_that_decodes_and_ends_is_told(roles):
    images = roles[1].search.images
    np.asarray(images[:1])
    readers = [child for child in multiprocessing.active_children() if "Spawn" in type(child).__name__]
    assert readers
    os.kill(readers[0].pid, signal.SIGKILL)
    readers[0].join()
    with pytest.raises(DataError, match="a process that decodes images has ended"):
        images[:20]
    np.testing.assert_array_equal(images[:20], roles[0].search.images[:20])  # others take their place
