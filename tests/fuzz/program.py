"""What a random program is: a list of steps over a pool of values, and so its own source."""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from laws import A, Subject

MOST = 400  # elements of a value
TOKEN = re.compile(r'p\["\w+"\]|\b[a-z]\d+\b')


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
