"""Paired one-sided tests: two models answer the same images, and how much worse one of them is has a margin.

Each gives the p-value of H0: the difference of the errors, the variant's less the dense model's, is at least `margin`.
The claim that it is below the margin holds at every level above the p-value.

| test | of | holds |
|---|---|---|
| `exact` | shares of wrong answers | for any number of independent images |
| `stratified` | weighted sums of such shares | asymptotically in the images of each class |
| `betting` | means of bounded values | for any number of independent images |
| `Bootstrap` | any statistic | approximately (BCa) |

The error of one model by itself is tested against a bound by the same, beside answers that are all right; a share of
wrong answers by `binomial`, exactly. `unseen` is what disagreements that did not turn up leave open: a floor for the
p-values of the approximate ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import bdtr, betaincinv

POWER = 0.8
OUTSIDE = 1e-4  # chance that the share of gained images is not among those that `exact` tries
SHARES = 64  # that it tries
TAIL = 1e-10  # of a binomial distribution, that is left out
FAR = 12  # standard deviations, beyond which nothing is left
FINE = 256  # cells of `unseen`'s lattice up to the largest stake
BETS = 24
SMALLEST_BET = 1e-3  # of the largest one
HALVINGS = 50
ENDS = 30  # halvings for the ends of an interval
NORMAL = NormalDist()


def score(worse: Any, better: Any, count: int, margin: float) -> np.ndarray:
    """Tango's statistic: the difference of two error rates on the same images less the margin, in standard deviations.

    The deviation is the one where the answers are likeliest among those whose expected difference is the margin.
    T. Tango: "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 1998.

    Args:
        worse: images that only the variant gets wrong, a number or an array of them.
        better: images that only the dense model gets wrong, likewise.
        count: images.
        margin: above -1 and below 1.
    """
    if margin < 0:  # the models exchanged: the constrained estimate is then that of the other cell
        return -score(better, worse, count, -margin)
    a = 2 * count
    b = -worse - better + (2 * count - worse + better) * margin
    c = -better * margin * (1 - margin)
    only_dense = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = count * (2 * only_dense + margin * (1 - margin))
    above = worse - better - count * margin
    return np.where(variance > 0, above / np.sqrt(np.where(variance > 0, variance, 1)), 0.0)


@lru_cache(maxsize=1 << 14)
def exact(worse: int, better: int, count: int, margin: float) -> float:
    """An exact test of H0: the difference of two error rates on the same images is at least `margin`.

    The chance of a score (see `score`) as low as the observed one, the largest over what H0 leaves open: the share of
    images that the variant gains. Of these shares, those within an interval of confidence 1 - `OUTSIDE` are tried, on a
    grid, and `OUTSIDE` is added. The score by itself, against the normal distribution, is asymptotic: of a variant that
    only loses images it claims falsely up to about twice as often as its level says.

    K. Sidik: "Exact unconditional tests for testing non-inferiority in matched-pairs design", Statistics in Medicine
    2003. R. Berger, D. Boos: "P values maximized over a confidence set for the nuisance parameter", JASA 1994.

    Args:
        worse: images that only the variant gets wrong.
        better: images that only the dense model gets wrong.
        count: images.
        margin: above -1 and below 1.

    Returns:
        The p-value: the claim that the difference is below the margin holds at every level above it.
    """
    from scipy.stats import binom  # takes most of a second to import

    if not -1 < margin < 1:
        return 0.0 if margin >= 1 else 1.0
    least = betaincinv(better, count - better + 1, OUTSIDE / 2) if better else 0.0
    most = betaincinv(better + 1, count - better, 1 - OUTSIDE / 2) if better < count else 1.0
    ends = np.clip([least, most], max(-margin, 0.0), (1 - margin) / 2)
    gained = np.linspace(math.sqrt(ends[0]), math.sqrt(ends[1]), SHARES) ** 2
    first, last = int(binom.ppf(TAIL, count, gained[0])), int(binom.ppf(1 - TAIL, count, gained[-1]))
    gains = np.arange(first, last + 1)
    as_low = float(score(worse, better, count, margin)) + 1e-9
    losses, most_losses = np.full(len(gains), -1), count - gains  # the most with a score as low
    while (losses < most_losses).any():
        middle = (losses + most_losses + 1) // 2
        lower = score(middle, gains, count, margin) <= as_low
        losses, most_losses = np.where(lower, middle, losses), np.where(lower, most_losses, middle - 1)
    lost = np.clip((gained + margin) / np.maximum(1 - gained, 1e-300), 0, 1)[:, None]  # of the images not gained
    chances = np.where(losses < 0, 0.0, bdtr(np.maximum(losses, 0), count - gains, lost))
    return float(min(1.0, (binom.pmf(gains, count, gained[:, None]) * chances).sum(1).max() + OUTSIDE))


def binomial(wrong: int, count: int, bound: float) -> float:
    """The exact test of H0: the error rate of one model is at least `bound`, by the binomial distribution's tail.

    Args:
        wrong: images that it gets wrong.
        count: images.
        bound: what the rate is tested against.
    """
    return float(bdtr(wrong, count, min(bound, 1.0))) if bound > 0 else 1.0


def smallest_margin(count: int, delta: float) -> float:
    """The least ε at which a variant passes `exact` that answers each of `count` images as the dense model does."""
    return _least(lambda margin: exact(0, 0, count, margin), delta)


def unseen(stakes: np.ndarray, counts: np.ndarray, observed: float, margin: float) -> float:
    """The chance to lose no more than `observed` where nothing is gained and the expected loss is `margin`.

    An image that answers otherwise than the dense model's costs its stake. How likely each kind of image does is what
    makes it likeliest that none is seen; for one kind this is the binomial distribution's tail.

    Args:
        stakes: `float[K]`, what an image of each kind costs at most; on a lattice of 1/256 of the largest.
        counts: `float[K]`, images of each kind.
        observed: the loss. Of one below 0 it is asked what it would take to bring it to the margin: nothing was seen of
            that.
        margin: the expected loss.
    """
    observed, margin = max(observed, 0.0), margin - min(observed, 0.0)
    unit = float(np.max(stakes)) / FINE
    cells, kind = np.unique(np.rint(np.asarray(stakes) / unit).astype(int), return_inverse=True)
    cells, counts = cells[::-1], np.bincount(kind, counts)[::-1]  # the largest stakes first
    counts, cells = counts[cells > 0], cells[cells > 0]
    common = np.gcd.reduce(cells)
    cells, unit = cells // common, unit * common
    wanted = margin / unit
    if wanted <= 0 or wanted >= (cells * counts).sum():
        return 0.0 if wanted > 0 else 1.0
    # Chances of 1 - 1/(tilt·stake), where that is above 0, by a Lagrange multiplier: those of the largest stakes alone.
    held, many = (cells * counts).cumsum(), counts.cumsum()
    tilts = np.where(held > wanted, many / np.maximum(held - wanted, 1e-300), np.inf)
    tilt = tilts[np.argmax(tilts * np.append(cells[1:], 0) <= 1)]
    chances = np.maximum(0, 1 - 1 / (tilt * cells))
    reach = math.floor(observed / unit + 1e-6)
    spread = math.sqrt((counts * chances * (1 - chances) * cells**2).sum())
    if abs(reach - wanted) > FAR * spread:
        return float(reach > wanted)
    size = 1 << math.ceil(math.log2(wanted + FAR * (spread + cells[0]) + reach))
    turns = 2j * np.pi * np.arange(size) / size
    with np.errstate(divide="ignore"):  # a factor of 0 has the logarithm -∞
        kinds = zip(counts, chances, cells, strict=True)
        logs = sum(n * np.log1p(p * np.expm1(turns * k)) for n, p, k in kinds if p > 0)
    return float(np.clip(np.fft.fft(np.exp(logs)).real[: reach + 1].sum() / size, 0, 1))


def smallest_unseen(stakes: np.ndarray, counts: np.ndarray, delta: float) -> float:
    """The least margin of which `unseen` is at most δ where nothing was lost."""
    return _least(lambda margin: unseen(stakes, counts, 0.0, margin), delta)


def _least(p_value: Callable[[float], float], delta: float) -> float:
    """The least margin from 0 to 1 with a p-value of δ or less."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(middle) <= delta else (middle, high)
    return high


def images_needed(margin: float, delta: float, disagreement: float, power: float = POWER) -> int:
    """Images on which a variant as good as the dense model passes with this chance.

    Args:
        margin: ε.
        delta: the level.
        disagreement: share of the images that exactly one of the two models gets wrong.
        power: the chance to pass.
    """
    spread = math.sqrt(max(disagreement, margin * (1 - margin)))
    passing = ((NORMAL.inv_cdf(1 - delta) + NORMAL.inv_cdf(power)) * spread / margin) ** 2
    return math.ceil(max(passing, math.log(delta) / math.log1p(-min(margin, 0.99))))  # or so many, if none disagrees


def stratified(worse: np.ndarray, better: np.ndarray, counts: np.ndarray, margin: float) -> float:
    """A score test for the mean over classes of the difference of two error rates; with one class, by Tango's `score`.

    The score statistic: the mean difference less the margin, over its standard deviation at the probabilities that make
    the answers likeliest among those whose mean difference is the margin. These come from one Lagrange multiplier, and
    within a class from the one that makes its probabilities sum to 1; both are roots of monotone functions.
    Asymptotic in the number of images of every class. By itself it claims too often of a variant that only loses images
    of the smallest classes; so no p-value is below what disagreements that did not turn up leave open (see `unseen`).

    Args:
        worse: `int[classes]`, images that only the variant gets wrong.
        better: `int[classes]`, images that only the dense model gets wrong.
        counts: `int[classes]`, images, at least 1.
        margin: above -1 and below 1.
    """
    from scipy.optimize import root_scalar  # takes half a second to import

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
    observed = float(((worse - better) / counts).mean())
    stakes = 1 / (len(counts) * counts)
    return max(NORMAL.cdf((observed - margin) / math.sqrt(variance)), unseen(stakes, counts, observed, margin))


def smallest_stratified_margin(counts: np.ndarray, delta: float) -> float:
    """The least ε at which a variant passes `stratified` that answers every image as the dense model does."""
    none, counts = np.zeros(len(counts)), np.asarray(counts, np.float64)
    return _least(lambda margin: stratified(none, none, counts, margin), delta)


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
