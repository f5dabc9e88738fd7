"""Random JAX programs: what they are, how they are drawn, how a failing one is made small, and a loop to find some.

A `Program` is a list of steps over a pool of values; every step is one assignment in Python, so a program is its own
source. `programs` draws programs through Hypothesis, `generate` does so from a seed. `reduce` takes a failing program
apart: a step gives way to a fresh parameter or input of its shape, a value to an older one, what nothing reads goes.

    python tests/fuzz.py --seconds 600 --seed 1 --out found.py

draws programs for a time (with `JAX_ENABLE_X64=1`), puts each to the laws and appends every small counter-example as
source. Operations come in families; each program uses a few of them ("Swarm testing", Groce et al., ISSTA 2012).
"""

from __future__ import annotations

import argparse
import itertools
import linecache
import math
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quick
from hypothesis import strategies as st
from jax import lax
from laws import A, Bench, Subject, count_macs, leaves_of, numpied, random_plan, value_and_grads, worst

from treesurgeon import engine
from treesurgeon.engine import Plan

MOST = 400  # elements of a value
TOKEN = re.compile(r'p\["\w+"\]|\b[a-z]\d+\b')

# Programs.


@dataclass(frozen=True)
class Val:
    """A value of a program: its name in the source, shape and dtype; `weight` where no input stands behind it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weight: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def is_int(self) -> bool:
        return "int" in self.dtype


@dataclass(frozen=True)
class Func:
    """A local function that a step defines before its assignment; `after` are lines that follow the definition."""

    name: str
    args: tuple[Val, ...]
    steps: tuple[Step, ...]
    result: str
    decorator: str = ""
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """`outs = expr`, with the functions that the expression calls."""

    outs: tuple[Val, ...]
    expr: str
    funcs: tuple[Func, ...] = ()

    def lines(self, indent: str = "    ") -> list[str]:
        out = []
        for f in self.funcs:
            if f.decorator:
                out.append(f"{indent}@{f.decorator}")
            out.append(f"{indent}def {f.name}({', '.join(map(str, f.args))}):")
            for step in f.steps:
                out += step.lines(indent + "    ")
            out.append(f"{indent}    return {f.result}")
            out += [indent + line for line in f.after]
        out.append(f"{indent}{', '.join(map(str, self.outs))} = {self.expr}")
        return out

    def reads(self) -> set[str]:
        """Every name that the step's source mentions, its results left out."""
        return set(TOKEN.findall("\n".join(self.lines()))) - {v.name for v in self.outs}


@dataclass(frozen=True)
class Program:
    """A function of parameters and arguments; `outputs` names what it returns."""

    params: Mapping[str, A]
    args: Mapping[str, A]
    steps: tuple[Step, ...]
    outputs: Mapping[str, str]

    def source(self, name: str = "program") -> str:
        lines = [f"def {name}({', '.join(['p', *self.args])}):"]
        for step in self.steps:
            lines += step.lines()
        returned = ", ".join(f'"{k}": {v}' for k, v in self.outputs.items())
        return "\n".join([*lines, f"    return {{{returned}}}"]) + "\n"

    def case(self, name: str = "program") -> str:
        """The program as an entry of `zoo.py`'s tables."""
        params = ", ".join(f'"{k}": {spec(a)}' for k, a in self.params.items())
        args = "".join(f", {spec(a)}" for a in self.args.values())
        return f"@case({{{params}}}{args})\n{self.source(name)}"

    def subject(self) -> Subject:
        return Subject("program", make(self.source(), "program"), dict(self.params), tuple(self.args.values()))

    def __repr__(self) -> str:
        return self.case()


def spec(a: A) -> str:
    if a.kind == "f":
        return f"arr({', '.join(map(str, a.shape))})"
    return (
        f"A({a.shape}, {a.kind!r})"
        if a.kind == "key"
        else f"arr({', '.join([*map(str, a.shape), f'kind={a.kind!r}'])})"
    )


NAMES: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": lax, "np": np}
_files = itertools.count()


def make(source: str, name: str) -> Callable:
    """The function of a source text, with its lines where tracebacks find them."""
    file = f"<fuzz{next(_files) % 50}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = dict(NAMES)
    exec(compile(source, file, "exec"), names)
    return names[name]


# Drawing programs.


class Reject(Exception):
    """A step that does not fit the values there are."""


class Choices:
    """Choices from a seed; `Drawn` has them from Hypothesis."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def int(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def pick(self, seq: Sequence[Any]) -> Any:
        if not seq:
            raise Reject("nothing to choose from")
        return seq[self.int(0, len(seq) - 1)]

    def chance(self, percent: int) -> bool:
        return self.int(0, 99) >= 100 - percent

    def some(self, seq: Sequence[Any], least: int = 0) -> list[Any]:
        out = [x for x in seq if self.chance(50)]
        return out if len(out) >= least else list(seq)[:least]

    def shuffled(self, seq: Iterable[Any]) -> list[Any]:
        rest, out = list(seq), []
        while rest:
            out.append(rest.pop(self.int(0, len(rest) - 1)))
        return out


class Drawn(Choices):
    def __init__(self, draw: Callable):
        self.draw = draw

    def int(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))


OPS: dict[str, list[tuple[int, Callable]]] = {}


def op(family: str, weight: int = 2):
    """Register a step: a function of the builder that emits values."""

    def add(f: Callable) -> Callable:
        OPS.setdefault(family, []).append((weight, f))
        return f

    return add


@dataclass
class Shared:
    """What the builders of a program and of its local functions have in common."""

    params: dict[str, A] = field(default_factory=dict)
    args: dict[str, A] = field(default_factory=dict)
    count: itertools.count = field(default_factory=itertools.count)
    mirrors: dict[str, str] = field(default_factory=dict)


class Builder:
    """Adds steps to a function body; each is evaluated for its shape at once, and rejected if it has none."""

    def __init__(self, s: Choices, ops: Sequence[Callable], shared: Shared, pool: Sequence[Val], depth: int = 0):
        self.s, self.ops, self.shared, self.pool, self.depth = s, ops, shared, list(pool), depth
        self.steps: list[Step] = []
        self.closed = False  # no parameters of the outer function: custom derivatives cannot close over them
        self.own = 0

    # Values to work on.

    def value(self, fits: Callable[[Val], bool] = lambda v: v.is_float, weights: int = 8) -> Val:
        """A value of the pool, the newest more often; sometimes a parameter as it is."""
        if not self.closed and self.shared.params and self.s.chance(weights):
            found = [v for v in self.param_vals() if fits(v)]
            if found:
                return self.s.pick(found)
        found = [v for v in self.pool if fits(v)]
        if not found:
            raise Reject("no such value")
        return found[-1] if self.s.chance(50) else self.s.pick(found[::-1])

    def array(self, least: int = 1, most: int = 9) -> Val:
        return self.value(lambda v: v.is_float and least <= v.rank <= most)

    def param_vals(self) -> list[Val]:
        return [
            Val(f'p["{k}"]', a.shape, "float64" if a.kind in "fp" else "int32", True)
            for k, a in self.shared.params.items()
        ]

    def size(self) -> int:
        known = sorted({n for v in self.pool for n in v.shape if n <= 6})
        if known and self.s.chance(30):
            return self.s.pick(known)
        return self.s.pick([4, 3, 2, 6, 5, 1, 8, 4, 6])

    def param(self, *shape: int, kind: str = "f") -> Val:
        """A parameter of this shape, sometimes one that is there already."""
        if self.closed or math.prod(shape) > MOST:
            raise Reject("no parameters here")
        alike = [v for v in self.param_vals() if v.shape == shape and v.is_float == (kind == "f")]
        if alike and self.s.chance(20):
            return self.s.pick(alike)
        name = f"w{len(self.shared.params)}"
        self.shared.params[name] = A(shape, kind)
        return Val(f'p["{name}"]', shape, "float64" if kind in "fp" else "int32", True)

    def arg(self, *shape: int, kind: str = "f") -> Val:
        alike = [(k, a) for k, a in self.shared.args.items() if a.kind == kind and a.shape == shape]
        if kind == "key" and alike:
            name = alike[0][0]
        else:
            name = f"x{len(self.shared.args)}"
            self.shared.args[name] = A(shape, kind)
        return Val(name, shape, "float64" if kind == "f" else "key" if kind == "key" else "int32")

    def axis(self, v: Val) -> int:
        return self.s.int(0, v.rank - 1) if self.s.chance(40) else v.rank - 1

    def axes(self, v: Val) -> tuple[int, ...]:
        if v.rank == 0:
            raise Reject("a scalar")
        return (v.rank - 1,) if self.s.chance(50) else tuple(self.s.some(range(v.rank), 1))

    def fresh(self, letter: str = "v") -> str:
        return f"{letter}{next(self.shared.count)}"

    # Steps.

    def emit(self, expr: str, n: int = 1, funcs: Sequence[Func] = ()) -> Any:
        """Add `n` values made by an expression."""
        outs = tuple(Val(self.fresh(), (), "") for _ in range(n))
        step = Step(outs, expr, tuple(map(lean, funcs)))
        read = step.reads()
        known = {v.name: v for v in self.pool}
        inside = {v.name for f in funcs for v in f.args}
        env = {name: known[name] for name in sorted(read & known.keys() - inside)}
        text = [f"def step({', '.join(['p', *env])}):", *step.lines(), f"    return {', '.join(map(str, outs))},"]
        structs = [struct(v.shape, v.dtype) for v in env.values()]
        p = {k: struct(a.shape, "float64" if a.kind in "fp" else "int32") for k, a in self.shared.params.items()}
        try:
            shapes = jax.eval_shape(make("\n".join(text), "step"), p, *structs)
        except Exception as error:
            if self.s.__class__ is Choices and "-v" in sys.argv:
                print("rejected:", expr, "|", str(error)[:200], file=sys.stderr)
            raise Reject(expr) from error
        weight = all(v.weight for v in env.values())
        done = []
        for v, out in zip(outs, shapes, strict=True):
            if math.prod(out.shape) > MOST or out.ndim > 5 or "complex" in str(out.dtype) or 0 in out.shape:
                raise Reject(expr)
            done.append(Val(v.name, tuple(out.shape), str(out.dtype), weight))
        self.steps.append(replace(step, outs=tuple(done)))
        self.pool += done
        self.own += len(done)
        return done[0] if n == 1 else done

    def body(self, args: Sequence[Val], closed: bool = False, visible: Sequence[Val] = (), most: int = 2) -> Builder:
        """A builder for a local function of these arguments; it sees the outer values too unless `closed`."""
        if self.depth >= 2:
            raise Reject("deep enough")
        pool = [*(visible if closed else self.pool), *args]
        inner = Builder(self.s, self.ops, self.shared, pool, self.depth + 1)
        inner.closed = closed or self.closed
        inner.run(self.s.int(1, most))
        return inner

    def local(self, shape: tuple[int, ...], dtype: str = "float64", letter: str = "a") -> Val:
        return Val(self.fresh(letter), tuple(shape), dtype)

    def last(self) -> Val:
        if not self.steps:
            raise Reject("an empty body")
        return next((v for v in reversed(self.steps[-1].outs) if v.is_float), self.steps[-1].outs[-1])

    def like(self, v: Val, shape: tuple[int, ...], carry: Val) -> str:
        """`v` as an array of this shape and of the carry's dtype."""
        if v.shape == shape and v.dtype == carry.dtype:
            return v.name
        fits = all(a in (1, b) for a, b in zip(v.shape[::-1], shape[::-1], strict=False))
        if fits and v.dtype == carry.dtype and v.rank <= len(shape):
            return f"{carry} + {v}"
        return f"{carry} * 0.5 + {v}.mean().astype({carry}.dtype)"

    def run(self, n: int) -> None:
        for _ in range(n):
            for _ in range(4):
                kept = len(self.steps), len(self.pool), dict(self.shared.params), dict(self.shared.args)
                try:
                    self.s.pick(self.ops)(self)
                    break
                except Reject:
                    del self.steps[kept[0] :], self.pool[kept[1] :]
                    self.shared.params, self.shared.args = kept[2], kept[3]


def struct(shape: Sequence[int], dtype: str) -> Any:
    if dtype == "key":
        return jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(np.dtype(jnp.dtype(dtype))))


ALWAYS = ("dense", "unary", "binary")


def build(s: Choices, families: Sequence[str] | None = None, most: int = 9) -> Program:
    """A random program; `families` are the operations it may use besides the common ones."""
    if families is None:
        others = [f for f in OPS if f not in ALWAYS]
        families = [f for f in others if s.chance(30)]
    shared = Shared()
    ops = [f for name in dict.fromkeys((*ALWAYS, *families)) for weight, f in OPS[name] for _ in range(weight)]
    b = Builder(s, ops, shared, [])
    for _ in range(2 if s.chance(20) else 1):
        rank = s.pick([2, 3, 4, 2, 3, 1])
        b.pool.append(b.arg(*(s.pick([2, 3, 4, 5, 1]) for _ in range(rank))))
    first = b.pool[-1]
    if s.chance(80):  # most axes that can be pruned start here
        with suppress(Reject):
            _dense(b, first)
    b.run(s.int(2, most))
    read = set().union(*(step.reads() for step in b.steps)) if b.steps else set()
    sinks = [v for v in b.pool if v.name not in read] or b.pool[-1:]
    outputs = {}
    for v in sinks[::-1][:3]:
        if v.is_float and v.rank and s.chance(80):
            with suppress(Reject):
                v = _head(b, v)
        outputs[f"y{len(outputs)}"] = v.name
    outputs |= shared.mirrors
    return tidy(Program(shared.params, shared.args, tuple(b.steps), outputs))


def _head(b: Builder, v: Val) -> Val:
    """What makes an axis of an output free: a contraction or reduction over it."""
    axes = tuple(range(1, v.rank)) if v.rank > 1 and b.s.chance(60) else b.axes(v)
    how = b.s.int(0, 3)
    if how == 0:
        return b.emit(f"jnp.tanh({v}).sum({axes})")
    if how == 1:
        return b.emit(f"{v}.mean({axes})")
    if how == 2:
        return b.emit(f"{v}.max({axes})")
    w = b.param(*(v.shape[d] for d in axes), b.size())
    return b.emit(f"jnp.tensordot({v}, {w}, ({axes}, {tuple(range(len(axes)))}))")


def needed(steps: Sequence[Step], *results: str) -> tuple[list[Step], set[str]]:
    """The steps that the results need, and every name that is read."""
    names, out = set(TOKEN.findall(" ".join(results))), []
    for step in reversed(steps):
        if any(v.name in names for v in step.outs):
            out.append(step)
            names |= step.reads()
    return out[::-1], names


def lean(f: Func) -> Func:
    """Without the steps that its result does not need."""
    return replace(f, steps=tuple(needed(f.steps, f.result, *f.after)[0]))


def tidy(program: Program) -> Program:
    """Without steps, parameters and inputs that no output needs."""
    steps, read = needed(
        [replace(s, funcs=tuple(map(lean, s.funcs))) for s in program.steps], *program.outputs.values()
    )
    params = {k: a for k, a in program.params.items() if f'p["{k}"]' in read}
    args = {k: a for k, a in program.args.items() if k in read}
    outputs = {k: v for k, v in program.outputs.items() if not k.startswith("w") or k in params}
    return Program(params or dict(itertools.islice(program.params.items(), 1)), args, tuple(steps), outputs)


def generate(seed: Any, families: Sequence[str] | None = None, most: int = 9) -> Program:
    """The program of a seed."""
    return build(Choices(random.Random(str(seed))), families, most)


@st.composite
def programs(draw: Callable, families: Sequence[str] | None = None, most: int = 9) -> Program:
    """Random programs; they shrink towards few and simple steps."""
    return build(Drawn(draw), families, most)


# Steps. Each takes the builder and emits values, or is rejected.


def _dense(b: Builder, v: Val) -> Val:
    n = b.size()
    w = b.param(v.shape[-1], n)
    bias = f" + {b.param(n)}" if b.s.chance(50) else ""
    return b.emit(f"{v} @ {w}{bias}")


@op("dense", 5)
def dense(b: Builder) -> None:
    _dense(b, b.array())


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


# Shapes.


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
    value = b.s.pick([f"jnp.zeros((), {v}.dtype)", f"{v}.sum()", f"{v}.max()"])
    b.emit(f"lax.pad({v}, {value}, {widths})")


def _index(d: int, text: str) -> str:
    return ", ".join([":"] * d + [text])


@op("slice", 3)
def slice_part(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    start = b.s.int(0, v.shape[d] - 1)
    b.emit(f"{v}[{_index(d, f'{start}:{b.s.int(start + 1, v.shape[d])}')}]")


@op("slice", 1)
def slice_strided(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    b.emit(f"{v}[{_index(d, b.s.pick(['::2', '1::2', '::-1', '::3', '0', '-1', 'None']))}]")


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


# Reductions and norms.


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


# Positions.


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
                f"{v}[{_index(d, f'np.array({ids})')}]",
                f"jnp.take({v}, jnp.array({ids}), axis={d})",
                f"{v}[{_index(d, str(ids[0]))}]",
                f"jnp.take({v}, {b.arg(len(ids), kind=f'i:{v.shape[d]}')}, axis={d})",
            ]
        )
    )


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
    at = b.s.pick([str(b.s.int(0, v.shape[d] - 1)), "np.array([0, -1])", ":1", "::2"])
    with_ = b.s.pick(["1.5", f"{v}[{_index(d, at)}] * 2.0", f"{v}.sum()"])
    b.emit(f"{v}.at[{_index(d, at)}].{how}({with_})")


@op("scatter", 1)
def scatter_dynamic(b: Builder) -> None:
    v = b.array()
    d = b.axis(v)
    i = b.arg(kind=f"i:{v.shape[d]}")
    b.emit(f"{v}.at[{_index(d, str(i))}].{b.s.pick(['set', 'add'])}(0.5)")


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


# Functions of functions.


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
    name = b.fresh("f")
    if how == "jvp":
        after = (f"{name}.defjvp(lambda primals, tangents: jax.jvp({g.name}, primals, tangents))",)
    else:
        scale = b.s.pick(["ct", "ct * 0.5"])
        after = (f"{name}.defvjp(lambda *a: jax.vjp({g.name}, *a), lambda pull, ct: pull({scale}))",)
    f = Func(name, (a, c), (), f"{g.name}({a}, {c})", f"jax.custom_{how}", after)
    b.emit(f"{name}({v}, {w})", funcs=[g, f])


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


# Putting a program to the laws.


@dataclass(frozen=True)
class Failure:
    """What went wrong: `kind` tells failures of one cause from others, `text` is for the reader."""

    kind: str
    text: str
    plan: Plan | None = None

    def __bool__(self) -> bool:
        return True


class Trivial(Exception):
    """A program in which nothing can be pruned, or that has no derivative."""


def attempt(what: str, f: Callable, plan: Plan | None = None) -> Failure | None:
    try:
        f()
    except Trivial:
        raise
    except AssertionError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if "/engine/" in frames[-1].filename:
            return Failure(f"{what} AssertionError at {_frame(error)}", f"{what}: {error!r} at {_frame(error)}", plan)
        law = str(error).split(":")[0].split("\n")[0]
        law = re.sub(r"the (input )?(value|gradient) \S+ changes.*", "changes", law)
        return Failure(law, str(error).split("\n")[0], plan)
    except Exception as error:  # noqa: BLE001
        at = _frame(error)
        return Failure(f"{what} {type(error).__name__} at {at}", f"{what}: {error!r} at {at}"[:1500], plan)
    return None


def _frame(error: BaseException) -> str:
    """The innermost line of the engine."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/engine/" in f.filename]
    if not frames:
        frames = traceback.extract_tb(error.__traceback__)
    f = frames[-1]
    return f"{f.filename.rsplit('/', 1)[-1]}:{f.name}:{f.lineno}"


def names(graph: Any) -> Any:
    return list(graph.groups), list(graph.blocks), str(graph)


def check(
    program: Program,
    draw_plan: Callable[[Any, int], Plan] | None = None,
    seed: int = 0,
    n_plans: int = 1,
    extra: bool = False,
    dry: bool = False,
) -> Failure | None:
    """The first law that a program breaks, None where it holds all; if `dry`, whether everything traces.

    Raises:
        Trivial: nothing in the program can be pruned, or it has no derivative.
    """
    if not program.params:
        raise Trivial
    bench = Bench(program.subject(), seed)
    with np.errstate(all="ignore"):
        if failed := attempt("trace", lambda: bench.graph):
            return failed
        graph = bench.graph
        again = engine.trace(bench.fn, bench.params, *bench.args)
        if names(graph) != names(again):
            return Failure("names", "two traces give other names")
        if not graph.groups and not graph.blocks:
            raise Trivial
        try:
            if not dry:
                jax.eval_shape(value_and_grads(bench.fn), bench.params, bench.args, bench.cts)
        except (ValueError, NotImplementedError) as error:  # a `while` has no derivative in reverse
            raise Trivial from error
        draw_plan = draw_plan or (lambda graph, k: random_plan(graph, 1000 * seed + k))
        if dry:
            plan = draw_plan(graph, 0)
            return attempt("law 7", lambda: dry_run(bench, plan), plan)
        failed = attempt("law 1", bench.law1)
        plans: list[Plan] = []
        for k in range(n_plans if not failed else 0):
            plan = draw_plan(graph, k)
            plans.append(plan)
            for what, law in (("law 7", bench.law7), ("law 2", bench.law2_and_5), ("law 3", bench.law3)):
                failed = failed or attempt(what, lambda law=law, plan=plan: law(plan), plan)
        if not failed:
            failed = attempt("law 4", lambda: bench.law4(plans), plans[-1])
        if not failed and extra:
            failed = attempt("law 5", bench.law5_transforms, plans[-1])
            if not failed and graph.groups:
                few = random_plan(graph, seed, least=2)
                failed = attempt("law 6", lambda: bench.law6(few, lambda g: random_plan(g, seed + 1)), few)
    if failed and not explained(bench, failed):
        return failed
    return None


def dry_run(bench: Bench, plan: Plan) -> None:
    """Everything but numbers: nothing is compiled."""
    masks = bench.graph.masks(plan)
    small, fast = bench.narrowed(plan)
    bench.out_kept(masks, {k: v.shape for k, v in leaves_of(jax.eval_shape(fast, small, *bench.args)).items()})
    assert engine.cost(bench.graph, plan).size == sum(np.size(x) for x in jax.tree.leaves(small)), "law 7: size"
    macs = count_macs(jax.make_jaxpr(fast)(small, *bench.args))
    assert engine.cost(bench.graph, plan).macs == macs, "law 7: MACs"
    gated = engine.gate(bench.fn, bench.graph)

    two = jax.tree.map(lambda m: np.stack([m, m]), masks)
    if jax.tree.leaves(two):
        jax.eval_shape(jax.vmap(lambda m: gated(bench.params, m, *bench.args)), two)


# Rounding: what may differ because the function itself cannot tell.

EXACT = {
    "max", "min", "reduce_max", "reduce_min", "sort", "gather", "slice", "dynamic_slice", "reshape", "squeeze",
    "expand_dims", "transpose", "broadcast_in_dim", "concatenate", "pad", "rev", "select_n", "neg", "abs", "copy",
    "dynamic_update_slice", "cummax", "cummin", "argmax", "argmin", "stop_gradient", "convert_element_type", "iota",
    "split", "sign", "floor", "ceil", "round", "clamp", "scatter", "optimization_barrier", "reduce_window_max",
    "reduce_window_min", "real", "imag", "copy_p", "mul_no_op", "select_and_gather_add", "select_and_scatter_add",
}  # fmt: skip


def rounded(closed: Any, key: Any) -> Callable:
    """A jaxpr as a function whose every arithmetic result is off by a few units in the last place."""
    counter = itertools.count()

    def blur(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jax.dtypes.issubdtype(x.dtype, np.floating):
            return x
        noise = jax.random.uniform(jax.random.fold_in(key, next(counter)), jnp.shape(x), jnp.float32, -1, 1)
        return x * (1 + 4 * float(jnp.finfo(x.dtype).eps) * noise.astype(jnp.float64)).astype(x.dtype)

    def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(v: Any) -> Any:
            return v.val if hasattr(v, "val") else env[v]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            name = eqn.primitive.name
            if inner is not None and name not in ("scan", "while", "cond", "reduce_window", "custom_vjp_call"):
                outs = run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), ins)
            else:
                outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(dict(eqn.params)))
                outs = list(outs) if eqn.primitive.multiple_results else [outs]
                if name not in EXACT:
                    outs = [blur(x) for x in outs]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return lambda *args: run(closed.jaxpr, closed.consts, args)


def explained(bench: Bench, failure: Failure) -> bool:
    """Whether rounding alone moves the function as much as the failure says it is off.

    An infinite activation gives its kernel a gradient of 0 × inf, for removed units as for others.
    """
    if "has a gradient" in failure.text and failure.plan is not None:
        masks = bench.graph.masks(failure.plan)
        _, grads, _ = bench.gated(bench.params, masks, bench.args, bench.cts)
        return not all(
            np.isfinite(g).all() for g in bench.cut_by_hand(grads, masks).values() if "float" in str(g.dtype)
        )
    off = re.search(r"is (\S+) off", failure.text)
    if off is None:
        return False
    functions = [(bench.fn, bench.params)]
    if failure.plan is not None:
        masks = bench.graph.masks(failure.plan)
        small, fast = bench.narrowed(failure.plan)
        gated = engine.gate(bench.fn, bench.graph)
        functions += [(fast, small), (lambda p, *args: gated(p, masks, *args), bench.params)]
    moved = 0.0
    for f, p in functions:
        shapes = leaves_of(jax.eval_shape(f, p, *bench.args))
        cts = {k: np.ones(v.shape, v.dtype) for k, v in shapes.items() if "float" in str(v.dtype)}
        leaves, tree = jax.tree.flatten((p, bench.args, cts))

        def flat(*leaves, f=f, tree=tree):
            return value_and_grads(f)(*jax.tree.unflatten(tree, leaves))

        try:
            closed = jax.make_jaxpr(flat)(*leaves)
            exact = jax.jit(lambda *a, c=closed: rounded(c, jax.random.key(0))(*a))(*leaves)
            for seed in (1, 2):
                other = jax.jit(lambda *a, c=closed, k=seed: rounded(c, jax.random.key(k))(*a))(*leaves)
                pair = ({str(i): v for i, v in enumerate(numpied(list(t)))} for t in (exact, other))
                moved = max(moved, worst(*pair)[0])
        except Exception as error:  # noqa: BLE001
            print("cannot blur:", repr(error)[:200], file=sys.stderr)
            return False
    return moved * 100 >= float(off[1])


# Making failing programs small.


def smaller(program: Program) -> Iterator[Program]:
    """Programs that are simpler by one change, the boldest first."""
    for k in program.outputs:
        if len(program.outputs) > 1:
            yield tidy(replace(program, outputs={j: v for j, v in program.outputs.items() if j != k}))
    makers = {v.name: step for step in program.steps for v in step.outs}
    for k, v in program.outputs.items():  # what an output is made of instead of it
        if v in makers and k not in program.params:
            for u in sorted(makers[v].reads() & makers.keys()):
                yield tidy(replace(program, outputs={**program.outputs, k: u}))
    every = [*_places(program.steps)]
    for at in reversed(every):
        step = _at(program.steps, at)
        for value in step.outs:
            # an older value of its kind, or a new leaf, takes its place
            alike = [v for v in _before(program, at) if (v.shape, v.dtype) == (value.shape, value.dtype)]
            for v in alike[::-1][:3]:
                yield _substitute(program, at, value, v.name)
            if value.is_float and len(step.outs) == 1:
                n = len(program.params) + len(program.args) + 90
                yield _substitute(program, at, value, f"x{n}", args={f"x{n}": A(value.shape)})
                yield _substitute(program, at, value, f'p["w{n}"]', params={f"w{n}": A(value.shape)})
    for at in every:
        step = _at(program.steps, at)
        if len(step.funcs) == 1 and not step.funcs[0].decorator:
            f = step.funcs[0]
            called = re.fullmatch(rf"(?:jax\.\w+)?\(?{f.name}\)?\(([^()]+)\)", step.expr)
            if called and "," not in called[1] and not re.search("vmap", step.expr):
                body = [_renamed(s, str(f.args[0]), called[1]) for s in f.steps]
                result = re.sub(rf"\b{f.args[0]}\b", called[1], f.result)
                new = _spliced(program.steps, at, [*body, replace(step, expr=result, funcs=())])
                yield tidy(replace(program, steps=new))


def _places(steps: Sequence[Step], at: tuple = ()) -> Iterator[tuple]:
    for i, step in enumerate(steps):
        for j, f in enumerate(step.funcs):
            yield from _places(f.steps, (*at, i, j))
        yield (*at, i)


def _at(steps: Sequence[Step], at: tuple) -> Step:
    return steps[at[0]] if len(at) == 1 else _at(steps[at[0]].funcs[at[1]].steps, at[2:])


def _spliced(steps: Sequence[Step], at: tuple, new: Sequence[Step]) -> tuple[Step, ...]:
    i = at[0]
    if len(at) == 1:
        return (*steps[:i], *new, *steps[i + 1 :])
    f = steps[i].funcs[at[1]]
    f = replace(f, steps=_spliced(f.steps, at[2:], new))
    funcs = (*steps[i].funcs[: at[1]], f, *steps[i].funcs[at[1] + 1 :])
    return (*steps[:i], replace(steps[i], funcs=funcs), *steps[i + 1 :])


def _before(program: Program, at: tuple) -> list[Val]:
    """The values in sight before a step."""
    dtype = str(jax.dtypes.canonicalize_dtype(np.float64))
    out = [Val(k, a.shape, dtype) for k, a in program.args.items() if a.kind == "f"]
    steps: Sequence[Step] = program.steps
    while True:
        out += [v for step in steps[: at[0]] for v in step.outs]
        if len(at) == 1:
            return out
        f = steps[at[0]].funcs[at[1]]
        out += f.args
        steps, at = f.steps, at[2:]


def _renamed(step: Step, old: str, new: str) -> Step:
    def sub(text: str) -> str:
        return TOKEN.sub(lambda m: new if m[0] == old else m[0], text)

    funcs = tuple(
        replace(f, steps=tuple(_renamed(s, old, new) for s in f.steps), result=sub(f.result),
                after=tuple(map(sub, f.after)))
        for f in step.funcs
    )  # fmt: skip
    return replace(step, expr=sub(step.expr), funcs=funcs)


def _substitute(program: Program, at: tuple, old: Val, new: str, params: Any = None, args: Any = None) -> Program:
    step = _at(program.steps, at)
    left = tuple(v for v in step.outs if v != old)
    gone = program.steps if left else _spliced(program.steps, at, ())
    steps = list(gone)

    def everywhere(steps: Sequence[Step]) -> tuple[Step, ...]:
        return tuple(_renamed(s, old.name, new) for s in steps)

    outputs = {k: new if v == old.name else v for k, v in program.outputs.items()}
    return tidy(
        Program({**program.params, **(params or {})}, {**program.args, **(args or {})}, everywhere(steps), outputs)
    )


def reduce(
    program: Program, failure: Failure, seed: int = 0, limit: float = 240, dry: bool = False
) -> tuple[Program, Failure]:
    """The smallest program found that fails in the same way."""
    until = time.monotonic() + limit
    going, tried = True, set()
    while going and time.monotonic() < until:
        going = False
        for other in smaller(program):
            text = other.source()
            if time.monotonic() > until:
                break
            if text in tried or len(text) > len(program.source()) + 20 or not other.outputs:
                continue
            tried.add(text)
            try:
                twice = failure.kind.startswith(("law 5, vmap", "law 6"))
                found = check(other, seed=seed, n_plans=3, extra=twice, dry=dry)
            except Exception as error:  # noqa: BLE001 (a program that is no longer one)
                print("not reduced so:", repr(error)[:200], file=sys.stderr)
                continue
            if found and found.kind == failure.kind:
                program, failure, going = other, found, True
                break
    return program, failure


def report(program: Program, failure: Failure, seed: Any) -> str:
    """A counter-example as source."""
    plan = ""
    if failure.plan is not None:
        keep = {name: [int(i) for i in units] for name, units in failure.plan.keep.items()}
        plan = f"# plan: keep={keep}, drop={sorted(failure.plan.drop)}\n"
    what = "\n".join(f"# {line}" for line in failure.text.splitlines())
    return f"\n\n# seed {seed}: {failure.kind}\n{what}\n{plan}{program.case(f'case_{seed}'.replace('-', '_'))}"


# Without fused multiply-adds: with them `x == x.max()` (the derivative of max) fails where XLA computes x once for each
# side and contracts one of them.
FLAGS = f"{quick.FLAGS} --xla_cpu_max_isa=AVX"


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", FLAGS)  # read when the first array is made
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="found.py")
    parser.add_argument("--skip", default="", help="families to leave out, with commas")
    parser.add_argument("--only", default="", help="families to draw from, with commas")
    parser.add_argument("--ignore", action="append", default=[], help="failures to pass over: part of their text")
    parser.add_argument("--most", type=int, default=9, help="steps of a program")
    parser.add_argument("--dry", action="store_true", help="only trace, many more programs")
    parser.add_argument("--extra", action="store_true", help="narrow under vmap and twice as well")
    parser.add_argument("-v", action="store_true")
    args = parser.parse_args()
    if not jax.config.jax_enable_x64:
        parser.error("set JAX_ENABLE_X64=1: the laws are exact in float64")
    start, counts, seen = time.monotonic(), {"held": 0, "trivial": 0, "failed": 0, "invalid": 0}, {}
    for n in itertools.count():
        if time.monotonic() - start > args.seconds:
            break
        if n % 50 == 49:
            jax.clear_caches()
        seed = args.seed * 100000 + n
        rng = random.Random(seed)
        families = [f for f in OPS if f not in args.skip.split(",") and (not args.only or f in args.only.split(","))]
        families = [f for f in families if f not in ALWAYS and rng.random() < (0.3 if not args.only else 0.7)]
        try:
            program = generate(seed, families, args.most)
            failure = check(program, seed=seed, extra=args.extra and n % 3 == 0, dry=args.dry)
        except Trivial:
            counts["trivial"] += 1
            continue
        except Exception as error:  # noqa: BLE001
            counts["invalid"] += 1
            print(f"seed {seed}: invalid: {error!r}"[:300], flush=True)
            continue
        if not failure:
            counts["held"] += 1
            continue
        counts["failed"] += 1
        known = failure.kind if " at " in failure.kind else None
        if any(text in failure.kind + failure.text for text in args.ignore) or seen.get(known, 0) >= 2:
            continue
        print(f"seed {seed}: {failure.kind}: {failure.text[:200]}", flush=True)
        program, failure = reduce(program, failure, seed, dry=args.dry)
        seen[failure.kind] = seen.get(failure.kind, 0) + 1
        text = report(program, failure, seed)
        print(text, flush=True)
        with open(args.out, "a") as file:
            file.write(text)
    took = time.monotonic() - start
    print(f"{counts} in {took:.0f} s: {3600 * (counts['held'] + counts['failed']) / took:.0f} programs an hour")
    sys.exit(bool(counts["failed"] + counts["invalid"]))


if __name__ == "__main__":
    main()
