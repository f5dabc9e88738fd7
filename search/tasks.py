"""What answers are for: one class of several, any of several labels, or numbers.

| task | targets of N images | outputs of a model | loss of an image |
|---|---|---|---|
| classification | `int32[N]` | logits of the classes | cross-entropy |
| multilabel | `float32[N, K]`, 0 or 1 | log-odds of every label | mean over labels of the binary cross-entropy |
| regression | `float32[N, K]`, standardised | the numbers, likewise | half the mean over numbers of the squared error |

All are in nats: of a normal distribution of variance 1, where they are numbers.

Pruning changes how sure of itself a network is far more than what it answers: dropped blocks make an overconfident
network less so, and its cross-entropy falls while its errors rise. So candidates are compared at the temperature that
suits each of them best, one number for each, which no answer changes by: C. Guo et al.: "On calibration of modern
neural networks", ICML 2017. Numbers have no temperature.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

SHARPEST = 64.0  # bounds of the factor on logits: the largest, and one over the smallest
HALVINGS = 24
BINS = 10  # strata of numbers, at most
MEMBERS = 8  # of a stratum, at least

TaskName = Literal["classification", "multilabel", "regression"]


@dataclass(frozen=True)
class Task(ABC):
    """What targets are, and how answers compare with them and with each other.

    Attributes:
        name: as in `--task`.
        score: what one less the mean of `wrong` is called.
        answered: the same in a sentence: `98 % …`.
    """

    name: ClassVar[TaskName]
    score: ClassVar[str]
    answered: ClassVar[str]

    @abstractmethod
    def losses(self, outputs: Array, targets: Array) -> Array:
        """Of each image, in nats: `float32[N]`."""

    @abstractmethod
    def exact_losses(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The same in float64."""

    @abstractmethod
    def wrong(self, outputs: Any, targets: Any) -> Any:
        """How wrong each answer is, `[N]`: whether it is, the share of wrong labels, the mean squared error."""

    @abstractmethod
    def divergence(self, dense: Array, outputs: Array) -> Array:
        """How far the answers are from the dense model's, for each image, in nats."""

    @abstractmethod
    def decided(self, outputs: np.ndarray) -> np.ndarray:
        """The targets that these outputs amount to, one for each image."""

    @abstractmethod
    def expected(self, outputs: Array) -> Array:
        """The targets that these outputs expect, `float[N, K]`: probabilities, or numbers."""

    @abstractmethod
    def wanted(self, targets: Array, outputs: int) -> Array:
        """Targets as the outputs should expect them, `float[N, outputs]`."""

    @abstractmethod
    def strata(self, targets: np.ndarray) -> np.ndarray:
        """The stratum of each image, `int[N]`: splits have their share of each, of whatever size."""

    def fold_strata(self, targets: np.ndarray) -> np.ndarray:
        """Likewise for folds, whose images are dealt out one by one: a stratum may be smaller than there are folds."""
        return self.strata(targets)

    def sharpness(self, outputs: Array, wanted: Array, weights: Array) -> Array:
        """The factor on outputs (one over the temperature) with the least mean loss, a scalar.

        The loss is convex in it; the root of its derivative is found by bisection, on a scale of logarithms.

        Args:
            outputs: `float[N, K]`.
            wanted: `float[N, K]`, probabilities.
            weights: `float[N]`, 0 for images that do not count.
        """
        outputs = outputs.astype(jnp.float32)
        right = (wanted * outputs).sum(-1)

        def too_sharp(log_factor: Array) -> Array:
            expected = (self.expected(jnp.exp(log_factor) * outputs) * outputs).sum(-1)
            return ((expected - right) * weights).sum() > 0

        def halve(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            low, high = bounds
            middle = (low + high) / 2
            sharp = too_sharp(middle)
            return (jnp.where(sharp, low, middle), jnp.where(sharp, middle, high)), None

        most = jnp.log(jnp.float32(SHARPEST))
        (low, high), _ = jax.lax.scan(halve, (-most, most), None, length=HALVINGS)
        return jnp.exp((low + high) / 2)


class Classification(Task):
    """One class of several: outputs are logits, `wrong` is `bool[N]`."""

    name = "classification"
    score = "accuracy"
    answered = "right"

    def losses(self, outputs: Array, targets: Array) -> Array:
        """Cross-entropy."""
        return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)

    def exact_losses(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Cross-entropy."""
        outputs = outputs.astype(np.float64)
        top = outputs.max(1)
        right = outputs[np.arange(len(outputs)), targets]
        return top + np.log(np.exp(outputs - top[:, None]).sum(1)) - right

    def wrong(self, outputs: Any, targets: Any) -> Any:
        """Whether another class has the largest logit, or one is no number."""
        return (outputs.argmax(-1) != targets) | ~(outputs.max(-1) > -math.inf)

    def divergence(self, dense: Array, outputs: Array) -> Array:
        """Kullback and Leibler's."""
        ours = jax.nn.log_softmax(outputs.astype(jnp.float32))
        theirs = jax.nn.log_softmax(dense.astype(jnp.float32))
        return (jnp.exp(theirs) * (theirs - ours)).sum(-1)

    def decided(self, outputs: np.ndarray) -> np.ndarray:
        """The class with the largest logit."""
        return outputs.argmax(-1).astype(np.int32)

    def expected(self, outputs: Array) -> Array:
        """Softmax."""
        return jax.nn.softmax(outputs)

    def wanted(self, targets: Array, outputs: int) -> Array:
        """One-hot."""
        return jax.nn.one_hot(targets, outputs)

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """The classes."""
        return targets


class Multilabel(Task):
    """Any of several labels: outputs are log-odds, `wrong` is the share of labels that are, `float[N]`."""

    name = "multilabel"
    score = "label accuracy"
    answered = "of the labels right"

    def losses(self, outputs: Array, targets: Array) -> Array:
        """Mean over labels of the binary cross-entropy."""
        return optax.sigmoid_binary_cross_entropy(outputs.astype(jnp.float32), targets).mean(-1)

    def exact_losses(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Likewise."""
        outputs = outputs.astype(np.float64)
        return (np.logaddexp(0, outputs) - outputs * targets).mean(-1)

    def wrong(self, outputs: Any, targets: Any) -> Any:
        """Share of labels with log-odds of the wrong sign, or that are no number."""
        return (((outputs > 0) != (targets > 0.5)) | ~(abs(outputs) >= 0)).mean(-1)

    def divergence(self, dense: Array, outputs: Array) -> Array:
        """Mean over labels of Kullback and Leibler's."""
        ours, theirs = outputs.astype(jnp.float32), dense.astype(jnp.float32)
        p = jax.nn.sigmoid(theirs)
        yes = jax.nn.log_sigmoid(theirs) - jax.nn.log_sigmoid(ours)
        no = jax.nn.log_sigmoid(-theirs) - jax.nn.log_sigmoid(-ours)
        return (p * yes + (1 - p) * no).mean(-1)

    def decided(self, outputs: np.ndarray) -> np.ndarray:
        """Labels that are likelier than not."""
        return (outputs > 0).astype(np.float32)

    def expected(self, outputs: Array) -> Array:
        """The logistic function."""
        return jax.nn.sigmoid(outputs)

    def wanted(self, targets: Array, outputs: int) -> Array:
        """As they are."""
        return targets

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """By the rarest label of each image; images without any are a stratum of their own; small ones are joined."""
        rarest = self.fold_strata(targets)
        _, at, counts = np.unique(rarest, return_inverse=True, return_counts=True)
        small = counts[at] < MEMBERS
        if 0 < small.sum() < MEMBERS:
            small |= at == counts.argmax()
        return np.where(small, targets.shape[1] + 1, rarest)

    def fold_strata(self, targets: np.ndarray) -> np.ndarray:
        """The rarest label of each image; a number of its own for none, so that every fold gets some with labels."""
        there = targets > 0.5
        rarity = np.where(there, there.sum(0), np.inf)
        return np.where(there.any(1), rarity.argmin(1), targets.shape[1])


class Regression(Task):
    """Numbers, standardised (see `Units`): `wrong` is the mean squared error, `float[N]`."""

    name = "regression"
    score = "R²"
    answered = "of the variance explained"

    def losses(self, outputs: Array, targets: Array) -> Array:
        """Half the mean squared error."""
        return self.wrong(outputs.astype(jnp.float32), targets) / 2

    def exact_losses(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Likewise."""
        return self.wrong(outputs.astype(np.float64), targets) / 2

    def wrong(self, outputs: Any, targets: Any) -> Any:
        """Mean over numbers of the squared error."""
        return ((outputs - targets) ** 2).mean(-1)

    def divergence(self, dense: Array, outputs: Array) -> Array:
        """Half the mean squared difference."""
        return self.losses(outputs, dense.astype(jnp.float32))

    def decided(self, outputs: np.ndarray) -> np.ndarray:
        """As they are."""
        return outputs.astype(np.float32)

    def expected(self, outputs: Array) -> Array:
        """As they are."""
        return outputs

    def wanted(self, targets: Array, outputs: int) -> Array:
        """As they are."""
        return targets

    def sharpness(self, outputs: Array, wanted: Array, weights: Array) -> Array:
        """One: numbers have no temperature."""
        return jnp.ones(())

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Up to `BINS` bins of as many images each, by the first number."""
        count = len(targets)
        bins = min(BINS, max(count // MEMBERS, 1))
        out = np.empty(count, int)
        out[np.argsort(targets[:, 0], kind="stable")] = np.arange(count) * bins // max(count, 1)
        return out


@dataclass(frozen=True)
class Units:
    """What numbers are in: `value = offset + scale * standardised`, for each of them.

    Attributes:
        offset: their means on `train`.
        scale: their standard deviations there.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, targets: np.ndarray) -> Units:
        """Of targets `[N, K]`; a number that never changes keeps its scale."""
        spread = targets.std(0, dtype=np.float64)
        spread = np.where(spread > 1e-9 * np.maximum(np.abs(targets).max(0), 1e-30), spread, 1)
        return cls(tuple(targets.mean(0, dtype=np.float64).tolist()), tuple(spread.tolist()))

    def inverse(self) -> Units:
        """What turns values into standardised ones, as this does the other way round."""
        pairs = list(zip(self.offset, self.scale, strict=True))
        return Units(tuple(-offset / scale for offset, scale in pairs), tuple(1 / scale for _, scale in pairs))

    def standardised(self, values: Any) -> Any:
        """Values `[N, K]` as numbers of mean 0 and variance 1 on `train`."""
        return (values - np.asarray(self.offset, np.float32)) / np.asarray(self.scale, np.float32)


CLASSIFICATION = Classification()
TASKS: Mapping[TaskName, Task] = MappingProxyType(
    {task.name: task for task in (CLASSIFICATION, Multilabel(), Regression())}
)


def guess_task(labels: np.ndarray) -> TaskName:
    """What labels as they are stored are for: whole numbers or words, rows of them, or floating-point numbers."""
    if labels.dtype.kind == "f":
        return "regression"
    return "multilabel" if labels.ndim == 2 else "classification"


def class_counts(labels: np.ndarray) -> np.ndarray:
    """Images of each class that has any; of labels `[N, K]` those with it or those without, whatever is fewer."""
    if labels.ndim == 1:
        return np.unique(labels, return_counts=True)[1]
    there = (labels > 0.5).sum(0)
    fewer = np.minimum(there, len(labels) - there)
    return fewer[fewer > 0]
