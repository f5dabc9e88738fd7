"""`cut` and `narrow`: make a plan physical.

`cut` slices the leaves. `narrow` runs the function's program at the small shapes: each primitive is bound again with
the parameters that hold sizes recomputed, constants are sliced where they meet a narrow operand, and a dropped block's
exit is its entry. Only what the outputs need is run, so dropped parameters are never read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.tree_util import tree_map_with_path, tree_unflatten

from treesurgeon.engine.axes import Axis
from treesurgeon.engine.calls import rebuild
from treesurgeon.engine.constants import Constants
from treesurgeon.engine.errors import NarrowError, StructureError
from treesurgeon.engine.graph import Graph, Plan
from treesurgeon.engine.jaxprs import (
    Eqn,
    Literal,
    Operand,
    bind,
    is_array,
    is_key,
    named_leaves,
    path_name,
    standing_at,
)
from treesurgeon.engine.masks import axis_count, axis_mask
from treesurgeon.engine.retrace import Retraced, Retracer
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.base import Axes, Kept
from treesurgeon.engine.solve import Divisor, Solution

GONE = object()
Adapt: TypeAlias = Callable[[int, Mapping[str, Any], list[Any]], list[Any]]  # equation number, parameters, operands


def cut(params: Any, graph: Graph, plan: Plan) -> Any:
    """Slice a pytree of parameters down to what a plan keeps.

    Leaves whose every use lies in dropped blocks are removed: their keys leave mappings (and mappings that this
    empties), elsewhere `None` takes their place. `jax.ShapeDtypeStruct` leaves give structs.

    Args:
        params: the dense parameters, or any pytree of their structure and shapes (an optimiser's moments).
        graph: the traced graph.
        plan: what to keep.

    Raises:
        PlanError: the plan does not fit the graph.
        StructureError: the pytree is not the one that was traced.
    """
    indices = graph.indices(graph.masks(plan))
    check_leaves(params, {path: leaf.shape for path, leaf in graph.leaves.items()}, "cut")

    def one(path: Any, leaf: Any) -> Any:
        kept = indices[path_name(path)]
        return GONE if kept is None else _take(leaf, kept)

    return without_gone(tree_map_with_path(one, params))


def _take(leaf: Any, kept: Sequence[np.ndarray]) -> Any:
    shape = tuple(len(k) for k in kept)
    if shape == np.shape(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    if _is_on_one_device(leaf):
        # On the host: on a device each shape would be a program to compile, which takes longer than all the rest.
        return jax.device_put(_take(np.asarray(leaf), kept), leaf.sharding if leaf.committed else None)
    for d, k in enumerate(kept):
        if len(k) != leaf.shape[d]:
            leaf = leaf.take(k, axis=d)
    return leaf


def _is_on_one_device(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return False
    return not is_key(leaf) and leaf.is_fully_addressable and len(leaf.sharding.device_set) == 1


def without_gone(tree: Any) -> Any:
    """The pytree without the leaves marked GONE."""
    if isinstance(tree, Mapping):
        rest = {k: without_gone(v) for k, v in tree.items() if v is not GONE}
        rest = {k: v for k, v in rest.items() if not (isinstance(v, Mapping) and not v and tree[k])}
        if isinstance(tree, defaultdict):
            return defaultdict(tree.default_factory, rest)
        return rest if type(tree) is dict else type(tree)(rest)  # pyright: ignore[reportCallIssue]
    return jax.tree.map(
        lambda x: without_gone(x) if isinstance(x, Mapping) else None if x is GONE else x,
        tree,
        is_leaf=lambda x: x is GONE or isinstance(x, Mapping),
    )


def check_leaves(params: Any, shapes: Mapping[str, tuple[int, ...] | None], verb: str) -> dict[str, Any]:
    """The leaves of `params` by path, after checking that they are those of `shapes` (None: must not be there).

    Raises:
        StructureError: lists what is missing, unexpected or of another shape.
    """
    leaves = {path: x if is_array(x) else jnp.asarray(np.asarray(x)) for path, x in named_leaves(params).items()}
    wrong = []
    for path, shape in shapes.items():
        if shape is None:
            continue
        if path not in leaves:
            wrong.append(f"{path}: expected {shape}, missing")
        elif tuple(np.shape(leaves[path])) != tuple(shape):
            wrong.append(f"{path}: expected {shape}, got {tuple(np.shape(leaves[path]))}")
    wrong += [f"{path}: not expected" for path in leaves if shapes.get(path) is None]
    if wrong:
        more = f"\n  … and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        hint = {
            "cut": "pass the pytree that was traced",
            "narrow": "pass what cut(params, graph, plan) returns for the same plan",
            "gate": "pass the dense pytree that was traced",
        }[verb]
        raise StructureError(f"{verb}: the parameters do not fit; {hint}\n  " + "\n  ".join(wrong[:8]) + more)
    return leaves


def narrow(fn: Callable, graph: Graph, plan: Plan) -> Callable:
    """The pruned model as a function: `narrow(fn, graph, plan)(cut(params, graph, plan), *args, **kwargs)`.

    `fn` is the traced function or any other primal function of the same parameters: the loss, training mode, another
    method. Take derivatives outside: `jax.grad(narrow(loss, graph, plan))`. Outputs that mirror parameters (new batch
    statistics) come out narrow, those of removed leaves do not come out. Inputs that were free in `trace` may come
    whole or at what the plan keeps of them.

    Args:
        fn: a function of the dense parameters.
        graph: the traced graph.
        plan: what to keep.

    Raises:
        PlanError: the plan does not fit the graph.
        StructureError: on call, the parameters are not what `cut` gives for this plan.
        NarrowError: on call, `fn` reads pruned parameters in a way that the traced function did not.
    """
    masks = graph.masks(plan)
    units, shapes = graph.positions(masks), graph.shapes(masks)
    retracer = Retracer(fn, graph, units)

    def narrowed(params: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = check_leaves(params, shapes, "narrow")
        found, call = retracer(leaves, args, kwargs)
        _check_conflicts(found, graph, units)
        found.require(graph, plan.drop)
        inputs = [leaves.get(path, GONE) for path in graph.leaves]
        outs = Narrowed(units).main(found, [*inputs, *call.arrays], masks["blocks"])
        return without_gone(tree_unflatten(found.analysis.traced.out_tree, outs))

    return narrowed


def _check_conflicts(found: Retraced, graph: Graph, units: Mapping[str, np.ndarray]) -> None:
    for name, axis in found.conflicts.items():
        mask = axis_mask(axis, units)
        if (np.ones(axis.size, bool) if mask is None else mask).tolist() != units[name].tolist():
            raise NarrowError(
                f"{found.conflict(graph, name)}, so its units cannot go one by one: trace this function instead, or "
                f"keep the whole group"
            )


class Narrowed:
    """Runs a solved program on narrow values."""

    def __init__(self, units: Mapping[str, np.ndarray]):
        self.units = units
        self.cache: dict[int, tuple[Axis, np.ndarray | None, Any]] = {}
        self.kept = Kept(lambda axis: self._look(axis)[2], lambda axis: self._look(axis)[1])

    def _look(self, axis: Axis) -> tuple[Axis, np.ndarray | None, Any]:
        if id(axis) not in self.cache:
            mask = axis_mask(axis, self.units)
            if mask is not None and mask.all():
                mask = None
            count = axis_count(axis, self.units)
            self.cache[id(axis)] = (axis, mask, int(count) if isinstance(count, np.integer) else count)
        return self.cache[id(axis)]

    def whole(self, axes: Axes) -> bool:
        """Whether nothing of these axes is removed."""
        return all(self.kept.mask(axis) is None for axis in axes)

    def slim(self, value: Any, axes: Axes) -> Any:
        """A value at the kept positions of its axes, those that are narrow already left alone."""
        for d, axis in enumerate(axes):
            mask = self.kept.mask(axis)
            if mask is not None and value.shape[d] == len(mask):
                value = jnp.take(value, np.flatnonzero(mask), axis=d)
        return value

    def main(
        self, found: Retraced, inputs: list[Any], blocks: Mapping[str, Any], adapt: Adapt | None = None
    ) -> list[Any]:
        """Run a whole function; blocks that are not kept pass their entry on, `adapt` may change operands."""
        analysis = found.analysis
        program, regions = analysis.program, analysis.regions
        dropped = [regions[b] for b, name in found.blocks.items() if not blocks[name]]
        leaf_gone = [value is GONE for value in inputs]
        for k in range(len(analysis.modules), len(inputs)):  # free inputs may come whole
            inputs[k] = self.slim(inputs[k], analysis.solution.axes[program.inputs[k]])
        wanted = [
            GONE if (leaf := analysis.mirror_of.get(i)) is not None and leaf_gone[leaf] else v
            for i, v in enumerate(program.outputs)
        ]
        skip = {region.exit: region.entry for region in dropped}
        return self.run(analysis.solution, inputs, wanted, skip, adapt)

    def run(
        self,
        solution: Solution,
        inputs: Sequence[Any],
        wanted: Sequence[Any] | None = None,
        skip: Mapping[int, int] | None = None,
        adapt: Adapt | None = None,
    ) -> list[Any]:
        """Run a program on narrow inputs; a value in `skip` is replaced by another one of its shape."""
        program = solution.program
        wanted = program.outputs if wanted is None else wanted
        skip = skip or {}
        env: dict[int, Any] = dict(zip(program.inputs, inputs, strict=True))
        needed = self._needed(solution, wanted, skip)
        tables = solution.tables()

        def read(v: Operand, axes: Axes) -> Any:
            if isinstance(v, Literal):
                return v.value
            return self._table(tables, v, axes) if solution.constant[v] else env[v]

        for i, eqn in enumerate(program.eqns):
            if i in needed:
                axes = solution.operands(i)
                with standing_at(eqn):
                    outs = self.apply(i, eqn, solution, [read(v, axes[k]) for k, v in enumerate(eqn.ins)], adapt)
                env.update(zip(eqn.outs, outs, strict=True))
            for v in eqn.outs:
                if v in skip and skip[v] in env:  # else nothing reads it: a dropped block around it
                    env[v] = self._pass_on(env[skip[v]], solution.axes[skip[v]], solution.axes[v])
        return [v if v is GONE else read(v, solution.of(v)) for v in wanted]

    def _table(self, tables: Constants, v: int, axes: Axes) -> Any:
        """A constant at the kept positions of the axes of this use."""
        if self.whole(axes):
            return tables.traced(v)
        kept = [self.kept.mask(axis) for axis in axes]
        known = tables.concrete(v)
        if known is None or is_key(known):
            return self.slim(tables.traced(v), axes)
        for d, mask in enumerate(kept):
            if mask is not None:
                known = np.compress(mask, known, axis=d)
        return known

    def _needed(self, solution: Solution, wanted: Sequence[Any], skip: Mapping[int, int]) -> set[int]:
        eqns = solution.program.eqns
        values = {v for v in wanted if isinstance(v, int)}
        out = set()
        for i in range(len(eqns) - 1, -1, -1):
            if solution.fixed(i):
                continue  # made where it is read
            passed = [v for v in eqns[i].outs if v in skip and v in values]
            if passed:
                values.update(skip[v] for v in passed)
                values.difference_update(passed)
            if eqns[i].effects or any(v in values for v in eqns[i].outs):
                out.add(i)
                values.update(v for v in eqns[i].ins if isinstance(v, int))
        return out

    def _pass_on(self, value: Any, entry: Axes, exit_: Axes) -> Any:
        """A dropped block's entry as its exit: the positions that the exit keeps."""
        for d, (a, b) in enumerate(zip(entry, exit_, strict=True)):
            have, want = self.kept.mask(a), self.kept.mask(b)
            if have is want or (have is not None and want is not None and (have == want).all()):
                continue
            if want is None or (have is not None and (want & ~have).any()):
                raise NarrowError("a dropped block's exit keeps units that its entry removed: build plans with Plan")
            places = np.flatnonzero(want if have is None else want[have])
            value = jnp.take(value, places, axis=d)
        return value

    def apply(self, i: int, eqn: Eqn, solution: Solution, values: list[Any], adapt: Adapt | None = None) -> list[Any]:
        """One equation at the small sizes."""
        if eqn.bodies:
            if self._untouched(i, solution):
                return bind(eqn, eqn.params, values)
            length = self.kept.size(solution.lengths[i]) if i in solution.lengths else None

            def run(_: Any, body: Solution, xs: Sequence[Any]) -> list[Any]:
                return self.run(body, xs)

            return rebuild(eqn, solution.bodies[i], values, run, (), length, solution.rules.get(i))
        site = solution.site(i)
        rule = lookup(eqn.name)
        if rule is None:
            if not all(self.whole(axes) for axes in (*site.ins, *site.outs)):
                raise NarrowError(
                    f"{eqn.where}: the primitive `{eqn.name}` has no rule and meets a pruned axis: "
                    f"trace this function instead, or register a rule"
                )
            return bind(eqn, eqn.params, values)
        if rule.positional:
            wide = bind(eqn, eqn.params, values)
            return [self.slim(value, axes) for value, axes in zip(wide, site.outs, strict=True)]
        if i in solution.divisors:
            divisor = solution.divisors[i]
            count = self._divisor(eqn, solution, divisor, site.ins[divisor.operand])
            if divisor.inverse:  # divided, since half of a sum would be no mean (see solve.py) when traced again
                return [lax.div(*jnp.broadcast_arrays(values[1 - divisor.operand], count))]
            values[divisor.operand] = count
        if i in solution.untied and not self.whole(solution.untied[i][1]):
            # Hidden from whoever traces the narrow function again: it may be how many positions are summed now.
            at, _ = solution.untied[i]
            values[at] = lax.optimization_barrier(jnp.asarray(values[at], solution.program.aval(eqn.ins[at]).dtype))
        if rule.renumber is not None:
            values = rule.renumber(site, self.kept, values)
        params = eqn.params if rule.resize is None else {**eqn.params, **rule.resize(site, self.kept)}
        if adapt is not None:
            values = adapt(i, params, values)
        return bind(eqn, params, values)

    def _divisor(self, eqn: Eqn, solution: Solution, divisor: Divisor, axes: Axes) -> Any:
        operand = eqn.ins[divisor.operand]
        count = 1
        for axis in divisor.axes:
            count *= self.kept.size(axis)
        aval = solution.program.aval(operand)
        scalar = np.asarray(count - divisor.ddof, aval.dtype)
        if not aval.shape:
            return scalar
        return lax.full(tuple(self.kept.size(axis) for axis in axes), scalar)

    def _untouched(self, i: int, solution: Solution) -> bool:
        """Whether equation `i` and the programs inside it meet nothing narrow, so that it can be bound as it is."""
        axes = [*solution.operands(i), *(solution.axes[v] for v in solution.program.eqns[i].outs)]
        return all(map(self.whole, axes)) and all(self._all_whole(body) for body in solution.bodies[i])

    def _all_whole(self, body: Solution) -> bool:
        inner = [solution for found in body.bodies.values() for solution in found]
        return all(map(self.whole, [*body.axes, *body.uses.values()])) and all(map(self._all_whole, inner))
