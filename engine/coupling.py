"""`trace`: find the coupled groups and droppable blocks of a function of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.tree_util import tree_structure

from treesurgeon.engine.axes import Atom, Axis, Reason, atoms, fixed_reason, fresh, pin, resolve, same
from treesurgeon.engine.blocks import Region, common_prefix, find_regions
from treesurgeon.engine.errors import StructureError
from treesurgeon.engine.flow import Contexts, Kinds, Uses, kernel_operand, kinds, uses
from treesurgeon.engine.graph import Block, Graph, Group, Leaf, Member, Term, Tie
from treesurgeon.engine.jaxprs import Operand, Program, Traced, is_float, named_leaves, split_call, trace_call
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
    found = kinds(program, n)
    modules = _modules(program, paths, found)
    regions = find_regions(program, found, roots, lambda leaf: modules[leaf])
    used = uses(program, [(r.entry, r.exit) for r in regions], roots, mirrors)
    return Analysis(traced, solution, found, regions, used, mirrors, mirror_of, modules)


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
    for eqn in program.eqns:
        for v in eqn.ins:
            for leaf in (kinds.leaves[v] or ()) if isinstance(v, int) else ():
                if leaf not in scopes:
                    scopes[leaf] = eqn.scope
    out = []
    for i, path in enumerate(paths):
        *home, last = path.split("/")
        named = _within(home, scopes.get(i, ()))
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
    names = _name_groups(analysis, paths, leaf_axes)
    for atom, name in names.items():
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
    blocks, ties, number = _name_blocks(analysis, paths)
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
    return Graph(groups, blocks, pinned, ties, _divisors(analysis.solution, program), leaves, macs, activations, tree)


def _rename(contexts: Contexts | None, number: Mapping[int, str]) -> frozenset[frozenset[str]] | None:
    """Contexts over block names; blocks that were not kept as droppable are always there."""
    if contexts is None:
        return None
    return frozenset(frozenset(number[b] for b in context if b in number) for context in contexts)


def _name_groups(analysis: Analysis, paths: list[str], leaf_axes: Sequence[Axes]) -> dict[Atom, str]:
    """A name for every free atom that some leaf holds, in order of execution.

    The name is the module of the leaf that makes the units: the first kernel on whose output axis they stand, else
    the first leaf that holds them.
    """
    program, kinds_ = analysis.program, analysis.kinds
    base: dict[Atom, str] = {}

    def claim(axes: Iterable[Axis], leaf: int) -> None:
        for axis in axes:
            for atom in atoms(axis):
                base.setdefault(atom, analysis.modules[leaf] if "/" in paths[leaf] else paths[leaf])

    held = {atom for axes in leaf_axes for axis in axes for atom in atoms(axis)}
    for i, eqn in enumerate(program.eqns):
        kernel = kernel_operand(eqn, kinds_)
        rule = lookup(eqn.name)
        if kernel is None or rule is None or rule.contraction is None or analysis.uses.eqns[i] is None:
            continue
        behind = kinds_.leaves[kernel] or frozenset()
        contraction = rule.contraction(analysis.solution.site(i))
        kept = contraction.rhs_out if eqn.ins[1] == kernel else contraction.lhs_out
        claim((analysis.solution.of(kernel)[d] for d in sorted(kept)), min(behind))
    for i, eqn in enumerate(program.eqns):
        if analysis.uses.eqns[i] is not None:
            for v in eqn.ins:
                if isinstance(v, int) and kinds_.leaves[v]:
                    claim(analysis.solution.of(v), min(kinds_.leaves[v] or ()))
    for leaf, axes in enumerate(leaf_axes):
        claim(axes, leaf)
    ordered = [atom for atom in base if atom in held]
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
    analysis: Analysis, paths: Sequence[str]
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
    blocks = {}
    turns = region_turns(analysis.regions)
    for b, name in number.items():
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
    return blocks, {number[b]: tie for b, tie in ties.items() if tie is not None}, number


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
    """The multiply-accumulates and the output bytes of every live contraction, call bodies included."""
    macs: list[Term] = []
    activations: list[Term] = []

    def visit(solution: Solution, contexts: Callable[[int], Contexts | None]) -> None:
        for i, eqn in enumerate(solution.program.eqns):
            inside = contexts(i)
            if inside is None:
                continue
            if i in solution.bodies:
                visit(solution.bodies[i], lambda _, inside=inside: inside)
            rule = lookup(eqn.name)
            if rule is None or rule.contraction is None:
                continue
            site = solution.site(i)
            contraction = rule.contraction(site)
            context = _rename(inside, number) or frozenset()
            out = tuple(resolve(axis) for axis in site.outs[0])
            summed = tuple(resolve(site.ins[1][d]) for d in contraction.rhs)
            macs.append(Term(contraction.extra, out + summed, context))
            activations.append(Term(solution.program.avals[eqn.outs[0]].dtype.itemsize, out, context))

    visit(analysis.solution, lambda i: analysis.uses.eqns[i])
    return tuple(macs), tuple(activations)


def _divisors(solution: Solution, program: Program) -> tuple[str, ...]:
    out = []
    for i, divisor in solution.divisors.items():
        names = sorted(set().union(*(labels(axis) for axis in divisor.axes)))
        if names:
            less = f" - {divisor.ddof}" if divisor.ddof else ""
            total = int(np.prod([axis.size for axis in divisor.axes]))
            out.append(f"{program.eqns[i].where}: {total}{less} follows {', '.join(names)}")
    for body in solution.bodies.values():
        out += _divisors(body, body.program)
    return tuple(out)
