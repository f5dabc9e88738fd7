"""What a model is judged by: one interface for accuracy, balanced accuracy, macro F1, AUROC and cross-entropy.

    metric = METRICS["f1"]
    seen = metric.observe(Answers(logits, labels))
    metric.error(seen)                                  # 1 - F1, or the loss itself
    metric.compare(seen, metric.observe(dense)).p_value(0.01)   # H0: the error exceeds dense's by 0.01 or more

`observe` keeps of the answers what the metric depends on; everything else works on that. Margins, gaps and the
selection are in terms of *errors*: 1 less the metric, and for cross-entropy, which is one, itself (in nats). Each
metric brings the paired test that fits it (see paired.py) and says how far that can be trusted. A mean over classes is
over those that the images have; `check` refuses data where a role lacks a class that another one has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from treesurgeon.search.judging import Answers, ByLabel, Comparison, Metric, MetricError, MetricName, only_one
from treesurgeon.search.paired import (
    betting,
    images_needed,
    smallest_margin,
    smallest_stratified_margin,
    stratified,
    tango,
)
from treesurgeon.search.resampling import F1, Auroc

__all__ = ["ACCURACY", "METRICS", "Answers", "Metric", "MetricError", "MetricName"]

TYPICAL = 0.05  # share of images that exactly one of two models gets wrong
MOST_NATS = 10.0  # a larger loss on one image counts as this


class Accuracy(Metric):
    """Share of right answers; observed is `bool[N]`, which images are wrong."""

    name = "accuracy"
    noun = "error"
    test = "Tango's score test (asymptotic)"
    description = "Accuracies are shares of right answers"

    def observe(self, answers: Answers) -> np.ndarray:
        """Which answers are wrong."""
        return answers.predicted != answers.labels

    def error(self, seen: np.ndarray) -> float:
        """Share of wrong answers."""
        return float(np.count_nonzero(seen) / len(seen))

    def compare(self, seen: np.ndarray, dense: np.ndarray) -> Comparison:
        """By Tango's test."""
        worse, better = only_one(seen, dense)
        test = partial(tango, worse, better, len(dense))
        return Comparison(worse, better, (worse - better) / len(dense), test)

    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """See `paired.smallest_margin`."""
        return smallest_margin(len(labels), delta)

    def outlook(self, epsilon: float, delta: float) -> str:
        """By the power of the test, if few answers change."""
        needed = f"{images_needed(epsilon, delta, TYPICAL):,}" if epsilon > 0 else "endlessly many"
        return f"for yours ({100 * epsilon:g}) expect to need {needed} if {TYPICAL:.0%} of the answers change"


class BalancedAccuracy(Metric):
    """Mean over classes of the share of right answers; observed are wrong answers and labels."""

    name = "balanced_accuracy"
    noun = "balanced error"
    trust = "by a score test stratified by class, which is asymptotic in the images of each class"
    test = "stratified score test (asymptotic)"
    per_class = True
    description = "Balanced accuracies are means over the classes of the shares of right answers"

    def observe(self, answers: Answers) -> ByLabel:
        """Which answers are wrong, and the labels."""
        return ByLabel(answers.predicted != answers.labels, answers.labels)

    def error(self, seen: ByLabel) -> float:
        """Mean over the classes that there are of the share of wrong answers."""
        return float(np.mean([seen.value[seen.labels == label].mean() for label in np.unique(seen.labels)]))

    def compare(self, seen: ByLabel, dense: ByLabel) -> Comparison:
        """By the stratified test."""
        _, stratum, counts = np.unique(dense.labels, return_inverse=True, return_counts=True)
        worse = np.bincount(stratum, seen.value & ~dense.value, len(counts))
        better = np.bincount(stratum, dense.value & ~seen.value, len(counts))
        difference = float(((worse - better) / counts).mean())
        test = partial(stratified, worse, better, counts)
        return Comparison(int(worse.sum()), int(better.sum()), difference, test)

    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """Classes with few images decide."""
        return smallest_stratified_margin(np.unique(labels, return_counts=True)[1], delta)

    def outlook(self, epsilon: float, delta: float) -> str:
        """Depends on the smallest classes: a bound for classes of one size."""
        needed = f"{images_needed(epsilon, delta, TYPICAL):,}" if epsilon > 0 else "endlessly many"
        return (
            f"for yours ({100 * epsilon:g}) expect to need {needed} or more if {TYPICAL:.0%} of the answers change: as "
            "many where classes are of one size, more where some are small"
        )


class CrossEntropy(Metric):
    """Mean cross-entropy in nats, losses above `MOST_NATS` counted as that; observed are the losses, `float[N]`.

    The cap makes the differences bounded, so that the test holds for any number of images and any distribution.
    """

    name = "cross_entropy"
    noun = "cross-entropy"
    trust = f"by a betting test that holds for any number of images (a loss above {MOST_NATS:g} nats counts as that)"
    test = "betting test (finite-sample)"
    rising = False
    unit = "nats"
    scale = 1.0
    reach = MOST_NATS
    description = f"Cross-entropies are means in nats, lower is better, a loss above {MOST_NATS:g} counts as that"

    def observe(self, answers: Answers) -> np.ndarray:
        """The capped losses; what is not a number counts as the cap."""
        return np.minimum(np.nan_to_num(answers.losses, nan=MOST_NATS), MOST_NATS)

    def error(self, seen: np.ndarray) -> float:
        """The mean."""
        return float(seen.mean())

    def compare(self, seen: np.ndarray, dense: np.ndarray) -> Comparison:
        """By betting."""
        differences = seen - dense
        worse, better = int((differences > 0).sum()), int((differences < 0).sum())
        test = partial(betting, differences, MOST_NATS)
        return Comparison(worse, better, float(differences.mean()), test)

    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """By bisection of the test itself."""
        same, low, high = np.zeros(len(labels)), 0.0, MOST_NATS
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if betting(same, MOST_NATS, middle) <= delta else (middle, high)
        return high

    def outlook(self, epsilon: float, delta: float) -> str:
        """Unknown before the losses are."""
        return f"how many images yours ({epsilon:g}) takes depends on how far the losses of the two models are apart"


ACCURACY = Accuracy()
METRICS: Mapping[MetricName, Metric] = MappingProxyType(
    {metric.name: metric for metric in (ACCURACY, BalancedAccuracy(), F1(), Auroc(), CrossEntropy())}
)
