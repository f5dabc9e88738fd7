"""The certificate: a claim about new data, at a level that was set before the data were seen.

Frozen finalists are tested on `certify`, which nothing else has looked at, against two nulls each, both at level δ:

- *no worse*: the error exceeds the dense model's by ε or more;
- *no wider*: the gap (error on `certify` less error on `train`) exceeds the dense model's by η or more. What a frozen
  model does on `train` is a constant, so this too is a claim about the difference of the errors on `certify`.

A variant has to pass both (an intersection-union test, which needs no correction). They are tested in a fixed order,
from large to small, up to the first that fails: the chance of any false claim is at most δ, however many candidates
the search has looked at. S. Bauer: "Multiple testing in clinical trials", 1991; A. Angelopoulos et al.: "Learn then
test", 2021 (arXiv 2110.01052).

Errors of two models on the same images are paired, so the test is T. Tango's score test: "Equivalence test and
confidence interval for the difference in proportions for the paired-sample design", Statistics in Medicine 1998. It is
asymptotic; `benchmarks/certificate.py` measures how often it claims falsely. Failing to find a difference is no
evidence that there is none, so McNemar's test would not do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from treesurgeon.search.selection import Finalist

POWER = 0.8
TYPICAL = 0.05  # share of images that exactly one of two models gets wrong


def p_value(worse: int, better: int, count: int, margin: float) -> float:
    """Tango's test of H0: the difference of two error rates on the same images is at least `margin`.

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
        return 1 - p_value(better, worse, count, -margin)
    a = 2 * count
    b = -worse - better + (2 * count - worse + better) * margin
    c = -better * margin * (1 - margin)
    only_dense = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = count * (2 * only_dense + margin * (1 - margin))
    if variance <= 0:
        return 1.0
    return NormalDist().cdf((worse - better - count * margin) / math.sqrt(variance))


def smallest_margin(count: int, delta: float) -> float:
    """The least ε at which a variant passes that answers every one of `count` images as the dense model does."""
    z = NormalDist().inv_cdf(1 - delta)
    return z * z / (count + z * z)


def images_needed(margin: float, delta: float, disagreement: float, power: float = POWER) -> int:
    """Images on which a variant as good as the dense model passes with this chance.

    Args:
        margin: ε.
        delta: the level.
        disagreement: share of the images that exactly one of the two models gets wrong.
        power: the chance to pass.
    """
    normal = NormalDist()
    spread = math.sqrt(max(disagreement, margin * (1 - margin)))
    return math.ceil(((normal.inv_cdf(1 - delta) + normal.inv_cdf(power)) * spread / margin) ** 2)


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
        worse, better: images that only it, that only the dense model gets wrong.
        margins: those it was tested against, ε and that of the gap.
        p_values: of the two tests.
        passed: whether both are at most δ.
    """

    name: str
    worse: int
    better: int
    margins: tuple[float, float]
    p_values: tuple[float, float]
    passed: bool


@dataclass(frozen=True)
class Certificate:
    """What can be said about new data.

    Attributes:
        valid: whether `certify` was opened, once, and the tests were made.
        selected: the last that passed, "dense" if none did; with a budget the one that was tested.
        passed: whether the selected variant passed. The dense model does by definition.
        steps: the tests in their order.
        count: images of `certify`.
        delta: the level.
        sentence: the outcome, or why there is none.
    """

    valid: bool
    selected: str
    passed: bool
    steps: tuple[Step, ...]
    count: int
    delta: float
    sentence: str


def certify(
    finalists: Sequence[Finalist],
    dense: Finalist,
    wrong: Callable[[Finalist], np.ndarray],
    *,
    epsilon: float,
    eta: float,
    delta: float,
    measure: str,
    only: str | None = None,
) -> Certificate:
    """Test frozen finalists from large to small up to the first that fails.

    Args:
        finalists: the variants; their order does not matter.
        dense: the model that they come from.
        wrong: opens `certify` for a model: `bool[N]`, which images it gets wrong.
        epsilon, eta: the margins.
        delta: the level.
        measure: the cost that the order goes by.
        only: test this one alone (the best within a budget).
    """
    ordered = [f for f in sorted(finalists, key=lambda f: -f.cost[measure]) if only in (None, f.name)]
    baseline = np.asarray(wrong(dense))
    count, steps = len(baseline), []
    for finalist in ordered:
        theirs = np.asarray(wrong(finalist))
        worse, better = int((theirs & ~baseline).sum()), int((baseline & ~theirs).sum())
        margins = epsilon, eta + finalist.train_error - dense.train_error
        p_values = tuple(p_value(worse, better, count, margin) for margin in margins)
        passed = max(p_values) <= delta
        steps.append(Step(finalist.name, worse, better, margins, (p_values[0], p_values[1]), passed))
        if not passed:
            break
    names = [step.name for step in steps if step.passed]
    selected = only or (names[-1] if names else dense.name)
    passed = selected == dense.name or selected in names
    return Certificate(
        True,
        selected,
        passed,
        tuple(steps),
        count,
        delta,
        _sentence(steps, selected, dense, epsilon, eta, delta, count),
    )


def not_certified(selected: str, reason: str, delta: float, count: int) -> Certificate:
    """No claim, and why."""
    return Certificate(False, selected, False, (), count, delta, f"Not certified: {reason}.")


def claim_opening(register: Path, fingerprint: str, identity: str, where: str) -> str | None:
    """Record that a run opens these images; where the run is that opened them before, if that was another one.

    Args:
        register: a file of one JSON record a line, shared by the runs of a directory.
        fingerprint: of the images and labels.
        identity: of the run: one that is resumed, or repeated as it was, may open again what it has opened.
        where: its directory.
    """
    known = [json.loads(line) for line in register.read_text().splitlines()] if register.exists() else []
    for record in known:
        if record["certify"] == fingerprint:
            return None if record["run"] == identity else str(record["where"])
    register.parent.mkdir(parents=True, exist_ok=True)
    with register.open("a") as file:
        file.write(json.dumps({"certify": fingerprint, "run": identity, "where": where}) + "\n")
    return None


def resolution(count: int, epsilon: float, delta: float) -> str:
    """What a `certify` split of this size can show, for people, before anything is searched."""
    least = smallest_margin(count, delta)
    needed = images_needed(epsilon, delta, TYPICAL) if epsilon > 0 else math.inf
    text = f"certify has {count:,} images: at level {delta:g} no ε below {100 * least:.2g} points can be certified"
    return f"{text}; for yours ({100 * epsilon:g}) expect to need {needed:,} if {TYPICAL:.0%} of the answers change"


def _sentence(
    steps: Sequence[Step], selected: str, dense: Finalist, epsilon: float, eta: float, delta: float, count: int
) -> str:
    claim = (
        f"its error on new data exceeds the dense model's by less than {100 * epsilon:g} points, and its gap by less "
        f"than {100 * eta:g}"
    )
    trust = f"at level {delta:g}, on {count:,} images opened once"
    by_name = {step.name: step for step in steps}
    if selected == dense.name:
        first = f"; {steps[0].name}, the largest variant, {_failure(steps[0], delta)}" if steps else ""
        return f"Certified: nothing smaller than the dense model can be claimed {trust}{first}."
    step = by_name[selected]
    if step.passed:
        after = next((s for s in steps if not s.passed), None)
        more = f" The next smaller one, {after.name}, {_failure(after, delta)}." if after else ""
        return f"Certified {selected}: {claim}, {trust}.{more}"
    return f"The certificate fails for {selected}, {trust}: it {_failure(step, delta)}."


def _failure(step: Step, delta: float) -> str:
    what = [name for name, p in zip(("no worse", "no wider gap"), step.p_values, strict=True) if p > delta]
    ps = ", ".join(f"p = {p:.2g}" for p in step.p_values if p > delta)
    return f"could not be shown to be {' and '.join(what)} ({ps}; {step.worse} images lost, {step.better} gained)"
