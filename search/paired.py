"""Paired one-sided tests: two models answer the same images, and how much worse one of them is has a margin.

Each gives the p-value of H0: the difference of the errors, the variant's less the dense model's, is at least `margin`.
The claim that it is below the margin holds at every level above the p-value.

| test | of | holds |
|---|---|---|
| `tango` | shares of wrong answers | asymptotically (score test) |
| `stratified` | weighted sums of such shares | asymptotically in the images of each class |
| `betting` | means of bounded values | for any number of independent images |
| `Bootstrap` | any statistic | approximately (BCa) |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.optimize import root_scalar

POWER = 0.8
BETS = 24
SMALLEST_BET = 1e-3  # of the largest one
HALVINGS = 50
ENDS = 30  # halvings for the ends of an interval
NORMAL = NormalDist()


def tango(worse: int, better: int, count: int, margin: float) -> float:
    """Tango's test of H0: the difference of two error rates on the same images is at least `margin`.

    T. Tango: "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 1998.

    Args:
        worse: images that only the variant gets wrong.
        better: images that only the dense model gets wrong.
        count: images.
        margin: above -1 and below 1.

    Returns:
        The p-value: the claim that the difference is below the margin holds at every level above it.
    """
    if not -1 < margin < 1:
        return 0.0 if margin >= 1 else 1.0
    if margin < 0:  # the same test with the models exchanged: the constrained estimate is then that of the other cell
        return 1 - tango(better, worse, count, -margin)
    a = 2 * count
    b = -worse - better + (2 * count - worse + better) * margin
    c = -better * margin * (1 - margin)
    only_dense = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = count * (2 * only_dense + margin * (1 - margin))
    if variance <= 0:
        return 1.0
    return NORMAL.cdf((worse - better - count * margin) / math.sqrt(variance))


def smallest_margin(count: int, delta: float) -> float:
    """The least ε at which a variant passes that answers every one of `count` images as the dense model does."""
    z = NORMAL.inv_cdf(1 - delta)
    return z * z / (count + z * z)


def images_needed(margin: float, delta: float, disagreement: float, power: float = POWER) -> int:
    """Images on which a variant as good as the dense model passes with this chance.

    Args:
        margin: ε.
        delta: the level.
        disagreement: share of the images that exactly one of the two models gets wrong.
        power: the chance to pass.
    """
    spread = math.sqrt(max(disagreement, margin * (1 - margin)))
    return math.ceil(((NORMAL.inv_cdf(1 - delta) + NORMAL.inv_cdf(power)) * spread / margin) ** 2)


def stratified(worse: np.ndarray, better: np.ndarray, counts: np.ndarray, margin: float) -> float:
    """Tango's test for the mean over classes of the difference of two error rates; the same test where there is one.

    The score statistic: the mean difference less the margin, over its standard deviation at the probabilities that make
    the answers likeliest among those whose mean difference is the margin. These come from one Lagrange multiplier, and
    within a class from the one that makes its probabilities sum to 1; both are roots of monotone functions.
    Asymptotic in the number of images of every class.

    Args:
        worse: `int[classes]`, images that only the variant gets wrong.
        better: `int[classes]`, images that only the dense model gets wrong.
        counts: `int[classes]`, images, at least 1.
        margin: above -1 and below 1.
    """
    if not -1 < margin < 1:
        return 0.0 if margin >= 1 else 1.0
    worse, better, counts = (np.asarray(v, np.float64) for v in (worse, better, counts))

    def excess(tilt: float) -> float:
        return _tilted(worse, better, counts, tilt)[2].mean() - margin

    reach = 2.0 * counts.max()
    while excess(reach) < 0 or excess(-reach) > 0:
        reach *= 4
    p, q, difference = _tilted(worse, better, counts, root_scalar(excess, bracket=(-reach, reach)).root)
    variance = ((p + q - difference**2) / counts).sum() / len(counts) ** 2
    if variance <= 0:
        return 1.0
    observed = ((worse - better) / counts).mean()
    return NORMAL.cdf((observed - margin) / math.sqrt(variance))


def smallest_stratified_margin(counts: np.ndarray, delta: float) -> float:
    """The least ε at which a variant passes `stratified` that answers every image as the dense model does.

    Without a disagreement the multiplier has a closed form: the smallest classes take all of the margin.
    """
    counts = np.asarray(counts, np.float64)
    z, low, high = NORMAL.inv_cdf(1 - delta), 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        p = np.maximum(0, 1 - counts * (1 - middle) / counts.min())
        passes = p.sum() > z * math.sqrt((p * (1 - p) / counts).sum())
        low, high = (low, middle) if passes else (middle, high)
    return float(np.maximum(0, 1 - counts * (1 - high) / counts.min()).mean())


def _tilted(
    worse: np.ndarray, better: np.ndarray, counts: np.ndarray, tilt: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In each class the p, q that maximise the log-likelihood + tilt·(p - q), and p - q."""
    for_better = abs(tilt)
    rises, falls = (worse, better) if tilt >= 0 else (better, worse)  # the cell that the tilt makes likelier, the other
    same = counts - worse - better
    low, high = np.full(len(counts), for_better), for_better + counts

    def total(at: np.ndarray) -> np.ndarray:
        gap = np.maximum(at - for_better, 1e-300)
        return np.where(rises > 0, rises / gap, 0) + falls / (at + for_better) + same / at

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = total(middle) > 1
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    less = falls / (high + for_better)
    more = np.clip(1 - less - same / high, 0, 1)
    return (more, less, more - less) if tilt >= 0 else (less, more, less - more)


def betting(differences: np.ndarray, bound: float, margin: float) -> float:
    """A test by betting that the mean of bounded differences is at least `margin`; it holds for any number of images.

    Were the mean at least the margin, betting a fixed share of one's wealth against that on each image would not gain
    on average, so the mean wealth of several such bettors exceeds 1/p with a chance of at most p (Markov's inequality).
    The bets are spread evenly on a scale of logarithms, up to what the largest difference cannot ruin. The order of the
    images does not matter. I. Waudby-Smith, A. Ramdas: "Estimating means of bounded random variables by betting", JRSS
    B 2024 (arXiv 2010.09686).

    Args:
        differences: `float[N]` of independent images, each from -bound to bound.
        bound: above 0.
        margin: what the mean is tested against.
    """
    if not -bound < margin < bound:
        return 0.0 if margin >= bound else 1.0
    largest = 0.99 / (bound - margin)
    bets = largest * np.geomspace(SMALLEST_BET, 1, BETS)
    wealth = np.array([np.log1p(bet * (margin - differences)).sum() for bet in bets])
    top = wealth.max()
    return float(min(1.0, math.exp(-min(top + math.log(np.exp(wealth - top).mean()), 700.0))))


def interval(
    above: Callable[[float], float], below: Callable[[float], float], reach: float, level: float = 0.95
) -> tuple[float, float]:
    """The differences of two models that neither of two one-sided tests rejects.

    Args:
        above: p-value of H0: the difference is at least this.
        below: p-value of H0: the difference the other way round is at least this.
        reach: the largest difference there can be.
        level: of the interval; each test is made at half of what is left.
    """
    alpha = (1 - level) / 2

    def least(p_value: Callable[[float], float]) -> float:
        low, high = -reach, reach
        for _ in range(ENDS):
            middle = (low + high) / 2
            low, high = (low, middle) if p_value(middle) <= alpha else (middle, high)
        return high

    return -least(below), least(above)


@dataclass(frozen=True)
class Bootstrap:
    """The bootstrap distribution of a difference, and B. Efron's bias-corrected and accelerated p-values.

    B. Efron: "Better bootstrap confidence intervals", JASA 1987. Approximate: nothing bounds how far it is off.

    Attributes:
        observed: the difference on all images.
        replicates: `float[B]`, on images drawn with replacement, the same ones for both models.
        influence: `float[N]`, what each image does to the difference (up to a factor): its skewness accelerates.
    """

    observed: float
    replicates: np.ndarray
    influence: np.ndarray

    def p_value(self, margin: float) -> float:
        """Of H0: the difference is at least `margin`: the level whose upper bound is the margin."""
        bias = self._normal(self.observed)
        shifted = self._normal(margin) - bias
        scale = 1 + self.acceleration * shifted
        if scale <= 0:  # beyond where the transformation turns: the bound does not exist
            return 1.0 if shifted < 0 else float(1 / (len(self.replicates) + 1))
        return float(np.clip(1 - NORMAL.cdf(shifted / scale - bias), 1 / (len(self.replicates) + 1), 1))

    @property
    def acceleration(self) -> float:
        """A sixth of the skewness of the influences."""
        centred = self.influence - self.influence.mean()
        spread = (centred**2).sum()
        return float((centred**3).sum() / (6 * spread**1.5)) if spread > 0 else 0.0

    def _normal(self, at: float) -> float:
        """The normal quantile of the share of replicates below `at`; those equal to it count half."""
        count = len(self.replicates)
        below = (self.replicates < at).sum() + 0.5 * (self.replicates == at).sum()
        return NORMAL.inv_cdf(float(np.clip(below, 0.5, count - 0.5) / count))
