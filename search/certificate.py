"""The certificate: a claim about new data, at a level that was set before the data were seen.

Frozen finalists are tested on `certify`, which nothing else has looked at, against two nulls each, both at level δ:

- *no worse*: the error exceeds the dense model's by ε or more;
- *no wider*: the gap (error on `certify` less error on `train`) exceeds the dense model's by η or more. What a frozen
  model does on `train` is a constant, so this too is a claim about the difference of the errors on `certify`. With an
  absolute allowance it is that the gap is as large as this or larger, a claim about the variant's own error.

A variant has to pass both (an intersection-union test, which needs no correction). They are tested in a fixed order,
from large to small, up to the first that fails, those left out that a smaller one beats on `search`: the chance of any
false claim is at most δ, however many candidates the search has looked at. S. Bauer: "Multiple testing in clinical
trials", 1991; A. Angelopoulos et al.: "Learn then test", 2021 (arXiv 2110.01052).

Errors of two models on the same images are paired, and the test is the metric's (see metrics.py). For accuracy that is
an exact one by T. Tango's score (see `paired.exact`); `benchmarks/certificate.py` measures how often the certificate
claims falsely. Failing to find a difference is no evidence that there is none, so McNemar's test would not do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from treesurgeon.search.metrics import ACCURACY, Metric
from treesurgeon.search.openings import claim_opening
from treesurgeon.search.paired import exact as p_value
from treesurgeon.search.paired import images_needed, smallest_margin
from treesurgeon.search.selection import Finalist

__all__ = [
    "Certificate",
    "Step",
    "certify",
    "claim_opening",
    "images_needed",
    "not_certified",
    "p_value",
    "smallest_margin",
    "undominated",
]


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `count` cases, at 95 %: E. B. Wilson: "Probable inference", JASA 1927."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True)
class Step:
    """One variant on `certify`.

    Attributes:
        name: the variant's.
        worse, better: images that only it, that only the dense model gets wrong (see `judging.Comparison`).
        difference: of the errors on `certify`, less the dense model's.
        margins: those it was tested against: of the difference ε and that of the gap; with an absolute allowance the
            second one is of the error itself.
        p_values: of the two tests.
        passed: whether both are at most δ.
    """

    name: str
    worse: int
    better: int
    difference: float
    margins: tuple[float, float]
    p_values: tuple[float, float]
    passed: bool


@dataclass(frozen=True)
class Certificate:
    """What can be said about new data.

    Attributes:
        valid: whether `certify` was opened, once, and the tests were made.
        selected: the last that passed, the dense model if none did; with a budget the one that was tested.
        passed: whether the selected variant passed. The dense model does by definition, but for an absolute allowance:
            that it keeps it is not tested.
        steps: the tests in their order.
        count: images of `certify`.
        delta: the level.
        sentence: the outcome, or why there is none.
        metric, test: what the errors are of, and how they were compared.
        approximate: whether the level is no more than about right (see `judging.Metric`).
    """

    valid: bool
    selected: str
    passed: bool
    steps: tuple[Step, ...]
    count: int
    delta: float
    sentence: str
    metric: str = ACCURACY.name
    test: str = ACCURACY.test
    approximate: bool = False


def undominated(
    finalists: Sequence[Finalist],
    dense: Finalist,
    epsilon: float,
    eta: float,
    measure: str,
    gap_max: float | None = None,
) -> list[Finalist]:
    """The finalists that no smaller one beats, by how far within its margins each is on `search`.

    To test another one could only end the walk before it gets to the smaller one. Of those left, a larger one is
    farther within its margins than every smaller one.

    Args:
        finalists: the variants, frozen.
        dense: the model that they come from.
        epsilon, eta, measure, gap_max: see `certify`.
    """

    def room(f: Finalist) -> float:
        worse = f.search_error - dense.search_error
        gap = eta + f.train_error - dense.train_error - worse if gap_max is None else gap_max - f.gap
        found = min(epsilon - worse, gap)
        return -math.inf if math.isnan(worse + gap) else found

    out: list[Finalist] = []
    for f in sorted(finalists, key=lambda f: (f.cost[measure], -room(f))):
        if not out or room(f) > room(out[-1]):
            out.append(f)
    return out


def certify(
    finalists: Sequence[Finalist],
    dense: Finalist,
    wrong: Callable[[Finalist], Any],
    *,
    epsilon: float,
    eta: float,
    delta: float,
    measure: str,
    gap_max: float | None = None,
    only: str | None = None,
    metric: Metric = ACCURACY,
) -> Certificate:
    """Test frozen finalists from large to small up to the first that fails.

    Args:
        finalists: the variants; their order does not matter.
        dense: the model that they come from.
        wrong: opens `certify` for a model: what the metric observes there, for accuracy `bool[N]`, which images it
            gets wrong.
        epsilon: the margin of the error.
        eta: that of the gap, likewise a difference of the metric's error.
        delta: the level.
        measure: the cost that the order goes by.
        gap_max: how large the gap may be, whatever the dense model's is; takes the place of `eta`.
        only: test this one alone (the best within a budget).
        metric: what errors are of.
    """
    ordered = [f for f in sorted(finalists, key=lambda f: -f.cost[measure]) if only in (None, f.name)]
    baseline = wrong(dense)
    count, steps = len(baseline), []
    for finalist in ordered:
        seen = wrong(finalist)
        found = metric.compare(seen, baseline)
        if gap_max is None:
            margins, widest = (epsilon, eta + finalist.train_error - dense.train_error), found.p_value
        else:
            margins, widest = (epsilon, gap_max + finalist.train_error), metric.absolute(seen)
        p_values = found.p_value(margins[0]), widest(margins[1])
        passed = max(p_values) <= delta
        steps.append(Step(finalist.name, found.worse, found.better, found.difference, margins, p_values, passed))
        if not passed:
            break
    names = [step.name for step in steps if step.passed]
    selected = only or (names[-1] if names else dense.name)
    passed = selected in names or (selected == dense.name and gap_max is None)
    sentence = _sentence(steps, selected, dense, epsilon, eta, gap_max, delta, count, metric)
    return Certificate(
        True, selected, passed, tuple(steps), count, delta, sentence, metric.name, metric.test, metric.approximate
    )


def not_certified(selected: str, reason: str, delta: float, count: int, metric: Metric = ACCURACY) -> Certificate:
    """No claim, and why."""
    sentence = f"Not certified: {reason}."
    return Certificate(False, selected, False, (), count, delta, sentence, metric.name, metric.test, metric.approximate)


def _sentence(
    steps: Sequence[Step],
    selected: str,
    dense: Finalist,
    epsilon: float,
    eta: float,
    gap_max: float | None,
    delta: float,
    count: int,
    metric: Metric,
) -> str:
    gap = f"by less than {metric.scale * eta:g}"
    if gap_max is not None:
        gap = f"is less than {metric.scale * gap_max:g} {metric.unit}"
    claim = (
        f"its {metric.noun} on new data exceeds {dense.title}'s by less than {metric.scale * epsilon:g} "
        f"{metric.unit}, and its gap {gap}"
    )
    trust = f"at level {delta:g}, on {count:,} images opened once" + (f", {metric.trust}" if metric.trust else "")
    by_name = {step.name: step for step in steps}
    if selected == dense.name:
        first = f"; {steps[0].name}, the largest variant tested, {_failure(steps[0], delta, metric)}" if steps else ""
        own = "" if gap_max is None else f" Whether {dense.title}'s own gap is within the allowance was not tested."
        return f"Certified: nothing smaller than {dense.title} can be claimed {trust}{first}.{own}"
    step = by_name[selected]
    if step.passed:
        after = next((s for s in steps if not s.passed), None)
        more = f" The next smaller one, {after.name}, {_failure(after, delta, metric)}." if after else ""
        return f"Certified {selected}: {claim}, {trust}.{more}"
    return f"The certificate fails for {selected}, {trust}: it {_failure(step, delta, metric)}."


def _failure(step: Step, delta: float, metric: Metric) -> str:
    claims = "be no worse", "keep its gap within the margin"
    what = [claim for claim, p in zip(claims, step.p_values, strict=True) if p > delta]
    ps = ", ".join(f"p = {p:.2g}" for p in step.p_values if p > delta)
    seen = f"{step.worse} images lost, {step.better} gained"
    if metric is not ACCURACY:
        seen = f"{metric.amount(step.difference, sign=True)} on these images"
    return f"could not be shown to {' and to '.join(what)} ({ps}; {seen})"
