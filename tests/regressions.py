"""Programs that once broke a law, most of them found by `fuzz` and made small: more odd programs, as in `zoo.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from laws import Subject, arr
from zoo import Case

REGRESSIONS: dict[str, Case] = {}


def case(params: Any, *args: Any, **kw: Any):
    """Register a function, as in `zoo.py`."""

    def add(fn: Callable) -> Callable:
        assert fn.__name__ not in REGRESSIONS
        REGRESSIONS[fn.__name__] = Case(Subject(fn.__name__, fn, params, args, kw))
        return fn

    return add


@case({"a": arr(5, 6), "b": arr(6, 6)}, arr(3, 5))
def block_before_stop_gradient(p, x):
    """A `while` has no derivative: one that flows past the block would be asked for."""
    u = x @ p["a"]
    v = lax.stop_gradient(u + jnp.tanh(u @ p["b"]))
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, v + s[1]), (0, v))[1].sum(1)


@case({"a": arr(4, 4)}, arr(2, 4))
def mask_of_the_input(p, x):
    """The mask is no signal, yet x reaches the result through it as well."""
    return jnp.where(x > 0, jnp.sin(x @ p["a"]), 0.5).max(1)


@case({"a": arr(4, 4)}, arr(2, 4))
def cond_on_the_input(p, x):
    h = jnp.tanh(x)
    return lax.cond(h.sum() > 0, lambda a: a @ p["a"], lambda a: a * 0.5, h).max(1)


@case({"w": arr(4, 6), "v": arr(4, 4)}, arr(5, 4))
def branches_that_change_places(p, x):
    """The branch with more work is not the one that has more of it left."""
    wide = lambda a: a + jnp.tanh(a @ p["w"]).sum()
    return lax.scan(lambda c, t: (lax.cond(t.sum() > 0, wide, lambda a: a @ p["v"], c), t), x, x)[0]


def with_rule(rule: Callable) -> Callable:
    """`tanh` with a derivative of its own."""
    f = jax.custom_vjp(jnp.tanh)
    f.defvjp(lambda v: (jnp.tanh(v), v), rule)
    return f


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def mean_in_a_backward_rule(p, x):
    """Nothing in the function itself mixes units."""
    return with_rule(lambda v, g: (g - g.mean(-1, keepdims=True),))(x @ p["a"]) @ p["c"]


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def softmax_in_a_backward_rule(p, x):
    return with_rule(lambda v, g: (g * jax.nn.softmax(v),))(x @ p["a"]) @ p["c"]


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def flip_in_a_backward_rule(p, x):
    """Only the derivative pins the axis."""
    return with_rule(lambda v, g: (jnp.flip(g, -1),))(x @ p["a"]) @ p["c"]


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def reshape_in_a_backward_rule(p, x):
    """Only the derivative splits the group."""

    def rule(v, g):
        g = g.reshape(3, 2, 3)
        return ((g + g.mean(1, keepdims=True)).reshape(3, 6),)

    return with_rule(rule)(x @ p["a"]) @ p["c"]


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def mean_in_a_forward_rule(p, x):
    f = jax.custom_jvp(jnp.tanh)
    f.defjvp(lambda v, t: (jnp.tanh(v[0]), t[0] - t[0].mean(-1, keepdims=True)))
    return f(x @ p["a"]) @ p["c"]


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def cotangent_of_zeros(p, x):
    """The rule makes the second cotangent from its shape."""
    f = jax.custom_vjp(lambda u, w: u * 2)
    f.defvjp(lambda u, w: (u * 2, None), lambda _, g: (g * 2, jnp.zeros((5, 6), g.dtype)))
    return f(x, p["a"]) @ p["a"] @ p["c"]


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def tangent_of_zeros(p, x):
    f = jax.custom_jvp(jnp.sign)
    f.defjvp(lambda v, t: (jnp.sign(v[0]), jnp.zeros((3, 6), t[0].dtype)))
    return f(x @ p["a"]) @ p["c"]


@case({"w": arr(3, 5, 6), "v": arr(4, 5, 6), "u": arr(6, 5, 6), "a": arr(6, 5)}, arr(2, 5))
def mapped_experts(p, x):
    """A removed step of a loop computes on junk, and all steps share `a`."""
    return sum(lax.map(lambda w: jnp.tanh(x @ w) @ p["a"], p[k]).sum(0) for k in "wvu")


@case({"a": arr(5, 6)}, arr(3, 5))
def dead_contraction_in_a_call(p, x):
    f = jax.custom_jvp(lambda v: (v @ jnp.eye(6, dtype=v.dtype), v)[1])
    f.defjvp(lambda v, t: (v[0], t[0]))
    return f(x @ p["a"]).sum(1)


@case({"e": arr(9, 6), "o": arr(6, 3)}, arr(4, kind="i:9"))
def mapped_lookup(p, ids):
    return jax.vmap(lambda i: p["e"][i])(ids) @ p["o"]


@case({"a": arr(5, 6), "c": arr(6, 2)}, arr(3, 5))
def rule_that_calls_its_function(p, x):
    @jax.custom_jvp
    def f(v):
        return jnp.tanh(v)

    f.defjvp(lambda v, t: ((y := f(v[0])), t[0] * (1 - y**2)))
    return f(x @ p["a"]) @ p["c"]


@case({"w": arr(5, 7, kind="p"), "a": arr(7, 6), "b": arr(6, 2)}, arr(4, 5, kind="p"))
def soft_assignment(p, x):
    h = jnp.tanh(x @ p["w"])
    return p["b"].T @ (jax.nn.softmax(h @ (p["a"] - 900)).T @ h)


@case({"k": arr(5, 4, 3), "o": arr(4, 3, 2)}, arr(3, 5))
def normalised_heads(p, x):
    k = jnp.einsum("nd,dhk->nhk", x, p["k"])
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)  # a removed head: 0 / 0
    return jnp.einsum("nh,hko->no", jnp.einsum("nhk,mgk->nhmg", k, k).sum((2, 3)), p["o"])


@case({"a": arr(5, 6), "c": arr(4, 6), "b": arr(6, 6)}, arr(3, 5), arr(3, 4))
def loop_half_of_which_a_block_reads(p, x, y):
    """The norm of zeros has no derivative; the loop that makes the zeros makes `sums` as well."""
    h, u = x @ p["a"], y @ p["c"]
    zeros, sums = lax.scan(lambda c, t: (c * (t.sum() * 0), t.sum()), h, h)
    u = u + jnp.tanh(u @ p["b"]) * (zeros**2).sum(1, keepdims=True) ** 0.5
    return u.sum(1) + sums


@case({"i": arr(4, 6), "hh": arr(3, 6), "o": arr(6, 2)}, arr(2, 4))
def householder(p, x):
    """A dropped reflection divides 0 by 0; its leaf stays for the others."""
    x = x @ p["i"]
    for v in p["hh"]:
        x = x - 2 * jnp.outer(x @ v, v) / (v @ v)
    return x @ p["o"]


@case({"a": arr(4, 4), "s": arr(3, 4, 4), "c": arr(4, 8), "d": arr(8, 4), "r": arr(2)}, arr(5, 4))
def stack_that_an_output_pins(p, x):
    """Only the output, which comes later, says that the steps of the loop cannot go."""
    h = lax.scan(lambda c, t: (c + jnp.tanh(c @ p["c"] + t.sum()) @ p["d"], None), x @ p["a"], p["s"])[0]
    return h, lax.scan(lambda c, t: (c * t, None), p["s"], p["r"])[0]


@case({"e": arr(5, 12), "v": arr(12, 12), "o": arr(12, 12), "h": arr(12, 3)}, arr(2, 5), arr(3))
def heads_that_an_input_scales(p, x, scale):
    """Without the block a unit of a head is the same as one of the stream at three positions."""
    u = x @ p["e"]
    v = jnp.tanh(u @ p["v"]).reshape(-1, 3, 4) * scale[:, None]
    return jnp.tanh(u + v.reshape(-1, 12) @ p["o"]) @ p["h"]


@case({"a": arr(5, 4), "o": arr(4, 3)}, arr(3, 5))
def half_of_a_sum(p, x):
    """Narrowed to two units, half of their sum is no mean."""
    e = jnp.tanh(x @ p["a"])
    return e @ p["o"] + 0.5 * (e**2).sum(-1, keepdims=True)


@case({"a": arr(5, 4), "o": arr(4, 3)}, arr(3, 5))
def custom_vjp_that_closes_over_a_table(p, x):
    """The table is an operand for which the rule has no derivative."""

    def lower(h):
        return h @ np.tri(4, dtype=h.dtype)

    half = jax.custom_vjp(lower)
    half.defvjp(lambda h: jax.vjp(lower, h), lambda pull, ct: pull(ct * 0.5))
    return half(jnp.tanh(x @ p["a"])) @ p["o"]


@case({"a": arr(5, 4), "o": arr(4, 3)}, arr(3, 5))
def custom_jvp_that_closes_over_a_table(p, x):
    """Likewise."""
    table = np.tri(4)

    @jax.custom_jvp
    def lower(h):
        return h @ table.astype(h.dtype)

    lower.defjvp(lambda primals, tangents: (lower(*primals), 0.5 * lower(*tangents)))
    return lower(jnp.tanh(x @ p["a"])) @ p["o"]


@case({"a": arr(6, 6), "s": arr(6), "o": arr(6, 3)}, arr(4, 6))
def block_between_the_input_and_units(p, x):
    """Without the block the units are positions of the input, which no mask has removed."""
    h = jax.nn.relu(x @ p["a"])

    def step(_, c):
        return c * lax.rsqrt((c**2).mean(1, keepdims=True) + 1e-3) * p["s"]

    return {"o": h @ p["o"], "top": lax.fori_loop(0, 3, step, h).max(1)}


@case({"a": arr(5, 6), "o": arr(6, 3)}, arr(3, 5))
def sum_times_a_share(p, x):
    """A mean over six units: narrowed to two of them it must still be one, though half of a sum is none."""
    h = jnp.tanh(x @ p["a"])
    return h @ p["o"] + h.sum(-1, keepdims=True) * (1 / 6)


@case({"e": arr(5, 4), "m": {"k": arr(4, 4), "w": arr(3, 4, 4)}, "o": arr(4, 2)}, arr(3, 5))
def steps_and_blocks_of_one_module(p, x):
    """Both would be called m[0], m[1], and a block would stand around itself."""
    h = x @ p["e"]
    for _ in range(2):
        h = h + jnp.tanh(h @ p["m"]["k"])
    return lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), h, p["m"]["w"])[0] @ p["o"]


@case({"a": arr(5, 2, 3), "o": arr(6, 2), "a[0]": arr(5, 4), "a[1]": arr(4, 2)}, arr(3, 5))
def leaf_with_the_name_of_a_group(p, x):
    """The two groups of `a` would be called like other leaves."""
    heads = jnp.tanh(jnp.einsum("nd,dhk->nhk", x, p["a"])).reshape(3, -1) @ p["o"]
    return heads + jnp.tanh(x @ p["a[0]"]) @ p["a[1]"]


@case({"a": arr(5, 4), "v": arr(), "s": arr(8), "o": arr(8, 2)}, arr(3, 5))
def padding_that_is_learnt(p, x):
    """Its derivative is a sum over all positions."""
    return (lax.pad(x @ p["a"], p["v"], ((0, 0, 0), (0, 4, 0))) * p["s"]) @ p["o"]


@case({"a": arr(5, 6), "t": arr(3), "b": arr(2), "s": arr(6), "o": arr(6, 2)}, arr(3, 5))
def values_that_many_units_take(p, x):
    """The derivative of an entry is a sum over the units that take it, by constant and by other indices."""
    h = jnp.tanh(x @ p["a"]) * p["t"][np.arange(6) // 2] * p["s"]
    return (h + p["b"][(h > 0).astype(int)] * p["s"] + x[:, np.array([0, 1, 2, 3, 4, 0])] * p["s"]) @ p["o"]


@case({"e": arr(5, 4), "a": arr(4, 6), "b": arr(6, 4), "o": arr(4, 2)}, arr(3, 5))
def kernels_in_a_rule_of_their_own(p, x):
    """The function reads them in a contraction alone, its derivative entry by entry."""
    decayed = jax.custom_vjp(jnp.matmul)
    decayed.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda kept, ct: (ct @ kept[1].T, (kept[0].T @ ct) * kept[1] + 0.1 * kept[1])
    )
    doubled = jax.custom_jvp(jnp.matmul)
    doubled.defjvp(lambda xs, ts: (xs[0] @ xs[1], ts[0] @ xs[1] + xs[0] @ (ts[1] * xs[1])))
    u = x @ p["e"]
    return (u + doubled(jnp.tanh(decayed(u, p["a"])), p["b"])) @ p["o"]


@case({"a": arr(5, 6)}, arr(3, 5))
def bits_of_units(p, x):
    """Of numbers with a sign the identities of `and` and `or` are -1 and 0."""
    bits = (x @ p["a"] * 40).astype(np.int32)
    both, either = np.int32(-1), np.int32(0)
    found = [lax.reduce(bits, both, lax.bitwise_and, (1,)), lax.reduce(bits, either, lax.bitwise_or, (1,))]
    return jnp.stack(found).astype(x.dtype)


@case({"a": arr(5, 6)}, arr(3, 5))
def largest_of_narrow_numbers(p, x):
    """Integers of four bits, and floats that have no infinity."""
    h = x @ p["a"]
    return sum(h.astype(kind).max(-1).astype(x.dtype) for kind in (jnp.int4, jnp.float8_e4m3fn, jnp.bfloat16))


@case({"a": arr(5, 6), "b": arr(5, 6), "o": arr(6, 2)}, arr(3, 5), jax.random.key(0))
def noise_by_a_key_for_each_unit(p, x, key):
    """What is folded into keys stands for the units that the noise goes with."""
    h, g = x @ p["a"], x @ p["b"]
    number = (h[0] * 100).astype(jnp.int32).astype(jnp.uint32)
    return (g * jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n)))(number).astype(x.dtype)) @ p["o"]


@case({"t": arr(1, 5, 5, 4), "a": arr(6, 4)}, arr(3, 5, 6))
def parameters_that_data_slide_over(p, x):
    """The kernel of the convolution is data, and its input is a parameter."""
    k = (x @ p["a"]).reshape(3, 5, 1, 4)[:, :3].transpose(0, 1, 3, 2).reshape(3, 3, 4, 1)
    return lax.conv_general_dilated(p["t"], k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum(
        (0, 1, 2)
    )


@case({"a": arr(5, 2), "b": arr(5, 4), "c": arr(5, 3)}, arr(3, 5))
def sums_that_are_no_means(p, x):
    """Two units times one, four by three and two, three by two: whatever is left of them, the constants stay."""
    a, b, c = x @ p["a"], x @ p["b"], x @ p["c"]
    return a.sum(-1) * 1.0 + (b**2).sum(-1) / 3 + jnp.tanh(b).sum(-1) / 2 + (c**2).sum(-1) / 2


def norms(kernels: str) -> Callable:
    """Two residual blocks that update one running mean."""

    def fn(p, x):
        h, m = x @ p["i"], p["m"]
        for k in kernels:
            z = h @ p[k]
            mean = z.mean(0)
            m = 0.9 * m + 0.1 * mean
            h = h + jax.nn.relu(z - mean)
        return h @ p["o"], {"m": m}

    return fn


@case({"i": arr(5, 4), "a": arr(4, 4), "b": arr(4, 4), "m": arr(4), "o": arr(4, 2)}, arr(3, 5))
def running_mean_of_two_blocks(p, x):
    """Without one of them the mean would be another program's."""
    return norms("ab")(p, x)


@case({"i": arr(5, 4), "a": arr(4, 4), "m": arr(4), "o": arr(4, 2)}, arr(3, 5))
def running_mean_of_a_norm_called_twice(p, x):
    """Likewise, with one kernel."""
    return norms("aa")(p, x)


@case({"a": arr(5, 6), "o": arr(6, 3)}, arr(3, 5))
def loops_that_end_one_by_one(p, x):
    """Under `vmap` the test of a loop has an axis, and those that are done wait for the others."""
    going = lambda s: (s[0] < 12) & (s[1].max() < 3)  # not for ever, whatever junk a candidate may read
    grow = lambda u: lax.while_loop(going, lambda s: (s[0] + 1, s[1] + 0.5 + 0.1 * s[1].mean()), (0, u))[1]
    return jax.vmap(grow)(lax.stop_gradient(x @ p["a"])) @ p["o"]


@case({"a": arr(5, 6), "o": arr(6, 3)}, arr(3, 5), np.array([1, 3, 2]))
def loops_of_other_lengths(p, x, n):
    more = lambda h, n: lax.fori_loop(0, n, lambda i, h: h + jnp.tanh(h) * h.mean(), h)
    return jax.vmap(more)(lax.stop_gradient(x @ p["a"]), n) @ p["o"]


@case({"a": arr(5, 6), "s": arr(6), "o": arr(6, 3)}, arr(3, 5))
def loops_of_each_unit(p, x):
    """What removed units hold must not keep the others waiting; far away would be for ever, so it is not that far."""
    start = lax.stop_gradient(jnp.maximum(p["s"] - x @ p["a"], -50))
    climb = jax.vmap(jax.vmap(lambda u: lax.while_loop(lambda u: u < 2, lambda u: u + 0.3, u)))
    return climb(start) @ p["o"]


@case({"a": arr(5, 6), "b": arr(6, 6), "o": arr(6, 2)}, arr(3, 5))
def loop_in_a_block(p, x):
    """A dropped block computes on zeros, on which its loop would never end."""
    h = jnp.tanh(x @ p["a"])
    grown = lax.while_loop(lambda v: (v**2).sum() < 1, lambda v: v * 2, lax.stop_gradient(h @ p["b"]))
    return (h + grown) @ p["o"]


@case({"a": arr(5, 6), "b": arr(3, 6, 6), "o": arr(6, 2)}, arr(3, 5))
def loop_in_a_step(p, x):
    """The same of a step of a stack."""

    def step(h, w):
        grown = lax.while_loop(lambda v: (v**2).sum() < 1, lambda v: v * 2, lax.stop_gradient(h @ w))
        return h + jnp.tanh(grown), None

    return lax.scan(step, jnp.tanh(x @ p["a"]), p["b"])[0] @ p["o"]
