"""Choosing among the finalists: the smallest that is neither worse nor overfits more than the dense model.

A rule sees the frozen finalists and the dense model, and answers with a `Verdict`. `WithinMargins` compares
point estimates on `search`, the data that the search itself was scored on: a first answer, optimistic,
without a claim about new data, and it says so. A rule that opens `certify` has the same shape (`Rule`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.search.metrics import ACCURACY, Metric

SLACK = 1e-9  # errors are counts divided by sizes: a difference of exactly ε must not fail by rounding
PLAIN = "dense fine-tuned"


class SelectionError(TreesurgeonError, ValueError):
    """A budget that nothing meets, or numbers that a rule cannot compare."""


@dataclass(frozen=True)
class Finalist:
    """A model that is done: fine-tuned, frozen and measured. The dense model is described by one as well.

    Attributes:
        name: unique among the finalists.
        cost: `params`, `macs` and whatever else a budget may name.
        train_error: the metric's error on all of `train`, in inference mode: for accuracy the share of wrong answers.
        search_error: likewise on `search`.
        ref: the caller's handle (genome, plan, file); rules do not look at it.
    """

    name: str
    cost: Mapping[str, float]
    train_error: float
    search_error: float
    ref: Any = field(default=None, compare=False)

    @property
    def title(self) -> str:
        """What sentences call it."""
        return title(self.name)

    @property
    def gap(self) -> float:
        """How much worse the model is on data it was not fitted on."""
        return self.search_error - self.train_error


@dataclass(frozen=True)
class Verdict:
    """What a rule chose and why.

    Attributes:
        selected: the chosen model; the dense one where nothing else passed.
        passed: whether it met every criterion that was applied.
        reasons: for each finalist by name, why it passed or failed.
        sentence: the outcome in one sentence.
    """

    selected: Finalist
    passed: bool
    reasons: Mapping[str, str]
    sentence: str


class Rule(Protocol):
    """Anything that can choose."""

    def select(
        self,
        finalists: Sequence[Finalist],
        dense: Finalist,
        *,
        budget: Mapping[str, float] | None = None,
        clean: bool = True,
    ) -> Verdict:
        """Choose among `finalists` and `dense`.

        Args:
            finalists: in any order.
            dense: the model that they come from.
            budget: upper limits on entries of `cost`, see `limits`.
            clean: whether `search` is data that the checkpoint was not fitted on.
        """
        ...


def title(name: str) -> str:
    """What sentences call a model that others are compared with."""
    return {"dense": "the dense model", PLAIN: "the fine-tuned dense model"}.get(name, name)


def level(model: Finalist, best: Finalist) -> bool:
    """Whether the errors are the same."""
    return model.search_error <= best.search_error


def unknown(model: Finalist) -> float:
    """No loss, so that cost decides."""
    return 0.0


@dataclass(frozen=True)
class WithinMargins:
    """The smallest within margins of the dense model on `search`; with a budget, the best within it.

    The best is the one of least error; where few images leave several that it is not clearly better than, that of
    these with the lowest loss: whether an answer is right says less than how sure of it the model is.

    Attributes:
        epsilon: by how much the error on `search` may exceed the dense model's.
        eta: by how much the gap may exceed the dense model's. Not applied where data is not clean.
        gap_max: how large the gap may be, whatever the dense model's is; takes the place of `eta`.
        measure: the entry of `cost` that "smallest" goes by.
        metric: what errors are of.
        where: what `search_error` was measured on or by, in words.
        alike: `(model, best) -> bool`: whether the images leave it open which of the two has the lower error.
        loss: of a model, on what judges, at the temperature that suits it best.
    """

    epsilon: float = 0.01
    eta: float = 0.02
    gap_max: float | None = None
    measure: str = "params"
    metric: Metric = ACCURACY
    where: str = "on search"
    alike: Callable[[Finalist, Finalist], bool] = level
    loss: Callable[[Finalist], float] = unknown

    def select(
        self,
        finalists: Sequence[Finalist],
        dense: Finalist,
        *,
        budget: Mapping[str, float] | None = None,
        clean: bool = True,
    ) -> Verdict:
        """See `Rule.select`; where nothing passes the dense model stays, so there is always an answer.

        The dense model itself is within margins of itself; with `gap_max` it can fail as any other.

        Raises:
            SelectionError: no finalist meets the budget.
        """
        everyone = [*finalists, dense]
        _comparable(everyone, {self.measure, *(budget or {})})
        faults = {f.name: self._faults(f, dense, clean) for f in everyone}
        over = {f.name: _excess(f, budget or {}) for f in everyone}
        reasons = {f.name: "; ".join(over[f.name] + faults[f.name]) or "passes" for f in everyone}
        allowed = [f for f in everyone if not over[f.name]]
        if not allowed:
            raise SelectionError(_unmet(everyone, budget or {}))
        if budget:
            best = min(allowed, key=lambda f: (_worst_if_nan(f.search_error), f.cost[self.measure]))
            near = [f for f in allowed if f is best or (f is not dense and self.alike(f, best))]
            losses = {f.name: _worst_if_nan(self.loss(f)) for f in near} if len(near) > 1 else {best.name: 0.0}
            chosen = min(near, key=lambda f: (losses[f.name], f.cost[self.measure]))
        else:
            best = None
            passing = [f for f in allowed if not faults[f.name]] or [dense]
            chosen = min(passing, key=lambda f: (f.cost[self.measure], f.search_error))
        passed = not faults[chosen.name]
        sentence = self._sentence(chosen, best, dense, faults[chosen.name], budget, clean, len(finalists))
        return Verdict(chosen, passed, reasons, sentence)

    def _faults(self, model: Finalist, dense: Finalist, clean: bool) -> list[str]:
        faults = []
        worse = model.search_error - dense.search_error
        if model is not dense and not worse <= self.epsilon + SLACK:
            above, allowed = self.metric.amount(worse), self.metric.amount(self.epsilon)
            faults.append(f"{self.metric.noun} {self.where} is {above} above {dense.name}, allowed {allowed}")
        wider = model.gap - dense.gap
        if clean and self.gap_max is not None:
            if not model.gap <= self.gap_max + SLACK:
                faults.append(f"gap is {self.metric.amount(model.gap)}, allowed {self.metric.amount(self.gap_max)}")
        elif clean and model is not dense and not wider <= self.eta + SLACK:
            more, allowed = self.metric.amount(wider), self.metric.amount(self.eta)
            faults.append(f"gap is {more} wider than {dense.name}'s, allowed {allowed}")
        return faults

    def _sentence(
        self,
        chosen: Finalist,
        best: Finalist | None,
        dense: Finalist,
        faults: Sequence[str],
        budget: Mapping[str, float] | None,
        clean: bool,
        count: int,
    ) -> str:
        share = chosen.cost[self.measure] / dense.cost[self.measure]
        named = ", ".join(f"{key} ≤ {value:,.0f}" for key, value in (budget or {}).items())
        if chosen is dense:
            what = f"{dense.title.capitalize()} stays: none of the smaller variants ({count}) " + (
                "has a lower error within the budget" if budget else "passed"
            )
        else:
            role = f"the best within the budget ({named})" if budget else "the smallest that passed"
            worse = chosen.search_error - dense.search_error
            what = (
                f"Selected: {chosen.name}, {role}; {share:.1%} of dense's {self.measure}, "
                f"{self.metric.noun} {self.where} {self.metric.show(chosen.search_error)} "
                f"({self.metric.amount(worse, sign=True)} against {dense.name})"
            )
            if best is not None and best is not chosen:
                what += (
                    f"; {best.name} has {self.metric.show(best.search_error)}, which these images do not tell apart, "
                    f"and no lower loss at the temperature that suits it"
                )
        if faults:
            what += f"; it fails: {'; '.join(faults)}"
        claim = (
            f"chosen {self.where}"
            if clean
            else "no gap criterion was applied, since the checkpoint may have been fitted on this data"
        )
        return f"{what} ({claim})."


def limits(budget: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """Absolute limits: a value of at most 1 is a share of the dense model's cost, any other is one already.

    Example:
        `limits({"macs": 0.5, "params": 2e5}, dense.cost)`
    """
    out = {}
    for key, value in budget.items():
        if key not in dense:
            raise SelectionError(f"budget on {key!r}: expected one of {', '.join(sorted(dense))}")
        if not value > 0:
            raise SelectionError(
                f"budget {key} = {value}: expected a share of dense (up to 1) or an absolute limit, above 0"
            )
        out[key] = value * dense[key] if value <= 1 else float(value)
    return out


def _comparable(models: Sequence[Finalist], keys: set[str]) -> None:
    names = [m.name for m in models]
    if twice := {n for n in names if names.count(n) > 1}:
        raise SelectionError(f"finalists: names must differ, {', '.join(sorted(twice))} is there twice")
    for m in models:
        if missing := keys - set(m.cost):
            raise SelectionError(
                f"finalist {m.name!r}: its cost has {', '.join(sorted(m.cost))}, "
                f"but {', '.join(sorted(missing))} is asked for"
            )


def _excess(model: Finalist, budget: Mapping[str, float]) -> list[str]:
    return [
        f"{key} {model.cost[key]:,.0f} is over the budget of {limit:,.0f}"
        for key, limit in budget.items()
        if not model.cost[key] <= limit
    ]


def _unmet(models: Sequence[Finalist], budget: Mapping[str, float]) -> str:
    least = {key: min(m.cost[key] for m in models) for key in budget}
    return (
        "no finalist meets the budget "
        + ", ".join(f"{k} ≤ {v:,.0f} (the least any has: {least[k]:,.0f})" for k, v in budget.items())
        + "; raise the budget, protect fewer layers, or search for more generations"
    )


def _worst_if_nan(error: float) -> float:
    return error if error == error else float("inf")
