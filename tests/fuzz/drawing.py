"""Whole programs, from a seed or through Hypothesis."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from hypothesis import strategies as st

from fuzz import functions, positions, products, reductions, shapes
from fuzz.builder import OPS, Builder, Choices, Drawn, Reject, Shared
from fuzz.products import dense_layer
from fuzz.program import Program, Val, tidy

STEPS = (products, shapes, reductions, positions, functions)  # importing them fills the table of operations
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
            dense_layer(b, first)
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


def generate(seed: Any, families: Sequence[str] | None = None, most: int = 9) -> Program:
    """The program of a seed."""
    return build(Choices(random.Random(str(seed))), families, most)


@st.composite
def programs(draw: Callable, families: Sequence[str] | None = None, most: int = 9) -> Program:
    """Random programs; they shrink towards few and simple steps."""
    return build(Drawn(draw), families, most)
