"""Plans without a search, against trying every number of units."""

import numpy as np
import pytest
import zoo
from laws import Bench

from treesurgeon import engine
from treesurgeon.engine import Plan
from treesurgeon.search.baselines import global_plan, to_budget, uniform_plan
from treesurgeon.search.selection import SelectionError

GRAPH = Bench(zoo.ZOO["residual"].subject).graph  # stem: 6 units, c1: 5
DENSE = engine.cost(GRAPH, Plan())
RNG = np.random.default_rng(0)
SCORES = {name: RNG.random(group.size) for name, group in GRAPH.groups.items()}


def widths(plan):
    return {name: len(kept) for name, kept in plan.keep.items()}


def test_uniform_keeps_the_best_of_every_group():
    plan = uniform_plan(GRAPH, SCORES, 0.5)
    assert widths(plan) == {"stem": 3, "c1": 3}
    for name, kept in plan.keep.items():
        assert set(kept) == set(np.argsort(-SCORES[name])[: len(kept)])


@pytest.mark.parametrize(("share", "multiple", "want"), [(0, 1, 1), (0, 2, 2), (1, 1, 6), (0.6, 4, 4), (0.9, 4, 4)])
def test_uniform_widths(share, multiple, want):
    assert widths(uniform_plan(GRAPH, SCORES, share, ["stem"], multiple=multiple)) == {"stem": want}


def slow_global(scores, limit, measure, least, multiple):
    """One unit at a time, the worst first, until the budget is met."""
    units = sorted((value, name, u) for name, values in scores.items() for u, value in enumerate(values))
    left = {name: set(range(len(values))) for name, values in scores.items()}

    def plan():
        keep = {}
        for name, values in scores.items():
            count = max(len(left[name]), 1, int(np.ceil(least * len(values))))
            while count % multiple and count < len(values):
                count += 1
            keep[name] = np.sort(np.argsort(-values)[:count])
        return Plan(keep)

    for _, name, u in units:
        if getattr(engine.cost(GRAPH, plan()), measure) <= limit:
            break
        left[name].remove(u)
    return plan()


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize(("least", "multiple"), [(0, 1), (0.5, 1), (0, 2), (0.3, 3)])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.55])
def test_global_against_one_unit_at_a_time(measure, least, multiple, share):
    limit = share * getattr(DENSE, measure)
    want = slow_global(SCORES, limit, measure, least, multiple)
    got = global_plan(GRAPH, SCORES, {measure: share}, least=least, multiple=multiple)
    assert getattr(engine.cost(GRAPH, got), measure) <= limit
    assert {k: v.tolist() for k, v in got.keep.items()} == {k: v.tolist() for k, v in want.keep.items()}


def test_global_leaves_every_group_a_unit_and_the_others_alone():
    scores = {"stem": np.zeros(6), "c1": np.ones(5)}
    assert widths(global_plan(GRAPH, scores, {"macs": 0.3})) == {"stem": 1, "c1": 5}
    assert widths(global_plan(GRAPH, scores, {"macs": 0.7}, ["c1"])).keys() == {"c1"}


def test_global_meets_several_budgets_together():
    cost = engine.cost(GRAPH, global_plan(GRAPH, SCORES, {"macs": 0.9, "params": 0.4, "activation_bytes": 500.0}))
    assert cost.macs <= 0.9 * DENSE.macs
    assert cost.params <= 0.4 * DENSE.params
    assert cost.activation_bytes <= 500


@pytest.mark.parametrize("measure", ["params", "macs", "activation_bytes"])
def test_to_budget_finds_the_largest(measure):
    plans = [uniform_plan(GRAPH, SCORES, share) for share in np.linspace(0, 1, 241)]
    costs = [getattr(engine.cost(GRAPH, plan), measure) for plan in plans]
    for limit in (0.9, 0.5, 0.3):
        want = max(cost for cost in costs if cost <= limit * getattr(DENSE, measure))
        plan = to_budget(lambda share: uniform_plan(GRAPH, SCORES, share), GRAPH, measure, limit)
        assert getattr(engine.cost(GRAPH, plan), measure) == want
    assert widths(to_budget(lambda share: uniform_plan(GRAPH, SCORES, share), GRAPH, measure, 1.0)) == {
        "stem": 6,
        "c1": 5,
    }


def test_messages():
    with pytest.raises(SelectionError, match=r"macs ≤ 2 \(the smallest plan has [\d,]+\) cannot be met: raise it"):
        global_plan(GRAPH, SCORES, {"macs": 2})
    with pytest.raises(SelectionError, match=r"params ≤ 3 .* cannot be met"):
        to_budget(lambda share: uniform_plan(GRAPH, SCORES, share), GRAPH, "params", 3)
    with pytest.raises(SelectionError, match="budget on 'seconds': expected one of"):
        global_plan(GRAPH, SCORES, {"seconds": 0.5})
