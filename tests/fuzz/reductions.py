"""Steps that run along axes: reductions, norms, windows, running sums."""

from __future__ import annotations

import math

from laws import A

from fuzz.builder import Builder, Reject, op


@op("reduce", 4)
def reduce_axes(b: Builder) -> None:
    v = b.array()
    f = b.s.pick(["sum", "mean", "max", "min", "var", "std", "prod"])
    keep = ", keepdims=True" if b.s.chance(50) else ""
    ddof = ", ddof=1" if f in ("var", "std") and b.s.chance(20) else ""
    b.emit(f"{v}.{f}({b.axes(v)}{ddof}{keep})")


@op("reduce", 2)
def reduce_otherwise(b: Builder) -> None:
    v = b.array()
    axes, keep = b.axes(v), b.s.chance(50)
    n = math.prod(v.shape[d] for d in axes)
    b.emit(
        b.s.pick(
            [
                f"jax.nn.logsumexp({v}, {axes}, keepdims={keep})",
                f"jnp.linalg.norm({v} + 0.1, axis={axes[0]}, keepdims={keep})",
                f"{v}.sum({axes}, keepdims={keep}) / {n}",
                f"{v}.sum({axes}, keepdims={keep}) * {1 / n!r}",
                f"{v}.sum({axes}, keepdims={keep}) / {b.size()}",
                f"jnp.median({v}, {axes[0]}, keepdims={keep})",
                f"({v} > 0).sum({axes}, keepdims={keep})",
                f"jnp.any({v} > 0.3, {axes}, keepdims={keep})",
                f"jnp.all({v} > -0.3, {axes}, keepdims={keep})",
                f"jnp.ptp({v}, {axes[0]}, keepdims={keep})",
                f"jnp.average({v}, {axes[0]}, keepdims={keep})",
            ]
        )
    )


@op("reduce", 2)
def mean_in_steps(b: Builder) -> None:
    v = b.array(2)
    n = v.shape[-1] * v.shape[-2]
    b.emit(
        b.s.pick(
            [
                f"{v}.sum(-1).sum(-1) / {n}",
                f"{v}.mean(-1).mean(-1)",
                f"{v}.sum((-1, -2)) / {v.shape[-1]} / {v.shape[-2]}",
                f"{v}.sum(-1) / {v}.shape[-1] - {v}.mean((-1, -2), keepdims=True)[..., 0]",
                f"{v} - {v}.mean(-1, keepdims=True)",
                f"{v} - {v}.mean(-2, keepdims=True)",
            ]
        )
    )


@op("norm", 2)
def softmax(b: Builder) -> None:
    v = b.array()
    b.emit(f"jax.nn.{b.s.pick(['softmax', 'log_softmax'])}({v}, axis={b.axes(v)})")


@op("norm", 2)
def normalise(b: Builder) -> None:
    v = b.array()
    axes = b.axes(v)
    m = f"{v} - {v}.mean({axes}, keepdims=True)"
    text = b.s.pick(
        [
            f"({m}) * lax.rsqrt({v}.var({axes}, keepdims=True) + 1e-3)",
            f"({m}) / jnp.sqrt({v}.var({axes}, keepdims=True) + 1e-3)",
            f"{v} * lax.rsqrt(({v} ** 2).mean({axes}, keepdims=True) + 1e-3)",
            f"jax.nn.standardize({v}, {axes}, epsilon=1e-3)",
            f"{v} / jnp.sqrt(({v} ** 2).sum({axes}, keepdims=True) + 1e-3)",
        ]
    )
    scale = f" * {b.param(v.shape[-1])}" if b.s.chance(50) else ""
    b.emit(text + scale)


@op("norm", 1)
def group_norm(b: Builder) -> None:
    v = b.array(2)
    g = b.s.pick([m for m in range(1, v.shape[-1] + 1) if v.shape[-1] % m == 0])
    u = b.emit(f"{v}.reshape({(*v.shape[:-1], g, v.shape[-1] // g)})")
    axes = (*range(1, u.rank - 2), u.rank - 1)
    b.emit(f"jax.nn.standardize({u}, {axes}, epsilon=1e-3).reshape({v.shape}) * {b.param(v.shape[-1])}")


@op("norm", 1)
def weight_norm(b: Builder) -> None:
    v = b.array()
    n, m = v.shape[-1], b.size()
    w = b.param(n, m)
    w = b.emit(
        b.s.pick(
            [
                f"{w} / jnp.linalg.norm({w}, axis=0)",
                f"{w} - {w}.mean(0)",
                f"{w} * {b.param(m)}",
                f"jax.nn.standardize({w}, 0)",
                f"{w} / jnp.abs({w}).sum()",
            ]
        )
    )
    b.emit(f"{v} @ {w}")


@op("norm", 1)
def batch_statistics(b: Builder) -> None:
    """A new running mean: an output that mirrors a parameter."""
    v = b.array(2)
    if b.depth:
        raise Reject("only outside")
    d = b.axis(v)
    others = tuple(i for i in range(v.rank) if i != d)
    name = f"w{len(b.shared.params)}"
    b.shared.params[name] = A((v.shape[d],), "f")
    new = b.emit(f'0.9 * p["{name}"] + 0.1 * {v}.mean({others})')
    b.shared.mirrors[name] = new.name
    if b.s.chance(60):
        b.emit(f"{v} - jnp.expand_dims({new}, {tuple(i for i in range(v.rank - d)[1:])})")


@op("window", 2)
def window(b: Builder) -> None:
    v = b.array()
    some = b.axes(v)
    sizes = tuple(b.s.int(1, 3) if d in some else 1 for d in range(v.rank))
    strides = tuple(b.s.int(1, 2) if d in some else 1 for d in range(v.rank))
    f = b.s.pick(["-jnp.inf, lax.max", "jnp.inf, lax.min", "0.0, lax.add", "0.0, lax.add", "1.0, lax.mul"])
    b.emit(f'lax.reduce_window({v}, {f}, {sizes}, {strides}, "{b.s.pick(["SAME", "VALID"])}")')


@op("cumulative", 2)
def cumulative(b: Builder) -> None:
    v = b.array()
    f = b.s.pick(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])
    b.emit(f"lax.{f}({v}, axis={b.axis(v)}{', reverse=True' if b.s.chance(30) else ''})")


@op("cumulative", 1)
def associative(b: Builder) -> None:
    v = b.array()
    b.emit(f"lax.associative_scan(jnp.{b.s.pick(['add', 'multiply', 'maximum'])}, {v}, axis={b.axis(v)})")
