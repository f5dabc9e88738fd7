"""`trace`: find the coupled groups and droppable blocks of a function of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.tree_util import tree_structure

from treesurgeon.engine.axes import Atom, Axis, Reason, atoms, fixed_reason, fresh, pin, resolve, same
from treesurgeon.engine.blocks import Region, common_prefix, find_regions
from treesurgeon.engine.errors import StructureError
from treesurgeon.engine.flow import Contexts, Kinds, Uses, kernel_operand, live, main_kinds, uses
from treesurgeon.engine.graph import Block, Graph, Group, Leaf, Member, Term, Tie
from treesurgeon.engine.jaxprs import (
    Eqn,
    Operand,
    Program,
    Traced,
    is_float,
    named_leaves,
    split_call,
    trace_call,
    wiring,
)
from treesurgeon.engine.masks import labels, single_units, unit_index
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.base import Axes, fixed_axes
from treesurgeon.engine.solve import Solution, join, solve


@dataclass(frozen=True, eq=False)
class Analysis:
    """A traced function, solved: its axes, what depends on what, its blocks and the contexts they make.

    `mirrors` are the outputs that return updated parameters, by leaf number; `roots` are all the others.
    """

    traced: Traced
    solution: Solution
    kinds: Kinds
    regions: list[Region]
    uses: Uses
    mirrors: Mapping[int, Operand]
    mirror_of: Mapping[int, int]
    modules: Sequence[str]

    @property
    def program(self) -> Program:
        """The program."""
        return self.traced.program


def analyse(traced: Traced, paths: Sequence[str], leaf_axes: Sequence[Axes], input_names: Sequence[str]) -> Analysis:
    """Solve a traced function whose first inputs are the parameter leaves `paths` with axes `leaf_axes`."""
    program = traced.program
    n = len(paths)
    given = [
        fixed_axes(program.avals[v].shape, Reason(f"an axis of the input {name}"))
        for v, name in zip(program.inputs[n:], input_names, strict=True)
    ]
    solution = solve(program, [*leaf_axes, *given])
    mirror_of = _mirrors(traced, paths)
    roots = [v for i, v in enumerate(program.outputs) if i not in mirror_of] or list(program.outputs)
    mirrors = {leaf: program.outputs[i] for i, leaf in mirror_of.items()}
    for leaf, v in mirrors.items():
        join(
            leaf_axes[leaf],
            solution.of(v),
            Reason(f"the output that mirrors {paths[leaf]} splits it differently"),
        )
    _pin_steps(solution, program, live(program, roots), roots)
    found = main_kinds(program, n)
    modules = _modules(program, paths, found)
    stepping = {
        i
        for i, along in solution.lengths.items()
        if isinstance(resolve(along), Atom)
        and (wires := wiring(program.eqns[i])).carried
        and any(found.of(program.eqns[i].ins[k])[1] for k in wires.mapped_ins)
    }
    regions = find_regions(program, found, roots, lambda leaf: modules[leaf], stepping)
    used = uses(program, [(r.entry, r.exit) for r in regions], roots, mirrors)
    return Analysis(traced, solution, found, regions, used, mirrors, mirror_of, modules)


def _pin_steps(solution: Solution, program: Program, alive: Iterable[int], roots: Sequence[Operand]) -> None:
    """Steps of a loop that carries something may be left out only if nothing reads their results one by one."""
    read = {v for i in alive for v in program.eqns[i].ins if isinstance(v, int)} | {
        v for v in roots if isinstance(v, int)
    }
    for i, along in solution.lengths.items():
        eqn = program.eqns[i]
        wires = wiring(eqn)
        if not wires.carried:
            continue
        if any(eqn.outs[j] in read for j in wires.mapped_outs):
            pin(along, Reason("the results of the loop's steps are read one by one", eqn.where))
        elif not isinstance(resolve(along), Atom):
            pin(along, Reason("the steps of the loop are not entries of one axis", eqn.where))
    for found in solution.bodies.values():
        for body in found:
            _pin_inner_steps(body)


def _pin_inner_steps(body: Solution) -> None:
    for i, along in body.lengths.items():
        if wiring(body.program.eqns[i]).carried:
            pin(along, Reason("a step of a loop inside a loop", body.program.eqns[i].where))
    for found in body.bodies.values():
        for inner in found:
            _pin_inner_steps(inner)


def _mirrors(traced: Traced, paths: Sequence[str]) -> dict[int, int]:
    """Outputs whose path ends in a parameter leaf's path and that have its shape: output number -> leaf number."""
    leaf_of = {path: i for i, path in enumerate(paths) if path}
    out: dict[int, int] = {}
    for i, (path, v) in enumerate(zip(traced.out_paths, traced.program.outputs, strict=True)):
        parts = path.split("/")
        for k in range(len(parts)):
            leaf = leaf_of.get("/".join(parts[k:]))
            if leaf is not None and leaf not in out.values():
                if traced.program.aval(v).shape == traced.program.avals[traced.program.inputs[leaf]].shape:
                    out[i] = leaf
                break
    return out


def _modules(program: Program, paths: Sequence[str], kinds: Kinds) -> list[str]:
    """The module path of each leaf, read off the scope in which it is first used; else the leaf's parent path."""
    scopes: dict[int, tuple[str, ...]] = {}

    def visit(program: Program, kinds: Kinds, outer: tuple[str, ...]) -> None:
        for i, eqn in enumerate(program.eqns):
            scope = (*outer, *eqn.scope)
            for body, inner in zip(eqn.bodies, kinds.bodies.get(i, ()), strict=True):
                visit(body, inner, scope)
            for v in eqn.ins:
                for leaf in (kinds.leaves[v] or ()) if isinstance(v, int) else ():
                    scopes.setdefault(leaf, scope)

    visit(program, kinds, ())
    out = []
    for i, path in enumerate(paths):
        *home, last = path.split("/")
        named = _within(home, scopes.get(i, ()))
        home = home[1:] if home[:1] == ["params"] else home
        out.append("/".join(named or home) or last)
    return out


def _within(home: Sequence[str], scope: tuple[str, ...]) -> Sequence[str]:
    """The longest tail of `home` that stands in `scope`."""
    for k in range(len(home)):
        tail = tuple(home[k:])
        if any(scope[s : s + len(tail)] == tail for s in range(len(scope) - len(tail) + 1)):
            return tail
    return ()


def trace(fn: Callable, params: Any, *args: Any, free_outputs: Iterable[str] = (), **kwargs: Any) -> Graph:
    """Find the coupled groups and droppable blocks of `fn(params, *args, **kwargs)`.

    Args:
        fn: a function of a pytree of parameters; what it returns may be any pytree.
        params: the parameters; `jax.ShapeDtypeStruct` leaves do.
        args, kwargs: example arguments of `fn`, likewise. Axes of inputs are pinned, and so are those of outputs
            except outputs that mirror a leaf's path and shape (new batch statistics).
        free_outputs: paths (or first parts of paths) of outputs whose axes may shrink as well; "" frees all.

    Returns:
        The graph. It holds no arrays and serves every function of the same parameters.
    """
    leaves = named_leaves(params)
    if not leaves:
        raise StructureError("trace(fn, params, …): params has no array leaves")
    if len(leaves) != tree_structure(params).num_leaves:
        raise StructureError("trace(fn, params, …): two leaves have one path, such as 'a/b' and 'a' / 'b': rename one")
    call = split_call(args, kwargs)
    traced = trace_call(fn, params, call)
    paths = list(leaves)
    program = traced.program
    leaf_axes = [tuple(fresh(n) for n in program.avals[v].shape) for v in program.inputs[: len(paths)]]
    analysis = analyse(traced, paths, leaf_axes, call.names)
    free = tuple(free_outputs)
    for i, (path, v) in enumerate(zip(traced.out_paths, program.outputs, strict=True)):
        if i in analysis.mirror_of or any(path == f or path.startswith(f"{f}/") or not f for f in free):
            continue
        for axis in analysis.solution.of(v):
            pin(axis, Reason(f"an axis of the output {path}" if path else "an axis of the output"))
    for path, axes, v in zip(paths, leaf_axes, program.inputs, strict=False):
        if analysis.uses.values[v] is None:
            for axis in axes:
                pin(axis, Reason(f"{path} is not used"))
    return _build(analysis, paths, leaf_axes, tree_structure(params))


def _build(analysis: Analysis, paths: list[str], leaf_axes: Sequence[Axes], tree: Any) -> Graph:
    program = analysis.program
    stacks = _stacks(analysis, leaf_axes)
    names = _name_groups(analysis, paths, leaf_axes, stacks)
    for atom, name in [*names.items(), *((atom, stack.label) for atom, stack in stacks.items())]:
        atom.label = name
    frozen = [tuple(resolve(axis) for axis in axes) for axes in leaf_axes]
    groups = {}
    for atom, name in names.items():
        members = tuple(
            Member(path, d, unit_index(axis, name))
            for path, axes in zip(paths, frozen, strict=True)
            for d, axis in enumerate(axes)
            if name in labels(axis)
        )
        groups[name] = Group(name, atom.size, members)
    blocks, ties, number = _name_blocks(analysis, paths, list(stacks.values()))
    contexts = [_rename(analysis.uses.values[v], number) for v in program.inputs[: len(paths)]]
    has_collections = any(path.startswith("params/") for path in paths)
    leaves = {}
    pinned = {}
    for path, axes, v, context in zip(paths, frozen, program.inputs, contexts, strict=False):
        aval = program.avals[v]
        trainable = is_float(aval) and (path.startswith("params/") or not has_collections)
        leaves[path] = Leaf(path, aval.shape, aval.dtype, axes, trainable, context)
        for d, axis in enumerate(axes):
            if aval.shape[d] > 1 and not labels(axis):
                pinned[f"{path}[{d}]"] = fixed_reason(axis) or Reason("nothing reads it unit by unit")
    macs, activations = _work(analysis, number)
    divisors = _divisors(analysis.solution, program)
    steps = {stack.label: stack.blocks for stack in stacks.values()}
    return Graph(groups, blocks, pinned, ties, divisors, leaves, macs, activations, tree, steps)


@dataclass(frozen=True)
class _Stack:
    """The steps of a scanned stack of layers: its label, the names of its blocks, and the equation that runs them."""

    label: str
    blocks: tuple[str, ...]
    eqn: int


def _stacks(analysis: Analysis, leaf_axes: Sequence[Axes]) -> dict[Atom, _Stack]:
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
        out[atom] = _Stack(f"{home}[]", tuple(f"{home}[{k}]" for k in range(atom.size)), found[atom])
    return out


def _rename(contexts: Contexts | None, number: Mapping[int, str]) -> frozenset[frozenset[str]] | None:
    """Contexts over block names; blocks that were not kept as droppable are always there."""
    if contexts is None:
        return None
    return frozenset(frozenset(number[b] for b in context if b in number) for context in contexts)


def _name_groups(
    analysis: Analysis, paths: list[str], leaf_axes: Sequence[Axes], steps: Container[Atom]
) -> dict[Atom, str]:
    """A name for every free atom that some leaf holds, in order of execution.

    The name is the module of the leaf that makes the units: the first kernel on whose output axis they stand, else
    the first leaf that holds them.
    """
    base: dict[Atom, str] = {}

    def claim(axes: Iterable[Axis], leaf: int) -> None:
        for axis in axes:
            for atom in atoms(axis):
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


def _number(names: Sequence[str]) -> list[str]:
    """Names made unique: `a`, or `a[0]`, `a[1]` where several are called `a`."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        k = seen[name] = seen.get(name, -1) + 1
        out.append(f"{name}[{k}]" if names.count(name) > 1 else name)
    return out


def _region_names(analysis: Analysis) -> list[str]:
    """A name for each region: the module that it is the whole of, else the module of its first kernel."""
    names = []
    for region, own in zip(analysis.regions, _own_leaves(analysis), strict=True):
        home = common_prefix([analysis.modules[leaf] for leaf in own])
        within = {leaf for leaf, module in enumerate(analysis.modules) if f"{module}/".startswith(f"{home}/")}
        whole = home and within <= set(own)
        names.append(home if whole else analysis.modules[min(region.kernels)])
    return _number(names)


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
    alike: dict[frozenset[int], list[int]] = {}
    for b, region in enumerate(regions):
        alike.setdefault(region.kernels, []).append(b)
    return [(alike[region.kernels].index(b), len(alike[region.kernels])) for b, region in enumerate(regions)]


def _name_blocks(
    analysis: Analysis, paths: Sequence[str], stacks: Sequence[_Stack]
) -> tuple[dict[str, Block], dict[str, tuple[Tie, ...]], dict[int, str]]:
    """The droppable blocks, what dropping each one ties, and the name of each region."""
    program, solution = analysis.program, analysis.solution
    maker = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.outs}
    own = _own_leaves(analysis)
    ties = {b: _ties(solution.of(region.entry), solution.of(region.exit)) for b, region in enumerate(analysis.regions)}
    names = _region_names(analysis)
    number = {b: names[b] for b, tie in ties.items() if tie is not None}
    around: dict[int, frozenset[int]] = {}
    for b, region in enumerate(analysis.regions):
        contexts = analysis.uses.eqns[maker[region.exit]] or frozenset()
        around[b] = frozenset.intersection(*contexts) - {b} if contexts else frozenset()
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


def _work(analysis: Analysis, number: Mapping[int, str]) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """The multiply-accumulates and the output bytes of every live contraction, loops and branches included."""
    macs: list[Term] = []
    activations: list[Term] = []

    def visit(solution: Solution, contexts: Callable[[int], Contexts | None], around: Axes) -> None:
        for i, eqn in enumerate(solution.program.eqns):
            inside = contexts(i)
            if inside is None or solution.fixed(i):
                continue
            if i in solution.bodies:
                length = (solution.lengths[i],) if i in solution.lengths else ()
                for body in _worked(eqn, solution.bodies[i]):
                    visit(body, lambda _, inside=inside: inside, (*around, *map(resolve, length)))
            rule = lookup(eqn.name)
            if rule is None or rule.contraction is None:
                continue
            site = solution.site(i)
            contraction = rule.contraction(site)
            context = _rename(inside, number) or frozenset()
            out = (*around, *(resolve(axis) for axis in site.outs[0]))
            summed = tuple(resolve(site.ins[1][d]) for d in contraction.rhs)
            macs.append(Term(contraction.extra, out + summed, context))
            activations.append(Term(solution.program.avals[eqn.outs[0]].dtype.itemsize, out, context))

    visit(analysis.solution, lambda i: analysis.uses.eqns[i], ())
    return tuple(macs), tuple(activations)


def _worked(eqn: Eqn, bodies: Sequence[Solution]) -> Sequence[Solution]:
    """The programs that count: of a branch the largest; of a `while` loop, whose length nobody knows, one turn."""
    if eqn.name == "cond":
        return [max(bodies, key=_dense_macs)]
    return bodies


def _dense_macs(solution: Solution) -> int:
    total = 0
    for i, eqn in enumerate(solution.program.eqns):
        rule = lookup(eqn.name)
        if rule is not None and rule.contraction is not None:
            site = solution.site(i)
            contraction = rule.contraction(site)
            summed = [site.in_shapes[1][d] for d in contraction.rhs]
            total += math.prod([contraction.extra, *site.out_shapes[0], *summed])
        total += sum(map(_dense_macs, _worked(eqn, solution.bodies.get(i, ()))))
    return total


def _divisors(solution: Solution, program: Program) -> tuple[str, ...]:
    out = []
    for i, divisor in solution.divisors.items():
        names = sorted(set().union(*(labels(axis) for axis in divisor.axes)))
        if names:
            less = f" - {divisor.ddof}" if divisor.ddof else ""
            total = int(np.prod([axis.size for axis in divisor.axes]))
            out.append(f"{program.eqns[i].where}: {total}{less} follows {', '.join(names)}")
    for found in solution.bodies.values():
        for body in found:
            out += _divisors(body, body.program)
    return tuple(out)
