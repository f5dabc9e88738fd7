"""Fine-tuning: what is trained, what is replaced, what is restored."""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.search import finetune
from treesurgeon.search.finetune import Recipe, fit, objective

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int32)
DATA = {"x": X, "y": Y}
SGD = Recipe(epochs=4, batch_size=8, learning_rate=0.1)


def params():
    return {
        "batch_stats": {"mean": jnp.zeros(4), "steps": jnp.zeros((), jnp.int32)},
        "params": {"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((4, 2))}, "scale": jnp.ones((1, 4))},
    }


def train_apply(p, x, key):
    del key
    stats = p["batch_stats"]
    new = {"mean": 0.9 * stats["mean"] + 0.1 * x.mean(0), "steps": stats["steps"] + 1}
    return apply(p, x), {"batch_stats": new}


def apply(p, x):
    return (x * p["params"]["scale"]) @ p["params"]["dense"]["kernel"] + p["params"]["dense"]["bias"]


def trainable(p, frozen=("batch_stats",)):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(name in jax.tree_util.keystr(path) for name in frozen), p
    )


@jax.jit
def evaluate(p):
    logits = apply(p, X)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()
    return loss, (logits.argmax(-1) != Y).mean()


def run(recipe=SGD, loss=None, data=None, evaluate=evaluate, seed=0, start=None, frozen=("batch_stats",)):
    p = start or params()
    loss, data = loss or objective(train_apply), data or DATA
    return fit(loss, p, trainable(p, frozen), data, recipe, jax.random.key(seed), evaluate)


def identical(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_learns_and_reports_what_it_returns(optimizer):
    result = run(dataclasses.replace(SGD, optimizer=optimizer))
    assert [e.number for e in result.history] == [0, 1, 2, 3, 4]
    assert result.history[0].train_loss is None
    assert result.history[0].search_error > 0.3
    assert result.history[result.best_epoch].search_error < 0.15
    loss, error = evaluate(result.params)
    best = result.history[result.best_epoch]
    assert (float(loss), float(error)) == (best.search_loss, best.search_error)
    assert jax.tree.structure(result.params) == jax.tree.structure(params())
    assert not identical(result.params, params())


def test_it_is_deterministic_and_the_key_matters():
    once = run().params
    assert identical(once, run().params)
    assert not identical(once, run(seed=1).params)


def test_statistics_are_replaced_by_what_the_apply_returns():
    result = run(dataclasses.replace(SGD, monitor="loss"))
    steps = result.params["batch_stats"]["steps"]
    assert steps.dtype == jnp.int32
    assert steps == 7 * result.best_epoch  # 50 images, 8 a batch
    assert jnp.abs(result.params["batch_stats"]["mean"]).max() > 0


def test_what_is_not_trainable_does_not_move():
    result = run(frozen=("batch_stats", "kernel"))
    assert identical(result.params["params"]["dense"]["kernel"], params()["params"]["dense"]["kernel"])
    assert not identical(result.params["params"]["dense"]["bias"], params()["params"]["dense"]["bias"])


def scripted(values):
    """An evaluation that gives (loss, error) pairs in turn, and remembers what it saw."""
    seen, values = [], iter(values)

    def evaluate(p):
        seen.append(p)
        return next(values)

    return evaluate, seen


@settings(deadline=None, max_examples=3)
@given(st.lists(st.tuples(*[st.sampled_from([0.1, 0.2, 0.3, float("nan")])] * 2), min_size=5, max_size=5))
def test_the_best_epoch_is_restored_the_first_of_equals(pairs):
    evaluate, seen = scripted(pairs)
    result = run(evaluate=evaluate)
    order = [(e, v) if e == e and v == v else (np.inf, np.inf) for v, e in pairs]
    assert result.best_epoch == order.index(min(order))
    assert identical(result.params, seen[result.best_epoch])


def test_the_monitor_decides_what_best_means():
    pairs = [(0.5, 0.5), (0.1, 0.4), (0.3, 0.2), (0.9, 0.3), (0.9, 0.3)]
    assert run(evaluate=scripted(pairs)[0]).best_epoch == 2
    assert run(dataclasses.replace(SGD, monitor="loss"), evaluate=scripted(pairs)[0]).best_epoch == 1


def test_when_nothing_improves_the_start_is_returned():
    start = params()
    result = run(evaluate=scripted([(0.1, 0.1)] + [(1.0, 1.0)] * 4)[0], start=start)
    assert result.best_epoch == 0
    assert identical(result.params, start)


def test_patience_stops():
    pairs = [(1.0, 0.5), (1.0, 0.4), (1.0, 0.6), (1.0, 0.6), (1.0, 0.1)]
    result = run(dataclasses.replace(SGD, patience=2), evaluate=scripted(pairs)[0])
    assert [e.number for e in result.history] == [0, 1, 2, 3]
    assert result.best_epoch == 1


def test_a_run_that_diverges_gives_back_the_start():
    result = run(dataclasses.replace(SGD, learning_rate=1e30, monitor="loss"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


@pytest.mark.parametrize(("rows", "size", "steps"), [(10, 4, 3), (8, 4, 2), (3, 64, 1), (1, 1, 1)])
def test_every_image_is_seen_at_least_once_and_the_last_batch_is_filled_from_the_same_order(rows, size, steps):
    seen = []

    def loss(p, batch, key):
        jax.debug.callback(lambda x: seen.append(x.tolist()), batch["x"], ordered=True)
        return jnp.sum(p["w"] ** 2), None

    p = {"w": jnp.ones(2)}
    recipe = dataclasses.replace(SGD, epochs=2, batch_size=size)
    fit(loss, p, {"w": True}, {"x": np.arange(rows)}, recipe, jax.random.key(0), lambda p: (0.0, 0.0))
    jax.effects_barrier()
    size = min(size, rows)
    assert [len(batch) for batch in seen] == [size] * 2 * steps
    first, second = [*itertools.chain(*seen[:steps])], [*itertools.chain(*seen[steps:])]
    for epoch in (first, second):
        assert sorted(epoch[:rows]) == list(range(rows))
        assert epoch[rows:] == epoch[: len(epoch) - rows]
        assert max(Counter(epoch).values()) <= 2
    if rows == 10:
        assert first != second


def test_an_epoch_is_compiled_once():
    traced = []

    def loss(p, batch, key):
        traced.append(1)
        return objective(train_apply)(p, batch, key)

    run(dataclasses.replace(SGD, epochs=1), loss)
    once = len(traced)
    traced.clear()
    run(dataclasses.replace(SGD, epochs=6), loss)
    assert len(traced) == once


@pytest.mark.parametrize(("spare", "programs"), [(0, ["ahead", "learn"]), (-1, ["step"])])
def test_a_step_is_two_programs_where_there_is_room_for_what_lies_between(monkeypatch, spare, programs):
    def ahead(state, x):
        return jax.vjp(lambda w: (jnp.tanh(x @ w).sum(), x.mean()), state, has_aux=True)

    def learn(state, value, back, updates):
        return state - 0.1 * back(jnp.ones_like(value))[0] + updates

    compiled, jit = [], jax.jit

    def counted(fun):
        def traced(*args):
            compiled.append(fun.__name__)
            return fun(*args)

        return jit(traced)

    state, x = jnp.ones((4, 3)), jnp.asarray(X)
    needed = finetune.size_of(jax.eval_shape(ahead, state, x))
    monkeypatch.setattr(jax, "jit", counted)
    step = finetune.stepping(ahead, learn, needed + spare)
    for _ in range(3):
        value, back, updates = ahead(state, x)
        expected = learn(state, value, back, updates), value
        found = step(state, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
        state = found[0]
    assert compiled[-len(programs) :] == programs
    assert compiled.count(programs[-1]) == 1


@pytest.mark.parametrize(("backend", "share"), [("cpu", 1 / finetune.BETWEEN), ("gpu", 0)])
def test_steps_have_room_for_what_lies_between_on_a_cpu(monkeypatch, backend, share):
    rooms, stepping = [], finetune.stepping
    monkeypatch.setattr(finetune, "memory", lambda: 10**9)
    monkeypatch.setattr(finetune.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(finetune, "stepping", lambda *parts: rooms.append(parts[-1]) or stepping(*parts))
    run()
    assert rooms == [share * 10**9]


def test_weight_decay_spares_scales_and_biases():
    p = params()
    assert finetune._decayed(p, trainable(p)) == [False, True, False]  # bias, kernel, scale of shape [1, 4]

    def flat(p, batch, key):  # no gradient: only the decay moves anything
        return 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(p["params"])), None

    start = jax.tree.map(lambda leaf: leaf + 1, p)
    for optimizer in ("sgd", "adamw"):
        recipe = dataclasses.replace(SGD, optimizer=optimizer, weight_decay=0.1)
        out = run(recipe, flat, start=start, evaluate=scripted([(5.0 - i, 0.5) for i in range(5)])[0]).params
        assert (out["params"]["dense"]["kernel"] < 1).all()
        assert identical(out["params"]["dense"]["bias"], start["params"]["dense"]["bias"])
        assert identical(out["params"]["scale"], start["params"]["scale"])


def test_the_schedule_warms_up_and_falls():
    recipe = Recipe(learning_rate=1.0, warmup=0.25, weight_decay=0.0, momentum=0.0)
    optimizer = finetune.transformation(recipe, 8, [True])
    state, rates = optimizer.init([jnp.zeros(1)]), []
    for _ in range(8):
        change, state = optimizer.update([jnp.ones(1)], state, [jnp.zeros(1)])
        rates.append(-float(change[0][0]))
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[2] == pytest.approx(1.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1


def test_distillation_is_the_divergence_from_softened_answers():
    batch = {"x": X[:5], "y": Y[:5], "teacher": RNG.normal(size=(5, 2)).astype(np.float32)}
    p = {"w": jnp.asarray(RNG.normal(size=(4, 2)).astype(np.float32))}
    apply = lambda p, x, key: (x @ p["w"], None)
    loss, _ = objective(apply, distill=1.0, temperature=3.0)(p, batch, jax.random.key(0))
    soft = lambda z: np.exp(z / 3) / np.exp(z / 3).sum(-1, keepdims=True)
    teacher, student = soft(batch["teacher"]), soft(np.asarray(X[:5] @ p["w"]))
    expected = 9 * (teacher * np.log(teacher / student)).sum(-1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    plain, _ = objective(apply)(p, batch, jax.random.key(0))
    mixed, _ = objective(apply, distill=0.25, temperature=3.0)(p, batch, jax.random.key(0))
    np.testing.assert_allclose(mixed, 0.75 * plain + 0.25 * loss, rtol=1e-5)
    same, _ = objective(apply, distill=1.0)(p, {**batch, "teacher": X[:5] @ p["w"]}, jax.random.key(0))
    np.testing.assert_allclose(same, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: run(data={"x": X, "y": Y[:3]}), "same number of images, at least 1, got {'x': 50, 'y': 3}"),
        (lambda: run(data={"x": X[:0], "y": Y[:0]}), "at least 1, got"),
        (lambda: run(loss=objective(train_apply, distill=0.5)), r"pass data\['teacher'\]"),
        (lambda: run(dataclasses.replace(SGD, optimizer="lion")), "expected 'sgd' or 'adamw', got 'lion'"),
        (lambda: run(frozen=("",)), "none of the 5 leaves is"),
        (lambda: run(frozen=("mean",)), r"trainable\['batch_stats'\]\['steps'\]: int32 has no gradient"),
        (lambda: run(loss=lambda p, batch, key: (apply(p, batch["x"])[:, 0], None)), r"real number, got float32\[8\]"),
        (lambda: run(loss=lambda p, batch, key: (batch["y"].sum(), None)), r"real number, got int32\[\]"),
        (
            lambda: fit(objective(train_apply), params(), {"params": True}, DATA, SGD, jax.random.key(0), evaluate),
            "expected a bool for each leaf",
        ),
        (
            lambda: finetune.replace(params(), {"batch_stats": {"var": jnp.zeros(3)}}),
            r"updates\['batch_stats'\]\['var'\]: expected a path of the parameters, got shape \[3\]",
        ),
        (
            lambda: finetune.replace(params(), {"batch_stats": {"mean": jnp.zeros(3)}}),
            r"expected shape \[4\], got shape \[3\]",
        ),
    ],
)
def test_errors(action, message):
    with pytest.raises(finetune.FinetuneError, match=message):
        action()
