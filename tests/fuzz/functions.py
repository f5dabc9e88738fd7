"""Steps that define functions: calls, maps, derivatives, loops, branches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fuzz.builder import Builder, Reject, op
from fuzz.program import Func, Step, Val


def _captured(v: str, names: Iterable[Val]) -> str:
    return ", ".join([v, *map(str, names)])


@op("call", 3)
def call(b: Builder) -> None:
    """A local function, called as it is, jitted or rematerialised."""
    v = b.array()
    a = b.local(v.shape, v.dtype)
    inner = b.body([a], most=3)
    f = Func(b.fresh("f"), (a,), tuple(inner.steps), inner.last().name)
    how = b.s.pick(["jax.jit", "jax.checkpoint", "", "jax.named_call"])
    b.emit(f"{how}({f.name})({v})", funcs=[f])


@op("call", 2)
def call_twice(b: Builder) -> None:
    """A function with its own parameters, applied twice: a shared layer."""
    v = b.array()
    a = b.local(v.shape, v.dtype)
    inner = b.body([a])
    f = Func(b.fresh("f"), (a,), tuple(inner.steps), inner.like(inner.last(), v.shape, a))
    b.emit(f"jax.jit({f.name})({f.name}({v}))", funcs=[f])


@op("vmap", 3)
def vmap(b: Builder) -> None:
    v = b.array(1, 4)
    d = b.axis(v)
    a = b.local((*v.shape[:d], *v.shape[d + 1 :]), v.dtype)
    inner = b.body([a], most=3)
    f = Func(b.fresh("f"), (a,), tuple(inner.steps), inner.last().name)
    how = b.s.pick([f"jax.vmap({f.name}, {d}, {b.s.pick([0, -1])})", f"jax.vmap({f.name}, {d})"])
    b.emit(f"{how}({v})", funcs=[f])


@op("vmap", 1)
def vmap_two(b: Builder) -> None:
    u, v = b.array(1, 4), b.array(1, 4)
    i, j = b.axis(u), b.axis(v)
    a = b.local((*u.shape[:i], *u.shape[i + 1 :]), u.dtype)
    c = b.local((*v.shape[:j], *v.shape[j + 1 :]), v.dtype)
    inner = b.body([a, c], most=3)
    f = Func(b.fresh("f"), (a, c), tuple(inner.steps), inner.last().name)
    b.emit(f"jax.vmap({f.name}, ({i}, {j}))({u}, {v})", funcs=[f])


@op("custom", 2)
def custom_derivative(b: Builder) -> None:
    v = b.array(0)
    w = b.value(lambda w: (w.is_float and not w.weight) or w.name.startswith("p["))
    a, c = b.local(v.shape, v.dtype), b.local(w.shape, w.dtype)
    inner = b.body([c, a], closed=True, most=3)
    g = Func(b.fresh("g"), (a, c), tuple(inner.steps), inner.last().name)
    how = b.s.pick(["jvp", "vjp", "vjp"])
    if how == "jvp" and "custom_vjp" in "\n".join(line for step in inner.steps for line in step.lines()):
        raise Reject("JAX differentiates this in reverse only, and by a primitive that no other transformation knows")
    name = b.fresh("f")
    if how == "jvp":
        after = (f"{name}.defjvp(lambda primals, tangents: jax.jvp({g.name}, primals, tangents))",)
    else:
        scale = b.s.pick(["ct", "ct * 0.5"])
        after = (f"{name}.defvjp(lambda *a: jax.vjp({g.name}, *a), lambda pull, ct: pull({scale}))",)
    f = Func(name, (a, c), (), f"{g.name}({a}, {c})", f"jax.custom_{how}", after)
    b.emit(f"{name}({v}, {w})", funcs=[g, f])


@op("custom", 1)
def custom_kernel(b: Builder) -> None:
    """The function reads its kernel in a contraction, the derivative rule entry by entry."""
    v = b.array(2)
    if b.closed:
        raise Reject("no parameters here")
    w = b.param(v.shape[-1], b.size())
    a, c = b.local(v.shape, v.dtype), b.local(w.shape, w.dtype)
    name = b.fresh("f")
    if b.s.chance(50):
        of = f"ts[0] @ xs[1] + xs[0] @ (ts[1] * {b.s.pick(['1.0', 'xs[1]', 'jnp.sin(xs[1])'])})"
        how, after = "jvp", f"{name}.defjvp(lambda xs, ts: (xs[0] @ xs[1], {of}))"
    else:
        kernel = "x.reshape((-1, x.shape[-1])).T @ ct.reshape((-1, ct.shape[-1]))"
        of = b.s.pick([f"{kernel} + 0.1 * w", f"({kernel}) * w", f"({kernel}) * (jnp.abs(w) < 1)"])
        how = "vjp"
        after = f"{name}.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, ct: (lambda x, w: (ct @ w.T, {of}))(*xw))"
    b.emit(f"{name}({v}, {w})", funcs=[Func(name, (a, c), (), f"{a} @ {c}", f"jax.custom_{how}", (after,))])


@op("grad", 2)
def gradient_inside(b: Builder) -> None:
    v = b.array()
    a = b.local(v.shape, v.dtype)
    inner = b.body([a], most=3)
    f = Func(b.fresh("f"), (a,), tuple(inner.steps), f"{inner.last()}.astype({a}.dtype).sum()")
    how = b.s.pick(["jax.grad({f})({v})", "jax.jvp({f}, ({v},), ({v} * 2.0,))[1]", "jax.value_and_grad({f})({v})[1]"])
    b.emit(how.format(f=f.name, v=v), funcs=[f])


@op("scan", 3)
def scan_over_time(b: Builder) -> None:
    xs = b.array(1, 4)
    start = b.array(0, 3)
    c, t = b.local(start.shape, start.dtype, "c"), b.local(xs.shape[1:], xs.dtype, "t")
    inner = b.body([t, c], most=3)
    result = inner.last()
    carry = inner.like(result, start.shape, c)
    y = b.s.pick([str(result), str(c), f"{t} * 2.0", "None"])
    f = Func(b.fresh("f"), (c, t), tuple(inner.steps), f"{carry}, {y}")
    extra = ", reverse=True" if b.s.chance(20) else ""
    if y == "None":
        b.emit(f"lax.scan({f.name}, {start}, {xs}{extra})[0]", funcs=[f])
    else:
        b.emit(f"lax.scan({f.name}, {start}, {xs}{extra})", 2, funcs=[f])


@op("scan", 3)
def scan_over_layers(b: Builder) -> None:
    v = b.array()
    n, m, layers = v.shape[-1], b.size(), b.s.int(1, 3)
    c, w, u = b.local(v.shape, v.dtype, "c"), b.local((n, m), letter="t"), b.local((m, n), letter="t")
    how = b.s.int(0, 3)
    if how == 0:
        w = replace(w, shape=(n, n))
        text, ws = f"jnp.tanh({c} @ {w})", [b.param(layers, n, n)]
        args = (c, w)
    elif how == 1:
        text = f"{c} + jax.nn.relu({c} @ {w}) @ {u}"
        ws, args = [b.param(layers, n, m), b.param(layers, m, n)], (c, w, u)
    elif how == 2:
        text = f"{c} + jnp.tanh(jax.nn.standardize({c}, -1) @ {w}) @ {u}"
        ws, args = [b.param(layers, n, m), b.param(layers, m, n)], (c, w, u)
    else:
        w = replace(w, shape=(n,))
        text, ws, args = f"jax.nn.elu({c} * {w})", [b.param(layers, n)], (c, w)
    y = b.s.pick(["None", f"{c}.sum(-1)", str(c)])
    xs = ", ".join(map(str, ws)) + ("," if len(ws) == 1 else "")
    x = Val(b.fresh("t"), (), "float64")
    pieces = tuple(Step((a,), f"{x}[{i}]") for i, a in enumerate(args[1:]))
    f = Func(b.fresh("f"), (c, x), pieces, f"{text}, {y}")
    if y == "None":
        b.emit(f"lax.scan({f.name}, {v}, ({xs}))[0]", funcs=[f])
    else:
        b.emit(f"lax.scan({f.name}, {v}, ({xs}))", 2, funcs=[f])


@op("scan", 1)
def map_over(b: Builder) -> None:
    v = b.array(1, 4)
    a = b.local(v.shape[1:], v.dtype)
    inner = b.body([a], most=3)
    f = Func(b.fresh("f"), (a,), tuple(inner.steps), inner.last().name)
    b.emit(f"lax.map({f.name}, {v})", funcs=[f])


@op("cond", 3)
def cond(b: Builder) -> None:
    v = b.array(0)
    u = b.value()
    funcs = []
    for _ in range(2):
        a = b.local(v.shape, v.dtype)
        inner = b.body([a])
        funcs.append(Func(b.fresh("f"), (a,), tuple(inner.steps), inner.like(inner.last(), v.shape, a)))
    f, g = funcs
    how = b.s.pick([f"lax.cond({u}.sum() > 0, {f.name}, {g.name}, {v})",
                    f"lax.switch(({u}.sum() > 0).astype(int), [{f.name}, {g.name}], {v})"])  # fmt: skip
    b.emit(how, funcs=funcs)


@op("while", 2)
def fori(b: Builder) -> None:
    v = b.array(0)
    i, c = b.local((), "int32", "i"), b.local(v.shape, v.dtype, "c")
    inner = b.body([i, c] if b.s.chance(30) else [c])
    f = Func(b.fresh("f"), (i, c), tuple(inner.steps), inner.like(inner.last(), v.shape, c))
    b.emit(f"lax.fori_loop(0, {b.s.int(1, 3)}, {f.name}, {v})", funcs=[f])


@op("while", 2)
def while_loop(b: Builder) -> None:
    """Without derivatives: a `while` has none in reverse."""
    v = b.array(0)
    start = b.emit(f"lax.stop_gradient({v})")
    seen = [start]
    if v.rank:
        seen.append(b.emit(f"lax.stop_gradient({b.param(v.shape[-1], v.shape[-1])})"))
    i, c = b.local((), "int32", "i"), b.local(v.shape, v.dtype, "c")
    s = Val(b.fresh("s"), (), "float64")
    inner = b.body([c], closed=True, visible=seen)
    unpack = Step((i, c), str(s))
    f = Func(b.fresh("f"), (s,), (unpack, *inner.steps), f"({i} + 1, {inner.like(inner.last(), v.shape, c)})")
    until = b.s.pick([f"s[0] < {b.s.int(1, 3)}", "(s[0] < 3) & (s[1].sum() < 1.0)"])
    b.emit(f"lax.while_loop(lambda s: {until}, {f.name}, (0, {start}))[1]", funcs=[f])
