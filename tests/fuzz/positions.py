"""Steps that pick and place positions; constants, masks, noise, dtypes."""

from __future__ import annotations

from fuzz.builder import Builder, Reject, op
from fuzz.shapes import index_text


@op("sort", 2)
def sort(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    k = b.s.int(1, v.shape[-1])
    b.emit(
        b.s.pick(
            [
                f"jnp.sort({v}, axis={d})",
                f"lax.top_k({v}, {k})[0]",
                f"jnp.argmax({v}, axis={d})",
                f"jnp.argsort({v}, axis={d})",
                f"lax.top_k({v}, {k})[1]",
                f"jnp.argmin({v}, axis={d})",
                f"jnp.take_along_axis({v}, jnp.argsort({v}, axis={d}), axis={d})",
                f"lax.sort_key_val({v}, {v} * 2.0, dimension={d})[1]",
                f"jnp.nonzero({v}, size={k})[0]",
            ]
        )
    )


@op("sort", 1)
def sort_several(b: Builder) -> None:
    u = b.array()
    v = b.value(lambda v: v.shape == u.shape)
    d = b.axis(u)
    b.emit(b.s.pick([f"lax.sort_key_val({u}, {v}, dimension={d})", f"lax.sort(({u}, {v}), dimension={d})"]), 2)


@op("gather", 3)
def take(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    ids = [b.s.int(0, v.shape[d] - 1) for _ in range(b.s.int(1, 4))]
    b.emit(
        b.s.pick(
            [
                f"{v}[{index_text(d, f'np.array({ids})')}]",
                f"jnp.take({v}, jnp.array({ids}), axis={d})",
                f"{v}[{index_text(d, str(ids[0]))}]",
                f"jnp.take({v}, {b.arg(len(ids), kind=f'i:{v.shape[d]}')}, axis={d})",
            ]
        )
    )


@op("gather", 2)
def reorder(b: Builder) -> None:
    """All positions in another order, or some of them, as a permutation, a split by parity or a shuffle makes."""
    v = b.array()
    d = b.axis(v)
    n = v.shape[d]
    order = b.s.shuffled(range(n))
    fast = b.s.pick([m for m in range(1, n + 1) if n % m == 0])
    shuffle = [i * fast + j for j in range(fast) for i in range(n // fast)]
    ids = b.s.pick([order, order[: b.s.int(1, n)], sorted(order[: b.s.int(1, n)]), shuffle])
    b.emit(b.s.pick([f"{v}[{index_text(d, f'np.array({ids})')}]", f"jnp.take({v}, jnp.array({ids}), axis={d})"]))


@op("gather", 2)
def take_dynamic(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    i = b.value(lambda u: u.is_int and u.rank <= 2)
    b.emit(f"jnp.take({v}, {i} % {v.shape[d]}, axis={d})")


@op("gather", 1)
def embedding(b: Builder) -> None:
    n = b.s.int(2, 6)
    ids = b.arg(*(b.s.int(1, 3) for _ in range(b.s.int(1, 2))), kind=f"i:{n}")
    b.emit(f"{b.param(n, b.size())}[{ids}]")


@op("gather", 1)
def shared_entries(b: Builder) -> None:
    """Several positions take one entry, which another parameter scales."""
    v = b.array()
    n = v.shape[-1]
    t, s = b.param(-(-n // 2)), b.param(n)
    of_data = f"{b.param(2)}[({v} > 0).astype(int)]"
    taken = b.s.pick([f"{t}[np.arange({n}) // 2]", f"jnp.repeat({t}, 2)[:{n}]", of_data])
    b.emit(f"{v} * {taken} * {s}" if b.s.chance(50) else f"{v} + {taken} * {s}")


@op("gather", 1)
def dynamic_slice(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    i = b.s.pick([str(b.s.int(0, 2)), str(b.arg(kind="i:3"))])
    starts = tuple(i if e == d else "0" for e in range(v.rank))
    sizes = tuple(b.s.int(1, n) if e == d else n for e, n in enumerate(v.shape))
    b.emit(f"lax.dynamic_slice({v}, ({', '.join(starts)},), {sizes})")


@op("gather", 1)
def along(b: Builder) -> None:
    v = b.array(2)
    i = b.value(lambda u: u.is_int and u.rank == v.rank)
    b.emit(f"jnp.take_along_axis({v}, {i} % {v.shape[-1]}, axis=-1)")


@op("gather", 1)
def advanced(b: Builder) -> None:
    v = b.array(2)
    b.emit(
        b.s.pick(
            [
                f"{v}[jnp.arange({min(v.shape[:2])}), jnp.arange({min(v.shape[:2])})]",
                f"jnp.diagonal({v})",
                f"jnp.trace({v})",
                f"{v}[..., {v.shape[-1] - 1}, None]",
                f"jnp.tril({v})",
            ]
        )
    )


@op("scatter", 2)
def scatter(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    how = b.s.pick(["set", "add", "multiply", "max"])
    order = b.s.shuffled(range(v.shape[d]))
    listed = f"np.array({order[: b.s.int(1, v.shape[d])]})"
    at = b.s.pick([str(order[0]), "np.array([0, -1])", ":1", "::2", listed, f"{order[0]}:"])
    with_ = b.s.pick(["1.5", f"{v}[{index_text(d, at)}] * 2.0", f"{v}.sum()"])
    b.emit(f"{v}.at[{index_text(d, at)}].{how}({with_})")


@op("scatter", 1)
def scatter_dynamic(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    i = b.arg(kind=f"i:{v.shape[d]}")
    b.emit(f"{v}.at[{index_text(d, str(i))}].{b.s.pick(['set', 'add'])}(0.5)")


@op("scatter", 1)
def segment_sum(b: Builder) -> None:
    v = b.array()
    ids = [b.s.int(0, 2) for _ in range(v.shape[0])]
    f = b.s.pick(["segment_sum", "segment_max"])
    b.emit(f"jax.ops.{f}({v}, {b.s.pick([f'np.array({ids})', str(b.arg(v.shape[0], kind='i:3'))])}, num_segments=3)")


@op("scatter", 1)
def update_slice(b: Builder) -> None:
    v = b.array()
    u = b.value(lambda u: u.rank == v.rank and all(m <= n for m, n in zip(u.shape, v.shape, strict=True)))
    starts = tuple(b.s.int(0, n - m) for m, n in zip(u.shape, v.shape, strict=True))
    b.emit(f"lax.dynamic_update_slice({v}, {u}.astype({v}.dtype), {starts})")


# Constants, masks, noise, dtypes.


@op("constant", 3)
def table(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    n = v.shape[d]
    text = b.s.pick(
        [f"jnp.arange({n})", f"np.linspace(-1, 1, {n})", f"jnp.asarray(np.arange({n}) % 2)", f"jnp.ones({n})",
         f"(jnp.arange({n}) < {(n + 1) // 2})", f"jnp.cos(jnp.arange({n}) * 0.5)", f"np.arange({n})[::-1] / {n}"]
    )  # fmt: skip
    b.emit(f"{v} {b.s.pick('*+')} {text}.reshape({(n, *[1] * (v.rank - d - 1))})")


@op("constant", 1)
def matrix(b: Builder) -> None:
    v = b.array()
    n = v.shape[-1]
    b.emit(
        b.s.pick(
            [
                f"{v} @ jnp.eye({n})",
                f"{v} @ np.tri({n})",
                f"{v} @ jnp.ones(({n}, {b.size()}))",
                f"{v} @ jnp.eye({n})[:, ::-1]",
                f"{v} @ jax.nn.one_hot(jnp.arange({n}) // 2, {n})",
            ]
        )
    )


@op("constant", 1)
def indices(b: Builder) -> None:
    v = b.value(lambda v: v.is_int and v.rank <= 3)
    n = b.size()
    b.emit(b.s.pick([f"jax.nn.one_hot({v}, {n})", f"{v} * 0.1", f"({v} == jnp.arange({n})[:, None]) * 1.0"]))


@op("constant", 1)
def integers(b: Builder) -> None:
    v = b.array()
    b.emit(b.s.pick([f"({v} * 4).astype(jnp.int32)", f"lax.iota(jnp.int32, {v.shape[-1]})"]))


@op("mask", 2)
def where(b: Builder) -> None:
    v = b.array()
    n = v.shape[-1]
    mask = b.s.pick(
        [f"{v} > {v}.mean(-1, keepdims=True)", f"jnp.arange({n}) % 2 == 0", f"{v} > 0", f"{b.param(n)} > 0"]
    )
    u = b.value(lambda u: u.is_float and u.shape in (v.shape, ()))
    b.emit(f"jnp.where({mask}, {v}, {b.s.pick([str(u), '0.0', '-1e9', '1.0'])})")


@op("mask", 1)
def causal(b: Builder) -> None:
    v = b.array(2)
    m, n = v.shape[-2:]
    b.emit(f"jax.nn.softmax(jnp.where(np.tri({m}, {n}, dtype=bool), {v}, -1e9))")


@op("mask", 1)
def compare(b: Builder) -> None:
    v = b.array()
    b.emit(f"({v} {b.s.pick(['<', '>=', '=='])} {b.s.pick(['0.0', f'{v}.max()', str(b.param(v.shape[-1]))])})")


@op("mask", 1)
def use_mask(b: Builder) -> None:
    m = b.value(lambda v: v.dtype == "bool")
    v = b.value(lambda v: v.is_float and v.shape == m.shape)
    b.emit(b.s.pick([f"jnp.where({m}, {v}, 0.0)", f"{v} * {m}", f"jnp.where(~{m}, {v}, 2.0)", f"{m}.sum(-1) + 0.5"]))


@op("random", 2)
def noise(b: Builder) -> None:
    v = b.array()
    key = b.arg(kind="key")
    if b.depth:
        raise Reject("only outside")
    b.pool.append(key)
    b.emit(
        b.s.pick(
            [
                f"jnp.where(jax.random.bernoulli({key}, 0.6, {v.shape}), {v} / 0.6, 0.0)",
                f"{v} + jax.random.normal({key}, {v.shape}, {v}.dtype)",
                f"{v} * jax.random.uniform(jax.random.fold_in({key}, 1), {v.shape[-1:]}, {v}.dtype)",
                f"jax.random.permutation({key}, {v}, axis={b.axis(v)})",
                f"{v} * jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in({key}, n), (), {v}.dtype))("
                f"(jnp.abs({v}.reshape((-1, {v.shape[-1]}))[0]) * 100).astype(jnp.uint32))",
            ]
        )
    )


@op("cast", 1)
def cast(b: Builder) -> None:
    v = b.value()
    half = b.s.pick(["jnp.bfloat16", "jnp.float16", "jnp.float32"])
    b.emit(
        b.s.pick([f"{v}.astype({half}).astype(jnp.float64)", f"jnp.tanh({v}.astype({half}))", f"{v}.astype({half})"])
    )


@op("odd", 1)
def odd(b: Builder) -> None:
    v = b.array()
    d, n = b.axis(v), v.shape[-1]
    b.emit(
        b.s.pick(
            [
                f"jnp.real(jnp.fft.fft({v}, axis={d}))",
                f"jnp.imag(jnp.fft.rfft({v}, axis={d}))",
                f"jnp.kron({v}, jnp.ones(2))",
                f"jnp.linalg.inv(jnp.eye({n}) * 9.0 + {v} @ {v}.T)" if v.rank == 2 else f"jnp.fft.fftshift({v})",
                f"jnp.convolve({v}.ravel(), np.array([1.0, 2.0]))",
                f"jnp.interp({v}, np.array([-1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.5]))",
                f"jnp.polyval(np.array([0.1, 0.2, 0.3]), {v})",
                f"jnp.nan_to_num({v})",
                f"lax.reduce({v}, 0.0, lax.add, ({d},))",
                f"lax.reduce(({v} * 9).astype(jnp.int32), np.int32(0), lax.bitwise_or, ({d},)).astype({v}.dtype)",
                f"lax.reduce(({v} * 9).astype(jnp.int32), np.int32(-1), lax.bitwise_and, ({d},)).astype({v}.dtype)",
                f"{v}.sum({d}) / {b.s.int(1, 3)}",
                f"({v}**2).sum({d}) * 1.0",
                f"{v}.astype(jnp.int4).max({d}).astype({v}.dtype)",
                f"lax.reduce_precision({v}, 8, 10)",
                f"lax.stop_gradient({v})",
                f"lax.optimization_barrier({v})",
                f"jnp.diff({v}, axis={d})",
                f"jnp.searchsorted(jnp.sort({v}.ravel()), 0.1)",
                f"jnp.atleast_2d({v})",
                f"jnp.meshgrid({v}.ravel(), jnp.arange(2))[0]",
                f"jnp.quantile({v}, 0.3, axis={d})",
                f"jnp.cov({v}.reshape(({v.shape[0]}, -1)))",
                f"jnp.select([{v} > 0.5, {v} > 0], [{v}, {v} * 2], -1.0)",
                f"jnp.abs(lax.complex({v}, {v} * 2))",
                f"jnp.real(jnp.exp(1j * {v}))",
                f"jnp.abs({v} + 1j)",
                f"jnp.real(({v} + 1j).mean({d}))",
                f"jnp.cumsum({v}, axis={d}) / {n}",
                f"jnp.linalg.svd({v}, compute_uv=False)",
                f"jnp.histogram({v}, bins=3)[0]",
                f"jnp.vectorize(lambda a: a * 2.0, signature='(n)->(n)')({v})",
            ]
        )
    )
