"""Where a function can be cut in depth: its head, what feeds it, and the boundaries of blocks before it.

    head = find_head(fn, graph, x)                       # which leaf makes the classes
    x_last = headless(fn, graph)(params, x)              # what feeds the head
    table = features(fn, graph)(params, x)               # {point: float[N, C]}, one forward pass
    short = truncate(fn, graph, "layer2_2", x)           # short(short.take(params), x): float[N, C]

A *point* is a value that everything between inputs and output passes: the exit of a droppable block (named as the
block), the entry of one where no other block ends (`before layer2_1`), what feeds the dense layers that follow the last
pool (`before dense0`), and what feeds the head (`before linear`). The insides of loops have none. Masks and positions
may pass a point by: they steer from the side (see blocks.py).

A truncated function is a function like any other: `trace` it with the leaves that it needs, to know what it costs or
to prune it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path

from treesurgeon.engine.analysis import Analysis
from treesurgeon.engine.errors import PlanError, StructureError
from treesurgeon.engine.flow import kernel_leaves, kernel_operand
from treesurgeon.engine.gating import gate_retraced
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import Operand, Program, named_leaves, path_name
from treesurgeon.engine.linear import linear
from treesurgeon.engine.masks import labels
from treesurgeon.engine.narrowing import GONE, without_gone
from treesurgeon.engine.refit import find_biases
from treesurgeon.engine.retrace import Retraced, Retracer
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.selects import Guard
from treesurgeon.engine.sites import leaf_axis, live_eqns
from treesurgeon.engine.splitting import needed, run
from treesurgeon.engine.stack import find_stack, signal_of


@dataclass(frozen=True)
class Head:
    """The contraction that makes the classes: the last one with a kernel.

    Attributes:
        kernel: the path of its kernel, a parameter leaf.
        inputs: the axes of that leaf that are summed over.
        classes: the axis of that leaf on which the classes stand.
        bias: the path of the vector that is added to the result and used nowhere else, if there is one.
        shared: whether the kernel is read elsewhere as well (a tied embedding).
    """

    kernel: str
    inputs: tuple[int, ...]
    classes: int
    bias: str | None
    shared: bool


def find_head(fn: Callable, graph: Graph, *args: Any, **kwargs: Any) -> Head:
    """Find the head of a function of the graph's parameters.

    Args:
        fn: the function; it returns an array whose last axis holds the classes.
        graph: the traced graph.
        *args: example arguments, `jax.ShapeDtypeStruct`s do.
        **kwargs: the same, by name.

    Raises:
        StructureError: there is no head, or there are several.
    """
    found, _ = Retracer(fn, graph)({}, args, kwargs)
    return _head(found).head


def headless(fn: Callable, graph: Graph) -> Callable:
    """The function without its head: `headless(fn, graph)(params, *args, **kwargs)` is what feeds the head.

    Raises:
        StructureError: on call, there is no head, or there are several; or the parameters do not fit.
    """
    retracer = Retracer(fn, graph)

    def short(params: Any, *args: Any, **kwargs: Any) -> Any:
        (value,) = _evaluate(retracer, params, args, kwargs, lambda found: [_head(found).value])
        return value

    return short


def points(fn: Callable, graph: Graph, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """The points of a function in order of execution; example arguments may be `jax.ShapeDtypeStruct`s."""
    return tuple(_points(Retracer(fn, graph)({}, args, kwargs)[0]))


def dense_stack(fn: Callable, graph: Graph, *args: Any, **kwargs: Any) -> tuple[str, tuple[str, ...]] | None:
    """The dense layers between the last pool and the head: the point before them, and the paths of their kernels.

    None where the head follows the pool at once, where nothing is pooled, or where something leads past them.

    Args:
        fn: the function.
        graph: the traced graph.
        *args: example arguments, `jax.ShapeDtypeStruct`s do.
        **kwargs: likewise.
    """
    found, _ = Retracer(fn, graph)({}, args, kwargs)
    stack = find_stack(found)
    there = {point.value: name for name, point in _points(found).items()}
    return (there[stack.value], stack.kernels) if stack and stack.value in there else None


def levels(fn: Callable, graph: Graph, *args: Any, **kwargs: Any) -> dict[str, int]:
    """How deep each parameter leaf stands in the dataflow, by path, whatever the leaves are called.

    Level 0 is what is needed to reach the first point, a later level what is needed to reach a later point and no
    earlier one; what no point needs, the head, is the last. Points that need no further leaves make no level.

    Args:
        fn: the function.
        graph: the traced graph.
        *args: example arguments, `jax.ShapeDtypeStruct`s do.
        **kwargs: likewise.
    """
    found, _ = Retracer(fn, graph)({}, args, kwargs)
    program = found.analysis.program
    steps = []
    for point in _points(found).values():
        steps.append(_read(program, point.value))
    first = [next((k for k, read in enumerate(steps) if v in read), len(steps)) for v in program.inputs]
    own = dict(zip(graph.leaves, first, strict=False))
    order = {step: level for level, step in enumerate(sorted(set(own.values())))}
    return {path: order[step] for path, step in own.items()}


def features(fn: Callable, graph: Graph) -> Callable:
    """What every point of a function holds: `features(fn, graph)(params, *args, **kwargs) -> {point: float[N, C]}`.

    One forward pass. Values are averaged over all their axes but the examples', which is the first, and the channels':
    the one on which a group stands, else the last. Points are in order of execution (`jax.jit` sorts dicts by name: see
    `points`); the last is what feeds the head, where the function has one.

    Raises:
        StructureError: on call, the parameters do not fit.
    """
    retracer = Retracer(fn, graph)

    def every(params: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        there: dict[str, _Point] = {}

        def wanted(found: Retraced) -> list[int]:
            there.update(_points(found))
            return [point.value for point in there.values()]

        values = _evaluate(retracer, params, args, kwargs, wanted)
        return {name: pooled(x, point.channels) for (name, point), x in zip(there.items(), values, strict=True)}

    return every


def gated_features(fn: Callable, graph: Graph, *, finite: bool = False) -> Callable:
    """The model under masks, with what its points hold: `(params, masks, *args, **kwargs) -> (outputs, table)`.

    The outputs are those of `gate(fn, graph, gradients=False)`, the table is that of `features`, zero where units are
    removed: for a plan's masks, what the truncated and narrowed function returns. One forward pass.

    Args:
        fn: the function.
        graph: the traced graph.
        finite: see `gate`.
    """
    there: dict[str, _Point] = {}

    def also(found: Retraced) -> list[int]:
        there.clear()
        there.update(_points(found))
        return [point.value for point in there.values()]

    gated = gate_retraced(Retracer(fn, graph), Guard(False, not finite), also)

    def both(params: Any, masks: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        out, values = gated(params, masks, *args, **kwargs)
        return out, {name: pooled(x, point.channels) for (name, point), x in zip(there.items(), values, strict=True)}

    return both


@dataclass(frozen=True, eq=False)
class Truncated:
    """A function up to a point: `short(params, *args, **kwargs)` is `float[N, C]`, see `truncate`.

    Attributes:
        at: the point.
        leaves: the paths of the parameters that are needed. `take` picks them from all.
    """

    at: str
    leaves: tuple[str, ...]
    retracer: Retracer

    def take(self, params: Any) -> Any:
        """The pytree without the leaves that are not needed."""
        kept = frozenset(self.leaves)
        return without_gone(tree_map_with_path(lambda path, x: x if path_name(path) in kept else GONE, params))

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The pooled features at the point; `params` may hold more leaves than are needed."""
        return self.with_updates(params, *args, **kwargs)[0]

    def with_updates(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The pooled features, and the new values, by path, of leaves that the function returns updated.

        These are running statistics, as `module.apply(…, mutable=[…])` returns them.
        """
        kept = frozenset(self.leaves)
        channels: tuple[int, ...] = ()
        new: dict[str, int] = {}

        def wanted(found: Retraced) -> list[int]:
            nonlocal channels
            point = _point(_points(found), self.at)
            channels = point.channels
            for leaf, v in found.analysis.mirrors.items():
                if found.paths[leaf] in kept and isinstance(v, int):
                    new[found.paths[leaf]] = v
            return [point.value, *new.values()]

        value, *values = _evaluate(self.retracer, params, args, kwargs, wanted)
        return pooled(value, channels), dict(zip(new, values, strict=True))


def truncate(fn: Callable, graph: Graph, at: str, *args: Any, **kwargs: Any) -> Truncated:
    """The function up to a point, for a head of your own.

        short = truncate(fn, graph, "layer2_2", x)
        few = short.take(params)
        engine.cost(engine.trace(short, few, x), engine.Plan()).macs

    Args:
        fn: the function.
        graph: the traced graph.
        at: a point, as `features` names them.
        *args: example arguments, `jax.ShapeDtypeStruct`s do: by them it is known which leaves are needed.
        **kwargs: the same, by name.

    Raises:
        PlanError: there is no such point.
    """
    retracer = Retracer(fn, graph)
    found, _ = retracer({}, args, kwargs)
    point, program = _point(_points(found), at), found.analysis.program
    read = _read(program, point.value)
    paths = tuple(path for path, v in zip(graph.leaves, program.inputs, strict=False) if v in read)
    return Truncated(at, paths, retracer)


def _read(program: Program, value: int) -> set[Operand]:
    """What is read on the way to a value, and the value itself."""
    return {v for i in needed(program, [value], set()) for v in program.eqns[i].ins} | {value}


def pooled(x: Any, channels: Sequence[int]) -> Any:
    """The mean over all axes but the first other one (the examples) and `channels`: `float[N, C]`."""
    x = jnp.moveaxis(x, channels, range(x.ndim - len(channels), x.ndim))
    rest = x.ndim - len(channels)
    x = x.mean(tuple(range(1, rest))) if rest > 1 else x
    return x.reshape(x.shape[0], -1)


class _Point(NamedTuple):
    value: int
    channels: tuple[int, ...]


class _Found(NamedTuple):
    head: Head
    value: int  # what feeds it
    channels: tuple[int, ...]
    module: str


def _evaluate(
    retracer: Retracer, params: Any, args: tuple, kwargs: dict, wanted: Callable[[Retraced], Sequence[int]]
) -> list[Any]:
    """Some values of a function; of the parameters only what they depend on has to be there."""
    graph, leaves = retracer.graph, named_leaves(params)
    found, call = retracer(leaves, args, kwargs)
    program, values = found.analysis.program, wanted(found)
    read = {v for i in needed(program, values, set()) for v in program.eqns[i].ins} | set(values)
    env = dict(zip(program.inputs[len(graph.leaves) :], call.arrays, strict=True))
    for (path, leaf), v in zip(graph.leaves.items(), program.inputs, strict=False):
        if v not in read:
            continue
        if path not in leaves or tuple(np.shape(leaves[path])) != tuple(leaf.shape):
            hint = "pass the leaves that were traced"
            if path in leaves:
                hint = "features of a pruned model are those of the narrowed function, traced again"
            got = f"shape {tuple(np.shape(leaves[path]))}" if path in leaves else "none"
            raise StructureError(f"{path}: expected shape {tuple(leaf.shape)}, got {got}; {hint}")
        env[v] = leaves[path]
    return run(program, env, values)


def _point(there: Mapping[str, _Point], at: str) -> _Point:
    if at not in there:
        raise PlanError(f"there is no point {at!r} to truncate at; this function has {', '.join(there) or 'none'}")
    return there[at]


def _points(found: Retraced) -> dict[str, _Point]:
    """The points of a function, in order of execution."""
    analysis = found.analysis
    named = {analysis.regions[b].exit: name for b, name in found.blocks.items()}
    for b, name in found.blocks.items():
        named.setdefault(analysis.regions[b].entry, f"before {name}")
    last: dict[int, _Found] = {}
    try:
        head = _head(found)
        named.setdefault(head.value, f"before {head.module}")
        last[head.value] = head
        if stack := find_stack(found):
            name = f"before {stack.module}"  # which the flattened value may have, where the layer is a block
            named = {v: other for v, other in named.items() if other != name}
            named.setdefault(stack.value, name)
    except StructureError:  # the function has no head: its blocks are there all the same
        pass
    solution, signal = analysis.solution, signal_of(analysis)
    out = {}
    for v in sorted(named.keys() & solution.makers.keys(), key=lambda v: solution.makers[v]):
        if analysis.program.avals[v].ndim < 2 or not _dominates(analysis, signal, v):
            continue
        held = [d for d, axis in enumerate(solution.of(v)) if labels(axis)]
        channels = (held[0],) if len(held) == 1 else (analysis.program.avals[v].ndim - 1,)
        out[named[v]] = _Point(v, last[v].channels if v in last else channels)
    return out


def _dominates(analysis: Analysis, signal: set[int], point: int) -> bool:
    """Whether every way of the signal to the output passes a value."""
    program, makers = analysis.program, analysis.solution.makers
    todo: list[Operand] = [v for i, v in enumerate(program.outputs) if i not in analysis.mirror_of]
    seen, met = set(), False
    while todo:
        v = todo.pop()
        if not isinstance(v, int) or v in seen or v not in signal:
            continue
        seen.add(v)
        if v == point:
            met = True
            continue
        ins = program.eqns[makers[v]].ins if v in makers else ()
        if not any(w in signal for w in ins):
            return False
        todo += ins
    return met


def _head(found: Retraced) -> _Found:
    analysis = found.analysis
    program, kinds, solution = analysis.program, analysis.kinds, analysis.solution
    outputs = [v for i, v in enumerate(program.outputs) if i not in analysis.mirror_of]
    last: list[int] = []
    read: set[Operand] = set()
    for i in reversed(live_eqns(analysis)):
        inner = any(v in read for v in program.eqns[i].outs)
        kernels = kernel_leaves(program, i, kinds)
        if kernels and not inner:
            last.append(i)
        if kernels or inner:
            read.update(program.eqns[i].ins)
    if len(outputs) != 1 or len(last) != 1:
        where = ", ".join(program.eqns[i].where for i in reversed(last)) or "none"
        raise StructureError(
            f"a head is the one contraction with parameters that comes last, before the one output; this function has "
            f"{len(outputs)} outputs and {len(last)} such contractions ({where}): pass a function that returns the "
            f"logits alone"
        )
    eqn = program.eqns[last[0]]
    kernel = kernel_operand(eqn, kinds)
    behind = sorted(kinds.leaves[kernel] or ()) if kernel is not None else []
    at = eqn.ins.index(kernel) if kernel is not None else 0
    as_matrix = linear(eqn, at, eqn.params, program.aval(kernel).shape) if kernel is not None else None
    if kernel is None or as_matrix is None or len(behind) != 1 or len(as_matrix.outputs) != 1:
        raise StructureError(
            f"the last contraction with parameters ({eqn.name}, {eqn.where}) does not make one axis of classes from "
            f"one kernel: there is no head to replace"
        )
    leaf = program.inputs[behind[0]]
    path, (classes,) = found.paths[behind[0]], as_matrix.outputs
    rule, site = lookup(eqn.name), solution.site(last[0])
    assert rule is not None
    assert rule.contraction is not None
    contraction = rule.contraction(site)
    sides = contraction.lhs, contraction.rhs
    axes = [leaf_axis(solution, kernel, leaf, d) for d in (classes, *sides[at])]
    size = program.aval(kernel).shape[classes]
    shape = program.aval(outputs[0]).shape
    if None in axes or not shape or shape[-1] != size:
        raise StructureError(
            f"{path} makes {size} outputs at {eqn.where}, and the function returns an array of shape {shape}: expected "
            f"these on its last axis"
        )
    biases = find_biases(analysis, {last[0]: (behind[0], at)})
    bias = found.paths[biases[last[0]].leaf] if last[0] in biases else None
    uses = [i for i in live_eqns(analysis) for v in program.eqns[i].ins if _comes_from(analysis, v, behind[0])]
    shared = any(i != last[0] and not _leads_to(analysis, i, kernel) for i in uses)
    value = eqn.ins[1 - at]
    assert isinstance(value, int)
    inputs = tuple(d for d in axes[1:] if d is not None)
    assert axes[0] is not None
    return _Found(Head(path, inputs, axes[0], bias, shared), value, tuple(sides[1 - at]), analysis.modules[behind[0]])


def _comes_from(analysis: Analysis, v: Operand, leaf: int) -> bool:
    """Whether a value is a parameter leaf, or made of it and other parameters alone."""
    return leaf in (analysis.kinds.of(v)[1] or ())


def _leads_to(analysis: Analysis, i: int, kernel: int) -> bool:
    """Whether an equation is one of those that turn a leaf into this kernel."""
    program, makers = analysis.program, analysis.solution.makers
    v: Operand = kernel
    while isinstance(v, int) and v in makers:
        if makers[v] == i:
            return True
        v = program.eqns[makers[v]].ins[0]
    return False
