"""How good answers are: image by image, and whatever their scale.

Pruning changes how sure of itself a network is far more than what it answers: dropped blocks make an overconfident
network less so, and its cross-entropy falls while its errors rise. So candidates are compared at the temperature that
suits each of them best, one number for each, which no answer changes by: C. Guo et al.: "On calibration of modern
neural networks", ICML 2017.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

SHARPEST = 64.0  # bounds of the factor on logits: the largest, and one over the smallest
HALVINGS = 24


def loss_and_wrong(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Cross-entropy and whether the answer is wrong, for each image."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses, logits.argmax(-1) != labels


def sharpness(logits: Array, targets: Array, weights: Array) -> Array:
    """The factor on logits (one over the temperature) with the least mean cross-entropy to targets, a scalar.

    The cross-entropy is convex in it; the root of its derivative is found by bisection, on a scale of logarithms.

    Args:
        logits: `float[N, classes]`.
        targets: `float[N, classes]`, probabilities.
        weights: `float[N]`, 0 for images that do not count.
    """
    logits = logits.astype(jnp.float32)
    right = (targets * logits).sum(-1)

    def too_sharp(log_factor: Array) -> Array:
        expected = (jax.nn.softmax(jnp.exp(log_factor) * logits) * logits).sum(-1)
        return ((expected - right) * weights).sum() > 0

    def halve(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds
        middle = (low + high) / 2
        sharp = too_sharp(middle)
        return (jnp.where(sharp, low, middle), jnp.where(sharp, middle, high)), None

    most = jnp.log(jnp.float32(SHARPEST))
    (low, high), _ = jax.lax.scan(halve, (-most, most), None, length=HALVINGS)
    return jnp.exp((low + high) / 2)


def divergence(dense: Array, logits: Array) -> Array:
    """Kullback-Leibler divergence of the answers from the dense model's, for each image, in nats."""
    ours = jax.nn.log_softmax(logits.astype(jnp.float32))
    theirs = jax.nn.log_softmax(dense.astype(jnp.float32))
    return (jnp.exp(theirs) * (theirs - ours)).sum(-1)
