"""The first selection rule: honest about margins, budgets, unclean data and the dense model."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treesurgeon.search import selection
from treesurgeon.search.selection import Finalist, WithinMargins

RULE = WithinMargins(epsilon=0.01, eta=0.02)
DENSE = Finalist("dense", {"params": 1000, "macs": 100}, train_error=0.02, search_error=0.10)


def finalist(name, params, search, train=0.02, macs=None):
    return Finalist(name, {"params": params, "macs": params / 10 if macs is None else macs}, train, search)


counts = st.integers(0, 40).map(lambda wrong: wrong / 200)
models = st.lists(st.tuples(st.integers(1, 1000), counts, counts, st.integers(1, 100)), max_size=6).map(
    lambda rows: [finalist(f"v{i}", p, s, t, m) for i, (p, s, t, m) in enumerate(rows)]
)


def exactly(value):
    return Fraction(round(value * 200), 200)


def slow_passes(model, dense, clean):
    """In exact arithmetic."""
    worse = exactly(model.search_error) - exactly(dense.search_error)
    wider = worse - exactly(model.train_error) + exactly(dense.train_error)
    return worse <= Fraction(1, 100) and (wider <= Fraction(1, 50) or not clean)


@given(models, counts, counts, st.booleans())
def test_the_smallest_that_passes(finalists, train, search, clean):
    dense = Finalist("dense", DENSE.cost, train, search)
    verdict = RULE.select(finalists, dense, clean=clean)
    passing = [f for f in finalists if slow_passes(f, dense, clean)]
    assert verdict.passed
    assert verdict.selected.cost["params"] == min([f.cost["params"] for f in passing], default=1000)
    assert verdict.selected in [*passing, dense]
    assert {n for n, why in verdict.reasons.items() if why == "passes"} == {f.name for f in [*passing, dense]}
    assert RULE.select(finalists[::-1], dense, clean=clean).selected.cost["params"] == (verdict.selected.cost["params"])


@given(models, st.integers(1, 120))
def test_with_a_budget_the_best_within_it_and_whether_it_passes(finalists, macs):
    within = [f for f in [*finalists, DENSE] if f.cost["macs"] <= macs]
    if not within:
        with pytest.raises(selection.SelectionError, match="no finalist meets the budget macs ≤"):
            RULE.select(finalists, DENSE, budget={"macs": macs})
        return
    verdict = RULE.select(finalists, DENSE, budget={"macs": macs})
    assert verdict.selected.cost["macs"] <= macs
    assert verdict.selected.search_error == min(f.search_error for f in within)
    assert verdict.passed == (verdict.selected is DENSE or slow_passes(verdict.selected, DENSE, True))


def test_of_those_whose_errors_are_alike_the_one_with_the_lowest_loss():
    a, b, c = finalist("a", 400, 0.10), finalist("b", 300, 0.11), finalist("c", 200, 0.30)
    losses = {"a": 0.5, "b": 0.4, "c": 0.1, "dense": 0.0}
    near = replace(
        RULE,
        alike=lambda model, best: model.search_error <= best.search_error + 0.05,
        loss=lambda f: losses[f.name],
    )
    assert RULE.select([a, b, c], DENSE, budget={"macs": 50}).selected is a
    verdict = near.select([a, b, c], DENSE, budget={"macs": 50})
    assert verdict.selected is b
    assert "; a has 10.00%, which these images do not tell apart, and no lower loss at the" in verdict.sentence
    assert near.select([a, b, c], DENSE, budget={"macs": 35}).selected is b
    assert near.select([a, c], DENSE, budget={"macs": 50}).selected is a
    assert near.select([a, b], DENSE, budget={"macs": 100}).selected is b  # dense is within it, and no smaller variant
    alone = near.select([c], DENSE, budget={"macs": 100})
    assert alone.selected is DENSE
    assert alone.sentence.startswith("The dense model stays: none of the smaller variants (1) has a lower error")
    losses["b"] = math.nan
    assert near.select([b, a], DENSE, budget={"macs": 50}).selected is a
    assert near.select([a, b, c], DENSE).selected is RULE.select([a, b, c], DENSE).selected  # without a budget: margins


def test_what_variants_are_compared_with_is_named():
    tuned = replace(DENSE, name="dense fine-tuned")
    verdict = RULE.select([finalist("bad", 20, 0.2)], tuned)
    assert verdict.selected is tuned
    assert verdict.sentence.startswith("The fine-tuned dense model stays: none of the smaller variants (1) passed")
    assert verdict.reasons["bad"].startswith("error on search is 10.00 points above dense fine-tuned, allowed")


def test_only_dense_passes():
    verdict = RULE.select([finalist("half", 500, 0.2), finalist("over", 600, 0.10, train=-0.1)], DENSE)
    assert verdict.selected is DENSE
    assert verdict.passed
    assert verdict.sentence == ("The dense model stays: none of the smaller variants (2) passed (chosen on search).")
    assert verdict.reasons == {
        "half": "error on search is 10.00 points above dense, allowed 1.00 points; "
        "gap is 10.00 points wider than dense's, allowed 2.00 points",
        "over": "gap is 12.00 points wider than dense's, allowed 2.00 points",
        "dense": "passes",
    }


@given(models, counts, counts, st.booleans())
def test_with_an_absolute_allowance_the_dense_model_can_fail_as_well(finalists, train, search, clean):
    dense = Finalist("dense", DENSE.cost, train, search)
    verdict = WithinMargins(epsilon=0.01, gap_max=0.05).select(finalists, dense, clean=clean)

    def passes(f):
        worse, gap = exactly(f.search_error) - exactly(search), exactly(f.search_error) - exactly(f.train_error)
        return worse <= Fraction(1, 100) and (gap <= Fraction(1, 20) or not clean)

    passing = [f for f in [*finalists, dense] if passes(f)]
    assert verdict.passed == bool(passing)
    assert verdict.selected.cost["params"] == min([f.cost["params"] for f in passing], default=1000)
    assert {n for n, why in verdict.reasons.items() if why == "passes"} == {f.name for f in passing}


def test_what_keeps_no_allowance_is_said():
    verdict = WithinMargins(epsilon=0.01, gap_max=0.05).select([finalist("half", 500, 0.10)], DENSE)
    assert verdict.selected is DENSE
    assert not verdict.passed
    assert verdict.reasons == dict.fromkeys(("half", "dense"), "gap is 8.00 points, allowed 5.00 points")
    assert verdict.sentence == (
        "The dense model stays: none of the smaller variants (1) passed; it fails: gap is 8.00 points, allowed 5.00 "
        "points (chosen on search)."
    )


def test_the_sentence_names_size_and_error():
    verdict = RULE.select([finalist("v1", 250, 0.105)], DENSE)
    assert verdict.sentence == (
        "Selected: v1, the smallest that passed; 25.0% of dense's params, error on search 10.50% "
        "(+0.50 points against dense) (chosen on search)."
    )


def test_a_margin_met_exactly_is_met():
    """0.10 - 0.09 is above 0.01 in floating point."""
    assert 0.10 - 0.09 > 0.01
    dense = finalist("dense", 1000, 0.09)
    assert RULE.select([finalist("edge", 500, 0.10)], dense).selected.name == "edge"
    assert RULE.select([finalist("over", 500, 0.1001)], dense).selected is dense


def test_data_that_is_not_clean_has_no_gap_criterion_and_the_sentence_says_so():
    overfit = finalist("overfit", 500, 0.10, train=-0.2)
    assert RULE.select([overfit], DENSE, clean=True).selected is DENSE
    verdict = RULE.select([overfit], DENSE, clean=False)
    assert verdict.selected is overfit
    assert "no gap criterion was applied" in verdict.sentence


def test_a_budget_that_only_bad_models_meet_is_answered_and_flagged():
    verdict = RULE.select([finalist("tiny", 10, 0.5), finalist("bad", 400, 0.3)], DENSE, budget={"macs": 50})
    assert verdict.selected.name == "bad"
    assert not verdict.passed
    assert "best within the budget (macs ≤ 50)" in verdict.sentence
    assert "it fails: error on search is 20.00 points above dense" in verdict.sentence
    assert verdict.reasons["dense"] == "macs 100 is over the budget of 50"


def test_a_model_that_is_not_a_number_never_passes_or_wins():
    broken = finalist("broken", 10, math.nan)
    assert RULE.select([broken], DENSE).selected is DENSE
    verdict = RULE.select([broken, finalist("bad", 20, 0.9)], DENSE, budget={"macs": 50})
    assert verdict.selected.name == "bad"


def test_smallest_may_go_by_another_cost():
    finalists = [finalist("few_params", 100, 0.1, macs=90), finalist("few_macs", 900, 0.1, macs=10)]
    assert RULE.select(finalists, DENSE).selected.name == "few_params"
    assert WithinMargins(measure="macs").select(finalists, DENSE).selected.name == "few_macs"


def test_limits_are_shares_up_to_one_and_absolute_above():
    assert selection.limits({"macs": 0.5, "params": 250}, DENSE.cost) == {"macs": 50, "params": 250}
    assert selection.limits({"macs": 1}, DENSE.cost) == {"macs": 100}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda: selection.limits({"flops": 0.5}, DENSE.cost),
            "budget on 'flops': expected one of macs, params",
        ),
        (lambda: selection.limits({"macs": 0}, DENSE.cost), "budget macs = 0: expected a share"),
        (lambda: RULE.select([DENSE], DENSE), "names must differ, dense is there twice"),
        (
            lambda: RULE.select([], DENSE, budget={"bytes": 1}),
            "cost has macs, params, but bytes is asked for",
        ),
        (
            lambda: RULE.select([finalist("a", 500, 0.1)], DENSE, budget={"macs": 5}),
            r"macs ≤ 5 \(the least any has: 50\); raise the budget",
        ),
    ],
)
def test_errors(action, message):
    with pytest.raises(selection.SelectionError, match=message):
        action()
