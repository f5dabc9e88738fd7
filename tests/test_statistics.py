"""Running averages of plain functions: found, and set to the statistics of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from treesurgeon import engine

KEYS = jax.random.split(jax.random.key(0), 3)


def train(variables, x):
    """Two averages with momenta of their own, a counter, and a leaf that is replaced whole."""
    w, stats = variables["w"], variables["stats"]
    y = x @ w
    new = {
        "mean": 0.9 * stats["mean"] + 0.1 * y.mean(0),
        "square": 0.5 * stats["square"] + 0.5 * (y**2).mean(0),
        "steps": stats["steps"] + 1,
        "scale": stats["scale"] * y.std(),
        "fresh": y.max(0),
    }
    return y, {"stats": new}


def variables():
    size = {"mean": 5, "square": 5, "scale": 5, "fresh": 5}
    stats = {name: jax.random.normal(KEYS[0], (n,)) for name, n in size.items()}
    return {"w": jax.random.normal(KEYS[1], (4, 5)), "stats": {**stats, "steps": jnp.zeros((), jnp.int32)}}


X = jax.random.normal(KEYS[2], (16, 4))


def test_averages_are_found_by_their_update():
    assert engine.momenta(train, variables(), X) == pytest.approx(
        {"stats/mean": 0.9, "stats/square": 0.5, "stats/fresh": 0.0}
    )
    assert engine.momenta(lambda v, x: (x @ v["w"], {}), variables(), X) == {}


def test_they_become_the_statistics_of_the_batch_and_nothing_else_changes():
    given = variables()
    found = jax.jit(engine.reestimate(train, engine.momenta(train, given, X)))(given, X)
    y = np.asarray(X @ given["w"], np.float64)
    np.testing.assert_allclose(found["stats"]["mean"], y.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["stats"]["square"], (y**2).mean(0), rtol=1e-5)
    for name in ("scale", "steps"):
        np.testing.assert_array_equal(found["stats"][name], given["stats"][name])
    np.testing.assert_array_equal(found["w"], given["w"])
    assert engine.reestimate(train, {})(given, X) is given


def test_a_narrowed_function_is_reestimated_at_its_own_shapes():
    given = variables()
    found = engine.momenta(train, given, X)
    graph = engine.trace(lambda v, x: jnp.tanh(x @ v["w"] - v["stats"]["mean"]).sum(1), given, X)
    (name,) = (name for name, group in graph.groups.items() if group.size == 5)
    plan = engine.Plan({name: np.array([0, 3])})
    small = engine.cut(given, graph, plan)

    def run(v, x):
        y = x @ v["w"]
        return y, {"stats": {"mean": 0.9 * v["stats"]["mean"] + 0.1 * y.mean(0)}}

    found = {"stats/mean": found["stats/mean"]}
    new = engine.reestimate(run, found)(small, X)
    np.testing.assert_allclose(new["stats"]["mean"], (X @ given["w"][:, [0, 3]]).mean(0), rtol=1e-5, atol=1e-6)


def test_updates_that_are_no_leaves_are_refused():
    with pytest.raises(engine.StructureError, match="elsewhere"):
        engine.momenta(lambda v, x: (x, {"elsewhere": x}), variables(), X)
    with pytest.raises(engine.StructureError, match="stats/mean"):
        engine.reestimate(lambda v, x: (x, {}), {"stats/mean": 0.9})(variables(), X)


class Behind(nn.Module):
    """A norm behind what also updates a state of its own."""

    first: str

    @nn.compact
    def __call__(self, x, train=False):
        if self.first == "spectral":
            x = nn.SpectralNorm(nn.Dense(8), name="first")(x, update_stats=train)
        else:
            x = nn.BatchNorm(use_running_average=True, name="first")(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(nn.BatchNorm(not train, name="norm")(x)))


@pytest.mark.parametrize("first", ["spectral", "frozen"])
def test_an_average_behind_another_state(first):
    """Neither hides it; a power iteration, whose derivative Flax stops, is no average and must not start from zero."""
    module = Behind(first)
    start = jax.jit(module.init)(jax.random.key(0), X)
    step = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))
    found = engine.momenta(step, start, X)
    assert found == pytest.approx(
        {f"batch_stats/norm/{name}": 0.99 for name in ("mean", "var")}
        | ({"batch_stats/first/Dense_0/kernel/sigma": 0.0} if first == "spectral" else {})
    )
    settled = start
    for _ in range(1500):
        settled = {**settled, **step(settled, X)[1]}
    again = engine.reestimate(step, found)(settled, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, settled)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_averages_in_half_precision(dtype):
    """A momentum is no number of so few bits: what is divided by one less it must not be either."""
    given = jax.tree.map(lambda v: v.astype(dtype) if v.dtype == jnp.float32 else v, variables())

    def step(v, x):
        mean, new = v["stats"]["mean"], (x @ v["w"]).mean(0)
        return x, {"stats": {"mean": (0.9 * mean + 0.1 * new).astype(mean.dtype)}}

    x = X.astype(dtype)
    found = engine.momenta(step, given, x)
    assert found == pytest.approx({"stats/mean": 0.9}, abs=1e-6)
    again = engine.reestimate(step, found)(given, x)["stats"]["mean"]
    assert again.dtype == dtype
    want = np.asarray(x @ given["w"], np.float64).mean(0)
    np.testing.assert_allclose(np.asarray(again, np.float64), want, rtol=8 * float(jnp.finfo(dtype).eps), atol=0.005)


def test_an_average_that_insists_on_its_dtype():
    def step(v, x):
        turn = lambda mean, y: (jnp.bfloat16(0.5) * mean + jnp.bfloat16(0.5) * y.mean(0).astype(jnp.bfloat16), None)
        return x, {"mean": jax.lax.scan(turn, v["mean"], x[None])[0]}

    assert engine.momenta(step, {"mean": jnp.ones(4, jnp.bfloat16)}, X) == {"mean": 0.5}
