"""How programs are drawn: choices, the table of operations, and the builder that they add steps through."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from laws import A

from fuzz.program import MOST, Func, Step, Val, lean, make


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


FAMILIES = """
    dense unary unsafe binary einsum conv reshape concat pad slice tile flip reduce norm window cumulative
    sort gather scatter constant mask random cast odd call vmap custom grad scan cond while
""".split()
OPS: dict[str, list[tuple[int, Callable]]] = {family: [] for family in FAMILIES}


def op(family: str, weight: int = 2):
    """Register a step: a function of the builder that emits values."""

    def add(f: Callable) -> Callable:
        OPS[family].append((weight, f))
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
