"""Accuracy against depth: heads in closed form on what stands at every point of the network, from one forward pass.

Linear probes: G. Alain, Y. Bengio: "Understanding intermediate layers using linear classifier probes", 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search.data import Roles, Split
from treesurgeon.search.depth_chart import OWN, depths
from treesurgeon.search.heads import best_head, quick_head
from treesurgeon.search.pictures import write_pictures
from treesurgeon.search.report import write_depth
from treesurgeon.search.subject import Subject
from treesurgeon.search.transfer import by_batch

HeadName = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class Cut:
    """A truncated model with its head.

    Attributes:
        point: where it is cut; `OWN` for the whole model.
        features: how many there are; None for the whole model.
        cost: of all that is left, its head included, see `engine.cost`.
        train, search: the score, one less the mean of `Task.wrong`: for classes accuracy, a share.
        penalty: of the head; None where none was fitted.
        spread: the standard error of `search`.
    """

    point: str
    features: int | None
    cost: Mapping[str, int]
    train: float
    search: float
    penalty: float | None
    spread: float

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
        classes: of the labels; or how many labels, or numbers, an image has.
        head: least squares, or logistic regression where labels are no numbers.
    """
    task = roles.task
    fit_head = partial(quick_head if head == "ridge" else best_head, task)
    every = jax.jit(engine.features(subject.infer, subject.graph))
    on_train, on_search = (by_batch(lambda x: every(subject.variables, x), s) for s in (roles.train, roles.search))
    x = subject.spec.example
    cuts = []
    for point in engine.points(subject.infer, subject.graph, x):
        z = on_train[point]
        fitted = fit_head(z, roles.train.labels, classes)
        train, search = (
            np.asarray(task.wrong(np.asarray(fitted(found)), split.labels), float)
            for found, split in ((z, roles.train), (on_search[point], roles.search))
        )
        short = engine.truncate(subject.infer, subject.graph, point, x)
        stem = engine.cost(engine.trace(short, short.take(subject.variables), x), engine.Plan())
        cost = _with_head(stem, z.shape[1], classes)
        spread = float(search.std() / math.sqrt(len(search)))
        cuts.append(
            Cut(
                point,
                z.shape[1],
                cost,
                1 - float(train.mean()),
                1 - float(search.mean()),
                float(fitted.penalty),
                spread,
            )
        )
    return cuts


def own_head(subject: Subject, roles: Roles) -> Cut:
    """The whole model with the head it has, whose labels are those of the data."""
    answer = jax.jit(subject.infer)

    def wrong(split: Split) -> np.ndarray:
        answers = by_batch(lambda x: answer(subject.variables, x), split)
        return np.asarray(roles.task.wrong(answers, split.labels), float)

    train, search = wrong(roles.train), wrong(roles.search)
    cost = {name: int(value) for name, value in engine.cost(subject.graph, engine.Plan())._asdict().items()}
    spread = float(search.std() / math.sqrt(len(search)))
    return Cut(OWN, None, cost, 1 - float(train.mean()), 1 - float(search.mean()), None, spread)


def write_cuts(directory: Path, model: str, cuts: Sequence[Cut], score: str) -> None:
    """Write them as `depth.csv`, `depth.svg` and `depth.png`, which a run's report shows.

    Args:
        directory: where.
        model, score: what the picture is of.
        cuts: in order.
    """
    rows = [
        {
            "point": cut.point,
            "features": cut.features,
            "params": cut.params,
            "macs": cut.macs,
            "train_accuracy": cut.train,
            "search_accuracy": cut.search,
            "gap": cut.train - cut.search,
            "penalty": cut.penalty,
        }
        for cut in cuts
    ]
    write_depth(directory / "depth.csv", rows)
    told = [f"{cut.point}: {cut.params:,} parameters, {cut.macs:,} multiply-accumulates" for cut in cuts]
    shares = {"train": [cut.train for cut in cuts], "search": [cut.search for cut in cuts]}
    chart = depths(f"{model}: {score} against depth", [cut.point for cut in cuts], shares, told)
    write_pictures(directory, "depth", [chart])


def _with_head(stem: Any, features: int, classes: int) -> dict[str, int]:
    """Costs with those of a dense float32 layer added."""
    numbers = (features + 1) * classes
    head = {"params": numbers, "size": numbers, "macs": features * classes, "activation_bytes": 4 * classes}
    return {name: int(value) + head[name] for name, value in stem._asdict().items()}
