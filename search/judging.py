"""The interface of a metric: what it keeps of a model's answers, its error, and a paired test of two models.

metrics.py has the metrics and says how they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.search.tasks import CLASSIFICATION, Task, TaskName

OPEN = 0.16  # the p-value of a difference of one standard error
MetricName = Literal["accuracy", "balanced_accuracy", "label_accuracy", "f1", "auroc", "cross_entropy", "r2"]


class MetricError(TreesurgeonError, ValueError):
    """A metric that is not defined on these labels."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says about the images of a split.

    Attributes:
        logits: the outputs, `float[N, K]`.
        labels: the targets, `int[N]` or `float[N, K]`.
        task: what they are for.
    """

    logits: np.ndarray
    labels: np.ndarray
    task: Task = CLASSIFICATION

    @property
    def losses(self) -> np.ndarray:
        """The loss of each image, in nats: `float[N]`."""
        return self.task.exact_losses(self.logits, self.labels)

    @property
    def wrong(self) -> np.ndarray:
        """How wrong the answer to each image is, see `Task.wrong`: `[N]`."""
        return self.task.wrong(self.logits, self.labels)

    @property
    def calibrated_loss(self) -> float:
        """The mean loss in nats at the temperature that suits the model best."""
        return float(_calibrated_loss(self.task, self.logits, self.labels))

    def __getitem__(self, rows: np.ndarray) -> Answers:
        return Answers(self.logits[rows], self.labels[rows], self.task)


@partial(jax.jit, static_argnums=0)
def _calibrated_loss(task: Task, logits: jax.Array, labels: jax.Array) -> jax.Array:
    factor = task.sharpness(logits, task.wanted(labels, logits.shape[-1]), jnp.ones(len(logits)))
    return task.losses(logits * factor, labels).mean()


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models on the same images.

    Attributes:
        worse, better: images that only the variant gets wrong, that only the dense model does; where answers are more
            or less wrong, those with a larger, a smaller error.
        difference: of the errors, the variant's less the dense model's.
        p_value: of H0: the difference on new data is at least this margin.
    """

    worse: int
    better: int
    difference: float
    p_value: Callable[[float], float]


class Metric(ABC):
    """One way to judge answers.

    Attributes:
        name: as in `--metric`.
        tasks: what it is for.
        noun: what its error is called.
        trust: how far the test's level can be trusted, for the certificate's sentence; empty for accuracy's.
        test: the test's name.
        approximate: whether nothing is known of the level but that it is about right.
        per_class: whether every class, or label, counts alike, so that each needs images in every split.
        rising: whether more of the metric is better, and its error 1 less it.
        unit: of differences between errors.
        scale: of that unit in one.
        reach: the largest difference there can be.
        loss: whether the error is what fine-tuning minimises, or as good as that.
        description: the metric in words, for a card.
    """

    name: MetricName
    tasks: tuple[TaskName, ...] = ("classification",)
    noun: str
    trust: str = ""
    test: str
    approximate: bool = False
    per_class: bool = False
    rising: bool = True
    unit: str = "points"
    scale: float = 100.0
    reach: float = 1.0
    loss: bool = False
    description: str

    @abstractmethod
    def observe(self, answers: Answers) -> Any:
        """What the error depends on, for each image."""

    @abstractmethod
    def error(self, seen: Any) -> float:
        """The error on these images."""

    @abstractmethod
    def compare(self, seen: Any, dense: Any) -> Comparison:
        """A variant against the dense model on the same images, both as observed."""

    def alike(self, seen: Any, best: Any) -> bool:
        """Whether the images leave it open which of two models has the lower error: within one standard error."""
        return self.compare(best, seen).p_value(0.0) > OPEN

    @abstractmethod
    def absolute(self, seen: Any) -> Callable[[float], float]:
        """The test of one model by itself: the p-value of H0: its error on new data is at least this."""

    @abstractmethod
    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """The least ε at which a variant passes that answers every one of these images as the dense model does."""

    @abstractmethod
    def outlook(self, epsilon: float, delta: float) -> str:
        """How many images a margin takes, as far as that can be said."""

    def resolution(self, labels: np.ndarray, epsilon: float, delta: float) -> str:
        """What a `certify` split with these labels can show, for people, before anything is searched."""
        least = f"{self.scale * self.smallest_margin(labels, delta):.2g} {self.unit}"
        can = f"certify has {len(labels):,} images: at level {delta:g} no ε below {least} can be certified"
        return f"{can}; {self.outlook(epsilon, delta)}"

    def score(self, error: float) -> float:
        """The metric, from its error."""
        return 1 - error if self.rising else error

    def gap(self, train: float, search: float) -> float:
        """From two scores: by how much the error is larger on `search`."""
        return train - search if self.rising else search - train

    def show(self, score: float) -> str:
        """A score for a table."""
        return f"{score:.2%}" if self.rising else f"{score:.4f}"

    def amount(self, difference: float, sign: bool = False) -> str:
        """A difference of errors, with its unit."""
        digits = 2 if self.rising else 4
        return f"{self.scale * difference:{'+' if sign else ''}.{digits}f} {self.unit}"

    def check(self, splits: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        """Refuse splits on which the metric is not defined.

        Args:
            splits: labels by role.
            names: of the classes, or the labels.

        Raises:
            MetricError: a class has images in one role and none in another, or there is one class only; a label is on
                all images of a role, or on none.
        """
        if not self.per_class:
            return
        if next(iter(splits.values())).ndim == 2:
            self._check_labels(splits, names)
            return
        every = np.unique(np.concatenate(list(splits.values())))
        for role, labels in splits.items():
            for label in np.setdiff1d(every, labels):
                name = names[label] if label < len(names) else label
                raise MetricError(
                    f"--metric {self.name}: class {name!r} has no image in {role}, expected at least one in each role, "
                    f"since every class counts alike; add images of it, leave the class out, or use --metric accuracy"
                )
        if len(every) < 2:
            raise MetricError(
                f"--metric {self.name}: all images are of one class, expected two classes or more; add images of others"
            )

    def _check_labels(self, splits: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        for role, labels in splits.items():
            share = (labels > 0.5).mean(0)
            for name, found in zip(names, share, strict=True):
                if not 0 < found < 1:
                    on = "all images" if found else "no image"
                    raise MetricError(
                        f"--metric {self.name}: label {name!r} is on {on} of {role}, expected images with it and "
                        f"without it in each role, since every label counts alike; add images, leave the label out, or "
                        f"use --metric label_accuracy"
                    )


@dataclass(frozen=True, eq=False)
class ByLabel:
    """What is observed for each image where its class matters: `value` is `[N]`."""

    value: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def only_one(ours: np.ndarray, dense: np.ndarray) -> tuple[int, int]:
    """Images that only the variant, that only the dense model gets wrong."""
    return int((ours & ~dense).sum()), int((dense & ~ours).sum())
