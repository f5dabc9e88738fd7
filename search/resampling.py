"""Metrics whose only test is the bootstrap: macro F1 and AUROC. Their levels are approximate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from treesurgeon.search.judging import Answers, Comparison, Metric, only_one
from treesurgeon.search.paired import Bootstrap, smallest_unseen, unseen

REPLICATES = 2000
DECIMALS = 9  # of log-odds, so that what is equal but for rounding is a tie
AT_ONCE = 1 << 22  # numbers in a chunk of bootstrap replicates
TINY = np.finfo(np.float64).tiny  # a label that no drawn image has counts as one that is never right


@dataclass(frozen=True, eq=False)
class Marked:
    """What is observed of every image for every class, or label.

    Attributes:
        value: `[N, K]`: whether the answer has it, or a score for it.
        there: `bool[N, K]`: whether it is there.
        wrong: `bool[N]`: whether the answer is wrong.
        strata: `int[N]`: within which images are drawn again.
        several: whether an image can have several labels.
    """

    value: np.ndarray
    there: np.ndarray
    wrong: np.ndarray
    strata: np.ndarray
    several: bool

    def __len__(self) -> int:
        return len(self.there)

    @classmethod
    def of(cls, answers: Answers, value: np.ndarray) -> Marked:
        """With what is known of the images."""
        labels = answers.labels
        several = labels.ndim == 2
        strata = np.zeros(len(labels), int) if several else labels
        return cls(value, marks(labels, value.shape[1]), answers.wrong > 0, strata, several)

    @property
    def present(self) -> np.ndarray:
        """The classes, or labels, that some images have."""
        return np.flatnonzero(self.there.any(0))


def marks(labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Which class, or labels, each image has: `bool[N, K]`."""
    if labels.ndim == 2:
        return labels > 0.5
    return labels[:, None] == (np.unique(labels) if classes is None else np.arange(classes))


class Resampled(Metric):
    """A metric whose only test is the bootstrap: images are drawn again within their classes, as the split was made.

    Images with several labels are drawn again from all.

    A bootstrap that meets no disagreement, or few, would claim too much. So no p-value is below what disagreements that
    did not turn up leave open (see `paired.unseen`), where an image costs as much as it can.
    """

    trust = (
        f"where the level is approximate: a BCa bootstrap of {REPLICATES:,} paired resamples, with no guarantee for "
        "any number of images"
    )
    test = "BCa bootstrap (approximate)"
    approximate = True
    per_class = True
    tasks = ("classification", "multilabel")

    @abstractmethod
    def errors(self, seen: Marked, weights: np.ndarray) -> np.ndarray:
        """The error where image i counts `weights[b, i]` times: `float[B]`; NaN where no class, or label, is there."""

    @abstractmethod
    def influence(self, seen: Marked) -> np.ndarray:
        """What each image does to the error, up to a factor: `float[N]`."""

    @abstractmethod
    def stakes(self, there: np.ndarray, several: bool) -> np.ndarray:
        """The most that the answer to each image can add to the error where all others are right: `float[N]`.

        Args:
            there, several: see `Marked`.
        """

    def error(self, seen: Marked) -> float:
        """The error on all images."""
        return float(self.errors(seen, np.ones((1, len(seen))))[0])

    def compare(self, seen: Marked, dense: Marked) -> Comparison:
        """By bootstrap, the same resamples for both models."""
        observed = self.error(seen) - self.error(dense)
        influence = self.influence(seen) - self.influence(dense)
        test = self._test(seen, observed, influence, lambda drawn: self.errors(seen, drawn) - self.errors(dense, drawn))
        return Comparison(*only_one(seen.wrong, dense.wrong), observed, test)

    def absolute(self, seen: Marked) -> Callable[[float], float]:
        """By bootstrap as well."""
        return self._test(seen, self.error(seen), self.influence(seen), lambda drawn: self.errors(seen, drawn))

    def _test(
        self, seen: Marked, observed: float, influence: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]
    ) -> Callable[[float], float]:
        """The p-value of a statistic by its margin, see `Bootstrap`; `statistic` is of images that are drawn again."""
        rng = np.random.default_rng(0)
        step = max(1, AT_ONCE // len(seen))
        sizes = [min(step, REPLICATES - start) for start in range(0, REPLICATES, step)]
        replicates = np.concatenate([statistic(resampled(seen.strata, size, rng)) for size in sizes])
        found = Bootstrap(observed, replicates, influence)
        stakes, counts = np.unique(self.stakes(seen.there, seen.several), return_counts=True)
        return lambda margin: max(found.p_value(margin), unseen(stakes, counts, observed, margin))

    def smallest_margin(self, labels: np.ndarray, delta: float) -> float:
        """What no disagreement leaves open."""
        stakes = self.stakes(marks(labels), labels.ndim == 2)
        return smallest_unseen(*np.unique(stakes, return_counts=True), delta)

    def outlook(self, epsilon: float, delta: float) -> str:
        """Nothing exact is known."""
        return (
            f"how many images yours ({100 * epsilon:g}) takes is not known beforehand, and the level of this metric's "
            "test (a bootstrap) is approximate"
        )


class F1(Resampled):
    """Macro F1: the mean over classes, or labels, of the harmonic mean of precision and recall."""

    name = "f1"
    noun = "F1 error (1 - macro F1)"
    description = "F1 scores are means over the classes, or labels (macro F1)"

    def observe(self, answers: Answers) -> Marked:
        """Which class, or which labels the answers have; none where a logit is no number."""
        logits = answers.logits
        several = answers.labels.ndim == 2
        value = logits > 0 if several else logits.argmax(-1)[:, None] == np.arange(logits.shape[1])
        return Marked.of(answers, value & ~np.isnan(logits).any(-1, keepdims=True))

    def errors(self, seen: Marked, weights: np.ndarray) -> np.ndarray:
        """From weighted counts of hits, answers and labels."""
        scores = []
        for label in seen.present:
            hits, total = self._counts(seen, weights, label)
            scores.append(2 * hits / np.maximum(total, TINY))
        return 1 - np.mean(scores, 0) if scores else np.full(len(weights), np.nan)

    def influence(self, seen: Marked) -> np.ndarray:
        """The derivative by each image's weight."""
        ones = np.ones((1, len(seen)))
        out = np.zeros(len(seen))
        for label in seen.present:
            hits, total = (value[0] for value in self._counts(seen, ones, label))
            answered, there = seen.value[:, label], seen.there[:, label]
            out -= 2 * (answered & there) / total - 2 * hits / total**2 * (answered.astype(float) + there)
        return _centred(out, seen.strata)

    def stakes(self, there: np.ndarray, several: bool) -> np.ndarray:
        """A hit less of what is there, and a false alarm: for the rarest other class, or for all other labels."""
        count = there.sum(0)
        miss = np.where(count > 0, 1 / np.maximum(2 * count - 1, 1), 0)
        alarm = np.where(count > 0, 1 / (2 * count + 1), 0)
        alarms = np.where(there, 0, alarm)
        return ((there * miss).sum(1) + (alarms.sum(1) if several else alarms.max(1))) / (count > 0).sum()

    @staticmethod
    def _counts(seen: Marked, weights: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
        answered, there = seen.value[:, label], seen.there[:, label]
        return weights @ (answered & there), weights @ (answered.astype(float) + there)


class Auroc(Resampled):
    """Mean over classes, or labels, of the area under the ROC curve of one against the rest.

    Observed are log-odds, which order images as probabilities do and do not saturate. With two classes the two curves
    are one, so that this is the plain AUROC. The influences are the placements of E. DeLong et al., Biometrics 1988.
    """

    name = "auroc"
    noun = "AUROC error (1 - AUROC)"
    description = "AUROCs are of one class, or label, against the rest, means over them"

    def observe(self, answers: Answers) -> Marked:
        """Log-odds `float[N, K]`."""
        logits = np.nan_to_num(answers.logits.astype(np.float64))
        if answers.labels.ndim == 2:
            return Marked.of(answers, logits.round(DECIMALS))
        shifted = logits - logits.max(1, keepdims=True)
        powers = np.exp(shifted)
        rest = powers.sum(1, keepdims=True) - powers
        rows, top = np.arange(len(logits)), shifted.argmax(1)
        others = powers.copy()
        others[rows, top] = 0
        rest[rows, top] = others.sum(1)  # without the cancellation that the largest one suffers
        odds = shifted - np.log(np.maximum(rest, TINY))
        return Marked.of(answers, odds.round(DECIMALS))

    def errors(self, seen: Marked, weights: np.ndarray) -> np.ndarray:
        """Pairs in the wrong order, ties half, from cumulative weights in the order of the scores."""
        out = np.zeros(len(weights))
        for label in seen.present:
            order = np.argsort(seen.value[:, label], kind="stable")
            scores, there = seen.value[order, label], seen.there[order, label]
            sorted_weights = weights[:, order]
            positive, negative = sorted_weights * there, sorted_weights * ~there
            starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
            if len(starts) < len(order):
                positive, negative = (np.add.reduceat(part, starts, 1) for part in (positive, negative))
            above = negative.sum(1, keepdims=True) - negative.cumsum(1) + negative / 2
            out += (positive * above).sum(1) / np.maximum(positive.sum(1) * negative.sum(1), TINY)
        return out / len(seen.present) if len(seen.present) else np.full(len(weights), np.nan)

    def influence(self, seen: Marked) -> np.ndarray:
        """Each image's share of pairs in the wrong order, by the images of its side."""
        out = np.zeros(len(seen))
        for label in seen.present:
            there, scores = seen.there[:, label], seen.value[:, label]
            positive, negative = np.sort(scores[there]), np.sort(scores[~there])
            above = 1 - _midrank(negative, scores[there])
            below = _midrank(positive, scores[~there])
            out[there] += (above - above.mean()) / len(positive)
            out[~there] += (below - below.mean()) / len(negative)
        return _centred(out, seen.strata)

    def stakes(self, there: np.ndarray, several: bool) -> np.ndarray:
        """From one end of the order to the other, for every class or label."""
        count, rest = there.sum(0), (~there).sum(0)
        both = (count > 0) & (rest > 0)
        each = np.where(there, 1 / np.maximum(count, 1), 1 / np.maximum(rest, 1))
        return (each * both).sum(1) / max(both.sum(), 1)


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
