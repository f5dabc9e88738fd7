"""Scores against NumPy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import engine
from treesurgeon.engine import CRITERIA, TreesurgeonError, activation_energy, importance

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


P = {
    "params": {
        "a": {"kernel": normal(3, 3, 2, 4), "bias": normal(4)},
        "n": {"scale": normal(4), "bias": normal(4)},
        "b": {"kernel": normal(4 * 4, 5), "bias": normal(5)},
        "c": {"kernel": normal(5, 3)},
    },
    "batch_stats": {"n": {"mean": normal(4)}},
}
X = normal(6, 2, 2, 2)
DIMS = jax.lax.conv_dimension_numbers(X.shape, (3, 3, 2, 4), ("NHWC", "HWIO", "NHWC"))


def features(p, x):
    q = p["params"]
    h = jax.lax.conv_general_dilated(x, q["a"]["kernel"], (1, 1), "SAME", dimension_numbers=DIMS) + q["a"]["bias"]
    h = (h - p["batch_stats"]["n"]["mean"]) * q["n"]["scale"] + q["n"]["bias"]
    return jax.nn.relu(h).reshape(len(x), -1)


def hidden(p, x):
    return jnp.tanh(features(p, x) @ p["params"]["b"]["kernel"] + p["params"]["b"]["bias"])


def fn(p, x):
    return hidden(p, x) @ p["params"]["c"]["kernel"]


GRAPH = engine.trace(fn, P, X)
A, N, B, C = (P["params"][k] for k in "anbc")


def close(got, want):
    assert got.keys() == GRAPH.groups.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude(criterion, power):
    size = lambda w: np.abs(w) ** power
    by_channel = size(A["kernel"]).sum((0, 1, 2)) + size(B["kernel"]).reshape(4, 4, 5).sum((0, 2))
    by_neuron = size(B["kernel"]).sum(0) + size(C["kernel"]).sum(1)
    close(importance(criterion, GRAPH, P), {"a": by_channel, "b": by_neuron})


def test_norm_scale_falls_back_to_l2():
    close(importance("norm_scale", GRAPH, P), {"a": np.abs(N["scale"]), "b": importance("l2", GRAPH, P)["b"]})


def test_taylor():
    grads = jax.grad(lambda p: (fn(p, X) ** 2).sum())(P)
    slope = {k: jax.tree.map(lambda w, g: np.asarray(w * g), P["params"][k], grads["params"][k]) for k in "anbc"}
    channel = [
        slope["a"]["kernel"].sum((0, 1, 2)), slope["a"]["bias"], slope["n"]["scale"], slope["n"]["bias"],
        slope["b"]["kernel"].reshape(4, 4, 5).sum((0, 2)),
    ]  # fmt: skip
    neuron = [slope["b"]["kernel"].sum(0), slope["b"]["bias"], slope["c"]["kernel"].sum(1)]
    close(
        importance("taylor", GRAPH, P, grads=grads),
        {"a": sum(s**2 for s in channel), "b": sum(s**2 for s in neuron)},
    )


def test_activation_energy():
    energy = jax.jit(activation_energy(fn, GRAPH))(P, X)
    flat, top = np.asarray(features(P, X)), np.asarray(hidden(P, X))
    want = {"a": (flat**2).mean(0).reshape(4, 4).mean(0), "b": (top**2).mean(0)}
    close(energy, want)
    assert importance("activation", GRAPH, P, energy=energy).keys() == energy.keys()


LOOPED = {"a": normal(5, 4), "b": normal(4, 4), "c": normal(4, 3), "w": normal(3, 4, 4)}
ROWS = normal(6, 5)
HIDDEN = ROWS @ LOOPED["a"]


@jax.custom_jvp
def squashed(h, b):
    return jnp.tanh(h @ b)


squashed.defjvp(lambda v, t: jax.jvp(lambda h, b: jnp.tanh(h @ b), v, t))


def steps(n):
    """What a loop's steps read: h, tanh(h b), …"""
    out = [HIDDEN]
    for _ in range(n - 1):
        out.append(np.tanh(out[-1] @ LOOPED["b"]))
    return out


STACK = [HIDDEN]
for layer in LOOPED["w"][:-1]:
    STACK.append(np.tanh(STACK[-1] @ layer))


@pytest.mark.parametrize(
    ("name", "inside", "reads"),
    [
        ("scan", lambda p, h: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["w"])[0], STACK),
        ("fori", lambda p, h: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["b"]), h), steps(3)),
        (
            "while",
            lambda p, h: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["b"])), (0, h))[
                1
            ],
            steps(3),
        ),
        ("cond", lambda p, h: jax.lax.cond(h.sum() < 1e9, lambda h: jnp.tanh(h @ p["b"]), lambda h: h, h), steps(1)),
        ("custom", lambda p, h: squashed(h, p["b"]), steps(1)),
        ("nested", lambda p, h: jax.lax.fori_loop(0, 2, lambda _, h: squashed(h, p["b"]), h), steps(2)),
    ],
)
def test_energy_of_what_is_read_inside(name, inside, reads):
    """Outside there is only a sum over units, so that all energy comes from inside."""
    looped = lambda p, x: inside(p, x @ p["a"]).sum(1)
    graph = engine.trace(looped, LOOPED, ROWS)
    energy = jax.jit(activation_energy(looped, graph))(LOOPED, ROWS)
    np.testing.assert_allclose(energy["a"], sum((h**2).mean(0) for h in reads), rtol=1e-5)


def test_energy_does_not_depend_on_the_order_of_a_mapping():
    backwards = jax.tree.map(lambda x: x, P)
    backwards["params"] = dict(reversed(backwards["params"].items()))
    mine, his = activation_energy(fn, GRAPH)(backwards, X), activation_energy(fn, GRAPH)(P, X)
    for name in his:
        np.testing.assert_allclose(mine[name], his[name], rtol=1e-6)


def test_messages():
    with pytest.raises(TreesurgeonError, match=r"needs grads: the gradient of the loss"):
        importance("taylor", GRAPH, P)
    with pytest.raises(TreesurgeonError, match=r"needs energy: activation_energy\(fn, graph\)"):
        importance("activation", GRAPH, P)
    with pytest.raises(TreesurgeonError, match=f"unknown criterion 'size'; choose one of {', '.join(CRITERIA)}"):
        importance("size", GRAPH, P)
