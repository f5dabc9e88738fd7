"""Racing: a candidate that is clearly beaten is not shown the rest of the images.

A candidate is beaten when another one, no larger, has a lower loss on the same images beyond doubt: the mean of the
paired differences, image by image, lies more than z standard errors above zero. z is taken at level α shared out over
all comparisons a candidate can meet, so that it is dropped wrongly with a chance of at most α (by the normal
approximation: batches hold a hundred images or so).

O. Maron, A. Moore: "Hoeffding races: accelerating model selection search for classification and function
approximation", NIPS 1993.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import jax
import numpy as np

ALPHA = 0.01


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class References:
    """The best candidates that saw every image, against which others race; unused rows have size inf."""

    size: np.ndarray  # float32[R]
    losses: np.ndarray  # float32[R, N]

    @staticmethod
    def empty(count: int, images: int) -> References:
        """No references yet, room for `count`."""
        return References(np.full(count, np.inf, np.float32), np.zeros((count, images), np.float32))

    def joined(self, size: np.ndarray, losses: np.ndarray) -> References:
        """With the candidates that saw every image; what others dominate goes first, then what is lossy."""
        whole = ~np.isnan(losses).any(1)
        every_size = np.concatenate([self.size, size[whole]]).astype(np.float32)
        every_loss = np.concatenate([np.asarray(self.losses), losses[whole]])
        mean = every_loss.mean(1)
        beaten = ((every_size[:, None] >= every_size) & (mean[:, None] > mean)).any(1)
        order = np.lexsort((mean, beaten, np.isinf(every_size)))[: len(self.size)]
        return References(every_size[order], every_loss[order])


def judge(
    size: np.ndarray,
    losses: np.ndarray,
    references: References,
    looks: int,
    alpha: float = ALPHA,
    best: int = 1,
) -> np.ndarray:
    """Which candidates go on, `bool[P]`; those that are out do not.

    Args:
        size: `float[P]`.
        losses: `float[P, n]` on the images so far, NaN for candidates that are out.
        references: losses on all images.
        looks: how often a candidate is judged at most.
        alpha: chance at most that a candidate is dropped which nothing beats (fewer than `best` do).
        best: how many others have to beat a candidate beyond doubt.
    """
    n = losses.shape[1]
    going = np.asarray(~np.isnan(losses).any(1))
    known, mine = np.isfinite(references.size), size[going]
    if n < 2 or not len(mine):
        return going
    others = np.concatenate([losses[going], np.asarray(references.losses)[known, :n]]).astype(np.float64)
    sizes = np.concatenate([mine, np.asarray(references.size)[known]])
    z = NormalDist().inv_cdf(1 - alpha / (looks * max(len(losses) + int(known.sum()) - 1, 1)))
    with np.errstate(invalid="ignore"):  # an infinite loss is no proof
        means, together = others.mean(1), np.atleast_2d(np.cov(others))
        alone = np.diag(together)
        variance = np.maximum(alone[: len(mine), None] + alone - 2 * together[: len(mine)], 0)  # of differences
        worse = means[: len(mine), None] - means > z * np.sqrt(variance / n)
    going[going] = (worse & (sizes <= mine[:, None])).sum(1) < best
    return going


def estimates(losses: np.ndarray, references: References) -> np.ndarray:
    """Mean losses `float[P]`: for candidates that were dropped, the mean of what they saw, less how hard that was."""
    whole = ~np.isnan(losses).any(1)
    yardstick = np.concatenate([losses[whole], np.asarray(references.losses)[np.isfinite(references.size)]])
    hard = yardstick.mean(0) if len(yardstick) else np.zeros(losses.shape[1])
    out = np.full(len(losses), np.inf)
    for i, mine in enumerate(losses):
        seen = ~np.isnan(mine)
        if seen.any():
            out[i] = mine[seen].mean() + hard.mean() - hard[seen].mean()
    return out
