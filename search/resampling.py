"""Metrics whose only test is the bootstrap: macro F1 and AUROC. Their levels are approximate."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from treesurgeon.search.judging import Answers, ByLabel, Comparison, Metric, only_one
from treesurgeon.search.paired import Bootstrap, smallest_stratified_margin, stratified

REPLICATES = 2000
DECIMALS = 9  # of log-odds, so that what is equal but for rounding is a tie
AT_ONCE = 1 << 22  # numbers in a chunk of bootstrap replicates


class Resampled(Metric):
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
        worse, better = only_one(self.predicted(seen) != labels, self.predicted(dense) != labels)

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


class F1(Resampled):
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


class Auroc(Resampled):
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
