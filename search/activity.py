"""A model that is looked at with images, and what is found of the units of a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from treesurgeon import engine
from treesurgeon.engine import Graph
from treesurgeon.search.data import Split


@dataclass(frozen=True, eq=False)
class Looked:
    """A model and the images that it is looked at with.

    Attributes:
        name: of the model.
        infer: `(variables, x) -> logits`.
        variables: what it takes.
        graph: of `infer`.
        split: the images, normalised.
        classes: names.
        mean, std: what the images were normalised with.
    """

    name: str
    infer: Callable[[Any, Any], Any]
    variables: Any
    graph: Graph
    split: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Units:
    """What is found of one group.

    Attributes:
        group: its name.
        by_class: mean activity, `float[classes, size]`; NaN for classes without images.
        selectivity: `float[size]`.
        activity: on each image, `float[N, size]`.
        ratio: the participation ratio.
    """

    group: str
    by_class: np.ndarray
    selectivity: np.ndarray
    activity: np.ndarray
    ratio: float

    @property
    def prefers(self) -> np.ndarray:
        """The class that each unit is most active on, `int[size]`."""
        return np.nanargmax(self.by_class, 0)

    @property
    def idle(self) -> int:
        """How many units are active on no image."""
        return int((self.activity == 0).all(0).sum())

    def top(self, unit: int, count: int) -> np.ndarray:
        """The images that a unit is most active on, most first; none on which it is not active at all."""
        order = np.argsort(-self.activity[:, unit], kind="stable")[:count]
        return order[self.activity[order, unit] > 0]


def measured(group: str, activity: np.ndarray, looked: Looked) -> Units:
    """Everything about one group, from its activity on each image."""
    means = engine.class_means(activity, looked.split.labels, len(looked.classes))
    index = engine.selectivity_index(means)
    ratio = float(engine.participation_ratio(activity))
    return Units(group, np.asarray(means), np.asarray(index), activity, ratio)
