"""Metrics against scikit-learn, their tests against definitions, and their levels by simulation at tight nulls."""

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn import metrics as oracle

from treesurgeon.search import metrics, resampling
from treesurgeon.search.certificate import certify
from treesurgeon.search.metrics import METRICS, Answers, MetricError
from treesurgeon.search.paired import (
    Bootstrap,
    betting,
    score,
    smallest_stratified_margin,
    smallest_unseen,
    stratified,
    unseen,
)
from treesurgeon.search.selection import Finalist, WithinMargins
from treesurgeon.search.verify import rounding


def answers(count, classes, seed=0, signal=1.5, ties=False):
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, count - classes)]
    logits = rng.normal(size=(count, classes)) + signal * np.eye(classes)[labels]
    return Answers((logits.round() if ties else logits).astype(np.float32), labels)


def probabilities(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))  # equal odds stay equal
    return (powers / powers.sum(1, keepdims=True)).round(12)


ORACLES = {
    "accuracy": lambda a: 1 - oracle.accuracy_score(a.labels, a.logits.argmax(1)),
    "balanced_accuracy": lambda a: 1 - oracle.balanced_accuracy_score(a.labels, a.logits.argmax(1)),
    "f1": lambda a: 1 - oracle.f1_score(a.labels, a.logits.argmax(1), average="macro"),
    "auroc": lambda a: 1 - (
        oracle.roc_auc_score(a.labels, probabilities(a.logits)[:, 1]) if a.logits.shape[1] == 2
        else oracle.roc_auc_score(a.labels, probabilities(a.logits), multi_class="ovr")
    ),
    "cross_entropy": lambda a: oracle.log_loss(a.labels, probabilities(a.logits)),
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_errors_are_scikit_learns(name, classes, ties):
    found = answers(120, classes, ties=ties)
    metric = METRICS[name]
    assert metric.error(metric.observe(found)) == pytest.approx(ORACLES[name](found), abs=1e-7)


def test_sure_answers_still_have_an_order():
    """Probabilities that round to 1 would tie."""
    labels = np.array([0, 1, 0, 1])
    logits = np.array([[900.0, 0], [0, 900], [800, 0], [700, 0]])  # the last is wrong, but less sure than the others
    seen = METRICS["auroc"].observe(Answers(logits, labels))
    assert METRICS["auroc"].error(seen) == 0


def test_a_large_loss_counts_as_the_cap_and_so_does_one_that_is_not_a_number():
    logits = np.array([[0.0, 1000], [np.nan, 0]])
    assert METRICS["cross_entropy"].observe(Answers(logits, np.array([0, 0]))).tolist() == [metrics.MOST_NATS] * 2


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "f1"])
def test_an_answer_that_is_not_a_number_is_wrong(name):
    found = answers(60, 3)
    broken = Answers(np.where(np.arange(3) == 1, np.nan, found.logits), found.labels)
    assert found.task.wrong(broken.logits, broken.labels).all()
    assert METRICS[name].error(METRICS[name].observe(broken)) == 1


@pytest.mark.parametrize("name", METRICS)
def test_p_values_fall_with_the_margin_and_nobody_beats_identical_answers_for_free(name, monkeypatch):
    monkeypatch.setattr(resampling, "REPLICATES", 400)
    metric = METRICS[name]
    labels = answers(150, 3, 2).labels
    noise = [answers(150, 3, seed, signal=0).logits for seed in (1, 2)]
    ours, dense = (metric.observe(Answers(each + np.eye(3)[labels], labels)) for each in noise)
    found = metric.compare(ours, dense)
    assert found.difference == pytest.approx(metric.error(ours) - metric.error(dense), abs=1e-12)
    values = [found.p_value(margin) for margin in (-1.2, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.2)]
    assert (np.diff(values) <= 1e-9).all()
    assert values[0] > 0.99
    assert values[-1] < 0.01
    same = metric.compare(dense, dense)
    least = metric.smallest_margin(labels, 0.05)
    assert same.p_value(1.001 * least) < 0.05 < same.p_value(0.999 * least)
    assert (same.worse, same.better, same.difference) == (0, 0, 0)


# --- the stratified score test ----------------------------------------------------------------------------


@pytest.mark.parametrize(("worse", "better", "count", "margin"), [(5, 3, 99, 0.05), (0, 7, 60, -0.05), (3, 0, 80, 0.2)])
def test_with_one_class_the_stratified_test_is_tangos(worse, better, count, margin):
    found = stratified(np.array([worse]), np.array([better]), np.array([count]), margin)
    alone = float(stats.norm.cdf(score(worse, better, count, margin)))
    gained = max(better - worse, 0)
    floor = stats.binom.cdf(max(worse - better, 0), count, margin + gained / count)
    assert found == pytest.approx(max(alone, floor), abs=1e-6)


@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.03, 0.2])
@pytest.mark.parametrize(
    ("worse", "better", "counts"), [([3, 0, 5], [1, 2, 5], [20, 40, 90]), ([0, 0, 1], [0, 3, 0], [10, 20, 30])]
)
def test_the_stratified_test_is_the_score_test(worse, better, counts, margin):
    """Against the constrained maximum of the likelihood that a general optimiser finds."""
    b, c, n = (np.array(v, float) for v in (worse, better, counts))
    k = len(n)

    def loss(v):
        p, q = v[:k], v[k:]
        return -(b * np.log(p) + c * np.log(q) + (n - b - c) * np.log(1 - p - q)).sum()

    best = optimize.minimize(
        loss, np.full(2 * k, 0.1), method="SLSQP", bounds=[(1e-12, 0.9)] * (2 * k),
        options={"maxiter": 1000, "ftol": 1e-14},
        constraints=[
            {"type": "eq", "fun": lambda v: (v[:k] - v[k:]).mean() - margin},
            {"type": "ineq", "fun": lambda v: 1 - 1e-9 - v[:k] - v[k:]},
        ],
    )  # fmt: skip
    p, q = best.x[:k], best.x[k:]
    deviation = np.sqrt(((p + q - (p - q) ** 2) / n).sum()) / k
    observed = ((b - c) / n).mean()
    expected = max(stats.norm.cdf((observed - margin) / deviation), unseen(1 / (k * n), n, observed, margin))
    assert stratified(b, c, n, margin) == pytest.approx(expected, abs=2e-3)


def test_small_classes_decide_what_can_be_shown():
    assert smallest_stratified_margin(np.array([300]), 0.05) == pytest.approx(1 - 0.05 ** (1 / 300))
    even, uneven = (smallest_stratified_margin(np.array(c), 0.05) for c in ([150, 150], [290, 10]))
    assert uneven > 2 * even


# --- what did not turn up ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("observed", "margin"), [(0.0, 0.02), (0.011, 0.03), (0.03, 0.05)])
def test_what_is_unseen_of_one_kind_is_binomial(observed, margin):
    found = unseen(np.array([1 / 300]), np.array([300]), observed, margin)
    assert found == pytest.approx(stats.binom.cdf(np.floor(300 * observed + 1e-9), 300, margin), abs=1e-12)


@pytest.mark.parametrize("observed", [0.0, 0.004, 0.02])
def test_what_is_unseen_of_several_kinds(observed):
    """The chances against a general optimiser, the loss's distribution by drawing it."""
    stakes, counts, margin = np.array([0.001, 0.004, 0.002]), np.array([200, 20, 80]), 0.04
    best = optimize.minimize(
        lambda p: -(counts * np.log1p(-p)).sum(), np.full(3, 0.1), method="SLSQP", bounds=[(0, 0.99)] * 3,
        constraints=[{"type": "eq", "fun": lambda p: (stakes * counts * p).sum() - margin}], options={"ftol": 1e-14},
    )  # fmt: skip
    drawn = np.random.default_rng(0).binomial(counts, best.x, (40_000, 3)) @ stakes
    assert unseen(stakes, counts, observed, margin) == pytest.approx((drawn <= observed + 1e-9).mean(), abs=0.008)
    assert unseen(stakes, counts, -0.01, margin) == unseen(stakes, counts, 0.0, margin + 0.01)
    assert (unseen(stakes, counts, 0.0, 0.0), unseen(stakes, counts, 0.0, 0.45)) == (1, 0)
    least = smallest_unseen(stakes, counts, 0.05)
    assert unseen(stakes, counts, 0.0, 1.001 * least) < 0.05 < unseen(stakes, counts, 0.0, 0.999 * least)


@pytest.mark.parametrize("name", ["f1", "auroc"])
def test_stakes_are_what_the_worst_answer_costs(name):
    """Of a dense model that is always right: the largest rise of the error that any other answer makes."""
    metric, labels = METRICS[name], np.repeat([0, 1, 2], [12, 6, 3])
    right = 5 * np.eye(3)[labels]
    dense = metric.observe(Answers(right, labels))
    stakes = metric.stakes(dense.there, dense.several)
    for image in (0, 13, 20):
        costs = []
        for worst in 9 * np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, -9], [1, -9, 1], [-9, 1, 1]]):
            changed = right.copy()
            changed[image] = worst
            costs.append(metric.error(metric.observe(Answers(changed, labels))) - metric.error(dense))
        assert 0.45 * stakes[image] < max(costs) <= stakes[image] + 1e-12
    if name == "f1":
        assert max(costs) == pytest.approx(stakes[20])


@pytest.mark.parametrize("name", ["balanced_accuracy", "f1", "auroc"])
@pytest.mark.parametrize("counts", [(190, 10), (60, 60)])
def test_a_variant_that_only_loses_is_not_claimed_too_often(name, counts, monkeypatch):
    """Images of the last class are lost, wherever that leaves the least that so many images can show."""
    monkeypatch.setattr(resampling, "REPLICATES", 200)
    metric, labels, delta, rounds = METRICS[name], np.repeat([0, 1], counts), 0.1, 150
    right = 5 * np.eye(2)[labels]
    dense = metric.observe(Answers(right, labels))
    margin = 1.001 * metric.smallest_margin(labels, delta)
    last = counts[1]
    rng = np.random.default_rng(0)

    def error(share):
        """The expected error where each image of the last class is lost with this chance."""
        if name != "f1":  # in proportion
            return share * metric.error(metric.observe(Answers(np.where(labels[:, None], [9, 0], right), labels)))
        hits = last * (1 - share)
        first = 2 * counts[0] / (2 * counts[0] + last - hits)
        return 1 - (first + 2 * hits / (hits + last)) / 2

    share = optimize.brentq(lambda s: error(s) - margin, 1e-9, 1 - 1e-9)
    claims = 0
    for _ in range(rounds):
        logits = right.copy()
        logits[(labels == 1) & (rng.random(len(labels)) < share)] = [9, 0]
        claims += metric.compare(metric.observe(Answers(logits, labels)), dense).p_value(margin) <= delta
    assert claims / rounds < delta + 3 * np.sqrt(delta * (1 - delta) / rounds)


# --- betting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, 300, 3000])
def test_the_betting_test_holds_its_level_even_where_rare_losses_are_large(count):
    """Nine in ten thousand images cost 9 nats: the t-test claims far too often where it has not met one."""
    rng = np.random.default_rng(count)
    rare = rng.random((600, count)) < 0.005
    differences = np.where(rare, 9.0, 0.0) + rng.normal(0, 0.02, (600, count)).clip(-0.1, 0.1)
    truth = 0.045
    claimed = np.mean([betting(d, 10.0, truth) <= 0.05 for d in differences])
    assert claimed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)
    if count == 30:
        by_t = stats.ttest_1samp(differences, truth, axis=1, alternative="less").pvalue
        assert np.mean(by_t <= 0.05) > 0.5


def test_the_betting_test_has_power_and_does_not_go_by_order():
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 0.3, 2000)
    assert betting(differences, 10.0, 0.08) < 0.05
    assert betting(differences, 10.0, 0.08) == pytest.approx(betting(differences[::-1], 10.0, 0.08))
    assert betting(differences, 10.0, -11) == 1
    assert betting(differences, 10.0, 10) == 0


# --- the bootstrap ----------------------------------------------------------------------------------------


def test_the_p_value_of_the_bootstrap_is_where_scipys_bca_bound_is():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=40)
    drawn = values[rng.integers(0, 40, (40_000, 40))].mean(1)
    found = Bootstrap(values.mean(), drawn, values - values.mean())
    for alpha in (0.05, 0.2):
        high = stats.bootstrap(
            (values,), np.mean, n_resamples=40_000, confidence_level=1 - 2 * alpha, method="BCa", rng=rng
        ).confidence_interval.high
        assert found.p_value(high) == pytest.approx(alpha, abs=0.006)


@pytest.mark.parametrize("name", ["f1", "auroc"])
def test_influences_are_those_of_leaving_an_image_out(name):
    metric, found = METRICS[name], answers(60, 3, 3)
    seen = metric.observe(found)
    left = np.array([metric.error(metric.observe(found[np.arange(60) != i])) for i in range(60)])
    jackknife = -left
    for label in range(3):
        jackknife[found.labels == label] -= jackknife[found.labels == label].mean()
    assert np.corrcoef(jackknife, metric.influence(seen))[0, 1] > 0.99


def population(classes, excess, count=4000):
    """Answers of a dense model and of a variant that is worse."""
    rng = np.random.default_rng(7)
    labels = np.arange(count) % classes
    shared = rng.normal(size=(count, classes))
    own = [shared + 0.5 * rng.normal(size=(count, classes)) for _ in range(2)]
    signal = 2 * np.eye(classes)[labels]
    return [Answers(noise + strength * signal, labels) for noise, strength in zip(own, (1, 1 - excess), strict=True)]


BOOTSTRAPPED = [pytest.param(name, marks=pytest.mark.slow) for name in ("f1", "auroc")]


@pytest.mark.parametrize("name", ["balanced_accuracy", "cross_entropy", *BOOTSTRAPPED])
def test_false_claims_at_a_tight_null(name, monkeypatch):
    """The margin is the true excess: every claim is false. The bootstrap is only about right."""
    monkeypatch.setattr(resampling, "REPLICATES", 400)
    metric, rounds, delta = METRICS[name], 250, 0.1
    dense, ours = population(3, 0.1)
    margin = metric.error(metric.observe(ours)) - metric.error(metric.observe(dense))
    assert margin > 0.005
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(rounds):
        rows = np.concatenate([rng.choice(np.flatnonzero(dense.labels == k), 80) for k in range(3)])
        claims += metric.compare(metric.observe(ours[rows]), metric.observe(dense[rows])).p_value(margin) <= delta
    assert claims / rounds < delta + 3 * np.sqrt(delta * (1 - delta) / rounds) + 0.02 * metric.approximate


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "cross_entropy", *BOOTSTRAPPED])
def test_an_error_is_rarely_claimed_to_be_below_itself(name, monkeypatch):
    """The bound is the true error: every claim is false, and with a bound well above it most are made."""
    monkeypatch.setattr(resampling, "REPLICATES", 400)
    metric, rounds, delta = METRICS[name], 250, 0.1
    everyone, _ = population(3, 0.0)
    truth = metric.error(metric.observe(everyone))
    rng = np.random.default_rng(0)
    claims, above = 0, 0
    for _ in range(rounds):
        rows = np.concatenate([rng.choice(np.flatnonzero(everyone.labels == k), 80) for k in range(3)])
        test = metric.absolute(metric.observe(everyone[rows]))
        claims += test(truth) <= delta
        above += test(2 * truth) <= delta
    assert claims / rounds < delta + 3 * np.sqrt(delta * (1 - delta) / rounds) + 0.02 * metric.approximate
    assert above / rounds > 0.5


@pytest.mark.parametrize("name", METRICS)
def test_bounds_of_an_error(name, monkeypatch):
    """Likelier the higher they are; none is claimed of 0, or below what was seen."""
    monkeypatch.setattr(resampling, "REPLICATES", 400)
    metric = METRICS[name]
    seen = metric.observe(answers(400, 3, 1))
    error, test = metric.error(seen), metric.absolute(seen)
    p_values = [test(bound) for bound in (0.0, error / 2, error, (error + metric.reach) / 2)]
    assert p_values == sorted(p_values, reverse=True)
    assert p_values[0] == pytest.approx(1, abs=1e-6)
    assert p_values[2] > 0.3
    assert p_values[3] < 0.05


# --- the road -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_the_walk_certifies_by_any_metric_and_says_by_what(name, monkeypatch):
    monkeypatch.setattr(resampling, "REPLICATES", 400)
    metric = METRICS[name]
    dense, worse = population(3, 0.6, 1200)
    by_name = {"dense": dense, "same": dense, "worse": worse}
    models = [Finalist(n, {"params": p}, 0.0, 0.0) for n, p in (("worse", 1), ("same", 2))]
    whole = Finalist("dense", {"params": 3}, 0.0, 0.0)
    found = certify(
        models, whole, lambda f: metric.observe(by_name[f.name]),
        epsilon=0.05, eta=0.05, delta=0.05, measure="params", metric=metric,
    )  # fmt: skip
    assert (found.selected, found.passed, found.metric, found.count) == ("same", True, name, 1200)
    assert f"its {metric.noun} on new data exceeds" in found.sentence
    assert ("approximate" in found.sentence) == found.approximate == (name in ("f1", "auroc"))
    assert ("asymptotic" in found.sentence) == (name == "balanced_accuracy")
    assert ("nats" in found.sentence) == (name == "cross_entropy")
    assert found.steps[-1].difference > 0.05


def test_resolutions_say_what_can_be_said():
    labels = np.arange(900) % 3
    said = {name: metric.resolution(labels, 0.01, 0.05) for name, metric in METRICS.items()}
    assert said["accuracy"] == (
        "certify has 900 images: at level 0.05 no ε below 0.33 points can be certified; "
        "for yours (1) expect to need 3,092 if 5% of the answers change"
    )
    assert "or more" in said["balanced_accuracy"]
    assert "nats can be certified" in said["cross_entropy"]
    assert all("approximate" in said[name] for name in ("f1", "auroc"))


def test_selection_words_and_units():
    rule = WithinMargins(epsilon=0.01, metric=METRICS["cross_entropy"])
    dense = Finalist("dense", {"params": 10}, 0.5, 0.6)
    verdict = rule.select([Finalist("v1", {"params": 5}, 0.5, 0.605), Finalist("v2", {"params": 1}, 0.5, 0.7)], dense)
    assert "cross-entropy on search 0.6050 (+0.0050 nats against dense)" in verdict.sentence
    assert verdict.reasons["v2"].startswith("cross-entropy on search is 0.1000 nats above dense, allowed 0.0100 nats")


def test_classes_without_images_are_refused_by_name():
    splits = {"train": np.array([0, 1, 2]), "search": np.array([0, 2, 2])}
    for name, metric in METRICS.items():
        if not metric.per_class:
            metric.check(splits, ("cat", "dog", "owl"))
            continue
        with pytest.raises(MetricError, match=f"--metric {name}: class 'dog' has no image in search"):
            metric.check(splits, ("cat", "dog", "owl"))
        with pytest.raises(MetricError, match="all images are of one class"):
            metric.check({"train": np.array([1]), "search": np.array([1])}, ("cat", "dog"))


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "f1", "auroc"])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.05])
def test_no_more_than_rounding_may_change_is_allowed_and_no_less(name, share):
    """Against answers that are turned, at random and among the rarest; and far less than all where few are rare."""
    rng, metric = np.random.default_rng(0), METRICS[name]
    labels = np.repeat([0, 1, 2], [600, 390, 10])
    logits = rng.normal(size=(1000, 3)) + 2 * np.eye(3)[labels]
    allowed, turned = rounding(metric, labels, share), max(round(1000 * share), 1)
    before, most = metric.error(metric.observe(Answers(logits, labels))), 0.0
    for chosen in (*(rng.permutation(1000)[:turned] for _ in range(20)), np.arange(1000 - turned, 1000)):
        for wanted in range(3):
            other = logits.copy()
            other[chosen] = 9 * np.eye(3)[wanted]
            most = max(most, abs(metric.error(metric.observe(Answers(other, labels))) - before))
    assert most <= allowed + 1e-9
    assert allowed <= {"accuracy": share, "balanced_accuracy": 0.4}.get(name, 0.8) or share == 0
