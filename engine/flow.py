"""Who depends on what: liveness, what depends on parameters alone, and inside which blocks everything is used.

A *context* is a set of blocks; a value with contexts {C1, C2} is still needed while all blocks of C1, or all of C2,
are kept. `{frozenset()}` means always. Contexts are what makes drops exact: a leaf goes when none of its contexts is
left, an equation stops costing when none of its is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from treesurgeon.engine.jaxprs import Eqn, Operand, Program, is_key
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.shape import SHAPE_ONLY

Contexts = frozenset[frozenset[int]]
ALWAYS: Contexts = frozenset([frozenset()])
MOST_CONTEXTS = 64


@dataclass(eq=False)
class Kinds:
    """What every value depends on: `data` (the inputs), or parameters and constants only (`leaves`), or noise.

    `leaves[v]` holds the numbers of the parameter leaves behind a value that depends on nothing else, None for others.
    """

    data: list[bool]
    leaves: list[frozenset[int] | None]

    def static(self, operand: Operand) -> bool:
        """Whether an operand depends on parameters and constants only."""
        return not isinstance(operand, int) or self.leaves[operand] is not None


def kinds(program: Program, n_params: int) -> Kinds:
    """Classify every value; the first `n_params` inputs are the parameter leaves."""
    count = len(program.avals)
    data = [False] * count
    leaves: list[frozenset[int] | None] = [frozenset()] * count
    raw_keys = {v for e in program.eqns if e.name == "random_wrap" for v in e.ins}
    for i, v in enumerate(program.inputs):
        if i < n_params:
            leaves[v] = frozenset([i])
        else:
            leaves[v] = None
            data[v] = not is_key(program.avals[v]) and v not in raw_keys
    for eqn in program.eqns:
        operands = [v for v in eqn.ins if isinstance(v, int)]
        any_data = any(data[v] for v in operands)
        behind = [leaves[v] for v in operands]
        static = None if any(b is None for b in behind) else frozenset().union(*(b or () for b in behind))
        for out in eqn.outs:
            data[out], leaves[out] = any_data, static
    return Kinds(data, leaves)


def is_contraction(eqn: Eqn) -> bool:
    """Whether the equation is a sum of products of two operands."""
    rule = lookup(eqn.name)
    return rule is not None and rule.contraction is not None


def kernel_operand(eqn: Eqn, kinds: Kinds) -> int | None:
    """The operand of a contraction with data that depends on parameters only: its kernel."""
    if not is_contraction(eqn):
        return None
    static = [v for v in eqn.ins if isinstance(v, int) and kinds.leaves[v]]
    return static[0] if len(static) == 1 and any(isinstance(v, int) and kinds.data[v] for v in eqn.ins) else None


def shared_kernels(program: Program, kinds: Kinds) -> list[bool]:
    """Values that reach nothing but contractions with data, as kernels, through reshapes and casts alone.

    These stay unmasked under `gate`, so that a population of masks shares them.
    """
    shared = [bool(leaves) for leaves in kinds.leaves]
    for v in program.outputs:
        if isinstance(v, int):
            shared[v] = False
    for eqn in reversed(program.eqns):
        kernel = kernel_operand(eqn, kinds)
        passes = eqn.name in SHAPE_ONLY and all(shared[v] for v in eqn.outs)
        for v in eqn.ins:
            if isinstance(v, int) and v != kernel and not passes:
                shared[v] = False
    return shared


def live(program: Program, roots: Iterable[Operand]) -> set[int]:
    """The numbers of the equations that the roots need, or that have effects."""
    needed = {v for v in roots if isinstance(v, int)}
    out = set()
    for i in range(len(program.eqns) - 1, -1, -1):
        eqn = program.eqns[i]
        if eqn.effects or any(v in needed for v in eqn.outs):
            out.add(i)
            needed.update(v for v in eqn.ins if isinstance(v, int))
    return out


T = TypeVar("T")


def minimal(contexts: Iterable[frozenset[T]]) -> frozenset[frozenset[T]]:
    """Contexts without those that another one implies."""
    unique = set(contexts)
    if len(unique) > MOST_CONTEXTS:
        return frozenset([frozenset()])
    return frozenset(c for c in unique if not any(other < c for other in unique))


@dataclass(eq=False)
class Uses:
    """The contexts of every equation (None: dead) and of every value (None: unused)."""

    eqns: list[Contexts | None]
    values: list[Contexts | None]


def uses(
    program: Program,
    blocks: Sequence[tuple[int, int]],
    roots: Sequence[Operand],
    mirrors: Mapping[int, Operand],
) -> Uses:
    """Contexts of everything, given the blocks as (entry, exit) values.

    `mirrors` are the outputs that return updated parameters, by leaf number: they are needed as long as the part of
    the network that they watch is.
    """
    exits = {exit_: (b, entry) for b, (entry, exit_) in enumerate(blocks)}
    values: list[set[frozenset[int]]] = [set() for _ in program.avals]
    eqns: list[Contexts | None] = [None] * len(program.eqns)

    def visit(i: int) -> None:
        eqn = program.eqns[i]
        need = minimal(c for v in eqn.outs for c in values[v])
        if eqn.effects:
            need = ALWAYS
        if not need:
            return
        for v in eqn.outs:
            if v in exits:
                b, entry = exits[v]
                values[entry] |= need
                need = minimal(c | {b} for c in need)
        eqns[i] = need
        for v in eqn.ins:
            if isinstance(v, int):
                values[v] |= need

    for v in roots:
        if isinstance(v, int):
            values[v].add(frozenset())
    for i in range(len(program.eqns) - 1, -1, -1):
        visit(i)
    if mirrors:
        _use_mirrors(program, mirrors, values, eqns)
    return Uses(eqns, [minimal(v) if v else None for v in values])


def _use_mirrors(
    program: Program,
    mirrors: Mapping[int, Operand],
    values: list[set[frozenset[int]]],
    eqns: list[Contexts | None],
) -> None:
    maker = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.outs}
    for operand in mirrors.values():
        if not isinstance(operand, int):
            continue
        side: set[int] = set()
        watched: list[Contexts] = []
        todo = [operand]
        while todo:
            i = maker.get(todo.pop())
            if i is None or i in side:
                continue
            known = eqns[i]
            if known is not None:
                watched.append(known)
                continue
            side.add(i)
            todo += [v for v in program.eqns[i].ins if isinstance(v, int)]
        need = max(watched, key=lambda c: max(len(s) for s in c), default=ALWAYS)
        values[operand] |= need
        for i in side:
            eqns[i] = minimal((eqns[i] or frozenset()) | need)
            for v in program.eqns[i].ins:
                if isinstance(v, int):
                    values[v] |= need
