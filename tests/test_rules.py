"""One row a primitive: what `trace` finds in a program that uses it, and that narrow and gate agree on it.

Every program maps parameters `w` [5, 8] and an input [2, 5] to an array; `units` are the sizes of the groups found.
A new rule needs a row here and nothing else.
"""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.random import threefry2x32_p
from laws import random_plan

from treesurgeon import engine
from treesurgeon.engine import calling
from treesurgeon.engine.rules import base, elementwise

X = np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)
W = {
    "w": np.sin(np.arange(40, dtype=np.float32)).reshape(5, 8),
    "v": np.cos(np.arange(40, dtype=np.float32)).reshape(5, 8),
    "u": np.sin(2 * np.arange(64, dtype=np.float32)).reshape(8, 8),
    "h": np.cos(2 * np.arange(8, dtype=np.float32)),
    "k": np.sin(3 * np.arange(96, dtype=np.float32)).reshape(3, 4, 8),
}


def ints(h):
    return (jnp.abs(h) * 10).astype(jnp.int32)


def positive(h):
    return jnp.abs(h) * 0.3 + 0.2


def key_of(h):
    """A key that is no constant."""
    return jax.random.wrap_key_data((h.sum(1) > 9).astype(jnp.uint32))


def unit_keys(h):
    return jax.random.split(key_of(h), 8)


ACROSS_DEVICES = {"psum_invariant", "pvary", "sharding_constraint", "name"}  # see test_verbs.py
NEWER = {"log2", "one_minus_square", "polynomial"}  # primitives that jax 0.10 has not
ELEMENTWISE = {
    **{
        n: getattr(lax, n)
        for n in """abs acos asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc
        exp exp2 expm1 floor is_finite lgamma log log1p logistic neg real imag round rsqrt sign sin sinh sqrt square
        tan tanh conj""".split()
        if n not in ("real", "imag", "conj")
    },
    **{
        n: (lambda h, n=n: getattr(lax, n)(h, h * 0.7 + 0.1))
        for n in "add atan2 div eq ge gt le lt max min mul ne nextafter pow rem sub igamma igammac".split()
    },
    "le_to": lambda h: lax.le_to_p.bind(h, h * 0.7 + 0.1),
    "lt_to": lambda h: lax.lt_to_p.bind(h, h * 0.7 + 0.1),
    **{n: (lambda h, n=n: getattr(lax, f"bitwise_{n}")(ints(h), ints(h) + 1)) for n in ("and", "or", "xor")},
    "log2": jnp.log2,
    "one_minus_square": lambda h: jax.jvp(jnp.tanh, (h,), (h,))[1],
    "polynomial": lambda h: jnp.polyval(jnp.array([0.5, 2.0, 1.0]), h),
    "not": lambda h: lax.bitwise_not(ints(h)),
    "clz": lambda h: lax.clz(ints(h)),
    "population_count": lambda h: lax.population_count(ints(h)),
    "shift_left": lambda h: lax.shift_left(ints(h), ints(h)),
    "shift_right_arithmetic": lambda h: lax.shift_right_arithmetic(ints(h), ints(h)),
    "shift_right_logical": lambda h: lax.shift_right_logical(ints(h), ints(h)),
    "acosh": lambda h: lax.acosh(h + 1),
    "polygamma": lambda h: lax.polygamma(jnp.ones_like(h), h),
    "zeta": lambda h: lax.zeta(h + 1, h),
    "regularized_incomplete_beta": lambda h: lax.betainc(h + 1, h + 1, h),
    "integer_pow": lambda h: lax.integer_pow(h, 3),
    "clamp": lambda h: lax.clamp(0.1, h, 0.5),
    "select_n": lambda h: lax.select(h > 0.3, h, -h),
    "complex": lambda h: jnp.abs(lax.complex(h, h)),
    "conj": lambda h: jnp.abs(lax.conj(lax.complex(h, h))),
    "real": lambda h: lax.real(lax.complex(h, h)),
    "imag": lambda h: lax.imag(lax.complex(h, h)),
    "convert_element_type": lambda h: h.astype(jnp.float16),
    "reduce_precision": lambda h: lax.reduce_precision(h, 5, 10),
    "optimization_barrier": lambda h: sum(lax.optimization_barrier((h, h * 2))),
    "stop_gradient": lax.stop_gradient,
    "copy": jnp.copy,
    "copy_p": jnp.copy,
    "device_put": lambda h: jax.device_put(h),
    "threefry2x32": lambda h: threefry2x32_p.bind(*[lax.bitcast_convert_type(h, jnp.uint32)] * 4)[0] >> 9,
    "add_any": lambda h: jax.grad(lambda v: (jnp.sin(v) * v).sum())(h),
}

ROWS = {
    "dot_general": ((8, 6), lambda p, h: h @ p["u"][:, :2]),
    "conv_general_dilated": (
        (8, 5),
        lambda p, h: lax.conv_general_dilated(
            h[:, None, :], p["u"][None, :, :3], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
    ),
    "conv_general_dilated grouped": (
        (2, 4, 4),
        lambda p, h: lax.conv_general_dilated(
            h[:, None, :], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        ).sum(-1),
    ),
    "broadcast_in_dim": ((8,), lambda p, h: lax.broadcast_in_dim(h, (2, 3, 8), (0, 2)).sum(2)),
    "reshape": ((2, 4), lambda p, h: h.reshape(2, 2, 4).sum((1, 2))),
    "squeeze": ((8,), lambda p, h: lax.squeeze(h[:, None, :], (1,)).sum(1)),
    "expand_dims": ((8,), lambda p, h: lax.expand_dims(h, (1,)).sum(2)),
    "transpose": ((8,), lambda p, h: h.T.sum(0)),
    "concatenate": ((8, 5, 8), lambda p, h: jnp.concatenate([h, X @ p["v"]], 1).sum(1)),
    "pad": ((8,), lambda p, h: jnp.pad(h, ((0, 0), (2, 1)), constant_values=2).sum(1)),
    "slice": ((3, 5), lambda p, h: h[:, :3].sum(1) * h[:, 3:].sum(1)),
    "slice strided": ((4,), lambda p, h: h[:, ::2].sum(1) * h[:, 1::2].max(1)),
    "slice strided with a rest": ((), lambda p, h: h[:, ::3].sum(1)),
    "split": ((3, 5), lambda p, h: jnp.split(h, (3,), 1)[0].sum(1) * jnp.split(h, (3,), 1)[1].max(1)),
    "stack": ((8,), lambda p, h: jnp.stack([h, 2 * h], 1).sum(2)[:, 1]),
    "unstack": ((8,), lambda p, h: jnp.unstack(jnp.stack([h, 2 * h], 1), axis=1)[1].sum(1)),
    "unstack of units": ((), lambda p, h: jnp.unstack(h, axis=1)[3]),
    "tile": ((8,), lambda p, h: (jnp.tile(h, (1, 3)) @ jnp.ones((24, 2)))[:, 1]),
    "iota": ((8,), lambda p, h: (h * jnp.sort(jnp.sin(lax.iota(jnp.float32, 8)))).sum(1)),
    "dynamic_update_slice": ((8,), lambda p, h: lax.dynamic_update_slice(h, h[:1] + 1, (1, 0)).sum(1)),
    "dynamic_update_slice of units": ((2, 3), lambda p, h: lax.dynamic_update_slice(h, h[:, 5:], (0, 2)).sum(1)),
    "dynamic_update_slice of units at run time": (
        (),
        lambda p, h: lax.dynamic_update_slice(h, h[:, :3], (0, ints(h)[0, 0])).sum(1),
    ),
    **{
        f"scatter-{n}": ((8,), lambda p, h, n=way: getattr(jnp.tile(h, (2, 1)).at[jnp.array([0, 2])], n)(h).sum(1))
        for n, way in {"add": "add", "mul": "multiply", "min": "min", "max": "max", "sub": "subtract"}.items()
    },
    "scatter": ((8,), lambda p, h: h.at[jnp.array([1])].set(h[:1] * 2).sum(1)),
    "scatter of units": ((2, 6), lambda p, h: h.at[:, jnp.array([1, 4])].set(1.0).sum(1)),
    "scatter of a segment of units": ((2, 3), lambda p, h: h.at[:, 2:5].set(h[:, 5:]).sum(1)),
    "scatter-add of units": ((2, 6, 8, 6), lambda p, h: (h.at[:, [4, 1]].add(p["h"][:2]) @ p["u"]).sum(1)),
    "scatter of units twice": ((), lambda p, h: h.at[:, jnp.array([1, 4, 1])].set(1.0).sum(1)),
    "scatter of one unit": ((7,), lambda p, h: h.at[:, 0].set(1.0).sum(1)),
    "scatter of units at run time": ((), lambda p, h: h.at[:, ints(h)[0, :2] % 8].set(1.0).sum(1)),
    "dynamic_slice": ((8,), lambda p, h: lax.dynamic_slice(h, (1, 0), (1, 8)).sum(1)),
    "dynamic_slice of units": ((2, 3, 3), lambda p, h: lax.dynamic_slice(h, (1, 2), (1, 3)).sum(1)),
    "dynamic_slice of units at run time": ((), lambda p, h: lax.dynamic_slice(h, (1, ints(h)[0, 0]), (1, 3)).sum(1)),
    "gather": ((8,), lambda p, h: h[jnp.array([1, 0, 1])].sum(1)),
    "gather of units": ((8,), lambda p, h: (h[:, jnp.array([1, 0, 3, 2, 7, 6, 4, 5])] * p["h"]).sum(1)),
    "gather of some units": ((3, 5), lambda p, h: h[:, np.array([5, -7, 3])].sum(1)),
    "gather of one unit": ((7,), lambda p, h: jnp.take(h, 7, axis=1)),
    "gather of units twice": ((), lambda p, h: h[:, jnp.array([1, 0, 1])].sum(1)),
    "gather of units at run time": ((), lambda p, h: h[:, ints(h)[0] % 8].sum(1)),
    "gather of shuffled groups": (
        (2, 4, 4),
        lambda p, h: (h[:, np.arange(8).reshape(2, 4).T.reshape(-1)].reshape(2, 4, 2).sum(2) * p["h"][:4]).sum(1),
    ),
    "random_bits": ((8,), lambda p, h: (h * jax.random.uniform(key_of(h), (2, 8))).sum(1)),
    "random_wrap": ((8,), lambda p, h: (h * jax.random.normal(key_of(h), (8,))).sum(1)),
    "random_split": ((8,), lambda p, h: (h * jax.random.uniform(jax.random.split(key_of(h), 3)[1], (8,))).sum(1)),
    "random_split a key a unit": ((8,), lambda p, h: (h * jax.vmap(jax.random.uniform)(unit_keys(h))).sum(1)),
    "random_fold_in": ((8,), lambda p, h: (h * jax.random.uniform(jax.random.fold_in(key_of(h), 3), (8,))).sum(1)),
    "random_clone": ((8,), lambda p, h: (h * jax.random.uniform(jax.random.clone(key_of(h)), (8,))).sum(1)),
    "random_unwrap": ((8,), lambda p, h: (h * (jax.random.key_data(key_of(h)).sum() % 7)).sum(1)),
    "reduce_sum": ((8,), lambda p, h: h.sum(1)),
    "psum": ((8,), lambda p, h: jax.vmap(lambda r: r - lax.pmean(r, "d"), axis_name="d")(h).max(1)),
    "psum over units": ((), lambda p, h: jax.vmap(lambda r: r - lax.pmean(r, "d"), 1, 1, axis_name="d")(h).max(1)),
    "pmax": ((8,), lambda p, h: jax.vmap(lambda r: r - lax.pmax(r, "d"), axis_name="d")(h).max(1)),
    "pmin": ((8,), lambda p, h: jax.vmap(lambda r: r - lax.pmin(r, "d"), axis_name="d")(h).max(1)),
    "reduce_prod": ((8,), lambda p, h: h.prod(1)),
    "reduce_max": ((8,), lambda p, h: h.max(1)),
    "reduce_min": ((8,), lambda p, h: h.min(1)),
    "reduce_xor": ((8,), lambda p, h: lax.reduce(ints(h), np.int32(0), lax.bitwise_xor, (1,))),
    "reduce_and": ((8,), lambda p, h: (h > 0.2).all(1)),
    "reduce_or": ((8,), lambda p, h: (h > 0.8).any(1)),
    "argmax": ((), lambda p, h: h.argmax(1)),
    "argmin": ((), lambda p, h: h.argmin(1)),
    "argmax of others": ((8,), lambda p, h: h.argmax(0).sum()),
    "sort": ((), lambda p, h: jnp.sort(h, 1)),
    "sort of others": ((8,), lambda p, h: jnp.sort(h, 0).sum(1)),
    "rev": ((), lambda p, h: h[:, ::-1] * 2),
    "rev of units": ((8,), lambda p, h: (h[:, ::-1] * p["h"]).sum(1)),
    "rev of units added to them": ((), lambda p, h: (h + h[:, ::-1]).sum(1)),
    "rev of others": ((8,), lambda p, h: h[::-1].sum(1)),
    **{
        n: ((8,), lambda p, h, n=n: (getattr(lax, n)(h, 1) * h).sum(1))
        for n in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
    },
    "cumsum from the end": ((8,), lambda p, h: (lax.cumsum(h, 1, reverse=True) * h).sum(1)),
    "top_k": ((), lambda p, h: lax.top_k(h, 2)[0]),
    "top_k of others": ((8,), lambda p, h: lax.top_k(h.T, 1)[0].sum()),
    "fft": ((), lambda p, h: jnp.abs(jnp.fft.fft(h)).sum(1)),
    "fft of others": ((8,), lambda p, h: jnp.abs(jnp.fft.fft(h.T)).sum(0)),
    "cumsum of others": ((8,), lambda p, h: lax.cumsum(h, 0).sum(1)),
    "reduce_window_sum": (
        (8,),
        lambda p, h: lax.reduce_window(h[:, None], 0.0, lax.add, (2, 1, 1), (1, 1, 1), "VALID").sum(2),
    ),
    "reduce_window_max": ((8,), lambda p, h: lax.reduce_window(h, -jnp.inf, lax.max, (2, 1), (1, 1), "VALID").sum(1)),
    "reduce_window_max over units": (
        (),
        lambda p, h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID").sum(1),
    ),
    "reduce_window_min": ((8,), lambda p, h: lax.reduce_window(h, jnp.inf, lax.min, (2, 1), (1, 1), "VALID").sum(1)),
    "reduce_window": (
        (8,),
        lambda p, h: lax.reduce_window(
            h, jnp.float32(0), lambda a, b: jnp.maximum(a, b) + 0.1, (2, 1), (1, 1), "VALID"
        ).sum(1),
    ),
    "bitcast_convert_type": ((8,), lambda p, h: lax.bitcast_convert_type(h, jnp.int32).max(1)),
    "bitcast_convert_type to bytes": ((8,), lambda p, h: lax.bitcast_convert_type(jnp.round(h), jnp.uint8).max((1, 2))),
    "bitcast_convert_type of pairs": (
        (4,),
        lambda p, h: jnp.nan_to_num(lax.bitcast_convert_type(jnp.float16(h).reshape(2, 4, 2), jnp.float32)).max(1),
    ),
}  # fmt: skip


def primitives_of(fn):
    call = calling.split_call((X,), {})
    program = calling.trace_call(fn, W, call).program
    return {eqn.name for eqn in program.eqns}


def agree(fn):
    graph = engine.trace(fn, W, X, free_outputs=())
    for seed in range(1):
        plan = random_plan(graph, seed)
        small = jax.tree.map(np.asarray, engine.narrow(fn, graph, plan)(engine.cut(W, graph, plan), X))
        wide = jax.tree.map(np.asarray, engine.gate(fn, graph)(W, graph.masks(plan), X))
        np.testing.assert_allclose(small.astype(float), wide.astype(float), rtol=2e-5, atol=2e-6)
    return graph


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name):
    """Units stay apart: the result at kept units is the dense result at those units."""
    op = ELEMENTWISE[name]
    name = name if name not in NEWER or jax.__version_info__ >= (0, 12) else ""
    fn = lambda p, x: op(positive(x[:, :1] + p["h"]))
    assert name in primitives_of(fn) or name in ("", "copy", "copy_p", "stop_gradient", "convert_element_type")
    graph = engine.trace(fn, W, X, free_outputs=("",))
    assert graph.groups["h"].size == 8
    plan = engine.Plan({"h": [0, 3, 4]})
    small = engine.narrow(fn, graph, plan)(engine.cut(W, graph, plan), X)
    dense = jax.tree.map(np.asarray, fn(W, X))
    # Its float32 series is 1.4e-6 from float64 by itself; the laws allow four times that.
    rtol = 5.6e-6 if name == "regularized_incomplete_beta" else 1e-6
    np.testing.assert_allclose(np.asarray(small), dense[:, [0, 3, 4]], rtol=rtol)


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    units, then = ROWS[name]
    fn = lambda p, x: then(p, x @ p["w"])
    if name != "expand_dims":  # not every version of jax emits it
        assert name.partition(" ")[0] in primitives_of(fn)
    assert tuple(group.size for group in agree(fn).groups.values()) == units


def test_every_rule_has_a_row():
    rows = {name.partition(" ")[0] for name in ROWS}
    assert rows | set(ELEMENTWISE) | ACROSS_DEVICES >= set(base._RULES) >= set(ELEMENTWISE) | ACROSS_DEVICES
    assert set(elementwise.NAMES) == set(ELEMENTWISE) | (ACROSS_DEVICES - {"psum_invariant"})


twist = jax.extend.core.Primitive("twist")
twist.def_impl(lambda x: x * 2)
twist.def_abstract_eval(lambda x: x)


def test_a_rule_can_be_registered():
    fn = lambda p, x: twist.bind(x @ p["w"]).sum(1)
    assert not engine.trace(fn, W, X).groups
    try:
        base.register("twist", base.Rule(elementwise.axes))
        graph = engine.trace(fn, W, X)
        plan = random_plan(graph, 0)
        small = engine.narrow(fn, graph, plan)(engine.cut(W, graph, plan), X)
        np.testing.assert_allclose(small, 2 * (X @ W["w"])[:, plan.keep["w"]].sum(1), rtol=1e-5)
    finally:
        del base._RULES["twist"]


def test_an_unknown_primitive_pins_and_says_so():
    graph = engine.trace(lambda p, x: twist.bind(x @ p["w"]).sum(1), W, X)
    assert "no rule for the primitive `twist` (test_rules.py:" in str(graph.pinned["w[1]"])
