"""A function solved: its axes, what depends on what, its blocks and the contexts they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from treesurgeon.engine.axes import Atom, Reason, pin, resolve
from treesurgeon.engine.blocks import Region, find_regions
from treesurgeon.engine.calling import Traced
from treesurgeon.engine.flow import Kinds, Uses, main_kinds, straddled, uses
from treesurgeon.engine.jaxprs import Operand, Program, live, wiring
from treesurgeon.engine.rules.base import Axes, fixed_axes
from treesurgeon.engine.solve import Solution, join, solve


@dataclass(frozen=True, eq=False)
class Solved:
    """A traced function and its axes, which may still be pinned and unified by hand.

    `mirrors` are the outputs that return updated parameters, by leaf number; `roots` are all the others.
    """

    traced: Traced
    paths: Sequence[str]
    solution: Solution
    mirrors: Mapping[int, Operand]
    mirror_of: Mapping[int, int]
    roots: Sequence[Operand]

    @property
    def program(self) -> Program:
        """The program."""
        return self.traced.program

    @property
    def unused(self) -> list[int]:
        """The numbers of the leaves that nothing reads."""
        used = uses(self.program, (), self.roots, self.mirrors).values
        return [i for i, v in enumerate(self.program.inputs[: len(self.paths)]) if used[v] is None]


@dataclass(frozen=True, eq=False)
class Analysis(Solved):
    """A traced function, solved: its axes, what depends on what, its blocks and the contexts they make."""

    kinds: Kinds
    regions: list[Region]
    uses: Uses
    modules: Sequence[str]


def solve_axes(
    traced: Traced,
    paths: Sequence[str],
    leaf_axes: Sequence[Axes],
    input_names: Sequence[str],
    free: Mapping[str, Axes],
) -> Solved:
    """Find the axes of a traced function whose first inputs are the parameter leaves `paths` with axes `leaf_axes`.

    The other inputs are pinned, except those that `free` gives axes.
    """
    program = traced.program
    n = len(paths)
    given = [
        free.get(name) or fixed_axes(program.avals[v].shape, Reason(f"an axis of the input {name}"))
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
    return Solved(traced, paths, solution, mirrors, mirror_of, roots)


def analyse(solved: Solved) -> Analysis:
    """Find blocks and contexts, after which the axes must stay as they are: which loops have blocks is up to them."""
    program, solution, roots = solved.program, solved.solution, solved.roots
    _pin_steps(solution, program, live(program, roots), roots)
    found = main_kinds(program, len(solved.paths))
    modules = _modules(program, solved.paths, found)
    stepping = {
        i
        for i, along in solution.lengths.items()
        if isinstance(resolve(along), Atom)
        and (wires := wiring(program.eqns[i])).carried
        and any(found.of(program.eqns[i].ins[k])[1] for k in wires.mapped_ins)
    }
    regions = find_regions(program, found, roots, lambda leaf: modules[leaf], stepping)
    while crossed := straddled(program, [(r.entry, r.exit) for r in regions], roots, solved.mirrors):
        regions = [region for b, region in enumerate(regions) if b not in crossed]
    used = uses(program, [(r.entry, r.exit) for r in regions], roots, solved.mirrors)
    return Analysis(**vars(solved), kinds=found, regions=regions, uses=used, modules=modules)


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
    taken: set[int] = set()
    for i, (path, v) in enumerate(zip(traced.out_paths, traced.program.outputs, strict=True)):
        parts = path.split("/")
        for k in range(len(parts)):
            leaf = leaf_of.get("/".join(parts[k:]))
            if leaf is not None and leaf not in taken:
                if traced.program.aval(v).shape == traced.program.avals[traced.program.inputs[leaf]].shape:
                    out[i] = leaf
                    taken.add(leaf)
                break
    return out


def _modules(program: Program, paths: Sequence[str], kinds: Kinds) -> list[str]:
    """The module path of each leaf, read off the scope in which it is first used; else the leaf's parent path."""
    scopes: dict[int, tuple[str, ...]] = {}

    def visit(program: Program, kinds: Kinds, outer: tuple[str, ...]) -> None:
        inputs = set(program.inputs)  # what is computed from a leaf is read after the leaf
        for i, eqn in enumerate(program.eqns):
            scope = (*outer, *eqn.scope)
            for body, inner in zip(eqn.bodies, kinds.bodies.get(i, ()), strict=True):
                visit(body, inner, scope)
            for v in eqn.ins:
                for leaf in (kinds.leaves[v] or ()) if isinstance(v, int) and v in inputs else ():
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
    """The longest tail of `home` that stands in `scope`; Haiku's `~`, "made in the constructor", stands in none."""
    scope = tuple(part for part in scope if part != "~")
    for k in range(len(home)):
        tail = tuple(part for part in home[k:] if part != "~")
        if tail and any(scope[s : s + len(tail)] == tail for s in range(len(scope) - len(tail) + 1)):
            return home[k:]
    return ()
