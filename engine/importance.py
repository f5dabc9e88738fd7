"""Which units matter: scores for the units of each group, larger = keep longer.

Every criterion gives `{group: float[size]}`. Scores rank the units of one group; they are not comparable across groups
or criteria until normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.calls import rebuild
from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.engine.flow import Kinds
from treesurgeon.engine.graph import Graph, Member
from treesurgeon.engine.jaxprs import Literal, Operand, bind, named_leaves, standing_at
from treesurgeon.engine.masks import labels, unit_index
from treesurgeon.engine.retrace import Retracer
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.solve import Solution

Scores = dict[str, jax.Array]

CRITERIA = ("l1", "l2", "norm_scale", "taylor", "activation")


def importance(
    criterion: str,
    graph: Graph,
    params: Any,
    *,
    grads: Any = None,
    energy: Mapping[str, Any] | None = None,
) -> Scores:
    """Score the units of every group.

    Args:
        criterion: one of
            `l1`, `l2`: magnitude of the kernels' weights that go with the unit, producers and consumers alike (Li et
                al., ICLR 2017; over all coupled layers as in DepGraph, Fang et al., CVPR 2023);
            `norm_scale`: |scale| of the norms on the unit (Network Slimming, Liu et al., ICCV 2017); `l2` for groups
                without a norm;
            `taylor`: squared first-order change of the loss, (Σ w ∂L/∂w)² per leaf (Molchanov et al., CVPR 2019);
            `activation`: mean square of what the unit feeds its readers.
        graph: the traced graph.
        params: the dense parameters.
        grads: for `taylor`, the gradient of the loss, a pytree like `params`.
        energy: for `activation`, what `activation_energy(fn, graph)(params, …)` returned.

    Raises:
        TreesurgeonError: the criterion is not known, or what it needs is missing.
    """
    leaves = named_leaves(params)
    if criterion in ("l1", "l2"):
        power = 1 if criterion == "l1" else 2
        return {
            name: sum((_per_unit(jnp.abs(leaves[m.path]) ** power, m, size) for m in kernels), jnp.zeros(size))
            for name, size, kernels in _members(graph, lambda m: _is_kernel(graph, m))
        }
    if criterion == "norm_scale":
        plain = importance("l2", graph, params)
        out = {}
        for name, size, scales in _members(graph, lambda m: m.path.rpartition("/")[2] == "scale"):
            found = [_per_unit(jnp.abs(leaves[m.path]), m, size) for m in scales]
            out[name] = sum(found, jnp.zeros(size)) if found else plain[name]
        return out
    if criterion == "taylor":
        if grads is None:
            raise TreesurgeonError("importance('taylor', …) needs grads: the gradient of the loss at params")
        slopes = named_leaves(grads)
        return {
            name: sum((_per_unit(leaves[m.path] * slopes[m.path], m, size) ** 2 for m in members), jnp.zeros(size))
            for name, size, members in _members(graph, lambda m: graph.leaves[m.path].trainable)
        }
    if criterion == "activation":
        if energy is None:
            raise TreesurgeonError("importance('activation', …) needs energy: activation_energy(fn, graph)(params, x)")
        return {name: jnp.asarray(energy[name]) for name in graph.groups}
    raise TreesurgeonError(f"unknown criterion {criterion!r}; choose one of {', '.join(CRITERIA)}")


def _members(graph: Graph, wanted: Callable[[Member], bool]) -> Iterator[tuple[str, int, list[Member]]]:
    for name, group in graph.groups.items():
        yield name, group.size, [m for m in group.members if wanted(m)]


def _is_kernel(graph: Graph, member: Member) -> bool:
    leaf = graph.leaves[member.path]
    return leaf.trainable and len(leaf.shape) > 1


def _per_unit(values: Any, member: Member, size: int) -> jax.Array:
    """Sum an array over all but the member's axis, then over the positions of each unit: [size]."""
    rest = tuple(d for d in range(values.ndim) if d != member.axis)
    return _spread(values.sum(rest), member.units, size)


def _spread(along: Any, index: np.ndarray, size: int) -> jax.Array:
    there = np.flatnonzero(index >= 0)
    return jnp.zeros(size, along.dtype).at[index[there]].add(along[there])


def activation_energy(fn: Callable, graph: Graph) -> Callable:
    """`activation_energy(fn, graph)(params, *args)`: mean squares of the units' activations, `{group: float[size]}`.

    Measured where the units are read: at the operands of contractions, over examples and positions, summed over the
    readers; every step of a loop is one. Units that no contraction reads score 0.
    """
    retracer = Retracer(fn, graph)

    def measure(params: Any, *args: Any, **kwargs: Any) -> Scores:
        leaves = named_leaves(params)
        found, call = retracer(leaves, args, kwargs)
        analysis = found.analysis
        values = [*(leaves[path] for path in graph.leaves), *call.arrays]
        _, energy = _measured(graph, analysis.solution, analysis.kinds, values, analysis.uses.eqns)
        return dict(zip(graph.groups, energy, strict=True))

    return measure


def _measured(
    graph: Graph, solution: Solution, kinds: Kinds, inputs: Sequence[Any], needed: Sequence[Any] | None = None
) -> tuple[list[Any], list[Any]]:
    """What a program returns, and the energy of each group in it."""
    program = solution.program
    energy: list[Any] = [jnp.zeros(group.size) for group in graph.groups.values()]
    env: dict[int, Any] = {**program.consts, **dict(zip(program.inputs, inputs, strict=True))}

    def read(v: Operand) -> Any:
        return v.value if isinstance(v, Literal) else env[v]

    for i, eqn in enumerate(program.eqns):
        if needed is not None and needed[i] is None:
            continue
        values = [read(v) for v in eqn.ins]
        with standing_at(eqn):
            if i in solution.bodies:
                outs, inner = _measured_call(graph, i, solution, kinds, values)
                energy = [a + b for a, b in zip(energy, inner, strict=True)]
            else:
                outs = bind(eqn, eqn.params, values)
        env.update(zip(eqn.outs, outs, strict=True))
        rule = lookup(eqn.name)
        if rule is None or rule.contraction is None:
            continue
        contraction = rule.contraction(solution.site(i))
        for k, dims in enumerate((contraction.lhs, contraction.rhs)):
            v = eqn.ins[k]
            if not isinstance(v, int) or not kinds.data[v]:
                continue
            for d in dims:
                axis = solution.axes[v][d]
                square = jnp.square(values[k].astype(jnp.float32))
                along = square.mean(tuple(e for e in range(square.ndim) if e != d))
                for n, (name, group) in enumerate(graph.groups.items()):
                    if name in labels(axis):
                        index = unit_index(axis, name)
                        repeats = max(1, int((index >= 0).sum()) // group.size)
                        energy[n] = energy[n] + _spread(along, index, group.size) / repeats
    return [read(v) for v in program.outputs], energy


def _measured_call(
    graph: Graph, i: int, solution: Solution, kinds: Kinds, values: list[Any]
) -> tuple[list[Any], list[Any]]:
    """The same of an equation that holds programs: the energy is handed out of them as more results."""
    eqn, bodies = solution.program.eqns[i], solution.bodies[i]
    inner = {id(body): found for body, found in zip(bodies, kinds.bodies[i], strict=True)}
    zeros = [jnp.zeros(group.size) for group in graph.groups.values()]
    if eqn.name.startswith("custom_"):  # nobody takes derivatives here
        return _measured(graph, bodies[0], inner[id(bodies[0])], values)

    def run(_: Any, body: Solution, xs: Sequence[Any]) -> list[Any]:
        n = len(body.program.inputs)
        outs, energy = _measured(graph, body, inner[id(body)], xs[:n])
        return [*outs, *(a + b for a, b in zip(energy, xs[n:] or zeros, strict=True))]

    if eqn.name == "while":  # what a loop hands out it carries
        values = [*values, *zeros]
    outs = rebuild(eqn, bodies, values, run, (), eqn.params.get("length"))
    n = len(eqn.outs)
    return outs[:n], [x.sum(0) for x in outs[n:]] if eqn.name == "scan" else outs[n:]
