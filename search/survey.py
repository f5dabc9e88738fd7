"""Accuracy against depth: heads in closed form on what stands at every point of the network, from one forward pass.

Linear probes: G. Alain, Y. Bengio: "Understanding intermediate layers using linear classifier probes", 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search.data import Roles
from treesurgeon.search.heads import LinearHead, best_logistic, ridge
from treesurgeon.search.subject import Subject
from treesurgeon.search.transfer import by_batch

HeadName = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class Cut:
    """A truncated model with its head.

    Attributes:
        point: where it is cut.
        features: how many there are.
        cost: of all that is left, its head included, see `engine.cost`.
        train, search: accuracy, shares.
        penalty: of the head.
    """

    point: str
    features: int
    cost: Mapping[str, int]
    train: float
    search: float
    penalty: float

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return self.cost["params"]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.cost["macs"]


def survey(subject: Subject, roles: Roles, classes: int, head: HeadName = "ridge") -> list[Cut]:
    """The model cut at every point, in order; the last is what feeds its own head.

    Args:
        subject: the model.
        roles: heads are fitted to `train`, and measured on `search` as well.
        classes: of the labels.
        head: least squares to one-hot labels, or logistic regression.
    """
    every = jax.jit(engine.features(subject.infer, subject.graph))
    on_train, on_search = (by_batch(lambda x: every(subject.variables, x), s) for s in (roles.train, roles.search))
    x = subject.spec.example
    cuts = []
    for point in engine.points(subject.infer, subject.graph, x):
        z = on_train[point]
        fitted = fit_head(head, z, roles.train.labels, classes)
        train, search = (
            float((np.asarray(fitted(found)).argmax(1) == split.labels).mean())
            for found, split in ((z, roles.train), (on_search[point], roles.search))
        )
        short = engine.truncate(subject.infer, subject.graph, point, x)
        stem = engine.cost(engine.trace(short, short.take(subject.variables), x), engine.Plan())
        cost = _with_head(stem, z.shape[1], classes)
        cuts.append(Cut(point, z.shape[1], cost, train, search, float(fitted.penalty)))
    return cuts


def fit_head(kind: HeadName, x: np.ndarray, labels: np.ndarray, classes: int) -> LinearHead:
    """A head of a kind on features `[N, F]`."""
    if kind == "ridge":
        return ridge(x, np.eye(classes, dtype=np.float32)[labels])
    return best_logistic(x, labels, classes)


def _with_head(stem: Any, features: int, classes: int) -> dict[str, int]:
    """Costs with those of a dense float32 layer added."""
    numbers = (features + 1) * classes
    head = {"params": numbers, "size": numbers, "macs": features * classes, "activation_bytes": 4 * classes}
    return {name: int(value) + head[name] for name, value in stem._asdict().items()}
