"""Steps: layers, elementwise operations, contractions. Each takes the builder and emits values, or is rejected."""

from __future__ import annotations

from typing import Any

from fuzz.builder import Builder, op
from fuzz.program import Val


def dense_layer(b: Builder, v: Val) -> Val:
    n = b.size()
    w = b.param(v.shape[-1], n)
    bias = f" + {b.param(n)}" if b.s.chance(50) else ""
    return b.emit(f"{v} @ {w}{bias}")


@op("dense", 5)
def dense(b: Builder) -> None:
    dense_layer(b, b.array())


@op("dense", 2)
def dense_square(b: Builder) -> None:
    v = b.array()
    act = b.s.pick(["jnp.tanh", "jax.nn.relu", "jax.nn.elu", ""])
    b.emit(f"{act}({v} @ {b.param(v.shape[-1], v.shape[-1])})")


@op("dense", 2)
def residual(b: Builder) -> None:
    v = b.array()
    n, m = v.shape[-1], b.size()
    if b.s.chance(30):
        b.emit(f"{v} + jnp.tanh({v} @ {b.param(n, n)})")
    elif b.s.chance(50):
        b.emit(f"{v} + jax.nn.relu({v} @ {b.param(n, m)}) @ {b.param(m, n)}")
    else:
        b.emit(f"{v} @ {b.param(n, m)} + jnp.sin({v} @ {b.param(n, m)})")


UNARY = (
    "jnp.tanh({})", "jax.nn.relu({})", "jnp.sin({})", "jax.nn.silu({})", "jax.nn.gelu({})", "jax.nn.elu({})",
    "jax.nn.softplus({})", "jax.nn.relu6({})", "jax.nn.sigmoid({})", "jnp.abs({})", "{} ** 2", "-{}", "{} * 2.0",
    "1.0 - {}", "jnp.exp(-{} ** 2)", "jnp.exp(jnp.tanh({}))", "jnp.clip({}, -0.5, 0.5)", "jax.nn.leaky_relu({})",
    "jnp.sqrt(1.0 + {} ** 2)", "1.0 / (1.0 + {} ** 2)", "jnp.log1p(jnp.abs({}))", "{} / 3", "jnp.maximum({}, 0.1)",
    "jax.nn.hard_swish({})", "jax.nn.selu({})", "jnp.cos({})", "jnp.sign({}) * {}", "jnp.floor({}) + {}",
)  # fmt: skip


@op("unary", 5)
def unary(b: Builder) -> None:
    b.emit(b.s.pick(UNARY).replace("{}", str(b.value())))


@op("unsafe")
def unsafe(b: Builder) -> None:
    text = b.s.pick(["jnp.log({})", "1.0 / {}", "jnp.sqrt({})", "jnp.log(jax.nn.relu({}))", "{} / {}", "jnp.exp({})"])
    b.emit(text.replace("{}", str(b.value())))


BINARY = ("{} + {}", "{} * {}", "{} - {}", "jnp.maximum({}, {})", "{} / (1.0 + {} ** 2)", "jnp.where({} > 0, {}, 0.5)")


def _binary(b: Builder, u: Any, v: Any) -> None:
    b.emit(b.s.pick(BINARY).format(u, v))


@op("binary", 3)
def binary(b: Builder) -> None:
    v = b.value()

    def meets(u: Val) -> bool:
        return u.is_float and all(m == n or 1 in (m, n) for m, n in zip(u.shape[::-1], v.shape[::-1], strict=False))

    u = b.value(meets)
    _binary(b, *((u, v) if b.s.chance(50) else (v, u)))


@op("binary", 3)
def scale_or_shift(b: Builder) -> None:
    """With a parameter that broadcasts."""
    v = b.array()
    shape = tuple(1 if b.s.chance(25) else n for n in v.shape)
    u = b.param(*shape[b.s.int(0, v.rank) :])
    _binary(b, *((u, v) if b.s.chance(30) else (v, u)))


@op("binary")
def aligned(b: Builder) -> None:
    """Two values of other ranks, their equal axes laid on each other by new axes of size 1."""
    u, v = b.array(1, 3), b.array(1, 4)
    places: dict[int, int] = {}
    for i, n in enumerate(u.shape):
        free = [d for d, m in enumerate(v.shape) if m == n and d not in places.values()]
        places[i] = b.s.pick(free)
    order = sorted(places, key=lambda i: places[i])
    shape = tuple(v.shape[d] if d in places.values() else 1 for d in range(v.rank))
    _binary(b, v, f"{u}.transpose({tuple(order)}).reshape({shape})")


# Contractions.

LETTERS = "abcdefghijklmnop"


@op("einsum", 4)
def einsum_with_parameter(b: Builder) -> None:
    v = b.array()
    letters = LETTERS[: v.rank]
    summed = b.s.some(letters, 1)
    batch = [c for c in letters if c not in summed and b.s.chance(25)]
    new = LETTERS[v.rank : v.rank + b.s.int(0, 2)]
    kernel = "".join(b.s.shuffled([*summed, *batch, *new]))
    sizes = dict(zip(letters, v.shape, strict=True)) | {c: b.size() for c in new}
    out = [c for c in letters if c not in summed] + list(new)
    out = "".join(b.s.shuffled(out) if b.s.chance(40) else out)
    w = b.param(*(sizes[c] for c in kernel))
    if b.s.chance(30):
        b.emit(f'jnp.einsum("{kernel},{letters}->{out}", {w}, {v})')
    else:
        b.emit(f'jnp.einsum("{letters},{kernel}->{out}", {v}, {w})')


@op("einsum", 3)
def einsum_of_values(b: Builder) -> None:
    u, v = b.array(), b.array()
    left = LETTERS[: u.rank]
    sizes = dict(zip(left, u.shape, strict=True))
    right, new = "", iter(LETTERS[u.rank :])
    for n in v.shape:
        alike = [c for c in left if sizes[c] == n and c not in right]
        c = b.s.pick(alike) if alike and b.s.chance(75) else next(new)
        sizes[c] = n
        right += c
    both = [c for c in left if c in right]
    out = [c for c in dict.fromkeys(left + right) if not b.s.chance(60 if c in both else 15)]
    b.emit(f'jnp.einsum("{left},{right}->{"".join(out)}", {u}, {v})')


@op("einsum")
def attention(b: Builder) -> None:
    v = b.array(2, 3)
    n, h, d = v.shape[-1], b.s.int(1, 3), b.s.int(1, 3)
    q, k, u = (b.emit(f'jnp.einsum("...td,dhe->...the", {v}, {b.param(n, h, d)})') for _ in range(3))
    s = b.emit(f'jax.nn.softmax(jnp.einsum("...qhe,...khe->...hqk", {q}, {k}))')
    o = b.emit(f'jnp.einsum("...hqk,...khe->...qhe", {s}, {u})')
    if b.s.chance(50):
        b.emit(f'jnp.einsum("...qhe,hed->...qd", {o}, {b.param(h, d, n)})')
    else:
        b.emit(f"{o}.reshape({(*v.shape[:-1], h * d)}) @ {b.param(h * d, n)}")


@op("einsum")
def gram(b: Builder) -> None:
    v = b.array(2)
    b.emit(b.s.pick([f"{v} @ jnp.swapaxes({v}, -1, -2)", f"jnp.swapaxes({v}, -1, -2) @ {v}"]))


@op("einsum", 1)
def tied_weight(b: Builder) -> None:
    v = b.array()
    w = b.s.pick([w for w in b.param_vals() if w.rank == 2 and w.shape[1] == v.shape[-1]])
    b.emit(f"{v} @ {w}.T")


@op("conv", 5)
def convolution(b: Builder) -> None:
    v = b.array(3, 5)
    k = v.rank - 2
    spatial = "HWD"[:k]
    lhs = "N" + spatial + "C" if b.s.chance(70) else "".join(b.s.shuffled("NC" + spatial))
    rhs = spatial + "IO" if b.s.chance(70) else "".join(b.s.shuffled(spatial + "IO"))
    out = lhs if b.s.chance(80) else "".join(b.s.shuffled(lhs))
    features = v.shape[lhs.index("C")]
    groups = b.s.pick([g for g in range(1, features + 1) if features % g == 0]) if b.s.chance(40) else 1
    n_out = groups * b.s.int(1, max(1, 6 // groups))
    sizes = {c: b.s.int(1, 3) for c in spatial} | {"I": features // groups, "O": n_out}
    w = b.param(*(sizes[c] for c in rhs))
    padding = b.s.pick(['"SAME"', '"VALID"', str([(b.s.int(0, 1), b.s.int(0, 2)) for _ in spatial])])
    strides = tuple(b.s.pick([1, 1, 2]) for _ in spatial)
    extra = f", feature_group_count={groups}" if groups > 1 else ""
    if b.s.chance(20):
        extra += f", rhs_dilation={tuple(b.s.int(1, 2) for _ in spatial)}"
    if b.s.chance(20) and padding.startswith("["):
        extra += f", lhs_dilation={tuple(b.s.int(1, 2) for _ in spatial)}"
    numbers = f'("{lhs}", "{rhs}", "{out}")'
    b.emit(f"lax.conv_general_dilated({v}, {w}, {strides}, {padding}, dimension_numbers={numbers}{extra})")


@op("conv", 2)
def depthwise(b: Builder) -> None:
    v = b.array(3, 4)
    c, k = v.shape[-1], v.rank - 2
    w = b.param(*(b.s.int(1, 2) for _ in range(k)), 1, c * b.s.int(1, 2))
    numbers = ("N" + "HW"[:k] + "C", "HW"[:k] + "IO", "N" + "HW"[:k] + "C")
    act = b.s.pick(["", "jax.nn.relu"])
    text = f'{v}, {w}, {(1,) * k}, "SAME", dimension_numbers={numbers}, feature_group_count={c}'
    b.emit(f"{act}(lax.conv_general_dilated({text}))")


@op("conv", 1)
def transposed_convolution(b: Builder) -> None:
    v = b.array(3, 4)
    k = v.rank - 2
    w = b.param(*(b.s.int(1, 3) for _ in range(k)), v.shape[-1], b.size())
    padding = b.s.pick(['"SAME"', '"VALID"'])
    numbers = ("N" + "HW"[:k] + "C", "HW"[:k] + "IO", "N" + "HW"[:k] + "C")
    b.emit(f"lax.conv_transpose({v}, {w}, {(2,) * k}, {padding}, dimension_numbers={numbers})")


@op("conv", 1)
def convolution_of_values(b: Builder) -> None:
    u, v = b.array(3, 3), b.array(3, 3)
    b.emit(f'lax.conv_general_dilated({u}, {v}, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))')
