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

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.search.paired import (
    Bootstrap,
    betting,
    images_needed,
    smallest_margin,
    smallest_stratified_margin,
    stratified,
    tango,
)

MetricName = Literal["accuracy", "balanced_accuracy", "f1", "auroc", "cross_entropy"]

TYPICAL = 0.05  # share of images that exactly one of two models gets wrong
MOST_NATS = 10.0  # a larger loss on one image counts as this
REPLICATES = 2000
DECIMALS = 9  # of log-odds, so that what is equal but for rounding is a tie
AT_ONCE = 1 << 22  # numbers in a chunk of bootstrap replicates


class MetricError(TreesurgeonError, ValueError):
    """Labels that a metric is not defined on."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says about the images of a split.

    Attributes:
        logits: `float[N, classes]`.
        labels: `int[N]`.
    """

    logits: np.ndarray
    labels: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """`int[N]`."""
        return self.logits.argmax(-1)

    @property
    def losses(self) -> np.ndarray:
        """Cross-entropy of each image, in nats: `float[N]`."""
        logits = self.logits.astype(np.float64)
        top = logits.max(1)
        right = logits[np.arange(len(logits)), self.labels]
        return top + np.log(np.exp(logits - top[:, None]).sum(1)) - right

    def __getitem__(self, rows: np.ndarray) -> Answers:
        return Answers(self.logits[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models on the same images.

    Attributes:
        worse, better: images that only the variant gets wrong, that only the dense model does; for cross-entropy those
            with a larger, a smaller loss.
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
        noun: what its error is called.
        trust: how far the test's level can be trusted, for the certificate's sentence; empty for accuracy's.
        test: the test's name.
        approximate: whether nothing is known of the level but that it is about right.
        per_class: whether every class counts alike, so that each needs images in every split.
        rising: whether more of the metric is better, and its error 1 less it.
        unit: of differences between errors.
        scale: of that unit in one.
        description: the metric in words, for a card.
    """

    name: MetricName
    noun: str
    trust: str = ""
    test: str
    approximate: bool = False
    per_class: bool = False
    rising: bool = True
    unit: str = "points"
    scale: float = 100.0
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
            names: of the classes.

        Raises:
            MetricError: a class has images in one role and none in another, or there is one class only.
        """
        if not self.per_class:
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
        worse, better = _only_one(seen, dense)
        test = partial(tango, worse, better, len(dense))
        return Comparison(worse, better, (worse - better) / len(dense), test)

    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """See `paired.smallest_margin`."""
        return smallest_margin(len(labels), delta)

    def outlook(self, epsilon: float, delta: float) -> str:
        """By the power of the test, if few answers change."""
        needed = f"{images_needed(epsilon, delta, TYPICAL):,}" if epsilon > 0 else "endlessly many"
        return f"for yours ({100 * epsilon:g}) expect to need {needed} if {TYPICAL:.0%} of the answers change"


@dataclass(frozen=True, eq=False)
class ByLabel:
    """What is observed for each image where its class matters: `value` is `[N]` or `[N, classes]`."""

    value: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


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


class _Resampled(Metric):
    """A metric whose only test is the bootstrap: images are drawn again within their classes, as the split was made.

    A bootstrap that meets no disagreement would claim anything. So no p-value is below that of the stratified score
    test for a variant that disagrees nowhere and a margin as far above the observed difference: what so many images
    leave open, whatever the metric.
    """

    trust = (
        f"where the level is approximate: a BCa bootstrap of {REPLICATES:,} paired resamples, with no guarantee for "
        "any number of images"
    )
    test = "BCa bootstrap (approximate)"
    approximate = True
    per_class = True

    @abstractmethod
    def errors(self, seen: ByLabel, weights: np.ndarray) -> np.ndarray:
        """The error where image i counts `weights[b, i]` times: `float[B]`."""

    @abstractmethod
    def influence(self, seen: ByLabel) -> np.ndarray:
        """What each image does to the error, up to a factor: `float[N]`."""

    @abstractmethod
    def predicted(self, seen: ByLabel) -> np.ndarray:
        """The answers: `int[N]`."""

    def error(self, seen: ByLabel) -> float:
        """The error on all images."""
        return float(self.errors(seen, np.ones((1, len(seen.labels))))[0])

    def compare(self, seen: ByLabel, dense: ByLabel) -> Comparison:
        """By bootstrap, the same resamples for both models."""
        labels = dense.labels
        rng = np.random.default_rng(0)
        step = max(1, AT_ONCE // len(dense))
        parts = []
        for start in range(0, REPLICATES, step):
            weights = resampled(labels, min(step, REPLICATES - start), rng)
            parts.append(self.errors(seen, weights) - self.errors(dense, weights))
        observed = self.error(seen) - self.error(dense)
        found = Bootstrap(observed, np.concatenate(parts), self.influence(seen) - self.influence(dense))
        counts = np.unique(labels, return_counts=True)[1]
        none = np.zeros(len(counts))
        worse, better = _only_one(self.predicted(seen) != labels, self.predicted(dense) != labels)

        def p_value(margin: float) -> float:
            above = margin - observed
            least = stratified(none, none, counts, above) if above > 0 else 0.5
            return max(found.p_value(margin), least)

        return Comparison(worse, better, observed, p_value)

    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """By the convention that no disagreement leaves what the stratified test leaves."""
        return smallest_stratified_margin(np.unique(labels, return_counts=True)[1], delta)

    def outlook(self, epsilon: float, delta: float) -> str:
        """Nothing exact is known."""
        return (
            f"how many images yours ({100 * epsilon:g}) takes is not known beforehand, and the level of this metric's "
            "test (a bootstrap) is approximate"
        )


class F1(_Resampled):
    """Macro F1: the mean over classes of the harmonic mean of precision and recall; observed are answers and labels."""

    name = "f1"
    noun = "F1 error (1 - macro F1)"
    description = "F1 scores are means over the classes (macro F1)"

    def observe(self, answers: Answers) -> ByLabel:
        """The answers and the labels."""
        return ByLabel(answers.predicted, answers.labels)

    def predicted(self, seen: ByLabel) -> np.ndarray:
        """As observed."""
        return seen.value

    def errors(self, seen: ByLabel, weights: np.ndarray) -> np.ndarray:
        """From weighted counts of hits, answers and labels."""
        scores = []
        for label in np.unique(seen.labels):
            hits, total = self._counts(seen, weights, label)
            scores.append(2 * hits / total)
        return 1 - np.mean(scores, 0)

    def influence(self, seen: ByLabel) -> np.ndarray:
        """The derivative by each image's weight."""
        ones = np.ones((1, len(seen.labels)))
        out = np.zeros(len(seen.labels))
        for label in np.unique(seen.labels):
            hits, total = (value[0] for value in self._counts(seen, ones, label))
            answered, there = seen.value == label, seen.labels == label
            out -= 2 * (answered & there) / total - 2 * hits / total**2 * (answered.astype(float) + there)
        return _centred(out, seen.labels)

    @staticmethod
    def _counts(seen: ByLabel, weights: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
        answered, there = seen.value == label, seen.labels == label
        return weights @ (answered & there), weights @ (answered.astype(float) + there)


class Auroc(_Resampled):
    """Mean over classes of the area under the ROC curve of one class against the rest; observed are scores, labels.

    Scores are log-odds, which order images as probabilities do and do not saturate. With two classes the two curves are
    one, so that this is the plain AUROC. The influences are the placements of E. DeLong et al., Biometrics 1988.
    """

    name = "auroc"
    noun = "AUROC error (1 - AUROC)"
    description = "AUROCs are of one class against the rest, means over the classes"

    def observe(self, answers: Answers) -> ByLabel:
        """Log-odds `float[N, classes]` and the labels."""
        logits = np.nan_to_num(answers.logits.astype(np.float64))
        shifted = logits - logits.max(1, keepdims=True)
        powers = np.exp(shifted)
        rest = powers.sum(1, keepdims=True) - powers
        rows, top = np.arange(len(logits)), shifted.argmax(1)
        others = powers.copy()
        others[rows, top] = 0
        rest[rows, top] = others.sum(1)  # without the cancellation that the largest one suffers
        odds = shifted - np.log(np.maximum(rest, np.finfo(np.float64).tiny))
        return ByLabel(odds.round(DECIMALS), answers.labels)

    def predicted(self, seen: ByLabel) -> np.ndarray:
        """The class with the highest odds."""
        return seen.value.argmax(1)

    def errors(self, seen: ByLabel, weights: np.ndarray) -> np.ndarray:
        """Pairs in the wrong order, ties half, from cumulative weights in the order of the scores."""
        out = np.zeros(len(weights))
        classes = np.unique(seen.labels)
        for label in classes:
            order = np.argsort(seen.value[:, label], kind="stable")
            scores, there = seen.value[order, label], seen.labels[order] == label
            sorted_weights = weights[:, order]
            positive, negative = sorted_weights * there, sorted_weights * ~there
            starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
            if len(starts) < len(order):
                positive, negative = (np.add.reduceat(part, starts, 1) for part in (positive, negative))
            above = negative.sum(1, keepdims=True) - negative.cumsum(1) + negative / 2
            out += (positive * above).sum(1) / (positive.sum(1) * negative.sum(1))
        return out / len(classes)

    def influence(self, seen: ByLabel) -> np.ndarray:
        """Each image's share of pairs in the wrong order, by the images of its side."""
        out = np.zeros(len(seen.labels))
        for label in np.unique(seen.labels):
            there, scores = seen.labels == label, seen.value[:, label]
            positive, negative = np.sort(scores[there]), np.sort(scores[~there])
            above = 1 - _midrank(negative, scores[there])
            below = _midrank(positive, scores[~there])
            out[there] += (above - above.mean()) / len(positive)
            out[~there] += (below - below.mean()) / len(negative)
        return _centred(out, seen.labels)


def resampled(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image is drawn, with replacement within its class: `float[count, N]`."""
    weights = np.zeros((count, len(labels)))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), count)
    return weights


def _midrank(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of `ordered` below each value, ties half."""
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def _centred(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Less the mean of the class: class sizes do not vary."""
    out = np.array(values, np.float64)
    for label in np.unique(labels):
        out[labels == label] -= out[labels == label].mean()
    return out


def _only_one(ours: np.ndarray, dense: np.ndarray) -> tuple[int, int]:
    """Images that only the variant, that only the dense model gets wrong."""
    return int((ours & ~dense).sum()), int((dense & ~ours).sum())


ACCURACY = Accuracy()
METRICS: Mapping[MetricName, Metric] = MappingProxyType(
    {metric.name: metric for metric in (ACCURACY, BalancedAccuracy(), F1(), Auroc(), CrossEntropy())}
)
