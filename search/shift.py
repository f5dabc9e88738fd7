"""Domain shift: do the inputs of the data at hand look like those that the checkpoint was trained on?

With images of the source at hand, a two-sample test of H0, that both sets come from one distribution: on half of the
images of both a linear classifier learns to tell source from target by the dense model's pooled features, and on the
other half its scores are ranked. Under H0 they cannot favour either side, whatever the classifier has learnt, so the
Mann-Whitney test holds its level; the area under the ROC curve says how far apart the two are: 0.5 alike, 1 disjoint.
D. Lopez-Paz, M. Oquab: "Revisiting classifier two-sample tests", ICLR 2017; with ranks S. Clémençon, M. Depecker,
N. Vayatis: "AUC optimization and the two-sample problem", NeurIPS 2009.

Without them, the checkpoint's own record of its inputs, the running statistics of its norms, is compared with
statistics estimated on the data: the squared Hellinger distance of the two normal distributions, mean over channels
and layers, 0 alike and 1 disjoint. It is set beside the same distance between two halves of the data, which is what
sampling alone makes of it. That is a measure and no test: how noisy the checkpoint's averages are is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import mannwhitneyu

from treesurgeon import engine
from treesurgeon.search.data import Split
from treesurgeon.search.heads import ridge
from treesurgeon.search.setting import SOURCE_IMAGES, Setting
from treesurgeon.search.subject import Subject
from treesurgeon.search.transfer import by_batch

LEVEL = 0.05
FAR_AUC = 0.9  # of the classifier: one pair in ten in the wrong order
FAR_DISTANCE = 0.1
NEAR_DISTANCE = 0.02
DEPTHS = 4  # points whose features are looked at
STATISTICS = 256  # images that norm statistics are estimated on, at most
EPSILON = 1e-5  # added to variances, as norms do


@dataclass(frozen=True)
class Shift:
    """What was found of the inputs.

    Attributes:
        method: "two-sample test", "norm statistics" or "none".
        amount: how far apart: an AUC for the first, a distance for the second.
        p_value: of the test.
        noise: for norm statistics, the distance between two halves of the data.
        images: of the source and of the target, or of the target alone.
        advice: "same", "shifted", "far" or "unknown".
        sentence: all of it in words.
    """

    method: str
    amount: float | None
    p_value: float | None
    noise: float | None
    images: tuple[int, ...]
    advice: str
    sentence: str


def look(setting: Setting) -> Shift:
    """Compare the inputs of `train` with what the checkpoint was trained on, by what there is to go by."""
    subject, train = setting.subject, setting.roles.train
    if setting.source_images is not None:
        count = min(len(setting.source_images), len(train), SOURCE_IMAGES)
        source, target = setting.source_images[:count], train.images[:count]
        p_value, auc = two_sample(features(subject, source), features(subject, target))
        return _tested(p_value, auc, count, bool(subject.momenta))
    found = norm_distance(subject, train.images[:STATISTICS])
    if found is None:
        sentence = "domain shift: not looked at, as the model keeps no norm statistics; --source-data enables a test"
        return Shift("none", None, None, None, (), "unknown", sentence)
    return _compared(*found, min(len(train), STATISTICS) // 2 * 2)


def two_sample(source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """The classifier two-sample test: p-value of H0, both are from one distribution, and the AUC on held-out halves.

    Args:
        source: features `[N, F]` in an order without meaning.
        target: features `[M, F]`, likewise.
    """
    halves = [np.array_split(np.asarray(x, np.float32), 2) for x in (source, target)]
    x = np.concatenate([first for first, _ in halves])
    y = np.repeat([-1.0, 1.0], [len(first) for first, _ in halves])[:, None]
    classifier = ridge(x, y)
    ours, theirs = (np.asarray(classifier(rest), np.float64)[:, 0] for _, rest in halves)
    found = mannwhitneyu(theirs, ours, alternative="greater")
    return float(found.pvalue), float(found.statistic / (len(ours) * len(theirs)))


def features(subject: Subject, images: np.ndarray) -> np.ndarray:
    """Pooled features at a few depths, from the first point to the last, end to end: `[N, F]`."""
    x = jax.ShapeDtypeStruct((1, *subject.spec.input_shape), subject.spec.input_dtype)
    points = engine.points(subject.infer, subject.graph, x)
    chosen = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, DEPTHS).round().astype(int))]
    every = engine.features(subject.infer, subject.graph)

    @jax.jit
    def some(variables: Any, x: Any) -> Any:
        found = every(variables, x)
        return jnp.concatenate([found[name].astype(jnp.float32) for name in chosen], 1)

    count = len(images)
    split = Split(images, np.zeros(count, np.int32), np.arange(count), (), "")
    return by_batch(lambda x: some(subject.variables, x), split)


def norm_distance(subject: Subject, images: np.ndarray) -> tuple[float, float] | None:
    """How far the checkpoint's norm statistics are from those of images, and two halves of these from one another.

    None where the model has no pairs of a running mean and variance.
    """
    pairs = {path.rpartition("/")[0] for path in subject.momenta if path.endswith("/mean")}
    pairs = sorted(path for path in pairs if f"{path}/var" in subject.momenta)
    half = len(images) // 2
    if not pairs or not half:
        return None
    key = jax.random.key(0)
    estimate = jax.jit(lambda v, x: subject.reestimate(subject.train, v, x, key))
    checkpoint = _leaves(subject.variables)
    halves = [_leaves(estimate(subject.variables, part)) for part in (images[:half], images[half : 2 * half])]
    own, noise = [], []
    for path in pairs:
        there, one, two = ((found[f"{path}/mean"], found[f"{path}/var"]) for found in [checkpoint, *halves])
        own.append((hellinger(*there, *one) + hellinger(*there, *two)) / 2)
        noise.append(hellinger(*one, *two))
    return float(np.mean(np.concatenate(own))), float(np.mean(np.concatenate(noise)))


def hellinger(mean: Any, variance: Any, other_mean: Any, other_variance: Any) -> np.ndarray:
    """The squared Hellinger distance of normal distributions, elementwise, 0 to 1."""
    values = (np.asarray(x, np.float64).reshape(-1) for x in (mean, variance, other_mean, other_variance))
    m, v, n, w = values
    v, w = v + EPSILON, w + EPSILON
    return 1 - np.sqrt(2 * np.sqrt(v * w) / (v + w)) * np.exp(-((m - n) ** 2) / (4 * (v + w)))


def _tested(p_value: float, auc: float, count: int, norms: bool) -> Shift:
    advice = "same" if p_value > LEVEL else "far" if auc >= FAR_AUC else "shifted"
    restated = "re-estimated norm statistics (as every variant here gets)" if norms else "a longer fine-tuning"
    words: Mapping[str, str] = {
        "same": "no shift of the inputs is shown",
        "shifted": "the inputs are shifted; fine-tuning should make up for that",
        "far": f"the inputs are far from the source's: try {restated}, and compare with training from scratch",
    }
    sentence = (
        f"domain shift: {words[advice]} (two-sample test on {count:,} images each, p = {p_value:.2g}; a linear "
        f"classifier tells them apart with AUC {auc:.2f}, where 0.5 is chance)"
    )
    return Shift("two-sample test", auc, p_value, None, (count, count), advice, sentence)


def _compared(distance: float, noise: float, count: int) -> Shift:
    beyond = distance - noise
    advice = "same" if beyond < NEAR_DISTANCE else "far" if beyond >= FAR_DISTANCE else "shifted"
    words: Mapping[str, str] = {
        "same": "the inputs look like those that the checkpoint was trained on",
        "shifted": "the inputs seem shifted from those that the checkpoint was trained on; re-estimated norm "
        "statistics and fine-tuning should make up for that",
        "far": "the inputs seem far from those that the checkpoint was trained on: re-estimated norm statistics are "
        "needed, and training from scratch is worth comparing",
    }
    sentence = (
        f"domain shift: {words[advice]} (its norm statistics and those of {count:,} images are {distance:.3f} apart, "
        f"two halves of these {noise:.3f}; 0 is alike, 1 disjoint; a measure and no test, which --source-data enables)"
    )
    return Shift("norm statistics", distance, None, noise, (count,), advice, sentence)


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in pairs}
