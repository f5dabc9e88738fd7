"""Names for groups, blocks and steps: module paths, in order of execution, the same in every process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from treesurgeon.engine.analysis import Analysis
from treesurgeon.engine.axes import Atom, Axis, atoms, in_order, resolve, same
from treesurgeon.engine.blocks import Region, common_prefix
from treesurgeon.engine.flow import Kinds, kernel_leaves, kernel_operand
from treesurgeon.engine.graph import Block, Tie
from treesurgeon.engine.jaxprs import wiring
from treesurgeon.engine.masks import single_units
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.base import Axes
from treesurgeon.engine.solve import Solution


@dataclass(frozen=True)
class Stack:
    """The steps of a scanned stack of layers: its label, the names of its blocks, and the equation that runs them."""

    label: str
    blocks: tuple[str, ...]
    eqn: int


def stacks_of(analysis: Analysis, leaf_axes: Sequence[Axes]) -> dict[Atom, Stack]:
    """The layer axes of parameter leaves along which a loop steps, as stacks of blocks."""
    program, found = analysis.program, {}
    for i, along in analysis.solution.lengths.items():
        atom = resolve(along)
        if isinstance(atom, Atom) and wiring(program.eqns[i]).carried and analysis.uses.eqns[i] is not None:
            found.setdefault(atom, i)
    held = {
        atom: [leaf for leaf, axes in enumerate(leaf_axes) if any(resolve(axis) is atom for axis in axes)]
        for atom in found
    }
    homes = [common_prefix([analysis.modules[leaf] for leaf in leaves]) or "scan" for leaves in held.values() if leaves]
    out = {}
    for atom, home in zip([atom for atom in found if held[atom]], _number(homes), strict=True):
        out[atom] = Stack(f"{home}[]", tuple(f"{home}[{k}]" for k in range(atom.size)), found[atom])
    return out


def name_groups(
    analysis: Analysis,
    paths: list[str],
    leaf_axes: Sequence[Axes],
    inputs: Mapping[str, Axes],
    steps: Container[Atom],
) -> dict[Atom, str]:
    """A name for every free atom that some leaf holds, in order of execution.

    The name is that of the free input on which the units stand, or the module of the leaf that makes them: the first
    kernel on whose output axis they stand, else the first leaf that holds them.
    """
    base: dict[Atom, str] = {atom: name for name, axes in inputs.items() for axis in axes for atom in in_order(axis)}

    def claim(axes: Iterable[Axis], leaf: int) -> None:
        for axis in axes:
            for atom in in_order(axis):
                base.setdefault(atom, analysis.modules[leaf] if "/" in paths[leaf] else paths[leaf])

    def kernels(solution: Solution, kinds: Kinds, dead: Callable[[int], bool]) -> None:
        for i, eqn in enumerate(solution.program.eqns):
            if dead(i):
                continue
            for body, inner in zip(solution.bodies.get(i, ()), kinds.bodies.get(i, ()), strict=False):
                kernels(body, inner, lambda _: False)
            kernel = kernel_operand(eqn, kinds)
            rule = lookup(eqn.name)
            if kernel is None or rule is None or rule.contraction is None:
                continue
            contraction = rule.contraction(solution.site(i))
            kept = contraction.rhs_out if eqn.ins[1] == kernel else contraction.lhs_out
            claim((solution.of(kernel)[d] for d in sorted(kept)), min(kinds.leaves[kernel] or ()))

    def others(solution: Solution, kinds: Kinds, dead: Callable[[int], bool]) -> None:
        for i, eqn in enumerate(solution.program.eqns):
            if dead(i):
                continue
            for body, inner in zip(solution.bodies.get(i, ()), kinds.bodies.get(i, ()), strict=False):
                others(body, inner, lambda _: False)
            for v in eqn.ins:
                if isinstance(v, int) and kinds.leaves[v]:
                    claim(solution.of(v), min(kinds.leaves[v] or ()))

    held = {atom for axes in leaf_axes for axis in axes for atom in atoms(axis)}
    for visit in (kernels, others):
        visit(analysis.solution, analysis.kinds, lambda i: analysis.uses.eqns[i] is None)
    for leaf, axes in enumerate(leaf_axes):
        claim(axes, leaf)
    ordered = [atom for atom in base if atom in held and atom not in steps]
    return dict(zip(ordered, _number([base[atom] for atom in ordered]), strict=True))


def _number(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Names made unique: `a`, or `a[0]`, `a[1]` where several are called `a`, but for numbers that others have.

    Args:
        names: as they are.
        taken: names that others have.
    """
    seen: dict[str, int] = {}
    count = Counter([*names, *taken])
    out = []
    for name in names:
        if count[name] > 1:
            k = seen.get(name, 0)
            while f"{name}[{k}]" in count:
                k += 1
            seen[name] = k + 1
            name = f"{name}[{k}]"
        out.append(name)
    return out


def _region_names(analysis: Analysis, around: Sequence[frozenset[int]], steps: Iterable[str]) -> list[str]:
    """A name for each region, none of them a step's.

    The module that it is the whole of; else the scope of its kernels, if no others lie there; else the module of its
    first kernel. Where a region inside it has that name already: the modules that it is made of, `layer0/mlp+norm`.
    """
    modules, program = analysis.modules, analysis.program
    every = frozenset().union(*(kernel_leaves(program, i, analysis.kinds) for i in range(len(program.eqns))))
    within: dict[str, set[int]] = {}
    for leaf, module in enumerate(modules):
        parts = module.split("/")
        for k in range(1, len(parts) + 1):
            within.setdefault("/".join(parts[:k]), set()).add(leaf)
    own = [set(leaves) for leaves in _own_leaves(analysis)]
    homes = [common_prefix([modules[leaf] for leaf in sorted(leaves)]) for leaves in own]
    names = [home if home and within[home] == leaves else "" for home, leaves in zip(homes, own, strict=True)]
    taken = {name: b for b, name in enumerate(names) if name}
    for b, region in enumerate(analysis.regions):
        if names[b]:
            continue
        scope = common_prefix([modules[leaf] for leaf in sorted(region.kernels)])
        name = scope if scope and (within[scope] & every) == region.kernels else modules[min(region.kernels)]
        inner = taken.setdefault(name, b)
        names[b] = (b in around[inner] and _made_of(homes[b], own[b], modules, within)) or name
    return _number(names, steps)


def _made_of(home: str, own: set[int], modules: Sequence[str], within: Mapping[str, set[int]]) -> str:
    """The modules, side by side in `home`, that these leaves are the whole of, if they are two to four; else ""."""
    depth = len(home.split("/")) if home else 0
    parts = sorted({"/".join(modules[leaf].split("/")[: depth + 1]) for leaf in own} - {home})
    if not 1 < len(parts) < 5 or set().union(*(within[part] for part in parts)) != own:
        return ""
    return "/".join(filter(None, [home, "+".join(part.rpartition("/")[2] for part in parts)]))


def _own_leaves(analysis: Analysis) -> list[list[int]]:
    """For each region the leaves that are used nowhere else."""
    out: list[list[int]] = [[] for _ in analysis.regions]
    for leaf, v in enumerate(analysis.program.inputs[: len(analysis.modules)]):
        contexts = analysis.uses.values[v]
        if contexts:
            for b in frozenset.intersection(*contexts):
                out[b].append(leaf)
    return out


def region_turns(regions: Sequence[Region]) -> list[tuple[int, int]]:
    """For each region its number among those with the same kernels, in order of execution, and how many there are."""
    turns = Counter(region.kernels for region in regions)
    met: Counter[frozenset[int]] = Counter()
    out = []
    for region in regions:
        out.append((met[region.kernels], turns[region.kernels]))
        met[region.kernels] += 1
    return out


def name_blocks(
    analysis: Analysis, paths: Sequence[str], stacks: Sequence[Stack]
) -> tuple[dict[str, Block], dict[str, tuple[Tie, ...]], dict[int, str]]:
    """The droppable blocks, what dropping each one ties, and the name of each region."""
    program, solution = analysis.program, analysis.solution
    maker = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.outs}
    own = _own_leaves(analysis)
    ties = {b: _ties(solution.of(region.entry), solution.of(region.exit)) for b, region in enumerate(analysis.regions)}
    around: list[frozenset[int]] = []
    for b, region in enumerate(analysis.regions):
        contexts = analysis.uses.eqns[maker[region.exit]] or frozenset()
        around.append(frozenset.intersection(*contexts) - {b} if contexts else frozenset())
    names = _region_names(analysis, around, [name for stack in stacks for name in stack.blocks])
    number = {b: names[b] for b, tie in ties.items() if tie is not None}
    blocks: dict[str, Block] = {}
    turns = region_turns(analysis.regions)
    waiting = sorted(stacks, key=lambda stack: -stack.eqn)

    def add_steps(before: float) -> None:
        while waiting and waiting[-1].eqn < before:
            stack = waiting.pop()
            eqn = program.eqns[stack.eqn]
            contexts = analysis.uses.eqns[stack.eqn] or frozenset()
            inside = frozenset.intersection(*contexts) if contexts else frozenset()
            parent = max((p for p in inside if p in number), key=lambda p: len(around[p]), default=None)
            shape = max((tuple(program.avals[eqn.outs[j]].shape) for j in wiring(eqn).carried), key=len)
            for name in stack.blocks:
                blocks[name] = Block(name, (), (), shape, None if parent is None else number[parent], eqn.where)

    for b, name in number.items():
        add_steps(maker[analysis.regions[b].exit])
        enclosing = sorted((p for p in around[b] if p in number), key=lambda p: -len(around[p]))
        region = analysis.regions[b]
        blocks[name] = Block(
            name,
            tuple(paths[leaf] for leaf in own[b]),
            tuple(paths[leaf] for leaf in sorted(region.kernels)),
            tuple(program.avals[region.exit].shape),
            number[enclosing[0]] if enclosing else None,
            program.eqns[maker[region.exit]].where,
            *turns[b],
        )
    add_steps(float("inf"))
    found = {number[b]: tie for b, tie in ties.items() if tie is not None}
    return blocks, {name: found.get(name, ()) for name in blocks}, number


def _ties(entry: Axes, exit_: Axes) -> tuple[Tie, ...] | None:
    """Which units identity makes one; None where it cannot stand in: an exit position is fixed, its entry is not."""
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for a, b in zip(entry, exit_, strict=True):
        if same(a, b):
            continue
        left, right = single_units(a), single_units(b)
        if left is None or right is None:
            return None
        for u, v in zip(left, right, strict=True):
            if u is not None and v is None:
                return None
            if u is not None and v is not None and u != v:
                pairs.setdefault((u[0], v[0]), []).append((u[1], v[1]))
    return tuple(
        Tie(a, np.array([u for u, _ in units]), b, np.array([v for _, v in units])) for (a, b), units in pairs.items()
    )
