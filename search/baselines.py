"""Plans without a search: every group at one share, or the worst units of the whole network.

What a search has to beat. Both keep the best units of each group by scores; `to_budget` finds the largest plan within
a limit.

    scores = engine.normalise(engine.importance("l2", graph, params))
    limit = 0.5 * engine.cost(graph, engine.Plan()).macs
    uniform = to_budget(lambda share: uniform_plan(graph, scores, share), graph, "macs", limit)
    best = global_plan(graph, scores, {"macs": limit})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from treesurgeon import engine
from treesurgeon.engine import Graph, Plan
from treesurgeon.search.selection import SelectionError, limits
from treesurgeon.search.ties import ranking

STEPS = 24


def uniform_plan(
    graph: Graph,
    scores: Mapping[str, Any],
    share: float,
    groups: Collection[str] | None = None,
    *,
    multiple: int = 1,
) -> Plan:
    """Every group at one share of its units, the best ones, one unit at least.

    Args:
        graph: the traced graph.
        scores: of each group's units, larger = keep longer.
        share: 0 to 1.
        groups: those that shrink; if None, all.
        multiple: widths are rounded to multiples of this, where that is less than all.
    """
    names = graph.groups if groups is None else groups
    return Plan({g: _best(scores[g], _rounded(share * graph.groups[g].size, multiple)) for g in names})


def global_plan(
    graph: Graph,
    scores: Mapping[str, Any],
    budget: Mapping[str, float],
    groups: Collection[str] | None = None,
    *,
    least: float = 0.0,
    multiple: int = 1,
) -> Plan:
    """Without the globally worst units, as few of them as the budget allows.

    One ranking over all groups, as in P. Molchanov et al.: "Importance estimation for neural network pruning", CVPR
    2019; what the layers lose is decided by the scores alone, so normalise them first.

    Args:
        graph: the traced graph.
        scores: of each group's units, comparable across groups: see `engine.normalise`.
        budget: limits on fields of `engine.Cost`, shares of the dense model's (up to 1) or numbers.
        groups: those that shrink; if None, all.
        least: the share of its units that every group keeps, one unit at least.
        multiple: widths are rounded up to multiples of this, where that is less than all.

    Raises:
        SelectionError: the smallest plan does not meet the budget.
    """
    names = list(graph.groups) if groups is None else list(groups)
    order = np.concatenate([np.asarray(scores[g], np.float64) for g in names])
    owner = np.repeat(np.arange(len(names)), [graph.groups[g].size for g in names])
    worst_first = owner[np.argsort(order, kind="stable")]

    def without(count: int) -> Plan:
        gone = np.bincount(worst_first[:count], minlength=len(names))
        keep = {}
        for g, lost in zip(names, gone, strict=True):
            size = graph.groups[g].size
            kept = max(size - int(lost), math.ceil(least * size - 1e-9), 1)
            keep[g] = _best(scores[g], min(size, -(-kept // multiple) * multiple))
        return Plan(keep)

    dense = engine.cost(graph, Plan())._asdict()
    allowed = limits(budget, dense)
    most = len(order)
    if not _within(graph, without(most), allowed):
        raise SelectionError(_unmet(graph, without(most), allowed))
    low, high = -1, most  # the smallest count that fits is above `low`, and at most `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _within(graph, without(middle), allowed) else (middle, high)
    return without(high)


def to_budget(
    make_plan: Callable[[float], Plan],
    graph: Graph,
    measure: str,
    limit: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    steps: int = STEPS,
) -> Plan:
    """The largest plan within a limit, by bisection.

    Args:
        make_plan: a plan for each number from `low` to `high`; its cost never falls as the number grows.
        graph: the traced graph.
        measure: a field of `engine.Cost`.
        limit: a share of the dense model's (up to 1), or a number.
        low: where the plan is smallest.
        high: where it is largest.
        steps: halvings.

    Raises:
        SelectionError: `make_plan(low)` does not meet the limit.
    """
    allowed = limits({measure: limit}, engine.cost(graph, Plan())._asdict())
    if _within(graph, make_plan(high), allowed):
        return make_plan(high)
    best = make_plan(low)
    if not _within(graph, best, allowed):
        raise SelectionError(_unmet(graph, best, allowed))
    for _ in range(steps):
        middle = (low + high) / 2
        plan = make_plan(middle)
        if _within(graph, plan, allowed):
            best, low = plan, middle
        else:
            high = middle
    return best


def _best(scores: Any, count: int) -> np.ndarray:
    return np.flatnonzero(ranking(np.asarray(scores, np.float64)) < count)


def _rounded(width: float, multiple: int) -> int:
    return max(1, multiple, math.floor(width / multiple + 0.5) * multiple)


def _within(graph: Graph, plan: Plan, allowed: Mapping[str, float]) -> bool:
    found = engine.cost(graph, plan)._asdict()
    return all(found[name] <= limit for name, limit in allowed.items())


def _unmet(graph: Graph, smallest: Plan, allowed: Mapping[str, float]) -> str:
    found = engine.cost(graph, smallest)._asdict()
    over = [f"{k} ≤ {v:,.0f} (the smallest plan has {found[k]:,})" for k, v in allowed.items() if found[k] > v]
    return f"the budget {', '.join(over)} cannot be met: raise it, or let more groups shrink"
