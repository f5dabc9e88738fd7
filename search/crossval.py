"""Where `certify` is too small for ε: repeated stratified cross-validation, which is an estimate and no certificate.

`search` and `certify` together are the pool; `test` stays closed. A finalist is what a fixed sequence of steps on
`train` makes of a plan, and of the pool it has seen one thing since: `search` chose the epoch it is kept from. That
choice is what is repeated. Every image of a fold is answered by the epoch that is best on the other folds, as `search`
chose the frozen one; nothing is fitted to the pool, by which a variant would learn what the dense model never saw, and
one fine-tuning serves all folds, since they share its steps. Without fine-tuning nothing was chosen, and the folds
serve the interval alone.

The dense model answers the same folds, where it is fine-tuned itself from the epoch that `search` chose: as it is
frozen, which is in its favour. Folds share most of the images that epochs are chosen on, so the variance of the
mean over K folds, repeated R times, is taken as s² (1/(K R) + 1/(K - 1)): C. Nadeau, Y. Bengio: "Inference for the
generalization error", Machine Learning 2003; for repeats R. Bouckaert, E. Frank, PAKDD 2004. Where hardly an answer
differs that variance is next to 0, which so many images do not show: no interval of counted
answers is narrower than what a test on them could show (`Metric.smallest_margin`).

What stays optimistic: the plans themselves were searched on images of `search`, which also chose from a shortlist,
where to truncate, a new head's hidden units and the epoch of the dense model that teaches; none of this is repeated. Of
several finalists, one is chosen by these very estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from treesurgeon.search.data import Split
from treesurgeon.search.metrics import Answers, Metric
from treesurgeon.search.setting import Setting
from treesurgeon.search.tasks import class_counts
from treesurgeon.search.unlabelled import answered, merged


@dataclass(frozen=True)
class Estimate:
    """How a finalist compares with the dense model on images that had no part in choosing its epoch.

    Attributes:
        difference: of the errors, less the dense model's, the mean over folds.
        low, high: an interval for it of level 1 - 2δ.
        dense_error: of the dense model, the mean over folds.
        epochs: that were kept, one for each fold.
    """

    difference: float
    low: float
    high: float
    dense_error: float
    epochs: tuple[int, ...]

    @property
    def error(self) -> float:
        """Of the finalist, the mean over folds."""
        return self.dense_error + self.difference


def needed(setting: Setting) -> bool:
    """Whether a certificate is wanted and `certify` cannot show ε, even of one that answers as the dense model."""
    config, roles = setting.config, setting.roles
    if not config.certify or not roles.clean:
        return False
    return config.judged_by.smallest_margin(roles.certify.labels, config.delta) > config.epsilon


def pool(setting: Setting) -> Split:
    """The images of `search` and `certify`; after them those without labels that fine-tuning is judged on."""
    both = merged(setting.roles.search, setting.roles.certify)
    return merged(both, answered(setting, setting.held)) if setting.held else both


def fold_count(setting: Setting) -> int:
    """Folds: fewer than asked for where there are fewer images, of any class where every class counts alike."""
    config, roles = setting.config, setting.roles
    labels = np.concatenate([roles.search.labels, roles.certify.labels])
    images = int(class_counts(labels).min()) if config.judged_by.per_class else len(labels)
    return max(2, min(config.cv_folds, images))


def deal(strata: np.ndarray, count: int, seed: int, repeat: int) -> np.ndarray:
    """The fold of each image, `int[N]`: a stratum is dealt out one by one, where the one before has ended."""
    order = np.argsort(np.random.PCG64([seed, repeat]).random_raw(len(strata)), kind="stable")
    by_stratum = order[np.argsort(strata[order], kind="stable")]
    folds = np.empty(len(strata), int)
    folds[by_stratum] = np.arange(len(strata)) % count
    return folds


def cross_validate(
    trail: Sequence[Answers],
    dense: Answers,
    metric: Metric,
    *,
    folds: int,
    repeats: int,
    seed: int,
    delta: float,
    judges: int = 0,
) -> Estimate:
    """Compare a finalist with the dense model.

    Folds in which the dense model's error is not defined are left out.

    Args:
        trail: its answers to the pool after each epoch, before any first.
        dense: the dense model's.
        metric: what errors are of.
        folds: 2 or more.
        repeats: 1 or more, each with other folds.
        seed: of the folds.
        delta: level of either end of the interval.
        judges: the last so many images are in no fold: every choice of an epoch is made with them.
    """
    count = len(dense.labels) - judges
    differences, dense_errors, kept, strata = [], [], [], dense.task.fold_strata(dense.labels[:count])
    for repeat in range(repeats):
        at = deal(strata, folds, seed, repeat)
        for fold in range(folds):
            held = np.flatnonzero(at == fold)
            others = np.setdiff1d(np.arange(count + judges), held)
            best = min(range(len(trail)), key=lambda epoch, rows=others: _merit(trail[epoch][rows], metric))
            errors = [metric.error(metric.observe(answers[held])) for answers in (trail[best], dense)]
            if math.isnan(errors[1]):  # there are fewer labels than folds, and none in this one
                continue
            differences.append(errors[0] - errors[1])
            dense_errors.append(errors[1])
            kept.append(best)
    tries, mean = len(differences), float(np.mean(differences))
    deviation = math.sqrt(np.var(differences, ddof=1) * (1 / tries + 1 / (folds - 1)))
    least = metric.smallest_margin(dense.labels[:count], delta)  # no images show less, not even of the same answers
    half = max(float(stdtrit(tries - 1, 1 - delta)) * deviation, 0.0 if metric.loss else least)
    return Estimate(mean, mean - half, mean + half, float(np.mean(dense_errors)), tuple(kept))


def sentence(setting: Setting, estimate: Estimate | None, name: str, dense: str) -> str:
    """What was done, and what it found of the chosen variant; None where that is what variants are compared with."""
    config, metric = setting.config, setting.config.judged_by
    count = len(setting.roles.search) + len(setting.roles.certify)
    times = "once" if config.cv_repeats == 1 else f"{config.cv_repeats} times"
    how = (
        f"Instead {fold_count(setting)}-fold cross-validation, {times}, on the {count:,} images of search and certify "
        f"compared the variants with {dense}"
    )
    found = ""
    if estimate is not None:
        low, high = (metric.scale * end for end in (estimate.low, estimate.high))
        digits = 2 if metric.rising else 4
        found = (
            f": {metric.amount(estimate.difference, sign=True)} for {name}, {1 - 2 * config.delta:.0%} interval "
            f"{low:+.{digits}f} to {high:+.{digits}f} (Nadeau-Bengio)"
        )
    return f"{how}{found}. That is an estimate and no certificate: the variants were searched on some of these images."


def _merit(answers: Answers, metric: Metric) -> tuple[float, float]:
    """As fine-tuning chooses: the error, then the loss; what is not a number comes last."""
    pair = metric.error(metric.observe(answers)), float(answers.losses.mean())
    return (math.inf, math.inf) if math.isnan(sum(pair)) else pair
