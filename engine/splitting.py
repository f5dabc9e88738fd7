"""Split a function by what its values depend on, so that what is the same for many calls is computed once.

    parts = split(fn, params, x, masks)          # fn(params, x, masks); structs do
    fixed = parts.once(params)                   # what depends on the parameters alone
    known = parts.early(fixed, x)                # what depends on the data as well: the frontier, cached per batch
    out = parts.late(fixed, known, masks)        # the rest

For a population under `gate` the frontier lies where the first mask acts: everything before it is computed once for
each batch of a search, not once for each candidate. `parts.later(…)` moves the frontier behind the masks that stay as
they are, for variants of one candidate that differ in a few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.tree_util import tree_flatten, tree_leaves, tree_unflatten

from treesurgeon.engine.jaxprs import (
    Literal,
    Operand,
    Program,
    bind,
    flatten_program,
    is_array,
    live,
    standing_at,
    struct,
)

CONSTANT, ONCE, EARLY, LATE = range(4)


@dataclass(frozen=True, eq=False)
class Split:
    """A function in three parts; `varies` says in its output's structure which leaves depend on the late arguments."""

    program: Program
    stage: Sequence[int]
    inputs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    out_tree: Any
    kept: tuple[tuple[int, ...], ...]  # values handed on by the first and by the second part

    @property
    def passed(self) -> list[int | None]:
        """For each value that `once` hands on, which leaf of the first argument it is, None where it is computed."""
        number = {v: i for i, v in enumerate(self.inputs[0])}
        return [number.get(v) for v in self.kept[0]]

    @property
    def varies(self) -> Any:
        """Which outputs depend on the late arguments."""
        return tree_unflatten(self.out_tree, [self._stage(v) == LATE for v in self.program.outputs])

    def _stage(self, v: Operand) -> int:
        return self.stage[v] if isinstance(v, int) else CONSTANT

    def later(self, chosen: Collection[int]) -> Split:
        """The same program with only some leaves of the late argument late; the others count as data.

        `early` then takes the pair of the data and the list of the other leaves, `late` the list of the chosen.

        Args:
            chosen: the numbers of the leaves, in the order of `jax.tree.leaves`.
        """
        params, data, late = self.inputs
        rest = tuple(v for i, v in enumerate(late) if i not in chosen)
        return _divide(self.program, self.out_tree, (params, data + rest, tuple(late[i] for i in sorted(chosen))))

    def reach(self) -> list[int]:
        """For each leaf of the late argument, how many numbers the equations compute that depend on it."""
        needed = set(live(self.program, self.program.outputs))
        depends: dict[int, frozenset[int]] = {v: frozenset([i]) for i, v in enumerate(self.inputs[2])}
        out = [0] * len(self.inputs[2])
        for i, eqn in enumerate(self.program.eqns):
            on = frozenset().union(*(depends.get(v, frozenset()) for v in eqn.ins if isinstance(v, int)))
            if i not in needed or not on:
                continue
            for v in eqn.outs:
                depends[v] = on
            amount = sum(math.prod(self.program.avals[v].shape) for v in eqn.outs)
            for leaf in on:
                out[leaf] += amount
        return out

    def once(self, params: Any) -> list[Any]:
        """What depends on the first argument alone."""
        env = dict(zip(self.inputs[0], tree_leaves(params), strict=True))
        return self._run(env, self.kept[0])

    def early(self, fixed: Sequence[Any], data: Any) -> list[Any]:
        """What depends on the first two arguments and is read later."""
        env = dict(zip(self.kept[0], fixed, strict=True)) | dict(zip(self.inputs[1], tree_leaves(data), strict=True))
        return self._run(env, self.kept[1])

    def late(self, fixed: Sequence[Any], known: Sequence[Any], late: Any) -> Any:
        """The function's result."""
        env = dict(zip(self.kept[0], fixed, strict=True)) | dict(zip(self.kept[1], known, strict=True))
        env |= dict(zip(self.inputs[2], tree_leaves(late), strict=True))
        out = self._run(env, self.program.outputs)
        return tree_unflatten(self.out_tree, [cast(Any, v)(None) if callable(v) else v for v in out])

    def _run(self, env: dict[int, Any], wanted: Sequence[Operand]) -> list[Any]:
        return run(self.program, env, wanted)


def run(program: Program, env: Mapping[int, Any], wanted: Sequence[Operand]) -> list[Any]:
    """Some values of a program, given others; only what they need is run.

    A value may be given as a function instead, so that it need not be there as a whole from the start to the end. Every
    equation that reads it calls it with the newest value that came of such calls, or None: a function that waits for
    that one makes sure that a compiler does not do all of them at once.
    """
    env = dict[int, Any]({**program.consts, **env})
    came: set[int] = set()  # values that came of such calls
    newest: Any = None
    for i in sorted(needed(program, [v for v in wanted if isinstance(v, int)], set(env))):
        eqn = program.eqns[i]
        read = {v for v in eqn.ins if isinstance(v, int)}
        got = {v: env[v](newest) for v in read if callable(env[v])}
        values = [v.value if isinstance(v, Literal) else got.get(v, env[v]) for v in eqn.ins]
        with standing_at(eqn):
            env.update(zip(eqn.outs, bind(eqn, eqn.params, values), strict=True))
        if eqn.outs and (got or not came.isdisjoint(read)):
            came.update(eqn.outs)
            newest = env[eqn.outs[-1]]
    return [v.value if isinstance(v, Literal) else env[v] for v in wanted]


def split(fn: Callable, params: Any, data: Any, late: Any) -> Split:
    """Split `fn(params, data, late)`, a function of three pytrees of arrays, at the shapes of these.

        parts = split(fn, params, x, masks)
        fixed = parts.once(params)
        known = parts.early(fixed, x)          # what no mask touches, once for all masks
        out = parts.late(fixed, known, masks)

    Args:
        fn: the function.
        params: the first argument, or its shapes.
        data: the second one, likewise.
        late: the third one, likewise.
    """
    trees = [tree_flatten(tree) for tree in (params, data, late)]
    program, out_tree = _trace(
        lambda groups: fn(*(tree_unflatten(tree, leaves) for (_, tree), leaves in zip(trees, groups, strict=True))),
        [leaves for leaves, _ in trees],
    )
    ends = [0]
    for leaves, _ in trees:
        ends.append(ends[-1] + len(leaves))
    first, second, third = (tuple(program.inputs[a:b]) for a, b in itertools.pairwise(ends))
    return _divide(program, out_tree, (first, second, third))


def _divide(program: Program, out_tree: Any, inputs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> Split:
    """The parts of a program, by which of its inputs its values depend on."""
    stage = [CONSTANT] * len(program.avals)
    for number, values in zip((ONCE, EARLY, LATE), inputs, strict=True):
        for v in values:
            stage[v] = number
    for eqn in program.eqns:
        latest = max((stage[v] for v in eqn.ins if isinstance(v, int)), default=CONSTANT)
        for v in eqn.outs:
            stage[v] = max(latest, LATE if eqn.effects or eqn.across else CONSTANT)
    read: dict[int, set[int]] = {ONCE: set(), EARLY: set(), LATE: {v for v in program.outputs if isinstance(v, int)}}
    for i in live(program, program.outputs):
        eqn = program.eqns[i]
        now = stage[eqn.outs[0]] if eqn.outs else LATE
        if now != CONSTANT:
            read[now] |= {v for v in eqn.ins if isinstance(v, int)}
    first = tuple(sorted(v for v in read[EARLY] | read[LATE] if stage[v] == ONCE))
    second = tuple(sorted(v for v in read[LATE] if stage[v] == EARLY))
    return Split(program, stage, inputs, out_tree, (first, second))


def _trace(fn: Callable, args: Any) -> tuple[Program, Any]:
    """Trace `fn(args)` at the shapes of a pytree of arrays: the program and the structure of the result."""
    result: list[Any] = []

    def flat(args: Any) -> list[Any]:
        leaves, tree = tree_flatten(fn(args))
        result[:] = [tree]
        return leaves

    closed = jax.make_jaxpr(flat)(jax.tree.map(lambda x: struct(x if is_array(x) else np.asarray(x)), args))
    return flatten_program(closed), result[0]


def needed(program: Program, wanted: Sequence[int], have: set[int]) -> set[int]:
    """The equations to run when some values are at hand."""
    values = {v for v in wanted if v not in have}
    out = set()
    for i in range(len(program.eqns) - 1, -1, -1):
        eqn = program.eqns[i]
        if any(v in values for v in eqn.outs):
            out.add(i)
            values |= {v for v in eqn.ins if isinstance(v, int) and v not in have}
    return out
