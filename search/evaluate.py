"""Scoring: a population of masks in one compiled program, and one model on a whole split.

`Scorer.score` is written for one candidate: gate, re-estimate the norms' running averages on calibration images, then
the loss and error on the scoring images. It is vmapped over chunks of candidates, so that a chunk is one large batch
through shared kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from treesurgeon import engine
from treesurgeon.search.data import Split
from treesurgeon.search.subject import Subject


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batches:
    """Images cut into batches of one size; `weights` are 0 for the images that fill the last one."""

    images: Array  # float32[B, b, H, W, C]
    labels: Array  # int32[B, b]
    weights: Array  # float32[B, b]


def batches(split: Split, size: int, limit: int | None = None) -> Batches:
    """The first `limit` images of a split (any prefix is a random sample) in batches of `size`."""
    count = min(len(split), limit or len(split))
    size = min(size, count)
    fill = -count % size
    at = np.arange(count + fill) % count
    weights = (np.arange(count + fill) < count).astype(np.float32)
    shape = (-1, size)
    images = split.images[at]
    return Batches(
        jnp.asarray(images.reshape(*shape, *images.shape[1:])),
        jnp.asarray(split.labels[at].reshape(shape)),
        jnp.asarray(weights.reshape(shape)),
    )


def loss_and_error(infer: Callable[[Array], Array], data: Batches) -> tuple[Array, Array]:
    """Mean cross-entropy and share of wrong answers of `infer: images -> logits`."""

    def one(batch: Batches) -> tuple[Array, Array]:
        logits = infer(batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.labels)
        wrong = logits.argmax(-1) != batch.labels
        return (losses * batch.weights).sum(), (wrong * batch.weights).sum()

    losses, wrong = jax.lax.map(one, data)
    total = data.weights.sum()
    return losses.sum() / total, wrong.sum() / total


def measurer(infer: Callable[[Any, Array], Array], split: Split, batch: int = 250) -> Callable[[Any], Any]:
    """`measure(variables) -> (loss, error)` of a model on a whole split, compiled once."""
    data = batches(split, batch)
    compiled = jax.jit(lambda v, d: loss_and_error(lambda x: infer(v, x), d))

    def measure(variables: Any) -> tuple[float, float]:
        loss, error = compiled(variables, data)
        return float(loss), round(float(error) * len(split)) / len(split)

    return measure


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores candidates of one subject.

    Attributes:
        subject: the dense model.
        reestimate: whether the norms' running averages are re-estimated for each candidate.
        chunk: candidates that run as one batch.
    """

    subject: Subject
    reestimate: bool
    chunk: int

    def score(self, variables: Any, masks: Any, calibration: Array, data: Batches) -> tuple[Array, Array]:
        """Loss and error of one candidate."""
        subject = self.subject
        if self.reestimate:
            gated_train = engine.gate(subject.train, subject.graph)

            def train(variables: Any, x: Array, key: Array) -> Any:
                return gated_train(variables, masks, x, key)

            variables = subject.reestimate(train, variables, calibration, jax.random.key(0))
        gated = engine.gate(subject.infer, subject.graph)
        return loss_and_error(lambda x: gated(variables, masks, x), data)

    def population(self, variables: Any, masks: Any, calibration: Array, data: Batches) -> tuple[Array, Array]:
        """Losses and errors `[P]` of stacked masks."""

        def one(masks: Any) -> tuple[Array, Array]:
            return self.score(variables, masks, calibration, data)

        return jax.lax.map(one, masks, batch_size=self.chunk)
