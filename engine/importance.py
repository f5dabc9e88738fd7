"""Which units matter: scores for the units of each group, larger = keep longer.

Every criterion gives `{group: float[size]}`, none below 0. Scores rank the units of one group; `normalise` makes those
of several groups comparable. The criteria themselves stand in criteria.py.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from treesurgeon.engine.criteria import CRITERIA, Scores, spread
from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import Literal, bind, named_leaves, standing_at
from treesurgeon.engine.masks import labels, unit_index
from treesurgeon.engine.retrace import Retracer
from treesurgeon.engine.rules import lookup

Within: TypeAlias = typing.Literal["mean", "max", "sum", "rank", "none"]


def importance(criterion: str, graph: Graph, params: Any, **measured: Any) -> Scores:
    """Score the units of every group.

        importance("l2", graph, params)
        importance("taylor", graph, params, grads=jax.grad(loss)(params, x, y))
        importance("apoz", graph, params, zeros=zero_share(fn, graph)(params, x))

    Args:
        criterion: a name in `CRITERIA`, whose rows say what each needs; the papers are named in criteria.py.
            Of weights alone: `l1`, `l2`, `fpgm`, `lamp`, `norm_scale`. Of weights and gradients: `taylor`, `fisher`. Of
            what kernels read: `activation`, `apoz`, `reconstruction`. `random` takes a key.
        graph: the traced graph.
        params: the dense parameters.
        measured: what the criterion needs: `grads`, `fisher`, `energy`, `zeros`, `grams` or `key`. What only others
            need is not looked at.

    Raises:
        TreesurgeonError: the criterion is not known, or what it needs is missing.
    """
    if criterion not in CRITERIA:
        raise TreesurgeonError(f"unknown criterion {criterion!r}; choose one of {', '.join(CRITERIA)}")
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
    readers. Units that no contraction reads score 0.
    """
    retracer = Retracer(fn, graph)

    def measure(params: Any, *args: Any, **kwargs: Any) -> Scores:
        leaves = named_leaves(params)
        found, call = retracer(leaves, args, kwargs)
        analysis = found.analysis
        program, solution = analysis.program, analysis.solution
        out: Scores = {name: jnp.zeros(group.size) for name, group in graph.groups.items()}
        env: dict[int, Any] = dict(program.consts)
        env.update(zip(program.inputs, [*(leaves[path] for path in graph.leaves), *call.arrays], strict=True))
        for i, eqn in enumerate(program.eqns):
            if analysis.uses.eqns[i] is None:
                continue
            values = [v.value if isinstance(v, Literal) else env[v] for v in eqn.ins]
            with standing_at(eqn):
                env.update(zip(eqn.outs, bind(eqn, eqn.params, values), strict=True))
            rule = lookup(eqn.name)
            if rule is None or rule.contraction is None:
                continue
            contraction = rule.contraction(solution.site(i))
            for k, dims in enumerate((contraction.lhs, contraction.rhs)):
                v = eqn.ins[k]
                if not isinstance(v, int) or not analysis.kinds.data[v]:
                    continue
                for d in dims:
                    axis = solution.axes[v][d]
                    square = jnp.square(values[k].astype(jnp.float32))
                    along = square.mean(tuple(e for e in range(square.ndim) if e != d))
                    for name in labels(axis) & graph.groups.keys():
                        index = unit_index(axis, name)
                        repeats = max(1, int((index >= 0).sum()) // graph.groups[name].size)
                        out[name] = out[name] + spread(along, index, graph.groups[name].size) / repeats
        return out

    return measure
