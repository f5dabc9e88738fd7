"""The certificate: the test against its definition, its level by simulation, and the walk."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, multinomial, norm

from treesurgeon.search.certificate import certify, images_needed, p_value, smallest_margin, undominated
from treesurgeon.search.paired import OUTSIDE, score
from treesurgeon.search.selection import Finalist

RNG = np.random.default_rng(0)


def by_definition(worse, better, count, margin):
    """The score statistic at the numerically found constrained maximum of the trinomial likelihood."""

    def loss(q):
        p, rest = q + margin, 1 - 2 * q - margin
        return -sum(k * np.log(max(v, 1e-300)) for k, v in ((worse, p), (better, q), (count - worse - better, rest)))

    low = max(0.0, -margin)
    q = minimize_scalar(loss, bounds=(low, (1 - margin) / 2), method="bounded", options={"xatol": 1e-12}).x
    deviation = np.sqrt(count * (2 * q + margin - margin**2))
    return norm.cdf((worse - better - count * margin) / deviation)


@pytest.mark.parametrize(
    ("worse", "better", "count", "margin"),
    [(5, 3, 100, 0.05), (0, 0, 50, 0.1), (12, 30, 400, 0.01), (9, 4, 200, -0.02), (0, 7, 60, -0.05), (3, 0, 80, 0.2)],
)
def test_the_score_is_tangos(worse, better, count, margin):
    found = norm.cdf(float(score(worse, better, count, margin)))
    assert found == pytest.approx(by_definition(worse, better, count, margin), abs=1e-4)


def outcomes(count, margin, gained):
    """Every outcome on so many images, and its chance where the excess is the margin and so many are gained."""
    b, c = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    b, c = b[b + c <= count], c[b + c <= count]
    cells = np.stack([b, c, count - b - c], -1)
    return b, c, multinomial.pmf(cells, count, [gained + margin, gained, 1 - 2 * gained - margin])


@pytest.mark.parametrize(
    ("worse", "better", "count", "margin"), [(0, 0, 40, 0.05), (3, 2, 60, 0.1), (2, 9, 60, -0.05), (6, 1, 50, 0.3)]
)
def test_the_p_value_is_the_largest_chance_of_so_low_a_score(worse, better, count, margin):
    """By adding up all outcomes, at shares of gained images between those that are as good as excluded."""
    low = binom_bound(better - 1, count, 1 - OUTSIDE / 2) if better else 0.0
    high = binom_bound(better, count, OUTSIDE / 2)
    chances = []
    for gained in np.linspace(max(low, -margin, 0), min(high, (1 - margin) / 2), 400):
        b, c, chance = outcomes(count, margin, gained)
        chances.append(chance[score(b, c, count, margin) <= score(worse, better, count, margin) + 1e-9].sum())
    assert p_value(worse, better, count, margin) == pytest.approx(max(chances) + OUTSIDE, abs=3e-4)


def binom_bound(successes, count, chance):
    """The share at which so many successes, or fewer, have this chance."""
    return brentq(lambda share: binom.cdf(successes, count, share) - chance, 0, 1)


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1])
@pytest.mark.parametrize(("count", "margin"), [(40, 0.1), (80, 0.034), (30, -0.05)])
def test_the_level_holds_whatever_is_gained(count, margin, delta):
    """Exactly, by adding up all outcomes; the score by itself breaks it where nothing is gained."""
    b, c, _ = outcomes(count, margin, 0.1)
    passed = np.array([p_value(int(i), int(j), count, margin) <= delta for i, j in zip(b, c, strict=True)])
    for gained in np.linspace(max(0, -margin), 0.4, 23):
        assert outcomes(count, margin, gained)[2][passed].sum() <= delta
    alone = norm.cdf(score(b, c, count, margin)) <= delta
    if (count, delta) == (80, 0.05):
        assert outcomes(count, margin, 0.0)[2][passed].sum() == 0
        assert outcomes(count, margin, 0.0)[2][alone].sum() == pytest.approx((1 - margin) ** count)
        assert (1 - margin) ** count > 1.2 * delta


def test_with_many_disagreements_the_test_is_as_good_as_the_score():
    for worse, better in ((300, 250), (250, 260)):
        alone = norm.cdf(float(score(worse, better, 10_000, 0.01)))
        assert p_value(worse, better, 10_000, 0.01) == pytest.approx(alone, abs=1e-3)


def test_p_values_fall_with_the_margin_and_rise_with_the_losses():
    values = [p_value(8, 5, 300, m) for m in np.linspace(-0.5, 0.5, 41)]
    assert (np.diff(values) <= 1e-12).all()
    assert (np.diff([p_value(k, 5, 300, 0.02) for k in range(20)]) > 0).all()
    assert p_value(0, 0, 100, 1.5) == 0
    assert p_value(0, 0, 100, 0.0) == p_value(0, 0, 100, -2) == 1


def test_the_smallest_margin_is_where_no_disagreement_passes():
    for count in (20, 300, 4000):
        margin = smallest_margin(count, 0.05)
        assert p_value(0, 0, count, 1.001 * margin) < 0.05 < p_value(0, 0, count, 0.999 * margin)
        assert margin == pytest.approx(1 - 0.05 ** (1 / count), rel=2e-3)  # nobody else could claim less


def test_images_needed_give_the_power_promised():
    count = images_needed(0.03, 0.05, 0.08)
    worse, better, _ = RNG.multinomial(count, [0.04, 0.04, 0.92], 4000).T
    passed = np.mean([p_value(int(b), int(c), count, 0.03) <= 0.05 for b, c in zip(worse, better, strict=True)])
    assert 0.76 < passed < 0.84


def finalist(name, size, train=0.0):
    return Finalist(name, {"params": size}, train, 0.0)


def population(excess, count=100_000):
    """Which images a dense model and variants get wrong: each variant's error exceeds dense's by its excess."""
    dense = RNG.random(count) < 0.1
    out = {"dense": dense}
    for name, value in excess.items():
        gained = dense & (RNG.random(count) < 0.3)  # 3 % gained
        lost = ~dense & (RNG.random(count) < (0.03 + value) / 0.9)
        out[name] = (dense & ~gained) | lost
    return out


@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_false_claims_are_no_more_than_the_level(delta):
    """The null is tight: the smallest variants are worse by a hair more than ε, the larger ones are fine."""
    everyone = population({"large": -0.01, "middle": 0.021, "small": 0.021})
    truth = {name: everyone[name].mean() - everyone["dense"].mean() for name in everyone}
    epsilon = min(truth["middle"], truth["small"])
    models = [finalist("small", 1), finalist("large", 3), finalist("middle", 2)]
    false = naive = 0
    rounds = 1500
    for _ in range(rounds):
        drawn = RNG.integers(0, 100_000, 400)
        seen = {name: wrong[drawn] for name, wrong in everyone.items()}
        found = certify(
            models, finalist("dense", 4), lambda f, seen=seen: seen[f.name],
            epsilon=epsilon, eta=1, delta=delta, measure="params",
        )  # fmt: skip
        false += found.selected in ("middle", "small")
        naive += any(seen[name].mean() - seen["dense"].mean() <= epsilon for name in ("middle", "small"))
    assert false / rounds < delta + 3 * np.sqrt(delta * (1 - delta) / rounds)
    assert naive / rounds > 0.4  # what choosing by the numbers alone would claim


def test_the_walk_stops_at_the_first_failure():
    count = 500
    dense = np.zeros(count, bool)
    bad = np.arange(count) < 60
    opened = []

    def wrong(f):
        opened.append(f.name)
        return {"dense": dense, "a": dense, "b": bad, "c": dense}[f.name]

    models = [finalist("c", 1), finalist("a", 3), finalist("b", 2)]
    settings = {"epsilon": 0.02, "eta": 0.05, "delta": 0.05, "measure": "params"}
    found = certify(models, finalist("dense", 4), wrong, **settings)
    assert (found.selected, found.passed, opened) == ("a", True, ["dense", "a", "b"])
    assert "Certified a" in found.sentence
    assert "b, could not be shown to be no worse" in found.sentence
    found = certify(models[2:], finalist("dense", 4), wrong, **settings)
    assert (found.selected, found.passed) == ("dense", True)
    alone = certify(models, finalist("dense", 4), wrong, **settings, only="b")
    assert (alone.selected, alone.passed, len(alone.steps)) == ("b", False, 1)
    assert "fails for b" in alone.sentence


def test_a_wider_gap_is_a_matter_of_the_train_error():
    dense, same = finalist("dense", 4, train=0.10), np.zeros(2000, bool)
    settings = {"epsilon": 0.05, "eta": 0.01, "delta": 0.05, "measure": "params"}
    for train, passes in ((0.10, True), (0.08, False)):  # fitted better, no better on new data: it overfits
        found = certify([finalist("a", 1, train)], dense, lambda _: same, **settings)
        assert (found.selected == "a") == passes
    assert "could not be shown to keep its gap within the margin" in found.sentence


def test_with_an_absolute_allowance_the_gap_is_the_variants_own():
    count = 1000
    dense, own = np.arange(count) < 200, np.arange(count) < 195
    fits = [finalist("b", 1, train=0.16), finalist("a", 2, train=0.18)]
    settings = {"epsilon": 0.05, "eta": 0.001, "delta": 0.05, "measure": "params"}
    seen = {"dense": dense, "a": own, "b": own}
    found = certify(fits, finalist("dense", 4, train=0.05), lambda f: seen[f.name], **settings, gap_max=0.04)
    assert (found.selected, found.passed, len(found.steps)) == ("a", True, 2)  # 19.5 % is below 22 %, not 20 %
    assert found.steps[0].margins == (0.05, pytest.approx(0.22))
    expected = [binom.cdf(195, count, bound) for bound in (0.22, 0.20)]
    assert [step.p_values[1] for step in found.steps] == pytest.approx(expected)
    assert "and its gap is less than 4 points" in found.sentence
    assert "b, could not be shown to keep its gap within the margin (p = 0.36" in found.sentence
    none = certify(fits[:1], finalist("dense", 4, train=0.05), lambda f: seen[f.name], **settings, gap_max=0.04)
    assert (none.selected, none.passed) == ("dense", False)  # nothing says that the dense model keeps it
    assert "Whether the dense model's own gap is within the allowance was not tested" in none.sentence


def test_variants_that_a_smaller_one_beats_on_search_are_not_tested():
    def one(name, size, train, search):
        return Finalist(name, {"params": size}, train, search)

    dense = one("dense", 100, 0.10, 0.20)
    big, mid, small = one("big", 80, 0.10, 0.30), one("mid", 50, 0.10, 0.195), one("small", 20, 0.10, 0.205)

    def names(*finalists, epsilon=0.01, eta=0.02):
        return [f.name for f in undominated(finalists, dense, epsilon, eta, "params")]

    assert names(big, mid, small) == ["small", "mid"]  # the walk goes through these from the end
    assert names(big, small) == ["small"]
    assert names(big) == ["big"]  # nothing smaller: it is tested, whatever it has on search
    # A smaller one with a far wider gap is not within its margins: 0 on train, 0.205 on search.
    assert names(mid, one("overfits", 20, 0.0, 0.19)) == ["overfits", "mid"]
    assert names(one("nan", 10, 0.1, float("nan")), mid) == ["nan", "mid"]
    assert names(one("twin", 50, 0.1, 0.25), mid) == ["mid"]
    # An absolute allowance of the gap: mid has 0.095, small 0.105, and dense, 0.10, does not matter.
    found = undominated([big, mid, small], dense, 0.05, 0.02, "params", gap_max=0.1)
    assert [f.name for f in found] == ["small", "mid"]
    found = undominated([mid, one("fits", 20, 0.18, 0.2)], dense, 0.05, 0.02, "params", gap_max=0.05)
    assert [f.name for f in found] == ["fits"]
