"""What a model is judged by: one interface for accuracy, balanced accuracy, macro F1, AUROC, cross-entropy and R².

    metric = METRICS["f1"]
    seen = metric.observe(Answers(logits, labels))
    metric.error(seen)                                  # 1 - F1, or the loss itself
    metric.compare(seen, metric.observe(dense)).p_value(0.01)   # H0: the error exceeds dense's by 0.01 or more

`observe` keeps of the answers what the metric depends on; everything else works on that. Margins, gaps and the
selection are in terms of *errors*: 1 less the metric, and for cross-entropy, which is one, itself (in nats). Each
metric is for some tasks (see tasks.py), brings the paired test that fits it (see paired.py) and says how far that can
be trusted. A mean over classes is over those that the images have; `check` refuses data where a role lacks a class that
another one has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from treesurgeon.search.judging import Answers, ByLabel, Comparison, Metric, MetricError, MetricName, only_one
from treesurgeon.search.paired import (
    betting,
    binomial,
    exact,
    images_needed,
    smallest_margin,
    smallest_stratified_margin,
    stratified,
)
from treesurgeon.search.resampling import F1, Auroc
from treesurgeon.search.tasks import CLASSIFICATION, Task

__all__ = ["ACCURACY", "METRICS", "Answers", "Metric", "MetricError", "MetricName"]

TYPICAL = 0.05  # share of images that exactly one of two models gets wrong
MOST_NATS = 10.0  # a larger loss on one image counts as this
MOST_SQUARED = 4.0  # a larger squared error, in variances of the targets, likewise


class Accuracy(Metric):
    """Share of right answers; observed is `bool[N]`, which images are wrong."""

    name = "accuracy"
    noun = "error"
    test = "exact unconditional score test"
    description = "Accuracies are shares of right answers"

    def observe(self, answers: Answers) -> np.ndarray:
        """Which answers are wrong."""
        return answers.wrong

    def error(self, seen: np.ndarray) -> float:
        """Share of wrong answers."""
        return float(np.count_nonzero(seen) / len(seen))

    def compare(self, seen: np.ndarray, dense: np.ndarray) -> Comparison:
        """By the exact test."""
        worse, better = only_one(seen, dense)
        test = partial(exact, worse, better, len(dense))
        return Comparison(worse, better, (worse - better) / len(dense), test)

    def absolute(self, seen: np.ndarray) -> Callable[[float], float]:
        """By the binomial distribution."""
        return partial(binomial, int(np.count_nonzero(seen)), len(seen))

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
        return ByLabel(answers.wrong, answers.labels)

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

    def absolute(self, seen: ByLabel) -> Callable[[float], float]:
        """By the stratified test, against answers that are all right."""
        return self.compare(seen, ByLabel(np.zeros_like(seen.value), seen.labels)).p_value

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


class Mean(Metric):
    """The mean over images of a bounded error; observed are these errors, `float[N]`.

    The bound, `reach`, makes the differences bounded, so that the test holds for any number of images and any
    distribution. An error above it counts as it, and so does one that is not a number.
    """

    trust = "by a betting test that holds for any number of images"
    test = "betting test (finite-sample)"

    @abstractmethod
    def of_each(self, answers: Answers) -> np.ndarray:
        """The error of each image."""

    def observe(self, answers: Answers) -> np.ndarray:
        """The bounded errors."""
        return np.minimum(np.nan_to_num(self.of_each(answers), nan=self.reach), self.reach)

    def error(self, seen: np.ndarray) -> float:
        """The mean."""
        return float(seen.mean())

    def compare(self, seen: np.ndarray, dense: np.ndarray) -> Comparison:
        """By betting."""
        differences = seen - dense
        worse, better = int((differences > 0).sum()), int((differences < 0).sum())
        test = partial(betting, differences, self.reach)
        return Comparison(worse, better, float(differences.mean()), test)

    def alike(self, seen: np.ndarray, best: np.ndarray) -> bool:
        """By the mean square: betting has no power to tell that a difference is not 0."""
        differences = seen - best
        return bool(differences.mean() <= np.sqrt((differences**2).mean() / len(differences)))

    def absolute(self, seen: np.ndarray) -> Callable[[float], float]:
        """By betting as well: no error is below 0."""
        return partial(betting, seen, self.reach)

    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """By bisection of the test itself."""
        same, low, high = np.zeros(len(labels)), 0.0, self.reach
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if betting(same, self.reach, middle) <= delta else (middle, high)
        return high

    def outlook(self, epsilon: float, delta: float) -> str:
        """Unknown before the errors are."""
        wanted = f"{self.scale * epsilon:g}"
        return f"how many images yours ({wanted}) takes depends on how far the errors of the two models are apart"


class CrossEntropy(Mean):
    """Mean cross-entropy in nats; of several labels the binary one, the mean over labels."""

    name = "cross_entropy"
    tasks = ("classification", "multilabel")
    noun = "cross-entropy"
    trust = f"{Mean.trust} (a loss above {MOST_NATS:g} nats counts as that)"
    rising = False
    unit = "nats"
    scale = 1.0
    reach = MOST_NATS
    loss = True
    description = f"Cross-entropies are means in nats, lower is better, a loss above {MOST_NATS:g} counts as that"

    def of_each(self, answers: Answers) -> np.ndarray:
        """The losses."""
        return answers.losses


class LabelAccuracy(Mean):
    """Share of labels that are right: the mean over images and labels, one less the Hamming loss."""

    name = "label_accuracy"
    tasks = ("multilabel",)
    noun = "label error"
    description = "Label accuracies are shares of labels that are right, over images and labels"

    def of_each(self, answers: Answers) -> np.ndarray:
        """Shares of wrong labels."""
        return np.asarray(answers.wrong, np.float64)


class R2(Mean):
    """Coefficient of determination: one less the mean squared error in variances of the targets on `train`."""

    name = "r2"
    tasks = ("regression",)
    noun = "unexplained variance (1 - R²)"
    trust = f"{Mean.trust} (a squared error above {MOST_SQUARED:g} variances counts as that)"
    reach = MOST_SQUARED
    loss = True
    description = (
        "R² is one less the mean squared error in variances of the targets on train, where one above "
        f"{MOST_SQUARED:g} on an image counts as that; points are percent of the variance"
    )

    def of_each(self, answers: Answers) -> np.ndarray:
        """Squared errors, in variances."""
        return np.asarray(answers.wrong, np.float64)


ACCURACY = Accuracy()
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (ACCURACY, BalancedAccuracy(), LabelAccuracy(), F1(), Auroc(), CrossEntropy(), R2())
    }
)


def pick_metric(name: str, task: Task = CLASSIFICATION) -> Metric:
    """The metric of this name, or for `auto` the first that is for the task.

    Raises:
        MetricError: it is for other tasks, or there is none of this name.
    """
    fitting = [metric for metric in METRICS.values() if task.name in metric.tasks]
    if name == "auto":
        return fitting[0]
    found = next((metric for metric in fitting if metric.name == name), None)
    if found is None:
        kind = f"--metric {name} is not for {task.name}" if name in METRICS else f"--metric {name}: there is none such"
        raise MetricError(f"{kind}: expected one of {', '.join(metric.name for metric in fitting)}")
    return found
