"""Which units matter: scores for the units of each group, larger = keep longer.

Every criterion gives `{group: float[size]}`, none below 0. Scores rank the units of one group; `normalise` makes those
of several groups comparable. The criteria themselves stand in criteria.py.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from treesurgeon.engine.calls import rebuild
from treesurgeon.engine.criteria import CRITERIA, Scores, spread
from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.engine.flow import Kinds
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import Literal, Operand, bind, named_leaves, standing_at
from treesurgeon.engine.masks import labels, unit_index
from treesurgeon.engine.retrace import Retracer
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.solve import Solution

Within: TypeAlias = typing.Literal["mean", "max", "sum", "rank", "none"]


def importance(criterion: str, graph: Graph, params: Any, **measured: Any) -> Scores:
    """Score the units of every group.

        importance("l2", graph, params)
        importance("taylor", graph, params, grads=jax.grad(loss)(params, x, y))
        importance("apoz", graph, params, zeros=zero_share(fn, graph)(params, x))

    Args:
        criterion: a name in `CRITERIA`, whose rows say what each needs; the papers are named in criteria.py.
            Of weights alone: `l1`, `l2`, `fpgm`, `lamp`, `norm_scale`. Of weights and gradients: `taylor`, `fisher`. Of
            what kernels read: `activation`, `apoz`, `reconstruction`; with labels, `selectivity`. `random` takes a key.
        graph: the traced graph.
        params: the dense parameters.
        measured: what the criterion needs: `grads`, `fisher`, `energy`, `zeros`, `grams`, `selectivity` or `key`. What
            only others need is not looked at.

    Raises:
        TreesurgeonError: the criterion is not known, or what it needs is missing.
    """
    if criterion not in CRITERIA:
        given = repr(criterion) if isinstance(criterion, str) else f"of type {type(criterion).__name__}"
        raise TreesurgeonError(f"unknown criterion {given}; choose one of {', '.join(CRITERIA)}")
    known = {row.needs for row in CRITERIA.values() if row.needs}
    if unknown := sorted(measured.keys() - known):
        raise TreesurgeonError(f"importance: no criterion takes {unknown[0]!r}; they take {', '.join(sorted(known))}")
    row = CRITERIA[criterion]
    leaves = named_leaves(params)
    if not row.needs:
        return row.score(graph, leaves)
    given = measured.get(row.needs)
    if given is None:
        raise TreesurgeonError(f"importance({criterion!r}, …) needs {row.needs}: {row.source}")
    return row.score(graph, leaves, named_leaves(given) if row.needs == "grads" else given)


def normalise(scores: Mapping[str, Any], within: Within = "mean") -> Scores:
    """Scores that compare across groups.

    Args:
        scores: of each group's units, none below 0.
        within: divide the scores of each group by their `mean`, `max` or `sum`; or replace them by their `rank`, from
            1/size for the worst to 1 for the best (of equals the first is the better one); or leave them (`none`).
            Groups whose scores are all 0 stay so, except under `rank`.

    Raises:
        TreesurgeonError: `within` is none of these.
    """
    if within not in _WITHIN:
        raise TreesurgeonError(f"normalise: within={within!r}; choose one of {', '.join(_WITHIN)}")
    return {name: _WITHIN[within](jnp.asarray(score)) for name, score in scores.items()}


def _share(of: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def share(score: jax.Array) -> jax.Array:
        score = score.astype(jnp.promote_types(score.dtype, jnp.float32))
        unit = of(score)
        return score / jnp.where(unit > 0, unit, 1)

    return share


def _rank(score: jax.Array) -> jax.Array:
    size = len(score)
    place = jnp.zeros(size, jnp.int32).at[jnp.argsort(-score, stable=True)].set(jnp.arange(size, dtype=jnp.int32))
    return (size - place) / size


_WITHIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "mean": _share(jnp.mean),
    "max": _share(jnp.max),
    "sum": _share(jnp.sum),
    "rank": _rank,
    "none": lambda score: score,
}


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
                        energy[n] = energy[n] + spread(along, index, group.size) / repeats
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
