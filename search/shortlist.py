"""From a shortlist to finalists: successive halving, by what candidates are worth refitted, then fine-tuned a little.

K. Jamieson, A. Talwalkar: "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from treesurgeon.search import hosts
from treesurgeon.search.finalists import Pick, appraise
from treesurgeon.search.setting import Setting
from treesurgeon.search.state import States
from treesurgeon.search.tuning import Tuned
from treesurgeon.search.workers import Crew, Job


def halved(
    setting: Setting, picks: Sequence[Pick], states: States, crew: Crew | None, say: Callable[[str], None]
) -> tuple[list[int], dict[int, Tuned]]:
    """Which candidates of a shortlist become finalists, and those that were refitted in this process.

    All are refitted. The better half of them, if that is more than there are to be finalists, is fine-tuned for an
    epoch, and the best of these go on.
    """
    count, half = setting.config.finalists, -(-len(picks) // 2)
    short = setting.recipe.epochs > 1 and half > count
    made: dict[int, Tuned] = {}
    on = setting.judges

    def losses(name: str, which: Sequence[int], epochs: int) -> np.ndarray:
        def measure() -> dict[str, np.ndarray]:
            return {"losses": np.array(appraised(setting, picks, which, epochs, crew, made))}

        return states.arrays(name, measure)["losses"]

    best = chosen(losses("shortlist", range(len(picks)), 0), half if short else count, f"refitted, loss on {on}", say)
    if short:
        found = chosen(losses("shortlist_tuned", best, 1), count, f"fine-tuned for an epoch, loss on {on}", say)
        best = [best[i] for i in found]
    return best, made


def appraised(
    setting: Setting,
    picks: Sequence[Pick],
    which: Sequence[int],
    epochs: int,
    crew: Crew | None,
    made: dict[int, Tuned],
) -> list[float]:
    """The losses of these candidates, each computed by one of the pool; what is refitted in this process is noted."""
    if crew:
        return list(crew.done([Job("appraise", (picks[i], epochs)) for i in which]))

    def one(k: int) -> float:
        i = which[k]
        loss, made[i] = appraise(setting, picks[i], epochs, made.get(i))
        return loss

    return hosts.shared(len(which), one)


def chosen(losses: np.ndarray, count: int, what: str, say: Callable[[str], None]) -> list[int]:
    """Of a shortlist, the numbers of those with the lowest loss, best first; `what` was done with them."""
    order = np.argsort(losses, kind="stable")  # what is not a number comes last
    low, high = losses[order[[0, -1]]]
    say(f"{len(losses)} candidates {what} {low:.4f} to {high:.4f}: {count} go on (--shortlist)")
    return order[:count].tolist()
