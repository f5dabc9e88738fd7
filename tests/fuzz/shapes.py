"""Steps that move positions about."""

from __future__ import annotations

import math

from fuzz.builder import Builder, op
from fuzz.program import Val


@op("reshape", 2)
def merge(b: Builder) -> None:
    v = b.array(2)
    d = b.s.int(0, v.rank - 2)
    b.emit(f"{v}.reshape({(*v.shape[:d], v.shape[d] * v.shape[d + 1], *v.shape[d + 2 :])})")


@op("reshape", 2)
def split_axis(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    n = b.s.pick([m for m in range(2, v.shape[d]) if v.shape[d] % m == 0])
    b.emit(f"{v}.reshape({(*v.shape[:d], n, v.shape[d] // n, *v.shape[d + 1 :])})")


@op("reshape", 1)
def any_reshape(b: Builder) -> None:
    v = b.array()
    rest, shape = math.prod(v.shape), []
    while rest > 1:
        n = b.s.pick([m for m in range(2, rest + 1) if rest % m == 0])
        shape.append(n)
        rest //= n
    b.emit(f"{v}.reshape({tuple(shape)})")


@op("reshape", 2)
def transpose(b: Builder) -> None:
    v = b.array(2)
    b.emit(f"{v}.transpose({tuple(b.s.shuffled(range(v.rank)))})")


@op("reshape", 1)
def expand_squeeze(b: Builder) -> None:
    v = b.array(0, 4)
    ones = [d for d, n in enumerate(v.shape) if n == 1]
    if ones and b.s.chance(60):
        b.emit(f"jnp.squeeze({v}, {b.s.pick(ones)})")
    else:
        b.emit(f"jnp.expand_dims({v}, {b.s.int(0, v.rank)})")


@op("reshape", 1)
def there_and_back(b: Builder) -> None:
    """A channel shuffle."""
    v = b.array()
    n = b.s.pick([m for m in range(2, v.shape[-1]) if v.shape[-1] % m == 0])
    b.emit(f"jnp.swapaxes({v}.reshape({(*v.shape[:-1], n, v.shape[-1] // n)}), -1, -2).reshape({v.shape})")


@op("concat", 3)
def concatenate(b: Builder) -> None:
    u = b.array()
    d = b.axis(u)

    def fits(v: Val) -> bool:
        return v.rank == u.rank and v.dtype == u.dtype and all(
            i == d or m == n for i, (m, n) in enumerate(zip(u.shape, v.shape, strict=True))
        )  # fmt: skip

    parts = [u, b.value(fits)]
    if b.s.chance(30):
        parts.append(b.value(fits))
    b.emit(f"jnp.concatenate([{', '.join(map(str, b.s.shuffled(parts)))}], {d})")


@op("concat", 1)
def concatenate_constant(b: Builder) -> None:
    u = b.array()
    d = b.axis(u)
    shape = tuple(b.s.int(1, 3) if i == d else n for i, n in enumerate(u.shape))
    other = b.s.pick([f"jnp.zeros({shape}, {u}.dtype)", f"jnp.ones({shape}, {u}.dtype)", str(b.param(*shape))])
    b.emit(f"jnp.concatenate([{u}, {other}], {d})")


@op("concat", 1)
def stack(b: Builder) -> None:
    u = b.array(0, 4)
    v = b.value(lambda v: v.shape == u.shape and v.dtype == u.dtype)
    b.emit(f"jnp.stack([{u}, {v}], {b.s.int(0, u.rank)})")


@op("pad", 2)
def pad(b: Builder) -> None:
    v = b.array()
    some = b.axes(v)
    widths = [(b.s.int(0, 2), b.s.int(0, 2)) if d in some else (0, 0) for d in range(v.rank)]
    how = b.s.pick(["", "", ", constant_values=1.5", ', mode="edge"', ', mode="reflect"', ', mode="wrap"'])
    b.emit(f"jnp.pad({v}, {widths}{how})")


@op("pad", 1)
def lax_pad(b: Builder) -> None:
    v = b.array()
    some = b.axes(v)
    widths = [(b.s.int(-1, 2), b.s.int(-1, 2), b.s.int(0, 1)) if d in some else (0, 0, 0) for d in range(v.rank)]
    value = b.s.pick([f"jnp.zeros((), {v}.dtype)", f"{v}.sum()", f"{v}.max()", ""])
    value = value or f"{b.param()}.astype({v}.dtype)"
    b.emit(f"lax.pad({v}, {value}, {widths})")


def index_text(d: int, text: str) -> str:
    return ", ".join([":"] * d + [text])


@op("slice", 3)
def slice_part(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    start = b.s.int(0, v.shape[d] - 1)
    b.emit(f"{v}[{index_text(d, f'{start}:{b.s.int(start + 1, v.shape[d])}')}]")


@op("slice", 1)
def slice_strided(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    b.emit(f"{v}[{index_text(d, b.s.pick(['::2', '1::2', '::-1', '::3', '0', '-1', 'None']))}]")


@op("slice", 2)
def split(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    n = v.shape[d]
    if n % 2 == 0 and b.s.chance(60):
        left, right = b.emit(f"jnp.split({v}, 2, {d})", 2)
        if b.s.chance(50):
            b.emit(f"{left} * jax.nn.sigmoid({right})")
    else:
        b.emit(f"jnp.split({v}, ({b.s.int(1, max(1, n - 1))},), {d})", 2)


@op("tile", 1)
def broadcast_to(b: Builder) -> None:
    v = b.array(0, 4)
    shape = tuple(b.size() if n == 1 else n for n in v.shape)
    b.emit(f"jnp.broadcast_to({v}, {(b.size(), *shape) if b.s.chance(50) else shape})")


@op("tile", 1)
def tile(b: Builder) -> None:
    v = b.array()
    b.emit(f"jnp.tile({v}, {tuple(b.s.pick([1, 2, 1, 3]) for _ in v.shape)})")


@op("tile", 1)
def repeat(b: Builder) -> None:
    v = b.array()
    b.emit(f"jnp.repeat({v}, {b.s.int(2, 3)}, axis={b.axis(v)})")


@op("tile", 1)
def outer(b: Builder) -> None:
    u, v = b.array(1, 2), b.array(1, 2)
    b.emit(f"{u}[..., :, None] {b.s.pick('+*')} {v}[..., None, :]")


@op("flip", 1)
def flip(b: Builder) -> None:
    v = b.array()
    b.emit(f"jnp.flip({v}, {b.axis(v)})")


@op("flip", 1)
def roll(b: Builder) -> None:
    v = b.array()
    b.emit(f"jnp.roll({v}, {b.s.int(1, 2)}, {b.axis(v)})")
