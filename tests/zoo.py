"""Tiny functions with what `trace` must find in them, as data.

`groups`: name -> (size, members), each member (leaf path, axis). `blocks`: the names, in order.
`ODD` holds programs that only have to obey the laws: shapes and uses that nobody would write on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from laws import A, Subject, arr


@dataclass(frozen=True)
class Case:
    subject: Subject
    groups: Mapping[str, tuple[int, set]] | None = None
    blocks: tuple[str, ...] | None = None
    divisors: int | None = None
    pinned: Mapping[str, str] = field(default_factory=dict)


ZOO: dict[str, Case] = {}
ODD: dict[str, Case] = {}


def case(
    params: Any,
    *args: Any,
    groups: Any = None,
    blocks: Any = None,
    divisors: Any = None,
    pinned: Any = None,
    free=None,
    free_inputs=(),
    **kw,
):
    """Register a function; `groups` is written `{name: "8 leaf:axis leaf:axis"}`."""

    def add(fn: Callable) -> Callable:
        parsed = None
        if groups is not None:
            parsed = {}
            for name, text in groups.items():
                size, *members = text.split()
                pairs = {(m.rpartition(":")[0], int(m.rpartition(":")[2])) for m in members}
                parsed[name] = (int(size), pairs)
        subject = Subject(fn.__name__, fn, params, args, kw, free or {}, free_inputs)
        table = ODD if groups is None else ZOO
        assert fn.__name__ not in {**ZOO, **ODD}
        table[fn.__name__] = Case(subject, parsed, blocks, divisors, pinned or {})
        return fn

    return add


def conv(x, w, stride=1, padding="SAME", groups=1, dilation=1):
    return lax.conv_general_dilated(
        x, w, (stride,) * 2, padding, rhs_dilation=(dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def dense(p, x):
    return x @ p["w"] + p["b"]


def D(a, b):
    return {"w": arr(a, b), "b": arr(b)}


def C(k, a, b):
    return arr(k, k, a, b)


def BN(n):
    return {"scale": arr(n), "bias": arr(n), "mean": arr(n), "var": arr(n, kind="p")}


def bn(p, x):
    return (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def pool(x, kind="max"):
    if kind == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


X = arr(2, 5)
IMG = arr(2, 4, 4, 3)

# Layers.


@case(
    {"a": D(5, 6), "b": D(6, 4), "c": D(4, 3)}, X,
    groups={"a": "6 a/w:1 a/b:0 b/w:0", "b": "4 b/w:1 b/b:0 c/w:0"}, blocks=(),
    pinned={"a/w[0]": "input", "c/w[1]": "output", "c/b[0]": "output"},
)  # fmt: skip
def dense_chain(p, x):
    return dense(p["c"], jax.nn.relu(dense(p["b"], jax.nn.relu(dense(p["a"], x)))))


@case(
    {"c1": C(3, 3, 6), "c2": C(3, 6, 8), "c3": C(3, 8, 4), "head": D(4, 2)}, IMG,
    groups={"c1": "6 c1:3 c2:2", "c2": "8 c2:3 c3:2", "c3": "4 c3:3 head/w:0"}, blocks=(), divisors=0,
    pinned={"c2[0]": "slides", "c1[2]": "input"},
)  # fmt: skip
def conv_strided_dilated(p, x):
    x = jax.nn.relu(conv(x, p["c1"], stride=2))
    x = jax.nn.relu(conv(x, p["c2"], dilation=2))
    return dense(p["head"], conv(x, p["c3"]).mean((1, 2)))


@case(
    {"c1": C(3, 3, 8), "g": C(3, 4, 6), "c3": C(1, 6, 2)}, IMG,
    groups={"c1[0]": "2 c1:3 g:3 c3:2", "c1[1]": "4 c1:3 g:2", "g": "3 g:3 c3:2"}, blocks=(),
)  # fmt: skip
def conv_grouped(p, x):
    return conv(conv(conv(x, p["c1"]), p["g"], groups=2), p["c3"])


@case(
    {"c1": C(3, 3, 8), "d": C(3, 1, 8), "c3": C(1, 8, 2)}, IMG, groups={"c1": "8 c1:3 d:3 c3:2"}, blocks=("d",),
)  # fmt: skip
def conv_depthwise(p, x):
    return conv(jax.nn.relu(conv(conv(x, p["c1"]), p["d"], groups=8)), p["c3"])


@case(
    {"c1": C(3, 3, 4), "d": C(3, 1, 12), "b": BN(12), "c3": C(1, 12, 2)}, IMG,
    groups={
        "c1": "4 c1:3 d:3 b/scale:0 b/bias:0 b/mean:0 b/var:0 c3:2",
        "d": "3 d:3 b/scale:0 b/bias:0 b/mean:0 b/var:0 c3:2",
    },
    blocks=(),
)  # fmt: skip
def conv_depthwise_multiplier(p, x):
    return conv(jax.nn.relu(bn(p["b"], conv(conv(x, p["c1"]), p["d"], groups=4))), p["c3"])


@case(
    {"c1": C(3, 3, 6), "b": BN(6), "c2": C(3, 6, 2)}, IMG,
    groups={"c1": "6 c1:3 b/scale:0 b/bias:0 b/mean:0 b/var:0 c2:2"}, blocks=(),
)  # fmt: skip
def batch_norm(p, x):
    return conv(jax.nn.relu(bn(p["b"], conv(x, p["c1"]))), p["c2"])


@case(
    {"a": D(5, 8), "n": {"scale": arr(8), "bias": arr(8)}, "c": D(8, 3)}, X,
    groups={"a": "8 a/w:1 a/b:0 n/scale:0 n/bias:0 c/w:0"}, blocks=(), divisors=3,
)  # fmt: skip
def layer_norm(p, x):
    x = dense(p["a"], x)
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return dense(p["c"], x * p["n"]["scale"] + p["n"]["bias"])


@case(
    {"c1": C(3, 3, 8), "n": {"scale": arr(8), "bias": arr(8)}, "c2": C(1, 8, 2)}, IMG,
    groups={"c1[0]": "4 c1:3 n/scale:0 n/bias:0 c2:2", "c1[1]": "2 c1:3 n/scale:0 n/bias:0 c2:2"},
    blocks=(), divisors=3,
)  # fmt: skip
def group_norm(p, x):
    x = conv(x, p["c1"])
    y = x.reshape(*x.shape[:3], 4, 2)
    y = (y - y.mean((1, 2, 4), keepdims=True)) * lax.rsqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
    return conv(y.reshape(x.shape) * p["n"]["scale"] + p["n"]["bias"], p["c2"])


@case(
    {"a": D(5, 7), "c": D(7, 3)}, X, groups={"a": "7 a/w:1 a/b:0 c/w:0"}, blocks=(),
)  # fmt: skip
def activations(p, x):
    x = dense(p["a"], x)
    y = 0.0
    for f in (
        jax.nn.relu, jax.nn.softplus, jax.nn.silu, jax.nn.elu, jax.nn.gelu, partial(jax.nn.gelu, approximate=False),
        jax.nn.selu, jax.nn.leaky_relu, jnp.tanh, jax.nn.sigmoid, jax.nn.hard_swish, jax.nn.relu6, jax.nn.mish,
    ):  # fmt: skip
        y = y + f(x)
    return dense(p["c"], y)


@case(
    {"c1": C(3, 3, 4), "c2": C(3, 4, 6), "head": D(6, 2)}, arr(2, 8, 8, 3),
    groups={"c1": "4 c1:3 c2:2", "c2": "6 c2:3 head/w:0"}, blocks=(),
)  # fmt: skip
def pooling(p, x):
    return dense(p["head"], pool(conv(pool(conv(x, p["c1"])), p["c2"]), "avg").mean((1, 2)))


# Branches.


@case(
    {"stem": C(3, 3, 6), "c1": C(3, 6, 5), "c2": C(3, 5, 6), "head": D(6, 2)}, IMG,
    groups={"stem": "6 stem:3 c1:2 c2:3 head/w:0", "c1": "5 c1:3 c2:2"}, blocks=("c1",),
)  # fmt: skip
def residual(p, x):
    x = jax.nn.relu(conv(x, p["stem"]))
    x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, p["c1"])), p["c2"]))
    return dense(p["head"], x.mean((1, 2)))


@case(
    {"stem": C(3, 3, 4), "c1": C(3, 4, 5), "c2": C(3, 5, 6), "proj": C(1, 4, 6), "head": D(6, 2)}, IMG,
    groups={"stem": "4 stem:3 c1:2 proj:2", "c1": "5 c1:3 c2:2", "c2": "6 c2:3 proj:3 head/w:0"}, blocks=(),
)  # fmt: skip
def residual_projection(p, x):
    x = jax.nn.relu(conv(x, p["stem"]))
    y = conv(jax.nn.relu(conv(x, p["c1"], stride=2)), p["c2"])
    x = jax.nn.relu(y + conv(x, p["proj"], stride=2))
    return dense(p["head"], x.mean((1, 2)))


@case(
    {"stem": C(3, 3, 4), "c1": C(3, 4, 5), "c2": C(3, 5, 9), "head": D(9, 2)}, IMG,
    groups={
        "stem": "4 stem:3 c1:2 c2:3 head/w:0", "c1": "5 c1:3 c2:2",
        "c2[0]": "2 c2:3 head/w:0", "c2[1]": "3 c2:3 head/w:0",
    },
    blocks=(),
)  # fmt: skip
def residual_zero_padded(p, x):
    """No block: four channels enter and nine leave."""
    x = jax.nn.relu(conv(x, p["stem"]))
    y = conv(jax.nn.relu(conv(x, p["c1"])), p["c2"])
    x = jax.nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (2, 3))))
    return dense(p["head"], x.mean((1, 2)))


@case(
    {"a": D(5, 4), "b": D(5, 3), "c": D(7, 6), "d": D(6, 2)}, X,
    groups={"a": "4 a/w:1 a/b:0 c/w:0", "b": "3 b/w:1 b/b:0 c/w:0", "c": "6 c/w:1 c/b:0 d/w:0"}, blocks=(),
)  # fmt: skip
def concatenation(p, x):
    x = jnp.concatenate([jnp.tanh(dense(p["a"], x)), dense(p["b"], x)], -1)
    return dense(p["d"], jnp.tanh(dense(p["c"], x)))


@case(
    {"stem": C(3, 3, 4), "c1": C(3, 4, 2), "c2": C(3, 6, 3), "n": BN(9), "head": D(9, 2)}, IMG,
    groups={
        "stem": "4 stem:3 c1:2 c2:2 n/scale:0 n/bias:0 n/mean:0 n/var:0 head/w:0",
        "c1": "2 c1:3 c2:2 n/scale:0 n/bias:0 n/mean:0 n/var:0 head/w:0",
        "c2": "3 c2:3 n/scale:0 n/bias:0 n/mean:0 n/var:0 head/w:0",
    },
    blocks=(),
)  # fmt: skip
def dense_net(p, x):
    x = conv(x, p["stem"])
    x = jnp.concatenate([x, jax.nn.relu(conv(x, p["c1"]))], -1)
    x = jnp.concatenate([x, jax.nn.relu(conv(x, p["c2"]))], -1)
    return dense(p["head"], jax.nn.relu(bn(p["n"], x)).mean((1, 2)))


@case(
    {"c1": C(3, 3, 5), "d": D(20, 6), "head": D(6, 2)}, IMG,
    groups={"c1": "5 c1:3 d/w:0", "d": "6 d/w:1 d/b:0 head/w:0"}, blocks=(),
)  # fmt: skip
def flatten_dense(p, x):
    x = pool(jax.nn.relu(conv(x, p["c1"])))
    return dense(p["head"], jnp.tanh(dense(p["d"], x.reshape(x.shape[0], -1))))


@case(
    {"a": D(5, 8), "c": D(4, 3)}, X, groups={"a": "4 a/w:1 a/b:0 c/w:0"}, blocks=(),
)  # fmt: skip
def split_glu(p, x):
    a, b = jnp.split(dense(p["a"], x), 2, -1)
    return dense(p["c"], a * jax.nn.sigmoid(b))


@case(
    {"a": D(5, 8), "b": D(3, 3), "c": D(5, 3)}, X,
    groups={"a[0]": "3 a/w:1 a/b:0 b/w:0", "a[1]": "5 a/w:1 a/b:0 c/w:0"}, blocks=(),
)  # fmt: skip
def slice_halves(p, x):
    x = dense(p["a"], x)
    return dense(p["b"], jnp.tanh(x[:, :3])) + dense(p["c"], x[:, 3:])


@case(
    {"stem": C(3, 3, 6), "r": D(6, 3), "e": D(3, 6), "head": D(6, 2)}, IMG,
    groups={"stem": "6 stem:3 r/w:0 e/w:1 e/b:0 head/w:0", "r": "3 r/w:1 r/b:0 e/w:0"}, blocks=("e",),
)  # fmt: skip
def squeeze_excite(p, x):
    x = jax.nn.relu(conv(x, p["stem"]))
    s = jax.nn.sigmoid(dense(p["e"], jax.nn.relu(dense(p["r"], x.mean((1, 2))))))
    return dense(p["head"], (x * s[:, None, None, :]).mean((1, 2)))


@case(
    {"a": D(5, 8), "c": D(8, 3)}, X, A((), "key"), groups={"a": "8 a/w:1 a/b:0 c/w:0"}, blocks=(),
)  # fmt: skip
def dropout(p, x, key):
    x = jax.nn.relu(dense(p["a"], x))
    keep = jax.random.bernoulli(key, 0.7, x.shape)
    return dense(p["c"], jnp.where(keep, x / 0.7, 0))


# Reductions over prunable axes.


@case({"a": D(5, 8)}, X, groups={"a": "8 a/w:1 a/b:0"}, blocks=(), divisors=1)
def mean_of_units(p, x):
    return jnp.tanh(dense(p["a"], x)).mean(-1)


@case({"a": D(5, 8)}, X, groups={"a": "8 a/w:1 a/b:0"}, blocks=(), divisors=1)
def sum_over_count(p, x):
    return jnp.tanh(dense(p["a"], x)).sum(-1) / 8


@case({"a": D(5, 8)}, X, groups={"a": "8 a/w:1 a/b:0"}, blocks=(), divisors=1)
def sum_times_inverse(p, x):
    return jnp.tanh(dense(p["a"], x)).sum(-1) * (1 / 8)


@case({"a": D(5, 8)}, X, groups={"a": "8 a/w:1 a/b:0"}, blocks=(), divisors=0)
def sum_over_another_number(p, x):
    return jnp.tanh(dense(p["a"], x)).sum(-1) / 10


@case({"c": C(3, 3, 4)}, arr(4, 2, 2, 3), groups={"c": "4 c:3"}, blocks=(), divisors=0)
def mean_of_the_batch_only(p, x):
    """Four examples and four channels: the divisor belongs to the batch."""
    return conv(x, p["c"]).mean((0, 1, 2)).sum()


@case({"a": D(5, 8)}, X, groups={"a": "8 a/w:1 a/b:0"}, blocks=(), divisors=2)
def variance_ddof(p, x):
    return dense(p["a"], x).var(-1, ddof=1)


@case({"c": C(3, 3, 6)}, IMG, groups={"c": "6 c:3"}, blocks=(), divisors=1)
def joint_mean(p, x):
    return jnp.tanh(conv(x, p["c"])).mean((1, 2, 3))


@case({"a": D(5, 8), "c": D(8, 3)}, X, groups={"a": "8 a/w:1 a/b:0 c/w:0"}, blocks=())
def softmax_units(p, x):
    return dense(p["c"], jax.nn.softmax(dense(p["a"], x)))


@case({"a": D(5, 8)}, X, groups={"a": "8 a/w:1 a/b:0"}, blocks=())
def logsumexp_units(p, x):
    x = dense(p["a"], x)
    return jax.nn.logsumexp(x, -1) + x.max(-1) - x.min(-1) + jnp.prod(jnp.tanh(x), -1)


# Attention and weights used more than once.


@case(
    {"q": arr(5, 2, 3), "k": arr(5, 2, 3), "v": arr(5, 2, 4), "o": arr(2, 4, 5)}, arr(2, 6, 5),
    groups={"q[0]": "2 q:1 k:1 v:1 o:0", "q[1]": "3 q:2 k:2", "v": "4 v:2 o:1"}, blocks=("k",),
)  # fmt: skip
def heads(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
    s = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(3).astype(x.dtype))
    return jnp.einsum("bqhe,hed->bqd", jnp.einsum("bhqk,bkhe->bqhe", s, v), p["o"])


@case(
    {"qkv": D(5, 18), "o": D(6, 5)}, arr(2, 4, 5),
    groups={"qkv[0]": "2 qkv/w:1 qkv/b:0 o/w:0", "qkv[1]": "3 qkv/w:1 qkv/b:0", "qkv[2]": "3 qkv/w:1 qkv/b:0 o/w:0"},
    blocks=("o",),
)  # fmt: skip
def heads_fused(p, x):
    q, k, v = (t.reshape(2, 4, 2, 3) for t in jnp.split(dense(p["qkv"], x), 3, -1))
    s = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
    return dense(p["o"], jnp.einsum("bhqk,bkhe->bqhe", s, v).reshape(2, 4, 6))


@case({"w": arr(5, 6), "u": arr(6, 6)}, X, groups={"w": "6 w:1 u:0 u:1"}, blocks=("u[0]", "u[1]"))
def shared_twice(p, x):
    x = jnp.tanh(x @ p["w"])
    x = jnp.tanh(x @ p["u"])
    return jnp.tanh(x @ p["u"]).sum(-1)


@case(
    {"e": arr(5, 6), "u": D(6, 4), "v": D(4, 6)},
    X,
    groups={"e": "6 e:1 u/w:0 v/w:1 v/b:0", "u": "4 u/w:1 u/b:0 v/w:0"},
    blocks=("u",),
)
def tied_head(p, x):
    x = x @ p["e"]
    return (x + dense(p["v"], jnp.tanh(dense(p["u"], x)))) @ p["e"].T


@case(
    [{"w": arr(5, 6)}, (arr(6, 4), arr(4)), [arr(4, 3)]], X,
    groups={"0": "6 0/w:1 1/0:0", "1": "4 1/0:1 1/1:0 2/0:0"}, blocks=(),
)  # fmt: skip
def plain_pytree(p, x):
    return jnp.tanh(jnp.tanh(x @ p[0]["w"]) @ p[1][0] + p[1][1]) @ p[2][0]


@case(
    {"stem": D(5, 6), "l1": D(6, 6), "l2": D(6, 6), "l3": D(6, 6), "head": D(6, 2)}, X,
    groups={
        "stem": "6 stem/w:1 stem/b:0 l1/w:0", "l1": "6 l1/w:1 l1/b:0 l2/w:0", "l2": "6 l2/w:1 l2/b:0 l3/w:0",
        "l3": "6 l3/w:1 l3/b:0 head/w:0",
    },
    blocks=("l1", "l2", "l3"),
)  # fmt: skip
def chain_of_one_width(p, x):
    x = jax.nn.relu(dense(p["stem"], x))
    for name in ("l1", "l2", "l3"):
        x = jax.nn.relu(dense(p[name], x))
    return dense(p["head"], x)


# Running sums, copies, tables, indices.


ORDER = np.array([3, 6, 0, 5, 1, 7, 2, 4])


@case({"a": D(5, 8), "c": D(8, 3)}, X, groups={"a": "8 a/w:1 a/b:0 c/w:0"}, blocks=())
def units_in_another_order(p, x):
    return dense(p["c"], jax.nn.relu(dense(p["a"], x))[:, ORDER][:, ::-1])


@case(
    {"a": D(5, 8), "s": D(4, 4), "t": D(4, 4), "c": D(8, 3)},
    X,
    groups={"a[0]": "4 a/w:1 a/b:0 s/w:0 t/w:1 t/b:0 c/w:0", "a[1]": "4 a/w:1 a/b:0 s/w:1 s/b:0 t/w:0 c/w:0"},
    blocks=("s", "t"),
)
def flow(p, x):
    """Two coupling layers with a permutation before and a swap between (Dinh et al. 2017, arXiv:1605.08803)."""
    a, b = jnp.split(dense(p["a"], x)[:, ORDER], 2, 1)
    h = jnp.concatenate([a, b * jnp.exp(jnp.tanh(dense(p["s"], a)))], 1)
    a, b = jnp.split(h[:, [*range(4, 8), *range(4)]], 2, 1)
    return dense(p["c"], jnp.concatenate([a, b + dense(p["t"], a)], 1)[:, ORDER])


@case(
    {"a": C(1, 3, 8), "b": C(3, 4, 8), "d": C(1, 4, 6)},
    IMG,
    groups={"a[0]": "2 a:3 b:3 d:2", "a[1]": "4 a:3 b:2", "b": "2 b:3 d:2"},
    blocks=(),
)
def shuffled_by_index(p, x):
    """Channels of two groups dealt out in turn (Zhang et al. 2018, arXiv:1707.01083), by a list of their numbers."""
    deal = np.arange(8).reshape(2, 4).T.reshape(-1)
    h = jax.nn.relu(conv(x, p["a"], groups=1))[..., deal]
    h = jax.nn.relu(conv(h, p["b"], groups=2))[..., deal]
    return conv(h, p["d"], groups=2).max((1, 2))


@case(
    {"a": D(5, 8), "b": D(5, 3), "o": D(8, 2)},
    X,
    groups={"a[0]": "2 a/w:1 a/b:0 b/w:1 b/b:0 o/w:0", "a[1]": "3 a/w:1 a/b:0 o/w:0"},
    blocks=(),
)
def placed_by_index(p, x):
    """Written to positions that are constants: some, one by one, and a segment."""
    h, g = dense(p["a"], x), dense(p["b"], x)
    return dense(p["o"], jnp.tanh(h.at[:, ORDER[:3]].add(g).at[:, 5:].multiply(g)))


@case(
    {"i": arr(5, 6), "w": {"a": arr(3, 6, 8), "b": arr(3, 8, 6)}},
    X,
    groups={"i": "6 i:1 w/a:1 w/b:2", "w": "8 w/a:2 w/b:1"},
    blocks=("w[0]", "w[1]", "w[2]"),
)
def scanned_with_another_order(p, x):
    """The indices come into the loop from outside."""
    step = lambda h, w: (h + jnp.tanh(h @ w["a"])[:, ORDER] @ w["b"], None)
    return lax.scan(step, x @ p["i"], p["w"])[0].sum(1)


@case({"a": D(5, 6), "c": D(6, 3)}, X, groups={"a": "6 a/w:1 a/b:0 c/w:0"}, blocks=())
def cumulative(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], jnp.cumsum(h, -1) + lax.cumprod(h, 1) + lax.cummax(h, 1) + lax.cumlogsumexp(h, 1))


@case({"a": D(5, 8), "c": D(4, 3)}, X, groups={"a": "4 a/w:1 a/b:0 c/w:0"}, blocks=())
def even_and_odd(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], h[:, ::2] * h[:, 1::2])


@case(
    {"a": D(5, 6), "b": D(6, 2), "c": D(12, 3)}, X, blocks=(),
    groups={"a": "6 a/w:1 a/b:0 b/w:0 c/w:0", "c": "2 c/w:0"},
)  # fmt: skip
def copies(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return dense(p["c"], jnp.tile(h, (1, 2))) + dense(p["b"], jnp.stack([h, -2 * h], 1).max(1))[:, :1]


TABLE = np.linspace(-1, 1, 6, dtype=np.float32)


@case(
    {"a": D(5, 6), "b": D(5, 6), "c": D(6, 3), "d": D(6, 3)}, X,
    groups={"a": "6 a/w:1 a/b:0 c/w:0", "b": "6 b/w:1 b/b:0 d/w:0"}, blocks=(),
)  # fmt: skip
def shared_table(p, x):
    """One table of constants in two places, sorted and summed on the way: it couples nothing and pins nothing."""
    table = jnp.sort(jnp.asarray(TABLE) * jnp.arange(6.0))
    return dense(p["c"], dense(p["a"], x) * table) + dense(p["d"], dense(p["b"], x) + table / table.sum())


@case(
    {"a": D(5, 6), "c": D(6, 3)}, X, arr(2, kind="i:3"), groups={"a": "6 a/w:1 a/b:0 c/w:0"}, blocks=(),
)  # fmt: skip
def segment_sum(p, x, ids):
    return dense(p["c"], jax.ops.segment_sum(jnp.tanh(dense(p["a"], x)), ids, 3))[ids]


@case(
    {"c1": arr(3, 3, 6), "c2": arr(3, 6, 4), "head": D(4, 2)}, arr(2, 5, 3),
    groups={"c1": "6 c1:2 c2:1", "c2": "4 c2:2 head/w:0"}, blocks=(),
)  # fmt: skip
def conv_1d_transposed(p, x):
    numbers = ("NHC", "HIO", "NHC")
    h = jax.nn.relu(lax.conv_general_dilated(x, p["c1"], (1,), "SAME", dimension_numbers=numbers))
    return dense(p["head"], lax.conv_transpose(h, p["c2"], (2,), "SAME", dimension_numbers=numbers))


@case({"a": D(5, 6), "b": D(5, 6)}, arr(3, 5), groups={"a": "6 a/w:1 a/b:0 b/w:1 b/b:0"}, blocks=())
def sort_that_carries(p, x):
    """Sorting along the batch: what is carried along is one array with what is sorted."""
    u, v = dense(p["a"], x), dense(p["b"], x)
    return lax.sort_key_val(u, v, dimension=0)[1].sum(1) + jnp.argsort(u, axis=0).sum(1)


@case({"a": D(5, 6)}, X, groups={"a": "6 a/w:1 a/b:0"}, blocks=(), divisors=1)
def complex_mean(p, x):
    h = dense(p["a"], x) + 1j
    return jnp.abs(h.mean(1)) + jnp.abs(h.sum(1) * 2j)


# Loops, branches, and functions with derivatives of their own.


def L(n, a, b):
    return {"w": arr(n, a, b), "b": arr(n, b)}


@case(
    {"inp": D(5, 4), "layers": {"up": L(3, 4, 6), "down": L(3, 6, 4)}, "head": D(4, 2)}, X,
    groups={
        "inp": "4 inp/w:1 inp/b:0 layers/up/w:1 layers/down/w:2 layers/down/b:1 head/w:0",
        "layers/up": "6 layers/up/w:2 layers/up/b:1 layers/down/w:1",
    },
    blocks=("layers[0]", "layers[1]", "layers[2]"),
)  # fmt: skip
def scanned_stack(p, x):
    def step(h, layer):
        return h + dense(layer["down"], jax.nn.gelu(dense(layer["up"], h))), None

    return dense(p["head"], lax.scan(step, dense(p["inp"], x), p["layers"])[0])


@case(
    {"inp": D(5, 4), "layers": L(3, 4, 4), "head": D(4, 2)}, X,
    groups={"inp": "4 inp/w:1 inp/b:0 layers/w:1 layers/w:2 layers/b:1 head/w:0"}, blocks=(),
    pinned={"layers/w[0]": "read one by one"},
)  # fmt: skip
def steps_that_are_read(p, x):
    def step(h, layer):
        h = h + jnp.tanh(dense(layer, h))
        return h, h.mean()

    h, means = lax.scan(step, dense(p["inp"], x), p["layers"])
    return dense(p["head"], h) * means.sum()


@case(
    {"i": arr(3, 8), "h": arr(2, 8), "b": arr(8), "o": D(2, 2)}, arr(4, 2, 3),
    groups={"i": "2 i:1 h:0 h:1 b:0 o/w:0"}, blocks=(), divisors=0,
)  # fmt: skip
def lstm(p, xs):
    def cell(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["i"] + h @ p["h"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return dense(p["o"], lax.scan(cell, (jnp.zeros((2, 2)), jnp.zeros((2, 2))), xs)[1])


@case(
    {"a": D(5, 6), "w": arr(6, 6), "c": D(6, 2)}, X,
    groups={"a": "6 a/w:1 a/b:0 w:0 w:1 c/w:0"}, blocks=("w",),
)  # fmt: skip
def counted_loop(p, x):
    return dense(p["c"], lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]) / (i + 1), dense(p["a"], x)))


@case(
    {"a": D(5, 6), "w": arr(6, 6), "c": D(6, 2)}, X,
    groups={"a": "6 a/w:1 a/b:0 w:0 w:1 c/w:0"}, blocks=("w",),
)  # fmt: skip
def open_loop(p, x):
    w, h = lax.stop_gradient((p["w"], dense(p["a"], x)))  # a loop of unknown length has no reverse mode
    go = lambda state: (state[0] < 5) & (state[1].sum() < 1e3)
    return dense(p["c"], lax.while_loop(go, lambda state: (state[0] + 1, jnp.tanh(state[1] @ w)), (0, h))[1])


@case(
    {"a": D(5, 6), "b": D(6, 4), "c": arr(6, 4), "d": D(4, 2)}, X, blocks=(),
    groups={"a": "6 a/w:1 a/b:0 b/w:0 c:0", "c": "4 b/w:1 b/b:0 c:1 d/w:0"},
)  # fmt: skip
def branches(p, x):
    h = jax.nn.relu(dense(p["a"], x))
    h = lax.cond(x.sum() > 0, lambda h: dense(p["b"], h), lambda h: jnp.tanh(h @ p["c"]), h)
    return dense(p["d"], h)


@jax.custom_vjp
def clipped_exp(x):
    return jnp.exp(x)


clipped_exp.defvjp(lambda x: (jnp.exp(x), x), lambda x, ct: (jnp.clip(ct, -0.5, 0.5) * jnp.exp(x),))


@jax.custom_vjp
def shifted_softmax(x, n):
    return jax.nn.softmax(x) + n


shifted_softmax.defvjp(lambda x, n: (jax.nn.softmax(x) + n, x), lambda x, ct: (ct * jax.nn.softmax(3 * x), None))


@case({"a": D(5, 6), "c": D(6, 2)}, X, groups={"a": "6 a/w:1 a/b:0 c/w:0"}, blocks=())
def own_derivatives(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], clipped_exp(h) + shifted_softmax(h, 2))


@case(
    {"w": arr(3, 5, 6), "c": D(6, 2)}, X, groups={"w[0]": "6 w:2 c/w:0", "w[1]": "3 w:0"}, blocks=(), divisors=1,
)  # fmt: skip
def mapped_ensemble(p, x):
    return dense(p["c"], lax.map(lambda w: jnp.tanh(x @ w), p["w"]).mean(0))


@case(
    {"a": {"q": arr(4, 4), "k": arr(4, 4), "v": arr(4, 4), "o": arr(4, 4)}, "i": arr(5, 4), "h": arr(4, 2)},
    arr(2, 3, 5), arr(2, 3, kind="i:2"),
    groups={"i": "4 i:1 a/q:0 a/k:0 a/v:0 a/o:1 h:0", "a[0]": "4 a/q:1 a/k:1", "a[1]": "4 a/v:1 a/o:0"}, blocks=("a",),
)  # fmt: skip
def attention_with_padding(p, x, mask):
    """A mask steers the branch from the side: the branch still is a block."""
    x, w = x @ p["i"], p["a"]
    logits = jnp.einsum("btd,bsd->bts", x @ w["q"], x @ w["k"]) / 2 + (mask[:, None, :] - 1) * 1e9
    return (x + jax.nn.softmax(logits) @ (x @ w["v"]) @ w["o"]) @ p["h"]


@case(
    {"e": D(5, 4), "d": D(5, 4), "x": {"q": arr(4, 3), "k": arr(4, 3), "v": arr(4, 4)}, "h": arr(4, 2)},
    arr(2, 3, 5), arr(2, 3, 5),
    groups={
        "e": "4 e/w:1 e/b:0 x/k:0 x/v:0", "d": "4 d/w:1 d/b:0 x/q:0 x/v:1 h:0", "x": "3 x/q:1 x/k:1",
    },
    blocks=("x",),
)  # fmt: skip
def cross_attention(p, memory, x):
    """The encoder's output comes in from the side as well."""
    m, x, w = jnp.tanh(dense(p["e"], memory)), jnp.tanh(dense(p["d"], x)), p["x"]
    logits = jnp.einsum("btd,bsd->bts", x @ w["q"], m @ w["k"])
    return (x + jax.nn.softmax(logits) @ (m @ w["v"])) @ p["h"]


@case(
    {"a": D(5, 6), "b": D(6, 4), "c": D(6, 3)}, X, groups={"a": "6 a/w:1 a/b:0 c/w:0"}, blocks=(),
    pinned={"b/w[0]": "b/w is not used"},
)  # fmt: skip
def dead_code(p, x):
    h = jnp.tanh(dense(p["a"], x))
    jnp.sort(dense(p["b"], h), -1)
    return dense(p["c"], h)


@case(
    {"e": arr(5, 6), "b": arr(6, 4, 2), "c": arr(4, 3, 2)}, X, groups={"e": "6 e:1 b:0", "b": "4 b:1 c:0"}, blocks=(),
)  # fmt: skip
def complex_kernels(p, x):
    s = (x @ p["e"]) @ (p["b"][..., 0] + 1j * p["b"][..., 1])
    return (s @ (p["c"][..., 0] + 1j * p["c"][..., 1])).real


@case(
    {"a": arr(2, 3, 3, 4, 5), "b": arr(2, 3, 3, 5, 3)}, arr(1, 3, 3, 4), groups={"a": "5 a:4 b:3"}, blocks=(),
)  # fmt: skip
def ensemble_of_convs(p, x):
    return jax.vmap(lambda p: conv(jax.nn.relu(conv(x, p["a"])), p["b"]))(p)


@case({"a": D(5, 6), "c": D(6, 3)}, arr(3, 5), groups={"a": "6 a/w:1 a/b:0 c/w:0"}, blocks=())
def product_of_constants(p, x):
    mask = jnp.einsum("bi,bj->bij", jnp.ones((1, 3)), jnp.arange(3.0)[None])[0] @ jnp.ones((3, 3))
    return dense(p["c"], mask @ dense(p["a"], x))


# What pins.


@case({"a": D(5, 4), "c": D(4, 3)}, X, groups={}, blocks=(), pinned={"a/w[1]": "primitive `cholesky`", "c/w[0]": "`"})
def unknown_primitive(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], jnp.linalg.cholesky(jnp.einsum("bi,bj->bij", h, h) + 4 * jnp.eye(4)).sum(1))


@case({"a": D(5, 8), "c": D(8, 3)}, X, groups={}, blocks=(), pinned={"a/w[1]": "Fourier", "c/w[0]": "Fourier"})
def spectrum(p, x):
    return dense(p["c"], jnp.real(jnp.fft.fft(dense(p["a"], x))))


@case({"a": D(5, 8), "c": D(8, 3)}, X, groups={}, blocks=(), pinned={"a/w[1]": "`sort`"})
def sorted_units(p, x):
    return dense(p["c"], jnp.sort(dense(p["a"], x), -1))


@case({"a": D(5, 8), "b": arr(8, 3)}, X, groups={}, blocks=(), pinned={"a/w[1]": "`argmax`"})
def argmax_units(p, x):
    y = dense(p["a"], x)
    return y @ p["b"] + jnp.argmax(y, -1)[:, None]


@case({"w": C(3, 3, 6), "g": arr(6), "c": C(1, 6, 2)}, IMG, groups={"g": "6 w:3 g:0 c:2"}, blocks=())
def weight_standardisation(p, x):
    w = p["w"]
    w = (w - w.mean((0, 1, 2))) * lax.rsqrt(w.var((0, 1, 2)) + 1e-5) * p["g"]
    return conv(jax.nn.relu(conv(x, w)), p["c"])


@case(
    {"c1": C(3, 3, 6), "w": C(3, 6, 4), "c": C(1, 4, 2)}, IMG,
    groups={"c1": "6 c1:3 w:2", "w": "4 w:3 c:2"}, blocks=(), divisors=3,
)  # fmt: skip
def weight_standardisation_inside(p, x):
    """The mean runs over a prunable axis as well."""
    x = jax.nn.relu(conv(x, p["c1"]))
    w = p["w"]
    w = (w - w.mean((0, 1, 2))) * lax.rsqrt(w.var((0, 1, 2)) + 1e-5)
    return conv(jax.nn.relu(conv(x, w)), p["c"])


@case(
    {"t": arr(7, 6), "c": D(6, 3)},
    A((2, 4), "i:7"),
    groups={"t": "6 t:1 c/w:0"},
    blocks=(),
    pinned={"t[0]": "`gather`"},
)
def embedding(p, ids):
    return dense(p["c"], jnp.tanh(p["t"][ids]))


@case(
    {"a": D(5, 6), "b": D(4, 6), "c": D(6, 2)},
    X,
    arr(2, 4),
    groups={"a": "6 a/w:1 a/b:0 b/w:1 b/b:0 c/w:0"},
    blocks=(),
)
def two_inputs(p, x, y):
    return dense(p["c"], jnp.tanh(dense(p["a"], x) + dense(p["b"], y)))


@case(
    {"a": D(5, 6), "b": D(6, 4)},
    X,
    groups={"a": "6 a/w:1 a/b:0 b/w:0", "b": "4 b/w:1 b/b:0"},
    blocks=(),
    free={"features": (None, ("b/b", 0))},
)
def free_output(p, x):
    x = dense(p["b"], jnp.tanh(dense(p["a"], x)))
    return {"features": x, "y": x.sum(-1)}


@case(
    {"a": D(5, 6), "b": D(6, 4), "s": D(4, 5), "c": D(4, 2)}, X, arr(2, 4),
    free_inputs=("args[0]", "args[1]"), blocks=("a",),
    groups={
        "args[0]": "5 a/w:0 s/w:1 s/b:0", "args[1]": "4 b/w:1 b/b:0 s/w:0 c/w:0", "a": "6 a/w:1 a/b:0 b/w:0",
    },
    pinned={"args[0][0]": "output"},
)  # fmt: skip
def free_inputs(p, x, y):
    """Features to select; they enter a product with units, and a sum with the second input."""
    x = x * jax.nn.sigmoid(dense(p["s"], y))
    return dense(p["c"], y + dense(p["b"], jnp.tanh(dense(p["a"], x))))


@case(
    {"pos": arr(3, 4), "w": C(3, 2, 5), "c": D(20, 2)}, {"image": arr(2, 4, 4, 2), "text": arr(2, 3, 4)},
    free_inputs=("args[0]/image", "args[0]/text"), divisors=1, blocks=(),
    groups={
        "args[0]/image": "2 w:2", "args[0]/text[0]": "3 pos:0", "args[0]/text[1]": "4 pos:1 c/w:0", "w": "5 w:3 c/w:0",
    },
    pinned={"args[0]/image[1]": "slides", "args[0]/text[0]": "output"},
)  # fmt: skip
def free_inputs_in_a_mapping(p, batch):
    x = jnp.tanh(batch["text"] + p["pos"]).mean(1)
    h = jax.nn.relu(conv(batch["image"], p["w"])).mean((1, 2))
    return dense(p["c"], jnp.einsum("bi,bj->bij", x, h).reshape(2, 20))


# Programs that only have to obey the laws.


@case({"a": D(5, 6), "b": D(6, 6), "c": D(6, 2)}, X)
def outer_product(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return dense(p["c"], jnp.einsum("bi,bj,ij->bi", h, h, p["b"]["w"]))


@case({"a": D(5, 6), "c": arr(36, 2)}, X)
def outer_product_flat(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return (h[:, :, None] * h[:, None, :]).reshape(2, 36) @ p["c"]


@case({"a": D(5, 6), "c": arr(6, 2)}, X)
def gram(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return h @ h.T @ h @ p["c"] + (h.T @ h @ p["c"]).sum(0)


@case({"a": D(5, 6), "b": D(5, 6)}, X)
def bilinear_of_itself(p, x):
    h = dense(p["a"], x)
    return (h * h).sum() + h @ dense(p["b"], x).T


@case({"w": arr(6, 6), "a": D(5, 6)}, X)
def symmetric_weight(p, x):
    return dense(p["a"], x) @ (p["w"] + p["w"].T) @ p["a"]["w"].T


@case({"a": D(5, 6), "s": arr(6), "c": D(6, 2)}, X)
def broadcast_then_summed(p, x):
    h = jnp.tanh(dense(p["a"], x))
    wide = h[:, :, None] + p["s"][None, None, :]
    return dense(p["c"], wide.sum(1)) + dense(p["c"], wide.sum(2)) / 6


@case({"a": D(5, 6), "b": D(5, 4), "c": D(10, 3)}, X)
def nested_concat_split(p, x):
    h = jnp.concatenate([dense(p["a"], x), dense(p["b"], x)], -1)
    left, m, r = jnp.split(h, (2, 7), -1)
    h = jnp.concatenate([jnp.pad(m, ((0, 0), (1, 1))), r, left[:, :1]], -1)
    h = jnp.pad(h, ((0, 0), (0, 0)))
    return dense(p["c"], h[:, :10] if h.shape[1] >= 10 else h)


@case({"a": D(5, 8), "c": D(5, 3)}, X)
def negative_padding(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return dense(p["c"], lax.pad(h, np.zeros((), h.dtype), ((0, 0, 0), (-2, -1, 0))))


@case({"a": D(5, 4), "c": D(7, 3)}, X)
def interior_padding(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return dense(p["c"], lax.pad(h, np.zeros((), h.dtype), ((0, 0, 0), (0, 0, 1))))


@case({"a": D(5, 4), "c": D(9, 3)}, X)
def padding_with_ones(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], jnp.exp(jnp.pad(h, ((0, 0), (2, 3)), constant_values=1.0)))


@case({"a": D(5, 4), "b": arr(8), "c": D(8, 3)}, X)
def padding_reused(p, x):
    """Two pads of one width each: their padded parts may shrink only together."""
    h, g = dense(p["a"], x), jnp.tanh(dense(p["a"], x))
    u = jnp.pad(h, ((0, 0), (2, 2))) + jnp.pad(g, ((0, 0), (4, 0)))
    return dense(p["c"], u * p["b"] + jnp.pad(g, ((0, 0), (0, 4))))


@case({"a": D(5, 1), "b": D(1, 6), "c": D(6, 1)}, X)
def single_unit(p, x):
    return dense(p["c"], jnp.tanh(dense(p["b"], jnp.tanh(dense(p["a"], x)))))


@case({"a": D(5, 6), "z": arr(0, 6), "c": D(6, 2)}, X)
def empty_leaf(p, x):
    h = jnp.tanh(dense(p["a"], x))
    h = jnp.concatenate([h, h[:0]], 0) + p["z"].sum(0)
    return dense(p["c"], h)


@case({"a": D(5, 6), "steps": A((), "i:9"), "table": A((6,), "i:6"), "c": D(6, 2)}, X)
def integer_leaves(p, x):
    h = jnp.tanh(dense(p["a"], x)) * p["table"]
    return dense(p["c"], h) * p["steps"]


@case(
    {
        "a": {"w": arr(5, 6, kind="bfloat16"), "b": arr(6, kind="bfloat16")},
        "c": {"w": arr(6, 2, kind="bfloat16")},
    },
    arr(2, 5, kind="bfloat16"),
)
def half_precision(p, x):
    h = jax.nn.gelu(x @ p["a"]["w"] + p["a"]["b"])
    return (h / h.mean(-1, keepdims=True)) @ p["c"]["w"]


@case({"a": D(5, 6), "c": D(6, 2)}, arr(2, 4, 5))
def vmap_inside(p, x):
    f = lambda v: jax.nn.softplus(v @ p["a"]["w"] + p["a"]["b"])
    return jax.vmap(jax.vmap(lambda v: f(v) @ p["c"]["w"]))(x)


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def jit_inside(p, x):
    @partial(jax.jit, static_argnums=(1, 2))
    def layer(h, power, act):
        return jax.nn.elu(h**power) if act else h

    h = layer(dense(p["a"], x), 2, True)
    return dense(p["c"], jax.jit(jax.nn.softplus)(h))


TABLE = np.linspace(-1, 1, 6, dtype=np.float32)


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def constant_table(p, x):
    h = jnp.tanh(dense(p["a"], x)) + jnp.asarray(TABLE, x.dtype)
    return dense(p["c"], h * jnp.arange(6) + jnp.ones((2, 6), x.dtype))


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def one_hot_constant(p, x):
    h = jnp.tanh(dense(p["a"], x)) @ jnp.eye(6, dtype=x.dtype)
    return dense(p["c"], h)


@case({"a": D(5, 6), "n": arr(6), "k": arr()}, X)
def outputs_alias(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return {"x": x, "x2": x, "n": p["n"] * 1, "h": h.sum(-1), "k": p["k"], "c": np.float32(1.0)}


@case({"stem": D(5, 6), "a": D(6, 6), "c": D(6, 2), "scale": arr()}, X, A((), "key"))
def dropout_in_dropped_block(p, x, key):
    h = dense(p["stem"], x)
    y = jnp.tanh(dense(p["a"], h)) * p["scale"]
    h = h + jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y * 2, 0)
    return dense(p["c"], h)


@case({"a": D(5, 6), "b": D(6, 6)}, arr(2, 5))
def residual_ends_in_output(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return h + jax.nn.relu(dense(p["b"], h))


@case({"b": D(5, 5), "c": D(5, 5)}, X)
def residual_from_the_input(p, x):
    x = x + jax.nn.relu(dense(p["b"], x))
    return x + jax.nn.softplus(dense(p["c"], x))


@case({"c1": C(3, 3, 4), "c2": C(3, 3, 4), "n": {"scale": arr(8), "bias": arr(8)}, "c": C(1, 8, 2)}, IMG)
def group_norm_after_concat(p, x):
    h = jnp.concatenate([conv(x, p["c1"]), conv(x, p["c2"])], -1)
    y = h.reshape(2, 4, 4, 2, 4)
    y = (y - y.mean((1, 2, 4), keepdims=True)) * lax.rsqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
    return conv(y.reshape(h.shape) * p["n"]["scale"] + p["n"]["bias"], p["c"])


@case({"c1": C(3, 3, 6), "c2": C(3, 3, 2), "n": {"scale": arr(8)}, "c": C(1, 8, 2)}, IMG)
def group_norm_after_uneven_concat(p, x):
    h = jnp.concatenate([conv(x, p["c1"]), conv(x, p["c2"])], -1)
    y = h.reshape(2, 4, 4, 4, 2)
    y = (y - y.mean((1, 2, 4), keepdims=True)) * lax.rsqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
    return conv(y.reshape(h.shape) * p["n"]["scale"], p["c"])


@case({"c1": C(1, 3, 12), "g": C(3, 2, 8), "c": C(1, 8, 2)}, IMG)
def group_conv_of_a_split(p, x):
    h = conv(x, p["c1"])
    a, b = jnp.split(h, (8,), -1)
    return conv(conv(a, p["g"], groups=4), p["c"]) + b.mean()


@case({"c1": C(1, 3, 4), "c2": C(1, 3, 4), "g": C(3, 4, 8), "c": C(1, 8, 2)}, IMG)
def group_conv_of_a_concat(p, x):
    h = jnp.concatenate([conv(x, p["c1"]), conv(x, p["c2"])], -1)
    return conv(jax.nn.relu(conv(h, p["g"], groups=2)), p["c"])


@case({"c1": C(1, 3, 8), "g": C(1, 4, 8), "c": C(1, 8, 2)}, IMG)
def channel_shuffle(p, x):
    h = conv(conv(x, p["c1"]), p["g"], groups=2)
    h = jnp.swapaxes(h.reshape(2, 4, 4, 2, 4), 3, 4).reshape(2, 4, 4, 8)
    return conv(h, p["c"])


@case({"c1": C(1, 3, 8), "d": C(3, 1, 8), "c": C(1, 8, 2)}, IMG)
def shuffle_then_depthwise(p, x):
    h = conv(x, p["c1"])
    h = jnp.swapaxes(h.reshape(2, 4, 4, 2, 4), 3, 4).reshape(2, 4, 4, 8)
    return conv(conv(h, p["d"], groups=8) + h, p["c"])


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def where_on_units(p, x):
    h = dense(p["a"], x)
    h = jnp.where(h > h.mean(-1, keepdims=True), h, jnp.minimum(h, 0.1))
    return dense(p["c"], jnp.clip(h, -1, 1) ** 3)


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def log_of_relu(p, x):
    """Junk that overflows: log of zero, division by zero, roots of what is negative."""
    h = dense(p["a"], x)
    return dense(p["c"], jnp.log(jax.nn.softplus(h)) + 1 / (1 + h * h) + jnp.sqrt(jnp.exp(h)))


@case({"a": D(5, 6), "n": {"g": arr(6)}, "c": D(6, 2)}, X)
def l2_normalised(p, x):
    h = dense(p["a"], x)
    w = p["c"]["w"] / jnp.sqrt((p["c"]["w"] ** 2).sum(0, keepdims=True))
    return (h / jnp.linalg.norm(h, axis=-1, keepdims=True) * p["n"]["g"]) @ w


@case({"a": D(5, 6), "b": D(6, 6), "c": D(6, 2)}, X)
def shared_layer_with_other_between(p, x):
    h = jnp.tanh(dense(p["a"], x))
    h = h + jnp.tanh(dense(p["b"], h))
    h = h + jnp.tanh(dense(p["b"], h))
    return dense(p["c"], h)


@case({"s": D(5, 6), "a": D(6, 6), "b": D(6, 6), "d": D(6, 6), "c": D(6, 2)}, X)
def nested_residuals(p, x):
    h = jnp.tanh(dense(p["s"], x))
    y = h + jnp.tanh(dense(p["a"], h))
    y = jnp.tanh(y + dense(p["b"], y))
    h = h + y
    h = h + jnp.tanh(dense(p["d"], h))
    return dense(p["c"], h)


@case({"s": D(5, 6), "a": D(6, 6), "b": D(6, 6), "c": D(6, 2)}, X)
def parallel_branches(p, x):
    h = jnp.tanh(dense(p["s"], x))
    h = h + jnp.tanh(dense(p["a"], h)) + jax.nn.silu(dense(p["b"], h))
    return dense(p["c"], h)


@case({"s": D(5, 8), "a": D(8, 8), "n": {"scale": arr(8)}, "c": D(8, 2)}, X)
def plain_layers_with_norms(p, x):
    h = dense(p["s"], x)
    for _ in range(2):
        h = dense(p["a"], h)
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5) * p["n"]["scale"]
    return dense(p["c"], h)


@case({"a": D(5, 8), "b": D(8, 8), "c": D(4, 2)}, X)
def dropped_layer_meets_heads(p, x):
    h = dense(p["a"], x)
    h = jnp.tanh(dense(p["b"], h))
    h = h.reshape(2, 2, 4).sum(1)
    return dense(p["c"], h)


@case({"a": D(5, 8), "b": D(8, 8), "c": D(8, 2)}, X)
def block_between_fixed_and_free(p, x):
    h = jnp.cumsum(dense(p["a"], x), -1)
    h = jnp.tanh(dense(p["b"], h))
    return dense(p["c"], h)


@case({"a": D(5, 8), "b": D(8, 8), "c": D(8, 2)}, X)
def block_between_free_and_fixed(p, x):
    h = dense(p["a"], x)
    h = jnp.tanh(dense(p["b"], h))
    return dense(p["c"], jnp.cumsum(h, -1))


@case({"a": D(5, 6), "b": D(6, 6), "c": D(6, 2)}, X)
def read_inside_twice(p, x):
    """A block's leaf is used outside as well."""
    h = jnp.tanh(dense(p["a"], x))
    h = h + jnp.tanh(dense(p["b"], h))
    return dense(p["c"], h) + p["b"]["b"].sum()


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def loss_value(p, x):
    return jax.nn.log_softmax(dense(p["c"], jax.nn.relu(dense(p["a"], x))))[:, 0].mean()


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def gradient_inside(p, x):
    f = lambda x: dense(p["c"], jnp.tanh(dense(p["a"], x))).sum()
    return jax.grad(f)(x)


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def gradient_of_softplus_inside(p, x):
    f = lambda x: dense(p["c"], jax.nn.softplus(dense(p["a"], x))).sum()
    return jax.grad(f)(x)


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def remat_inside(p, x):
    f = jax.checkpoint(lambda p, x: jax.nn.relu(dense(p["a"], x)))
    return dense(p["c"], f(p, x))


@case({"a": D(5, 6), "b": D(6, 6), "c": D(6, 2)}, X)
def control_flow(p, x):
    h = dense(p["a"], x)
    h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(dense(p["b"], h)), h)
    h = lax.cond(x.sum() > 0, jnp.tanh, jnp.sin, h)
    return dense(p["c"], h)


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def scan_over_units(p, x):
    h = dense(p["a"], x)
    _, ys = lax.scan(lambda c, v: (c + v.sum(), v * c), jnp.zeros((), x.dtype), h.T)
    return dense(p["c"], ys.T)


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def custom_vjp_inside(p, x):
    @jax.custom_vjp
    def f(v):
        return jnp.tanh(v)

    f.defvjp(lambda v: (f(v), v), lambda v, g: (g * (1 - jnp.tanh(v) ** 2),))
    return dense(p["c"], f(dense(p["a"], x)))


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def custom_jvp_with_reduction(p, x):
    @jax.custom_jvp
    def normal(v):
        return v / jnp.sqrt((v * v).mean(-1, keepdims=True) + 1e-3)

    @normal.defjvp
    def rule(primals, tangents):
        return jax.jvp(lambda v: v / jnp.sqrt((v * v).mean(-1, keepdims=True) + 1e-3), primals, tangents)

    return dense(p["c"], normal(dense(p["a"], x)))


@case({"t": arr(7, 6), "i": A((3,), "i:7"), "c": D(6, 3)}, X)
def gather_of_parameters(p, x):
    return p["t"][p["i"]] @ p["c"]["w"] + jnp.take(p["t"], jnp.array([1, 2]), axis=1).sum()


@case({"a": D(5, 6), "c": D(6, 3)}, X)
def static_indexing(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], h)[:, 0] + h[:, 2] + h[0, 1:4].sum() + lax.dynamic_slice(h, (0, 1), (2, 2)).sum()


@case({"a": D(5, 6), "c": D(6, 3)}, X)
def scatter_units(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], h.at[:, 2].set(1.0).at[0].add(h[1]))


@case({"a": D(5, 6), "c": D(6, 3)}, X)
def reversed_units(p, x):
    return dense(p["c"], jnp.tanh(dense(p["a"], x))[:, ::-1]) + jnp.roll(dense(p["a"], x), 2, -1)[:, :3]


@case({"a": D(5, 6), "c": D(12, 3)}, X)
def tiled(p, x):
    h = jnp.tanh(dense(p["a"], x))
    return dense(p["c"], jnp.tile(h, (1, 2))) + dense(p["c"], jnp.repeat(h, 2, axis=-1))


@case({"a": D(5, 12), "c": arr(3, 4, 2)}, X)
def reshaped_and_back(p, x):
    h = jnp.tanh(dense(p["a"], x)).reshape(2, 3, 4)
    h = h.transpose(0, 2, 1).reshape(2, 12).reshape(2, 4, 3)
    return jnp.einsum("bij,jio->bo", h, p["c"])


@case({"a": D(5, 12), "c": D(4, 2)}, X)
def reshape_across(p, x):
    h = jnp.tanh(dense(p["a"], x)).reshape(6, 4)
    return dense(p["c"], h)


@case({"a": D(5, 12), "b": D(5, 6), "c": D(6, 2)}, X)
def reshape_disagrees(p, x):
    h = dense(p["a"], x)
    return dense(
        p["c"],
        h.reshape(2, 4, 3).sum(1) @ jnp.ones((3, 6), x.dtype) + h.reshape(2, 6, 2).max(-1) * dense(p["b"], x),
    )


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def everything_removed_is_negative(p, x):
    h = dense(p["a"], x)
    return (
        dense(p["c"], h - h.max(-1, keepdims=True))
        + h.min()
        + jnp.any(h > 0, -1)[:, None]
        + jnp.all(h > -9, -1)[:, None]
    )


@case({"a": D(5, 6), "b": {"mean": arr(6), "var": arr(6, kind="p")}, "c": D(6, 2)}, X)
def new_statistics(p, x):
    h = dense(p["a"], x)
    mean, var = h.mean(0), h.var(0)
    new = {"mean": 0.9 * p["b"]["mean"] + 0.1 * mean, "var": 0.9 * p["b"]["var"] + 0.1 * var}
    return dense(p["c"], jax.nn.relu((h - mean) / jnp.sqrt(var + 1e-3))), {"b": new}


@case({"s": D(5, 6), "a": D(6, 6), "b": {"mean": arr(6), "var": arr(6, kind="p")}, "c": D(6, 2)}, X)
def new_statistics_in_a_block(p, x):
    h = jnp.tanh(dense(p["s"], x))
    y = dense(p["a"], h)
    mean, var = y.mean(0), y.var(0)
    new = {"mean": 0.9 * p["b"]["mean"] + 0.1 * mean, "var": 0.9 * p["b"]["var"] + 0.1 * var}
    h = h + jax.nn.relu((y - mean) / jnp.sqrt(var + 1e-3))
    return dense(p["c"], h), {"b": new}


@case({"a": D(5, 6), "b": D(6, 6), "m": arr(6), "c": D(6, 2)}, X)
def statistics_of_the_trunk(p, x):
    """The mirrored output watches a value that is there whether or not the block is."""
    h = jnp.tanh(dense(p["a"], x))
    y = h + jnp.tanh(dense(p["b"], h))
    return dense(p["c"], y), {"m": 0.5 * p["m"] + y.mean(0)}


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def nothing_but_parameters(p, x):
    return p["a"]["w"].sum() + (p["a"]["w"] @ p["c"]["w"]).mean() + 0 * x.sum()


@case({"a": D(5, 6), "unused": D(6, 6), "c": D(6, 2)}, X)
def unused_leaves(p, x):
    dense(p["unused"], dense(p["a"], x))
    return dense(p["c"], dense(p["a"], x))


@case({"a": D(5, 6), "c": D(6, 2), "s": arr(), "t": arr(1)}, X)
def scalar_parameters(p, x):
    h = dense(p["a"], x) * p["s"] + p["t"]
    return dense(p["c"], jnp.where(h > 0, h, p["s"] * h)) + p["t"]


@case({"a": D(5, 6), "c": D(6, 2)}, X)
def stop_gradients(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], lax.stop_gradient(h / h.sum(-1, keepdims=True)) * h)


@case({"a": D(5, 6), "c": D(6, 2)}, arr(6, 5))
def batch_as_wide_as_units(p, x):
    h = dense(p["a"], x)
    return dense(p["c"], h + h.mean(0) + h.sum(1, keepdims=True) / 6 + h.sum(0) / 6)


@case({"a": D(5, 6), "c": D(6, 2)}, arr(6, 5))
def transposed_sum(p, x):
    """The unit axis meets the batch axis: pinned."""
    h = dense(p["a"], x)
    return dense(p["c"], h + h.T)


@case({"a": D(5, 8), "c": D(8, 2)}, X)
def mean_in_two_steps(p, x):
    h = jnp.tanh(dense(p["a"], x)).reshape(2, 2, 4)
    m = h.sum(2).sum(1) / 8 + h.mean(2).mean(1) + (h.sum((1, 2)) / 2) / 4
    return dense(p["c"], h.reshape(2, 8) - m[:, None])


@case({"a": D(5, 8), "c": D(8, 2)}, X)
def mean_kept_as_count(p, x):
    h = jnp.tanh(dense(p["a"], x))
    n = jnp.asarray(h.shape[-1], h.dtype)
    return dense(p["c"], h - h.sum(-1, keepdims=True) / n) * jnp.float32(2.0).astype(h.dtype)


@case({"a": D(5, 8), "m": arr(8)}, X)
def weighted_mean(p, x):
    h = jnp.tanh(dense(p["a"], x))
    w = jax.nn.softplus(p["m"])
    return (h * w).sum(-1) / w.sum() + (h @ w) / 8 + jnp.average(h, axis=-1, weights=w)
