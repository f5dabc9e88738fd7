"""Closed-form heads against NumPy and SciPy in float64."""

import jax
import numpy as np
import pytest
from scipy.optimize import minimize

from treesurgeon.search import heads
from treesurgeon.search.heads import HeadError, best_logistic, logistic, ridge


def data(n=200, f=7, k=3, seed=0, odd=True):
    """Features of very different scales, one of them constant, and noisy classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, f)) @ rng.normal(size=(f, f))
    if odd:
        x = x * 10.0 ** rng.integers(-3, 4, f) + rng.normal(size=f) * 10.0 ** rng.integers(-3, 3, f)
        x[:, -1] = 5.0
    score = rng.normal(size=(f, k))
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    return x.astype(np.float32), (z @ score + rng.gumbel(size=(n, k))).argmax(1)


def standardised(x):
    x = x.astype(np.float64)
    moves = x.std(0) > 1e-5 * np.abs(x.mean(0))
    return ((x - x.mean(0)) / np.where(moves, x.std(0), 1))[:, moves]


def slow_ridge(z, y, penalty):
    w = np.linalg.solve(z.T @ z / len(z) + penalty * np.eye(z.shape[1]), z.T @ (y - y.mean(0)) / len(z))
    return z @ w + y.mean(0)


@pytest.mark.parametrize(("n", "f"), [(200, 7), (15, 30)])
def test_ridge_is_the_solution_at_the_best_lambda(n, f):
    x, classes = data(n, f)
    y = np.eye(3)[classes]
    z = standardised(x)
    hats = []
    merits = []
    for penalty in heads.LAMBDAS:
        hat = z @ np.linalg.solve(z.T @ z / n + penalty * np.eye(z.shape[1]), z.T / n)
        hats.append(hat)
        rest = ((y - slow_ridge(z, y, penalty)) ** 2).sum(1).mean()
        merits.append(rest / (1 - (1 + np.trace(hat)) / n) ** 2)
    head = ridge(x, y)
    assert float(head.penalty) == pytest.approx(heads.LAMBDAS[int(np.argmin(merits))], rel=1e-5)
    np.testing.assert_allclose(head(x), slow_ridge(z, y, float(head.penalty)), atol=2e-3)


def test_ridge_by_held_out_and_for_numbers():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 30)).astype(np.float32)
    w = rng.normal(size=(30, 2))
    y, new = x @ w + 4 * rng.normal(size=(40, 2)), rng.normal(size=(500, 30)).astype(np.float32)
    wanted = new @ w
    head = ridge(x, y, held_out=(new, wanted))
    errors = []
    for penalty in heads.LAMBDAS:
        errors.append(float(((np.asarray(ridge(x, y, [penalty])(new)) - wanted) ** 2).mean()))
    assert float(head.penalty) == pytest.approx(heads.LAMBDAS[int(np.argmin(errors))])
    assert 0 < int(np.argmin(errors)) < len(errors) - 1  # a choice was to be made


def slow_logistic(z, y, k, l2, known=None, free=None):
    """The least loss, and the logits there, by SciPy in float64."""
    free = list(range(k)) if free is None else free
    ones = np.concatenate([z, np.ones((len(z), 1))], 1)
    decay = l2 * np.append(np.ones(z.shape[1]), 0)[:, None]

    def logits(w):
        out = np.zeros((len(z), k)) if known is None else known.astype(np.float64).copy()
        out[:, free] = ones @ w
        return out

    def loss(flat):
        w = flat.reshape(ones.shape[1], len(free))
        s = logits(w)
        s = s - s.max(1, keepdims=True)
        logp = s - np.log(np.exp(s).sum(1, keepdims=True))
        g = np.exp(logp)
        g[np.arange(len(y)), y] -= 1
        slope = ones.T @ g[:, free] / len(y) + decay * w
        return -logp[np.arange(len(y)), y].mean() + (decay * w**2).sum() / 2, slope.reshape(-1)

    found = minimize(loss, np.zeros(ones.shape[1] * len(free)), jac=True, method="L-BFGS-B",
                     options={"maxiter": 20000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9})  # fmt: skip
    return logits(found.x.reshape(ones.shape[1], len(free)))


def softmax(s):
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("newton", [True, False])
@pytest.mark.parametrize(("n", "f", "k", "l2"), [(300, 6, 2, 1e-3), (300, 9, 5, 1e-2), (20, 40, 3, 1e-2)])
def test_logistic_is_at_the_minimum(monkeypatch, newton, n, f, k, l2):
    monkeypatch.setattr(heads, "NEWTON", 10**6 if newton else 0)
    x, y = data(n, f, k)
    want = softmax(slow_logistic(standardised(x), y, k, l2))
    np.testing.assert_allclose(softmax(np.asarray(logistic(x, y, k, l2)(x))), want, atol=5e-3)


@pytest.mark.parametrize("newton", [True, False])
def test_classes_that_have_a_head_keep_it(monkeypatch, newton):
    monkeypatch.setattr(heads, "NEWTON", 10**6 if newton else 0)
    x, y = data(400, 6, 4)
    z = standardised(x)
    known = (z @ np.random.default_rng(3).normal(size=(z.shape[1], 4))).astype(np.float32)
    head = logistic(x, y, 4, 1e-2, known=known, free=[0, 3])
    assert head.kernel.shape == (6, 2)
    got = known.copy()
    got[:, [0, 3]] = head(x)
    want = slow_logistic(z, y, 4, 1e-2, known, [0, 3])
    np.testing.assert_allclose(softmax(got), softmax(want), atol=5e-3)


def test_separable_classes_and_far_features_stay_finite():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (np.eye(3)[y] * 1e4 + 1e6 + rng.normal(size=(60, 3))).astype(np.float32)
    for head in (ridge(x, np.eye(3)[y]), logistic(x, y, 3, 1e-6), best_logistic(x, y, 3)):
        assert np.isfinite(head.kernel).all()
        assert (np.asarray(head(x)).argmax(1) == y).all()


def test_the_penalty_is_chosen_on_what_was_held_out():
    x, y = data(100, 60, 3, odd=False)
    losses = []
    for l2 in heads.PENALTIES:
        head = logistic(x, y, 3, l2, weights=np.arange(100) >= 20)
        few = slow_logistic(standardised(x)[20:], y[20:], 3, l2)
        np.testing.assert_allclose(softmax(np.asarray(head(x[20:]))), softmax(few), atol=5e-3)
        p = softmax(np.asarray(head(x[:20])))
        losses.append(-np.log(p[np.arange(20), y[:20]]).mean())
    found = best_logistic(x, y, 3)
    assert float(found.penalty) == pytest.approx(heads.PENALTIES[int(np.argmin(losses))])
    np.testing.assert_allclose(found.kernel, logistic(x, y, 3, float(found.penalty)).kernel, rtol=1e-4, atol=1e-5)


def test_a_second_fit_of_the_same_shapes_does_not_compile():
    x, y = data(50, 5)
    logistic(x, y, 3, 1e-3)
    with jax.log_compiles(False):
        before = heads._logistic._cache_size()
        logistic(x + 1, (y + 1) % 3, 3, 1e-2)
        assert heads._logistic._cache_size() == before


X, Y = data(20, 4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ridge(X, Y), r"targets \[N, K\] of as many examples, got \(20, 4\) and \(20,\)"),
        (lambda: ridge(X[:1], np.eye(3)[Y[:1]]), "two examples at least"),
        (lambda: logistic(X[:5], Y, 3), r"got \(5, 4\) and \(20,\)"),
        (lambda: logistic(X, Y, 2), "expected classes 0 to 1, got 0 to 2"),
        (lambda: logistic(X, Y, 3, 0.0), "expected a penalty above 0"),
        (lambda: logistic(X, Y, 3, known=np.zeros((20, 2))), r"expected logits \(20, 3\), got shape \(20, 2\)"),
        (lambda: logistic(np.where(X[0, 0] == X, np.nan, X), Y, 3), "NaN or infinity.*--mean and --std"),
    ],
)
def test_messages(call, match):
    with pytest.raises(HeadError, match=match):
        call()
