"""What tracing finds (`Graph`) and what a user asks of it (`Plan`): plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.axes import Axis, Reason
from treesurgeon.engine.describe import describe, explain
from treesurgeon.engine.drawing import dot, svg
from treesurgeon.engine.errors import PlanError
from treesurgeon.engine.masks import axis_mask


class Member(NamedTuple):
    """One axis of one parameter leaf that holds units of a group.

    Attributes:
        path: of the leaf.
        axis: its number.
        units: `int[length of the axis]`, the unit at each position, -1 where it belongs to another group or to none.
        makes: whether the leaf is a kernel that makes the units along this axis, not one that reads them.
    """

    path: str
    axis: int
    units: np.ndarray
    makes: bool = False


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one; every member loses the same units.

    Attributes:
        name: the module path of the leaf that makes the units.
        size: how many units there are.
        members: every axis of a parameter on which they stand.
    """

    name: str
    size: int
    members: tuple[Member, ...]


class Tie(NamedTuple):
    """When a block is dropped, `entry_units[i]` of one group and `exit_units[i]` of the other are one unit."""

    entry: str
    entry_units: np.ndarray
    exit: str
    exit_units: np.ndarray


@dataclass(frozen=True)
class Block:
    """A region of the dataflow that identity can replace.

    A step of a `scan` over stacked layers is a block as well: its `leaves` and `kernels` are empty, since the stacked
    leaves lose entries of their layer axis.

    Attributes:
        name: of the module that it is the whole of, else the scope of its kernels or the module of the first of them.
        leaves: the parameters that are used nowhere else.
        kernels: those that enter a contraction in it.
        shape: of its entry and its exit.
        parent: the smallest block around it, if any.
        where: the source line of its exit.
        turn: its number among the regions with the same kernels (shared layers).
        turns: how many such regions there are.
    """

    name: str
    leaves: tuple[str, ...]
    kernels: tuple[str, ...]
    shape: tuple[Any, ...]
    parent: str | None
    where: str
    turn: int = 0
    turns: int = 1


@dataclass(frozen=True)
class Plan:
    """What to keep of each group (sorted unit numbers; all of a group that is not named) and which blocks to drop."""

    keep: Mapping[str, np.ndarray] = field(default_factory=dict)
    drop: frozenset[str] = frozenset()

    def __post_init__(self):
        keep = {name: _numbers(name, units) for name, units in self.keep.items()}
        for name, units in keep.items():
            if units.ndim != 1 or (units.size and not np.issubdtype(units.dtype, np.integer)):
                raise PlanError(
                    f"Plan.keep[{name!r}]: expected a 1-d array of unit numbers, got shape {units.shape} "
                    f"of {units.dtype}; a bool mask m becomes np.flatnonzero(m)"
                )
            if (units[1:] <= units[:-1]).any():
                raise PlanError(f"Plan.keep[{name!r}] must be sorted without repeats: pass np.unique(units)")
        if isinstance(self.drop, str):
            raise PlanError(f"Plan.drop takes a set of block names, got the string {self.drop!r}")
        keep = {name: units.astype(np.int64) for name, units in keep.items()}
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "drop", frozenset(self.drop))


def _numbers(name: str, units: Any) -> np.ndarray:
    try:
        return np.asarray(units)
    except ValueError as error:
        raise PlanError(f"Plan.keep[{name!r}]: expected a 1-d array of unit numbers; NumPy says: {error}") from error


@dataclass(frozen=True)
class Leaf:
    """One array of the parameters.

    Attributes:
        path: its keys, with `/` between them.
        shape: in the dense model.
        dtype: likewise.
        axes: what stands on each of its axes.
        trainable: floating point, and in the `params` collection where there is one.
        contexts: the sets of blocks inside which it is used (see blocks.py); None where it is used nowhere.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axis, ...]
    trainable: bool
    contexts: frozenset[frozenset[str]] | None


class Term(NamedTuple):
    """A count that masks change: `scale` times the kept positions of every axis, while a context is kept."""

    scale: int
    axes: tuple[Axis, ...]
    contexts: frozenset[frozenset[str]]


class Branches(NamedTuple):
    """Counts of which the largest counts: the branches of a condition."""

    options: tuple[tuple[Work, ...], ...]


Work: TypeAlias = Term | Branches


@dataclass(frozen=True, eq=False)
class Graph:
    """The coupled groups and droppable blocks of a traced function.

    Attributes:
        groups: prunable groups by name, in order of execution.
        blocks: droppable blocks by name, in order of execution.
        pinned: why an axis of a parameter (or of a free input) may not change, by `path[axis]`.
        ties: which units a dropped block makes one, by block.
        divisors: the mean and variance divisors that shrink with their axis, in words.
        meetings: where in the program several values meet that hold units of a group, by group.
        steps: the blocks that are the steps of a scanned stack, in order, by the label of the stack's layer axis.
        leaves: the arrays of the parameters, by path.
        macs: what `cost` counts multiply-accumulates from.
        activations: what it counts activation bytes from.
        tree: the structure of the parameters.
        inputs: the axes of the inputs that may shrink, by name.
    """

    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
    pinned: Mapping[str, Reason]
    ties: Mapping[str, tuple[Tie, ...]]
    divisors: tuple[str, ...]
    leaves: Mapping[str, Leaf]
    macs: tuple[Work, ...]
    activations: tuple[Work, ...]
    tree: Any
    steps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    meetings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)

    def masks(self, plan: Plan) -> dict[str, dict[str, np.ndarray]]:
        """A plan as masks: `{"units": {group: bool[size]}, "blocks": {block: bool[]}}`, True = kept.

        Keeps are closed by intersection over the ties of dropped blocks.

        Raises:
            PlanError: the plan names what is not there, is out of range, or empties a group.
        """
        for name in plan.drop:
            self._known(name, self.blocks, "Plan.drop", "block")
        units = {name: np.ones(group.size, bool) for name, group in self.groups.items()}
        for name, kept in plan.keep.items():
            self._known(name, self.groups, "Plan.keep", "group")
            size = self.groups[name].size
            if kept.size == 0:
                raise PlanError(f"Plan.keep[{name!r}] empties the group: keep at least one of its {size} units")
            if kept[0] < 0 or kept[-1] >= size:
                raise PlanError(f"Plan.keep[{name!r}]: units run from 0 to {size - 1}, got {kept[0]} to {kept[-1]}")
            units[name] = np.isin(np.arange(size), kept)
        self._close(units, plan.drop)
        blocks = {name: np.asarray(name not in plan.drop) for name in self.blocks}
        return {"units": units, "blocks": blocks}

    def closed(self, plan: Plan) -> Plan:
        """The plan with its keeps closed over the ties of dropped blocks, every group named: what `then` composes."""
        units = self.masks(plan)["units"]
        return Plan({name: np.flatnonzero(mask) for name, mask in units.items()}, plan.drop)

    def then(self, first: Plan, later: Plan) -> Plan:
        """The one plan that does what `first` and then `later`, made for the narrowed model, do.

        Where dropped blocks tie groups of the narrowed model, pass its `closed(later)`, without groups that have fewer
        units there than `first` leaves: a drop has tied their units to each other.
        """
        keep = dict(self.closed(first).keep)
        for name, units in later.keep.items():
            if name in keep and np.max(units, initial=-1) >= len(keep[name]):
                raise PlanError(
                    f"then: the later plan keeps unit {np.max(units)} of group {name!r}, of which the first one leaves "
                    f"{len(keep[name])}: it has to be a plan for the narrowed model"
                )
            keep[name] = keep[name][units] if name in keep else units
        drop = set(later.drop)
        for names in self.steps.values():  # the narrowed model counts its steps anew
            left = [name for name in names if name not in first.drop]
            drop = (drop - set(names)) | {old for old, new in zip(left, names, strict=False) if new in later.drop}
        return Plan(keep, first.drop | drop)

    def positions(self, masks: Mapping[str, Any]) -> dict[str, Any]:
        """The masks of everything that stands on an axis: units of groups, and steps of scanned stacks."""
        out, blocks = dict(masks["units"]), masks["blocks"]
        for label, names in self.steps.items():
            given = [blocks[name] for name in names if name in blocks]
            if given:
                xp = jnp if any(isinstance(bit, jax.Array) for bit in given) else np
                every = xp.ones_like(given[0])
                out[label] = xp.stack([blocks.get(name, every) for name in names], -1)
        return out

    def _close(self, units: dict[str, np.ndarray], drop: Iterable[str]) -> None:
        dropped = set(drop)
        active = [name for name in self.blocks if name in dropped and not dropped & set(self.around(name))]
        changed = True
        while changed:
            changed = False
            for name in (*active, *reversed(active)):  # there and back: chains close in one turn
                for tie in self.ties[name]:
                    a, b = units[tie.entry][tie.entry_units], units[tie.exit][tie.exit_units]
                    if (a != b).any():  # a unit may stand at several positions: what goes at one goes at all
                        units[tie.entry][tie.entry_units[~b]] = False
                        units[tie.exit][tie.exit_units[~a]] = False
                        changed = True
        for name, mask in units.items():
            if not mask.any():
                raise PlanError(
                    f"dropping blocks ties group {name!r} to groups that keep other units, and nothing is left: "
                    f"keep some of the same units in each, or keep the block"
                )

    def around(self, block: str) -> list[str]:
        """The blocks that enclose a block, the nearest first."""
        out = []
        while (parent := self.blocks[block].parent) is not None:
            out.append(parent)
            block = parent
        return out

    def _known(self, name: str, names: Mapping[str, Any], where: str, kind: str) -> None:
        if name not in names:
            close = get_close_matches(name, names, 3) or list(names)[:3]
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"this graph has no {kind}s"
            raise PlanError(f"{where} names the {kind} {name!r}, which is not there; {hint}")

    def shapes(self, masks: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
        """The shape of each leaf under concrete masks, None for leaves that go."""
        return {
            path: tuple(len(kept) for kept in indices) if indices is not None else None
            for path, indices in self.indices(masks).items()
        }

    def indices(self, masks: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...] | None]:
        """The kept positions on each axis of each leaf under concrete masks, None for leaves that go."""
        out: dict[str, tuple[np.ndarray, ...] | None] = {}
        units = self.positions(masks)
        for path, leaf in self.leaves.items():
            if not alive(leaf.contexts, masks["blocks"]):
                out[path] = None
                continue
            kept = []
            for axis, size in zip(leaf.axes, leaf.shape, strict=True):
                mask = axis_mask(axis, units)
                kept.append(np.arange(size) if mask is None else np.flatnonzero(mask))
            out[path] = tuple(kept)
        return out

    def explain(self, path: str, axis: int) -> str:
        """Which units stand on an axis of a leaf, what they go together with and where they meet; or why it is pinned.

        Free inputs are explained as leaves are.

        Raises:
            PlanError: there is no such leaf or axis.
        """
        self._known(path, {**self.leaves, **self.inputs}, "explain", "leaf")
        rank = len(self.inputs[path] if path in self.inputs else self.leaves[path].axes)
        if not 0 <= axis < rank:
            raise PlanError(f"explain: {path} has the axes 0 to {rank - 1}, got {axis}")
        return explain(self, path, axis)

    def dot(self) -> str:
        """The coupling graph in Graphviz's language: groups, the leaves they hold, and the blocks around these."""
        return dot(self)

    def svg(self) -> str:
        """The same as the text of an SVG file, for a browser: light or dark as its reader has it, with tooltips."""
        return svg(self)

    def __str__(self) -> str:
        return describe(self)


def alive(contexts: frozenset[frozenset[str]] | None, blocks: Mapping[str, Any]) -> bool:
    """Whether something used in these contexts is still used; what is used nowhere stays."""
    return contexts is None or any(all(blocks[name] for name in context) for context in contexts)


def check_masks(graph: Graph, masks: Mapping[str, Any], stacked: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The masks of units and of blocks as bools; a `PlanError` where they do not fit the graph.

    Where they may be `stacked` they may have leading axes, and NumPy's stay NumPy's.
    """
    unknown = set(masks) - {"units", "blocks", "maps"}
    if unknown:
        raise PlanError(f"masks: expected the keys 'units', 'blocks' and 'maps', got also {sorted(unknown)}")
    units, blocks = dict(masks.get("units", {})), dict(masks.get("blocks", {}))
    for kind, given, there in (("units", units, graph.groups), ("blocks", blocks, graph.blocks)):
        for name, mask in given.items():
            if name not in there:
                raise PlanError(f"masks[{kind!r}] names {name!r}, which is not in the graph")
            shape = (graph.groups[name].size,) if kind == "units" else ()
            found = np.shape(mask)
            if found[len(found) - len(shape) if stacked else 0 :] != shape:
                raise PlanError(
                    f"masks[{kind!r}][{name!r}]: expected shape {shape}, got {found}"
                    + ("" if stacked else "; stacks of masks go through jax.vmap")
                )
            given[name] = (jnp if isinstance(mask, jax.Array) or not stacked else np).asarray(mask, bool)
    return units, blocks
