"""Trace a function again for a call at hand, against a graph that is known: what `narrow` and `gate` start from.

The graph's atoms come in as they are, so solving only finds the axes of the new function's own values. Where the new
function couples or splits groups in a way that the traced one did not, the atoms no longer say what the graph says;
`Retraced.conflicts` lists those groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.tree_util import tree_unflatten

from treesurgeon.engine.analysis import Analysis, analyse, solve_axes
from treesurgeon.engine.axes import (
    Atom,
    Axis,
    Fixed,
    Prod,
    Reason,
    Shuffled,
    Sum,
    fixed_reason,
    product,
    resolve,
    shuffled,
    total,
)
from treesurgeon.engine.calling import Call, concrete, split_call, trace_call
from treesurgeon.engine.errors import NarrowError
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import struct
from treesurgeon.engine.masks import axis_count, labels
from treesurgeon.engine.naming import region_turns
from treesurgeon.engine.sites import Site, find_sites


@dataclass(frozen=True, eq=False)
class Retraced:
    """A solved function of a graph's parameters, the leaves at `paths`.

    `blocks` names those of its regions that are blocks of the graph; `conflicts` are groups that it splits otherwise.
    """

    analysis: Analysis
    paths: Sequence[str]
    blocks: Mapping[int, str]
    conflicts: Mapping[str, Axis]

    @cached_property
    def sites(self) -> dict[int, list[Site]]:
        """Where the function's contractions read groups, see sites.py."""
        return find_sites(self.analysis, self.paths)

    def conflict(self, graph: Graph, name: str) -> str:
        """What is wrong with a group of `conflicts`, in words."""
        why = fixed_reason(self.conflicts[name])
        text = f"this function reads group {name!r} in a way that the traced function did not"
        text += f" ({why})" if why else ""
        taken = [given for given, axes in graph.inputs.items() if any(name in labels(axis) for axis in axes)]
        return f"{text}; it takes input features that the traced function takes as {taken[0]}" if taken else text

    def require(self, graph: Graph, names: Collection[str]) -> None:
        """Check that dropping these blocks of the graph means the same in this function.

        Raises:
            NarrowError: the function reads parameters of one of them, and not (or not only) inside such a block.
        """
        own, values = set(self.blocks.values()), self.analysis.uses.values
        for leaf, v in zip(graph.leaves.values(), self.analysis.program.inputs, strict=False):
            traced = [context & set(names) for context in leaf.contexts or ()]
            for context in values[v] or ():
                here = {self.blocks[b] for b in context if b in self.blocks}
                if traced and not any(inside <= here for inside in traced):
                    block = sorted(min(traced, key=sorted) - here)[0]
                    raise NarrowError(
                        f"this function reads {leaf.path} outside of the block {block!r}, which the traced function "
                        f"did not: trace this function instead, or keep the block"
                    )
        read = {path for path, v in zip(graph.leaves, self.analysis.program.inputs, strict=False) if values[v]}
        for name in sorted(set(names) - own):
            if not read.isdisjoint(graph.blocks[name].kernels):
                raise NarrowError(f"the block {name!r} is not a block of this function: trace this function instead")


# Settings of JAX, also by `with`, that what is traced depends on.
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)


class Retracer:
    """Retraces a function once for every shape and dtype it is called at.

    With `units` (a plan's), free inputs may come whole or at what the plan keeps of them.
    """

    def __init__(self, fn: Callable, graph: Graph, units: Mapping[str, Any] | None = None):
        self.fn, self.graph, self.units = fn, graph, units or {}
        self.known: dict[Any, Retraced] = {}

    def __call__(self, leaves: Mapping[str, Any], args: tuple, kwargs: dict) -> tuple[Retraced, Call]:
        """The solved program for these arguments and parameter leaves, whose shapes are the graph's."""
        call = split_call(args, kwargs)
        structs = _structs(self.graph, leaves)
        settings = *(getattr(jax.config, name) for name in SETTINGS), jax.sharding.get_abstract_mesh()
        key = None if call.key is None else (call.key, structs, *settings)
        if key in self.known:
            return self.known[key], call
        found = _retrace(self.fn, self.graph, structs, call, self.units)
        if key is not None and concrete(found.analysis.program):
            self.known[key] = found
        return found, call


def _structs(graph: Graph, leaves: Mapping[str, Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Every leaf at its dense shape; one that went with a block would have been cast as its fellows were."""
    given = {path: struct(leaves[path], leaf.shape) for path, leaf in graph.leaves.items() if path in leaves}
    cast = {graph.leaves[path].dtype: found.dtype for path, found in given.items()}
    return tuple(
        given[path] if path in given else struct(jax.ShapeDtypeStruct(leaf.shape, cast.get(leaf.dtype, leaf.dtype)))
        for path, leaf in graph.leaves.items()
    )


def _retrace(fn: Callable, graph: Graph, structs: Sequence[Any], call: Call, units: Mapping[str, Any]) -> Retraced:
    leaves = list(graph.leaves.values())
    own = {name: Atom(group.size, label=name) for name, group in graph.groups.items()}
    own |= {label: Atom(len(names), label=label) for label, names in graph.steps.items()}
    axes = [tuple(_instance(axis, own) for axis in leaf.axes) for leaf in leaves]
    paths = [leaf.path for leaf in leaves]
    call, free = _whole_inputs(graph, call, own, units)
    traced = trace_call(fn, tree_unflatten(graph.tree, structs), call)
    analysis = analyse(solve_axes(traced, paths, axes, call.names, free))
    regions = {name: block for name, block in graph.blocks.items() if block.kernels}
    names = {(frozenset(block.kernels), block.turns, block.turn): name for name, block in regions.items()}
    turns_of = {kernels: turns for kernels, turns, _ in names}
    blocks = {}
    for b, (turn, found) in enumerate(region_turns(analysis.regions)):
        kernels = frozenset(paths[leaf] for leaf in analysis.regions[b].kernels)
        turns = turns_of.get(kernels, 1)
        name = names.get((kernels, turns, turn % turns))
        if name is not None and found % turns == 0:  # a function may run the model several times
            blocks[b] = name
    conflicts = {name: resolve(atom) for name, atom in own.items() if not _intact(atom)}
    return Retraced(analysis, paths, blocks, conflicts)


def _whole_inputs(
    graph: Graph, call: Call, own: Mapping[str, Atom], units: Mapping[str, Any]
) -> tuple[Call, dict[str, tuple[Axis, ...]]]:
    """The call with its free inputs at their whole size, and the axes of these; others of that name are pinned."""
    arrays, free = list(call.arrays), {}
    for k, (name, x) in enumerate(zip(call.names, call.arrays, strict=True)):
        known = graph.inputs.get(name, ())
        if len(known) != len(x.shape):
            continue
        bound = [bool(labels(axis)) for axis in known]
        shape = [
            axis.size if held and n == axis_count(axis, units) else n
            for n, axis, held in zip(x.shape, known, bound, strict=True)
        ]
        if any(held and n != axis.size for n, axis, held in zip(shape, known, bound, strict=True)):
            continue
        free[name] = tuple(
            _instance(axis, own) if held else Fixed(n, Reason(f"an axis of the input {name}"))
            for n, axis, held in zip(shape, known, bound, strict=True)
        )
        arrays[k] = struct(x, shape)
    return replace(call, arrays=tuple(arrays)), free


def _instance(axis: Axis, own: Mapping[str, Atom]) -> Axis:
    """A copy of a graph's axis over atoms of its own, so that solving does not touch the graph."""
    if isinstance(axis, Atom):
        assert axis.label is not None
        return own[axis.label]
    if isinstance(axis, Sum):
        return total(_instance(part, own) for part in axis.parts)
    if isinstance(axis, Prod):
        return product(_instance(f, own) for f in axis.factors)
    if isinstance(axis, Shuffled):
        return shuffled(_instance(axis.axis, own), axis.order)
    return Fixed(axis.size, axis.why)


def _intact(atom: Atom) -> bool:
    """Whether a group's atom still is itself, or its own parts end to end."""
    axis = resolve(atom)
    if axis is atom:
        return True
    start = 0
    for part in axis.parts if isinstance(axis, Sum) else (axis,):
        if not isinstance(part, Atom) or part.whole is not atom or part.offset != start:  # a part may be another one
            return False
        start += part.size
    return True
