"""Making failing programs small."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from laws import A

from fuzz.judging import Failure, check
from fuzz.program import TOKEN, Program, Step, Val, tidy


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
