"""`narrow` and `gate` on two devices, in a process of its own: XLA_FLAGS settle how many devices it has.

Prints for each program, and for JAX's check of what varies switched on and off, how far both are from the same on one
device: the whole batch under `vmap` with an axis of that name.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as S
from laws import arr, draw

from treesurgeon import engine
from treesurgeon.engine import Plan

P = draw({"s": arr(5, 6), "o": arr(6, 3)}, 0, np.float32)
X = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
KEEP = Plan({"s": [0, 2, 5]})


def whole_batch(p, x):
    h = x @ p["s"]
    return (h - lax.pmean(h.mean(0), "d")) @ p["o"]


def table(p, x):
    return (jnp.tanh(x @ p["s"]) * jnp.arange(6.0)) @ p["o"]


def own_noise(p, x):
    key = jax.random.fold_in(jax.random.key(0), lax.axis_index("d"))
    h = x @ p["s"]
    return (h * jax.random.bernoulli(key, 0.5, h.shape)) @ p["o"]


def own_place(p, x):
    return ((x @ p["s"]) * (1 + lax.axis_index("d") * jnp.arange(6.0))) @ p["o"]


def carried(p, x):
    turn = lambda c, w: ((jnp.tanh(c[0] * w), c[1] + lax.pmean((c[0] ** 2).mean(), "d")), None)
    (h, total), _ = lax.scan(turn, (x @ p["s"], jnp.zeros(())), jnp.ones(3))
    return h @ p["o"] + total


if __name__ == "__main__":
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    graph = engine.trace(lambda p, x: jnp.tanh(x @ p["s"]) @ p["o"], P, X)
    masks, small = graph.masks(KEEP), engine.cut(P, graph, KEEP)
    for fn in (whole_batch, table, own_noise, own_place, carried):
        fast, gated = engine.narrow(fn, graph, KEEP), engine.gate(fn, graph)
        want = jax.vmap(fn, (None, 0), axis_name="d")
        zeroed = {**P, "s": P["s"] * np.isin(np.arange(6), KEEP.keep["s"])}
        parts = X.reshape(2, 2, 5)
        for check in (True, False):
            spec = {"mesh": mesh, "in_specs": (S(), S("d")), "out_specs": S("d"), "check_vma": check}
            narrow = jax.jit(jax.shard_map(fast, **spec))(small, X)
            masked = jax.jit(jax.shard_map(lambda p, x, gated=gated: gated(p, masks, x), **spec))(P, X)
            dense = jax.jit(jax.shard_map(fn, **spec))(P, X)
            np.testing.assert_allclose(dense, want(P, parts).reshape(4, 3), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(narrow, masked, rtol=1e-5, atol=1e-5)
            if fn is not carried:  # there a mean is over the units that are kept
                np.testing.assert_allclose(narrow, want(zeroed, parts).reshape(4, 3), rtol=1e-5, atol=1e-5)
            print(fn.__name__, check)
