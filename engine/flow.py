"""Who depends on what: liveness, what depends on parameters alone, and inside which blocks everything is used.

A *context* is a set of blocks; a value with contexts {C1, C2} is still needed while all blocks of C1, or all of C2,
are kept. `{frozenset()}` means always. Contexts are what makes drops exact: a leaf goes when none of its contexts is
left, an equation stops costing when none of its is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias, TypeVar

from treesurgeon.engine.jaxprs import Eqn, Operand, Program, is_key, wiring
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.shape import SHAPE_ONLY

Contexts = frozenset[frozenset[int]]
ALWAYS: Contexts = frozenset([frozenset()])
MOST_CONTEXTS = 1024  # of one value; with more it counts as needed always


@dataclass(eq=False)
class Kinds:
    """What every value depends on: `data` (the inputs), or parameters and constants only (`leaves`), or noise.

    `leaves[v]` holds the numbers of the parameter leaves behind a value that depends on nothing else, None for others.
    `bodies` says the same of the programs inside an equation.
    """

    data: list[bool]
    leaves: list[frozenset[int] | None]
    bodies: dict[int, tuple[Kinds, ...]]

    def static(self, operand: Operand) -> bool:
        """Whether an operand depends on parameters and constants only."""
        return not isinstance(operand, int) or self.leaves[operand] is not None

    def of(self, operand: Operand) -> Kind:
        """What one operand depends on."""
        return (self.data[operand], self.leaves[operand]) if isinstance(operand, int) else CONSTANT


Kind: TypeAlias = tuple[bool, frozenset[int] | None]
CONSTANT: Kind = (False, frozenset())


def merge(found: Iterable[Kind]) -> Kind:
    """What a value depends on that is computed from these."""
    found = list(found)
    behind = [leaves for _, leaves in found if leaves is not None]
    return any(data for data, _ in found), frozenset().union(*behind) if len(behind) == len(found) else None


def main_kinds(program: Program, n_params: int) -> Kinds:
    """Classify every value of a whole function; the first `n_params` inputs are the parameter leaves."""
    raw_keys = {v for e in program.eqns if e.name == "random_wrap" for v in e.ins}
    inputs: list[Kind] = [(False, frozenset([i])) for i in range(n_params)]
    for v in program.inputs[n_params:]:
        inputs.append((not is_key(program.avals[v]) and v not in raw_keys, None))
    return kinds(program, inputs)


def kinds(program: Program, inputs: Sequence[Kind]) -> Kinds:
    """Classify every value of a program, given its inputs."""
    count = len(program.avals)
    out = Kinds([False] * count, [frozenset()] * count, {})
    for v, (data, leaves) in zip(program.inputs, inputs, strict=True):
        out.data[v], out.leaves[v] = data, leaves
    for i, eqn in enumerate(program.eqns):
        operands = [out.of(v) for v in eqn.ins]
        results = [merge(operands)] * len(eqn.outs)
        if eqn.bodies:
            out.bodies[i], results = _call_kinds(eqn, operands)
        for v, (data, leaves) in zip(eqn.outs, results, strict=True):
            out.data[v], out.leaves[v] = data, leaves
    return out


def _call_kinds(eqn: Eqn, operands: list[Kind]) -> tuple[tuple[Kinds, ...], list[Kind]]:
    wires = wiring(eqn)
    always = operands[:1] if eqn.name == "cond" else []
    while True:
        bodies = tuple(kinds(body, [operands[k] for k in ins]) for body, ins in zip(eqn.bodies, wires.ins, strict=True))
        results: list[list[Kind]] = [list(always) for _ in eqn.outs]
        for body, found, outs in zip(eqn.bodies, bodies, wires.outs, strict=True):
            for v, j in zip(body.outputs, outs, strict=True):
                for r in results if j is None else [results[j]]:  # how often a loop runs is in all that it returns
                    r.append(found.of(v))
        for j, k in wires.carried.items():
            results[j].append(operands[k])
        merged = [merge(r) for r in results]
        grown = list(operands)
        for j, k in wires.carried.items():
            grown[k] = merged[j]
        if grown == operands:
            return bodies, merged
        operands = grown


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


def kernel_leaves(program: Program, i: int, kinds: Kinds) -> frozenset[int]:
    """The parameter leaves that enter equation `i` as kernels, those of the programs inside it included."""
    eqn = program.eqns[i]
    if eqn.bodies:
        pairs = zip(eqn.bodies, kinds.bodies[i], strict=True)
        return frozenset().union(*(kernel_leaves(b, n, found) for b, found in pairs for n in range(len(b.eqns))))
    kernel = kernel_operand(eqn, kinds)
    return frozenset() if kernel is None else kinds.leaves[kernel] or frozenset()


@dataclass(eq=False)
class Shared:
    """Which values are kernels that a population shares (see `shared_kernels`), in the programs inside as well."""

    values: list[bool]
    bodies: dict[int, tuple[Shared, ...]]


def shared_kernels(program: Program, kinds: Kinds) -> Shared:
    """Values that reach nothing but contractions with data, as kernels, through reshapes and casts alone.

    These stay unmasked under `gate`, so that a population of masks shares them.
    """
    shared = [bool(leaves) for leaves in kinds.leaves]
    bodies: dict[int, tuple[Shared, ...]] = {}
    for v in program.outputs:
        if isinstance(v, int):
            shared[v] = False
    for i in range(len(program.eqns) - 1, -1, -1):
        eqn = program.eqns[i]
        if eqn.bodies:
            bodies[i] = tuple(map(shared_kernels, eqn.bodies, kinds.bodies[i]))
            wires = wiring(eqn)
            passes = [k not in wires.carried.values() for k in range(len(eqn.ins))]
            for body, found, ins in zip(eqn.bodies, bodies[i], wires.ins, strict=True):
                for v, k in zip(body.inputs, ins, strict=True):
                    passes[k] = passes[k] and found.values[v]
        else:
            kernel = kernel_operand(eqn, kinds)
            whole = eqn.name in SHAPE_ONLY and all(shared[v] for v in eqn.outs)
            passes = [v == kernel or whole for v in eqn.ins]
        for v, ok in zip(eqn.ins, passes, strict=True):
            if isinstance(v, int) and not ok:
                shared[v] = False
    for i, found in bodies.items():  # a body's input is shared only if what the call passes to it is
        eqn = program.eqns[i]
        _restrict(eqn, found, [isinstance(v, int) and shared[v] for v in eqn.ins])
    return Shared(shared, bodies)


def _restrict(eqn: Eqn, found: tuple[Shared, ...], operands: Sequence[bool]) -> None:
    for body, inner, ins in zip(eqn.bodies, found, wiring(eqn).ins, strict=True):
        for v, k in zip(body.inputs, ins, strict=True):
            inner.values[v] = inner.values[v] and operands[k]
        for n, e in enumerate(body.eqns):
            if e.name in SHAPE_ONLY:
                for v in e.outs:
                    inner.values[v] = inner.values[v] and all(isinstance(w, int) and inner.values[w] for w in e.ins)
            if n in inner.bodies:
                _restrict(e, inner.bodies[n], [isinstance(w, int) and inner.values[w] for w in e.ins])


T = TypeVar("T")


def minimal(contexts: Iterable[frozenset[T]]) -> frozenset[frozenset[T]]:
    """Contexts without those that another one implies."""
    unique = set(contexts)
    if len(unique) > MOST_CONTEXTS:
        return frozenset([frozenset()])
    return frozenset(c for c in unique if not _implied(c, unique))


def _implied(context: frozenset[T], others: set[frozenset[T]]) -> bool:
    """Whether a proper subset is among the others."""
    if 2 ** len(context) < len(others):
        return any(frozenset(part) in others for n in range(len(context)) for part in combinations(context, n))
    return any(other < context for other in others)


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


def straddled(
    program: Program, blocks: Sequence[tuple[int, int]], roots: Sequence[Operand], mirrors: Mapping[int, Operand]
) -> set[int]:
    """Blocks of which one updated parameter watches several, none inside another, as a norm does that is called twice.

    Without one of them it would be updated by the others alone, which is another program.
    """
    if not mirrors:
        return set()
    eqns, maker = uses(program, blocks, roots, {}).eqns, _makers(program)
    out: set[int] = set()
    for operand in mirrors.values():
        inside = {frozenset.intersection(*contexts) for contexts in _watched(program, operand, eqns, maker)[1]}
        deepest = [within for within in inside if not any(within < other for other in inside)]
        if len(deepest) > 1:
            out |= frozenset.union(*deepest) - frozenset.intersection(*deepest)
    return out


def _makers(program: Program) -> dict[int, int]:
    return {v: i for i, eqn in enumerate(program.eqns) for v in eqn.outs}


def _watched(
    program: Program, operand: Operand, eqns: Sequence[Contexts | None], maker: Mapping[int, int]
) -> tuple[set[int], list[Contexts]]:
    """The equations that an output alone needs, and the contexts of those whose results they read."""
    side: set[int] = set()
    watched: list[Contexts] = []
    todo = [operand] if isinstance(operand, int) else []
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
    return side, watched


def _use_mirrors(
    program: Program,
    mirrors: Mapping[int, Operand],
    values: list[set[frozenset[int]]],
    eqns: list[Contexts | None],
) -> None:
    maker, inputs = _makers(program), set(program.inputs)
    for operand in mirrors.values():
        if not isinstance(operand, int) or operand in inputs:  # an input handed through is no use
            continue
        side, watched = _watched(program, operand, eqns, maker)
        need = max(watched, key=lambda c: max(len(s) for s in c), default=ALWAYS)
        values[operand] |= need
        for i in side:
            eqns[i] = minimal((eqns[i] or frozenset()) | need)
            for v in program.eqns[i].ins:
                if isinstance(v, int):
                    values[v] |= need
