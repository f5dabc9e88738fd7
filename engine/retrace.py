"""Trace a function again for a call at hand, against a graph that is known: what `narrow` and `gate` start from.

The graph's atoms come in as they are, so solving only finds the axes of the new function's own values. Where the new
function couples or splits groups in a way that the traced one did not, the atoms no longer say what the graph says;
`Retraced.conflicts` lists those groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.tree_util import tree_unflatten

from treesurgeon.engine.analysis import Analysis, analyse
from treesurgeon.engine.axes import Atom, Axis, Fixed, Prod, Sum, product, resolve, total
from treesurgeon.engine.errors import NarrowError
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import Call, concrete, split_call, struct, trace_call
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


class Retracer:
    """Retraces a function once for every shape and dtype it is called at."""

    def __init__(self, fn: Callable, graph: Graph):
        self.fn, self.graph = fn, graph
        self.known: dict[Any, Retraced] = {}

    def __call__(self, leaves: Mapping[str, Any], args: tuple, kwargs: dict) -> tuple[Retraced, Call]:
        """The solved program for these arguments and parameter leaves, whose shapes are the graph's."""
        call = split_call(args, kwargs)
        dtypes = _dtypes(self.graph, leaves)
        key = None if call.key is None else (call.key, dtypes, bool(jax.config.read("jax_enable_x64")))
        if key in self.known:
            return self.known[key], call
        found = _retrace(self.fn, self.graph, dtypes, call)
        if key is not None and concrete(found.analysis.program):
            self.known[key] = found
        return found, call


def _dtypes(graph: Graph, leaves: Mapping[str, Any]) -> tuple[Any, ...]:
    """The dtype of every leaf at hand; a leaf that went with a block would have been cast as its fellows were."""
    cast = {
        leaf.dtype: getattr(leaves.get(path), "dtype", leaf.dtype)
        for path, leaf in graph.leaves.items()
        if path in leaves
    }
    return tuple(
        getattr(leaves.get(path), "dtype", leaf.dtype) if path in leaves else cast.get(leaf.dtype, leaf.dtype)
        for path, leaf in graph.leaves.items()
    )


def _retrace(fn: Callable, graph: Graph, dtypes: Sequence[Any], call: Call) -> Retraced:
    leaves = list(graph.leaves.values())
    structs = [struct(jax.ShapeDtypeStruct(leaf.shape, dtype)) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    traced = trace_call(fn, tree_unflatten(graph.tree, structs), call)
    own = {name: Atom(group.size, label=name) for name, group in graph.groups.items()}
    own |= {label: Atom(len(names), label=label) for label, names in graph.steps.items()}
    axes = [tuple(_instance(axis, own) for axis in leaf.axes) for leaf in leaves]
    paths = [leaf.path for leaf in leaves]
    analysis = analyse(traced, paths, axes, call.names)
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


def _instance(axis: Axis, own: Mapping[str, Atom]) -> Axis:
    """A copy of a graph's axis over atoms of its own, so that solving does not touch the graph."""
    if isinstance(axis, Atom):
        assert axis.label is not None
        return own[axis.label]
    if isinstance(axis, Sum):
        return total(_instance(part, own) for part in axis.parts)
    if isinstance(axis, Prod):
        return product(_instance(f, own) for f in axis.factors)
    return Fixed(axis.size, axis.why)


def _intact(atom: Atom) -> bool:
    """Whether a group's atom still is itself, or its own parts end to end."""
    axis = resolve(atom)
    if axis is atom:
        return True
    return isinstance(axis, Sum) and all(isinstance(p, Atom) and p.whole is atom for p in axis.parts)
