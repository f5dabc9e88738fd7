"""Domain shift: do the inputs of the data at hand look like those that the checkpoint was trained on?

With images of the source at hand, a two-sample test of H0, that both sets come from one distribution: on half of the
images of both a linear classifier learns to tell source from target by the dense model's pooled features, and on the
other half its scores are ranked. Under H0 they cannot favour either side, whatever the classifier has learnt, so the
Mann-Whitney test holds its level. That says whether there is a shift, and how well it can be seen: noise that no eye
sees is told with ease. How much of a shift it is, the distance of the features says: the Hellinger distance of normal
distributions with the means and variances of both, root mean square over features, 0 alike and 1 disjoint.
D. Lopez-Paz, M. Oquab: "Revisiting classifier two-sample tests", ICLR 2017; with ranks S. Clémençon, M. Depecker,
N. Vayatis: "AUC optimization and the two-sample problem", NeurIPS 2009.

Without them, the checkpoint's own record of its inputs, the running statistics of its norms, is compared with
statistics estimated on the data, by the same distance over channels and layers, less what sampling alone makes of it,
as two halves of the data show. That is a measure and no test: how noisy the checkpoint's averages are is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import engine
from treesurgeon.search.data import Split
from treesurgeon.search.heads import ridge
from treesurgeon.search.setting import SOURCE_IMAGES, Setting
from treesurgeon.search.subject import Subject
from treesurgeon.search.transfer import by_batch

LEVEL = 0.05
# Distances from which inputs count as far, and, for norm statistics, up to which they count as alike. Chosen on a
# ResNet-20 for CIFAR-10. Features of changed images from those of others: 0.04 for unchanged ones, 0.09 for less
# contrast (95 % of the answers stay), 0.24 for a blur (66 %), 0.48 for noise of deviation 0.1 (17 %), but 0.15 for
# negatives (41 %): a distance is not the harm. Norm statistics: 0.03 for JPEG images, which cost this net 11 points,
# 0.11 for noise in place of images; a net for digits on new digits: 0.
FAR_FEATURES, FAR_NORMS, NEAR_NORMS = 0.3, 0.1, 0.02
DEPTHS = 4  # points whose features are looked at
STATISTICS = 256  # images that norm statistics are estimated on, at most
EPSILON = 1e-5  # added to variances, as norms do


@dataclass(frozen=True)
class Shift:
    """What was found of the inputs.

    Attributes:
        method: "two-sample test", "norm statistics" or "none".
        distance: how far apart they are, 0 to 1.
        p_value, auc: of the test.
        images: of each side, or of the data alone.
        advice: "same", "shifted", "far" or "unknown".
        sentence: all of it in words.
    """

    method: str
    distance: float | None
    p_value: float | None
    auc: float | None
    images: int
    advice: str
    sentence: str


def look(setting: Setting) -> Shift:
    """Compare the inputs of `train` with what the checkpoint was trained on, by what there is to go by."""
    subject, train = setting.original or setting.subject, setting.roles.train
    if setting.source_images is not None:
        count = min(len(setting.source_images), len(train), SOURCE_IMAGES)
        if not engine.points(subject.infer, subject.graph, subject.spec.example):
            sentence = "domain shift: not looked at, as the model has no head and no block to take features at"
            return Shift("none", None, None, None, 0, "unknown", sentence)
        source, target = (features(subject, images[:count]) for images in (setting.source_images, train.images))
        p_value, auc = two_sample(source, target)
        moments = (moment for x in (source, target) for moment in (x.mean(0), x.var(0)))
        return _tested(p_value, auc, float(np.sqrt(hellinger(*moments).mean())), count, bool(subject.momenta))
    count = min(len(train), STATISTICS) // 2 * 2
    distance = norm_distance(subject, train.images[:count])
    if distance is None:
        sentence = "domain shift: not looked at, as the model keeps no norm statistics; --source-data enables a test"
        return Shift("none", None, None, None, 0, "unknown", sentence)
    return _compared(distance, count)


def two_sample(source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """The classifier two-sample test: p-value of H0, both are from one distribution, and the AUC on held-out halves.

    Args:
        source: features `[N, F]` in an order without meaning.
        target: features `[M, F]`, likewise.
    """
    from scipy.stats import mannwhitneyu  # takes most of a second to import

    halves = [np.array_split(np.asarray(x, np.float32), 2) for x in (source, target)]
    x = np.concatenate([first for first, _ in halves])
    y = np.repeat([-1.0, 1.0], [len(first) for first, _ in halves])[:, None]
    classifier = ridge(x, y)
    ours, theirs = (np.asarray(classifier(rest), np.float64)[:, 0] for _, rest in halves)
    found = mannwhitneyu(theirs, ours, alternative="greater")
    return float(found.pvalue), float(found.statistic / (len(ours) * len(theirs)))


def features(subject: Subject, images: np.ndarray) -> np.ndarray:
    """Pooled features at a few depths, from the first point to the last, end to end: `[N, F]`."""
    points = engine.points(subject.infer, subject.graph, subject.spec.example)
    chosen = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, DEPTHS).round().astype(int))]
    every = engine.features(subject.infer, subject.graph)

    @jax.jit
    def some(variables: Any, x: Any) -> Any:
        found = every(variables, x)
        return jnp.concatenate([found[name].astype(jnp.float32) for name in chosen], 1)

    count = len(images)
    split = Split(images, np.zeros(count, np.int32), np.arange(count), (), "")
    return by_batch(lambda x: some(subject.variables, x), split)


def norm_distance(subject: Subject, images: np.ndarray) -> float | None:
    """How far the checkpoint's norm statistics are from those of images, less what sampling alone makes of that.

    None where the model has no pairs of a running mean and variance.
    """
    pairs = {path.rpartition("/")[0] for path in subject.momenta if path.endswith("/mean")}
    pairs = sorted(path for path in pairs if f"{path}/var" in subject.momenta)
    half = len(images) // 2
    if not pairs or not half:
        return None
    key = jax.random.key(0)
    fresh = engine.reestimate(subject.train, subject.momenta)
    estimate = jax.jit(lambda v, x: fresh(v, x, key))
    checkpoint = engine.named_leaves(jax.tree.map(np.asarray, subject.variables))
    parts = images[:half], images[half : 2 * half]
    halves = [engine.named_leaves(jax.tree.map(np.asarray, estimate(subject.variables, part))) for part in parts]
    squares = []
    for path in pairs:
        there, one, two = ((found[f"{path}/mean"], found[f"{path}/var"]) for found in [checkpoint, *halves])
        sampling = hellinger(*one, *two) / 2  # of one half
        squares.append((hellinger(*there, *one) + hellinger(*there, *two)) / 2 - sampling)
    return float(np.sqrt(max(np.mean(np.concatenate(squares)), 0)))


def hellinger(mean: Any, variance: Any, other_mean: Any, other_variance: Any) -> np.ndarray:
    """The squared Hellinger distance of normal distributions, elementwise, 0 to 1."""
    values = (np.asarray(x, np.float64).reshape(-1) for x in (mean, variance, other_mean, other_variance))
    m, v, n, w = values
    v, w = v + EPSILON, w + EPSILON
    return 1 - np.sqrt(2 * np.sqrt(v * w) / (v + w)) * np.exp(-((m - n) ** 2) / (4 * (v + w)))


def _tested(p_value: float, auc: float, distance: float, count: int, norms: bool) -> Shift:
    advice = "same" if p_value > LEVEL else "far" if distance >= FAR_FEATURES else "shifted"
    then = "re-estimate the norm statistics, as every variant here does" if norms else "fine-tune for longer"
    words: Mapping[str, str] = {
        "same": "no shift of the inputs is shown",
        "shifted": "the inputs are shifted; fine-tuning should make up for that",
        "far": f"the inputs are far from the source's: {then}, and compare with training from scratch",
    }
    sentence = (
        f"domain shift: {words[advice]} (two-sample test on {count:,} images each, p = {p_value:.2g}; their features "
        f"are {distance:.2f} apart, 0 is alike and 1 disjoint; a linear classifier tells them apart with AUC {auc:.2f})"
    )
    return Shift("two-sample test", distance, p_value, auc, count, advice, sentence)


def _compared(distance: float, count: int) -> Shift:
    advice = "same" if distance < NEAR_NORMS else "far" if distance >= FAR_NORMS else "shifted"
    words: Mapping[str, str] = {
        "same": "none shows in the norm statistics; a small one might not",
        "shifted": "the inputs seem shifted from those that the checkpoint was trained on; re-estimated norm "
        "statistics and fine-tuning should make up for that",
        "far": "the inputs seem far from those that the checkpoint was trained on: re-estimate the norm statistics, "
        "as every variant here does, and compare with training from scratch",
    }
    sentence = (
        f"domain shift: {words[advice]} (the checkpoint's statistics and those of {count:,} images are {distance:.3f} "
        f"apart, 0 is alike and 1 disjoint; a measure and no test, which --source-data enables)"
    )
    return Shift("norm statistics", distance, None, None, count, advice, sentence)
