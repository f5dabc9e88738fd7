"""`trace`: find the coupled groups and droppable blocks of a function of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from jax.tree_util import tree_structure

from treesurgeon.engine.aligning import unify
from treesurgeon.engine.analysis import Analysis, analyse, solve_axes
from treesurgeon.engine.axes import Axis, Reason, atoms, fixed_reason, fresh, pin, resolve
from treesurgeon.engine.calling import Call, split_call, trace_call
from treesurgeon.engine.errors import StructureError
from treesurgeon.engine.flow import Contexts
from treesurgeon.engine.graph import Branches, Graph, Group, Leaf, Member, Term, Work
from treesurgeon.engine.jaxprs import Program, is_float, named_leaves
from treesurgeon.engine.masks import labels, unit_index
from treesurgeon.engine.naming import name_blocks, name_groups, stacks_of
from treesurgeon.engine.producers import made_axes
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.base import Axes
from treesurgeon.engine.solve import Solution


def trace(
    fn: Callable,
    params: Any,
    *args: Any,
    free_outputs: Iterable[str] = (),
    free_inputs: Iterable[str] = (),
    pin_axes: Iterable[str] = (),
    couple: Iterable[tuple[str, str]] = (),
    **kwargs: Any,
) -> Graph:
    """Find the coupled groups and droppable blocks of `fn(params, *args, **kwargs)`.

    Args:
        fn: a function of a pytree of parameters; what it returns may be any pytree.
        params: the parameters; `jax.ShapeDtypeStruct` leaves do.
        *args: example arguments of `fn`, likewise. Axes of inputs are pinned, and so are those of outputs except
            outputs that mirror a leaf's path and shape (new batch statistics).
        **kwargs: the same, by name.
        free_outputs: paths (or first parts of paths) of outputs whose axes may shrink as well; "" frees all.
        free_inputs: the same for array arguments: `args[0]`, the name of a keyword argument, or a path inside one
            (`args[0]/image`). Where parameters hold positions of such an input, these are a group: input features to
            select. `narrow` and `gate` still take the whole input; `narrow` takes a narrow one as well.
        pin_axes: axes of parameters that must stay, as `path[axis]`, or `path` for all axes of a leaf.
        couple: pairs of such axes, of one size, whose units must go together.

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
    inputs = _free_inputs(tuple(free_inputs), call)
    solved = solve_axes(traced, paths, leaf_axes, call.names, inputs)
    free = _free_outputs(free_outputs, traced.out_paths)
    for i, (path, v) in enumerate(zip(traced.out_paths, program.outputs, strict=True)):
        if i in solved.mirror_of or _named(path, free):
            continue
        for axis in solved.solution.of(v):
            pin(axis, Reason(f"an axis of the output {path}" if path else "an axis of the output"))
    for i in solved.unused:
        for axis in leaf_axes[i]:
            pin(axis, Reason(f"{paths[i]} is not used"))
    known = {f"{path}[{d}]": axis for path, axes in zip(paths, leaf_axes, strict=True) for d, axis in enumerate(axes)}
    known_leaves = dict(zip(paths, leaf_axes, strict=True))
    for name in pin_axes:
        for axis in known_leaves[name] if name in known_leaves else (_axis_named(name, known, "pin_axes"),):
            pin(axis, Reason("pinned by the caller of trace"))
    for a, b in couple:
        first, second = _axis_named(a, known, "couple"), _axis_named(b, known, "couple")
        if first.size != second.size:
            raise StructureError(
                f"couple: {a} has {first.size} positions and {b} has {second.size}: they cannot be one"
            )
        unify(first, second, Reason(f"{a} and {b} were coupled by hand, and split differently"))
    return _build(analyse(solved), paths, leaf_axes, inputs, tree_structure(params))


def _named(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the path, its first part, or "" (all paths)."""
    return any(path == name or path.startswith(f"{name}/") or not name for name in names)


def _free_outputs(names: Iterable[str], paths: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise StructureError(f"free_outputs takes names, got the string {names!r}: pass [{names!r}]")
    names = tuple(names)
    for name in names:
        if not any(_named(path, [name]) for path in paths):
            outputs = ", ".join(path or "''" for path in paths)
            raise StructureError(
                f"free_outputs names {name!r}; the outputs are {outputs}: pass some of these, or '' for all"
            )
    return names


def _free_inputs(names: Sequence[str], call: Call) -> dict[str, Axes]:
    for name in names:
        if not any(_named(path, [name]) for path in call.names):
            raise StructureError(f"free_inputs names {name!r}; the array arguments are {', '.join(call.names)}")
    pairs = zip(call.names, call.arrays, strict=True)
    return {path: tuple(map(fresh, x.shape)) for path, x in pairs if _named(path, names)}


def _axis_named(name: str, known: Mapping[str, Axis], where: str) -> Axis:
    if name not in known:
        close = get_close_matches(name, known, 3) or list(known)[:3]
        raise StructureError(f"{where} names {name!r}, which is no axis; did you mean {' or '.join(map(repr, close))}?")
    return known[name]


def _build(
    analysis: Analysis, paths: list[str], leaf_axes: Sequence[Axes], inputs: Mapping[str, Axes], tree: Any
) -> Graph:
    program = analysis.program
    stacks = stacks_of(analysis, leaf_axes)
    names = name_groups(analysis, paths, leaf_axes, inputs, stacks)
    for atom, name in [*names.items(), *((atom, stack.label) for atom, stack in stacks.items())]:
        atom.label = name
    for axis in (axis for axes in inputs.values() for axis in axes):
        for atom in atoms(axis):
            if atom.label is None:
                pin(atom, Reason("no parameter holds these positions"))
    frozen = [tuple(resolve(axis) for axis in axes) for axes in leaf_axes]
    frozen_inputs = {name: tuple(map(resolve, axes)) for name, axes in inputs.items()}
    members: dict[str, list[Member]] = {name: [] for name in names.values()}
    made = made_axes(analysis, leaf_axes)
    for leaf, (path, axes) in enumerate(zip(paths, frozen, strict=True)):
        for d, axis in enumerate(axes):
            for name in labels(axis) & members.keys():
                members[name].append(Member(path, d, unit_index(axis, name), (leaf, d) in made))
    groups = {name: Group(name, atom.size, tuple(members[name])) for atom, name in names.items()}
    blocks, ties, number = name_blocks(analysis, paths, list(stacks.values()))
    contexts = [_rename(analysis.uses.values[v], number) for v in program.inputs[: len(paths)]]
    has_collections = any(path.startswith("params/") for path in paths)
    leaves = {}
    pinned = {}
    for path, axes, v, context in zip(paths, frozen, program.inputs, contexts, strict=False):
        aval = program.avals[v]
        trainable = is_float(aval) and (path.startswith("params/") or not has_collections)
        leaves[path] = Leaf(path, aval.shape, aval.dtype, axes, trainable, context)
    for path, axes in [*zip(paths, frozen, strict=True), *frozen_inputs.items()]:
        for d, axis in enumerate(axes):
            if not labels(axis) and axis.size not in (0, 1):
                pinned[f"{path}[{d}]"] = fixed_reason(axis) or Reason("nothing reads it unit by unit")
    macs, activations = _work(analysis, number)
    divisors = _divisors(analysis.solution, program)
    steps = {stack.label: stack.blocks for stack in stacks.values()}
    met = _meetings(analysis.solution, lambda i: analysis.uses.eqns[i] is not None)
    meetings = {name: tuple(dict.fromkeys(met[name])) for name in groups if name in met}
    return Graph(
        groups, blocks, pinned, ties, divisors, leaves, macs, activations, tree, steps, meetings, frozen_inputs
    )


def _meetings(solution: Solution, alive: Callable[[int], bool]) -> dict[str, list[str]]:
    """The equations at which several operands hold units of a group, by group."""
    out: dict[str, list[str]] = {}
    for i, eqn in enumerate(solution.program.eqns):
        if not alive(i) or solution.fixed(i):
            continue
        held = [set().union(*map(labels, axes)) for axes in solution.operands(i) if axes]
        seen: set[str] = set()
        for names in held:
            for name in sorted(names & seen):
                scope = f" in {'/'.join(eqn.scope)}" if eqn.scope else ""
                out.setdefault(name, []).append(f"`{eqn.name}` ({eqn.where}){scope}")
            seen |= names
        for body in solution.bodies.get(i, ()):
            for name, lines in _meetings(body, lambda _: True).items():
                out.setdefault(name, []).extend(lines)
    return out


def _rename(contexts: Contexts | None, number: Mapping[int, str]) -> frozenset[frozenset[str]] | None:
    """Contexts over block names; blocks that were not kept as droppable are always there."""
    if contexts is None:
        return None
    return frozenset(frozenset(number[b] for b in context if b in number) for context in contexts)


def _work(analysis: Analysis, number: Mapping[int, str]) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
    """The multiply-accumulates and the output bytes of every live contraction, loops and branches included.

    Of a `while` loop, whose length nobody knows, it is one turn; of branches it is the largest.
    """

    def visit(solution: Solution, contexts: Callable[[int], Contexts | None], around: Axes) -> tuple[list, list]:
        macs: list[Work] = []
        activations: list[Work] = []
        for i, eqn in enumerate(solution.program.eqns):
            inside = contexts(i)
            if inside is None or solution.fixed(i):
                continue
            if i in solution.bodies:
                length = (solution.lengths[i],) if i in solution.lengths else ()
                turn = (*around, *map(resolve, length))
                found = [visit(body, lambda _, inside=inside: inside, turn) for body in solution.bodies[i]]
                for mine, his in zip((macs, activations), zip(*found, strict=True), strict=True):
                    if eqn.name == "cond":
                        mine.append(Branches(tuple(map(tuple, his))))
                    else:
                        mine += [work for body in his for work in body]
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
        return macs, activations

    macs, activations = visit(analysis.solution, lambda i: analysis.uses.eqns[i], ())
    return tuple(macs), tuple(activations)


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
