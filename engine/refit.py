"""Kernels fitted to the dense model's own: least squares, layer by layer, on the small shapes.

Each contraction of the narrowed model, in the order of execution, gets the kernel, and the bias if one is added to it,
that come nearest to what the same contraction returns in the dense model, from what the kernels fitted before it feed
it. With norms in training mode every fit sees statistics that suit it. No gradient step is taken.

Y. He, X. Zhang, J. Sun: "Channel pruning for accelerating very deep neural networks", ICCV 2017 (its second step), with
the asymmetric fit of X. Zhang et al.: "Accelerating very deep convolutional networks for classification and detection",
TPAMI 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path, tree_unflatten

from treesurgeon.engine.analysis import Analysis
from treesurgeon.engine.flow import kernel_operand
from treesurgeon.engine.graph import Graph, Plan
from treesurgeon.engine.jaxprs import bind, path_name
from treesurgeon.engine.linear import linear
from treesurgeon.engine.masks import axis_mask
from treesurgeon.engine.narrowing import GONE, Narrowed, check_leaves, without_gone
from treesurgeon.engine.retrace import Retracer
from treesurgeon.engine.rules.shape import SHAPE_ONLY
from treesurgeon.engine.sites import kernel_uses, leaf_axis, live_eqns, sampled

SAMPLES = 16384
RIDGE = 1e-3
SPREADING = SHAPE_ONLY | {"broadcast_in_dim"}  # what a bias passes through before it is added


@dataclass(frozen=True, eq=False)
class Refit:
    """`fit = refit(fn, graph, plan)`; see there."""

    retracer: Retracer
    teacher: Retracer
    plan: Plan
    heads: bool
    samples: int
    ridge: float

    def targets(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """What the dense model's contractions return at the units that the plan keeps, `[samples, outputs]`."""
        graph = self.teacher.graph
        leaves = check_leaves(params, {path: leaf.shape for path, leaf in graph.leaves.items()}, "gate")
        found, call = self.teacher(leaves, args, kwargs)
        kernels, solution = fitted_kernels(found.analysis, self.heads), found.analysis.solution
        units = graph.positions(graph.masks(self.plan))
        out: dict[str, jax.Array] = {}

        def note(i: int, params: Mapping[str, Any], values: list[Any]) -> list[Any]:
            if i not in kernels:
                return values
            leaf, at = kernels[i]
            eqn, shape = solution.program.eqns[i], values[at].shape
            as_matrix = linear(eqn, at, params, shape)
            if as_matrix is not None:
                axes = solution.site(i).ins[at]
                kept = np.ones((), bool)
                for d in as_matrix.outputs:
                    mask = axis_mask(axes[d], units)
                    kept = kept[..., None] & (np.ones(shape[d], bool) if mask is None else mask)
                rows = as_matrix.results(bind(eqn, params, values)[0])
                out[found.paths[leaf]] = rows[self._chosen(len(rows))][:, np.flatnonzero(kept)].astype(jnp.float32)
            return values

        whole = {name: np.asarray(True) for name in graph.blocks}
        Narrowed({}).main(found, [*(leaves[path] for path in graph.leaves), *call.arrays], whole, note)
        return out

    def __call__(self, params: Any, targets: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the narrowed function returns with the new kernels, and the parameters with them."""
        graph, plan = self.retracer.graph, self.plan
        masks = graph.masks(plan)
        leaves = check_leaves(params, graph.shapes(masks), "narrow")
        found, call = self.retracer(leaves, args, kwargs)
        kernels, program = fitted_kernels(found.analysis, self.heads), found.analysis.program
        biases = find_biases(found.analysis, kernels)
        sums = {bias.eqn: i for i, bias in biases.items()}
        shifts: dict[int, jax.Array] = {}
        new = dict(leaves)

        def adapt(i: int, params: Mapping[str, Any], values: list[Any]) -> list[Any]:
            if sums.get(i) in shifts:
                bias, shift = biases[sums[i]], shifts[sums[i]]
                leaf = new[found.paths[bias.leaf]]
                new[found.paths[bias.leaf]] = (leaf + shift.reshape(leaf.shape)).astype(leaf.dtype)
                y = values[1 - bias.at]
                shape = [y.shape[d] if d in bias.dims else 1 for d in range(y.ndim)]
                return [v if k == bias.at else v + shift.reshape(shape).astype(v.dtype) for k, v in enumerate(values)]
            if i not in kernels or found.paths[kernels[i][0]] not in targets:
                return values
            path, at = found.paths[kernels[i][0]], kernels[i][1]
            old = values[at]
            as_matrix = linear(program.eqns[i], at, params, old.shape)
            assert as_matrix is not None
            x = as_matrix.features(values[1 - at], old, self._chosen).astype(jnp.float32)
            matrices = as_matrix.matrices(old.astype(jnp.float32))
            y = targets[path].reshape(x.shape[1], len(matrices), -1).transpose(1, 0, 2)
            means = x.mean(1, keepdims=True), y.mean(1, keepdims=True)
            if i in biases:
                x, y = x - means[0], y - means[1]
            fitted = jax.vmap(lambda x, w, y: ridge_fit(x, w, y, self.ridge))(x, matrices, y)
            if i in biases:
                shifts[i] = (means[1] - means[0] @ fitted).reshape(-1)
            new[path] = as_matrix.kernel(fitted, old).astype(old.dtype)
            return [new[path] if k == at else value for k, value in enumerate(values)]

        inputs = [leaves.get(path, GONE) for path in graph.leaves]
        narrowed = Narrowed(graph.positions(masks))
        outs = narrowed.main(found, [*inputs, *call.arrays], masks["blocks"], adapt)
        out = without_gone(tree_unflatten(found.analysis.traced.out_tree, outs))
        return out, tree_map_with_path(lambda path, _: new[path_name(path)], params)

    def _chosen(self, count: int) -> np.ndarray:
        return sampled(count, self.samples)


def refit(
    fn: Callable,
    graph: Graph,
    plan: Plan,
    *,
    teacher: Callable | None = None,
    heads: bool = True,
    samples: int = SAMPLES,
    ridge: float = RIDGE,
) -> Refit:
    """Fit the kernels of a narrowed model to the dense model, without a gradient step.

        fit = refit(train, graph, plan)
        targets = fit.targets(params, x)
        out, small = fit(cut(params, graph, plan), targets, x)

    Kernels take part that are one parameter leaf, used once, outside of loops.

    Args:
        fn: a function of the graph's parameters: inference, or training mode where norms use the batch's statistics.
        graph: the traced graph.
        plan: what is kept.
        teacher: the function whose contractions are the targets, with the arguments of `fn`; if None, `fn`. Where `fn`
            is in training mode, inference is the better teacher: the norms of a small batch are not those that the
            dense model was trained with.
        heads: whether kernels after which no other comes are fitted too. Logits that are near the dense ones on average
            make a worse classifier than the dense head on fitted features does.
        samples: positions (examples and places) at most that a fit looks at.
        ridge: pull towards the kernel as it is, relative to the mean energy of what it is multiplied with.
    """
    own = Retracer(fn, graph)
    return Refit(own, own if teacher is None else Retracer(teacher, graph), plan, heads, samples, ridge)


def ridge_fit(x: Any, old: Any, y: Any, ridge: float) -> Any:
    """The W that minimises |x W - y|² + λ |W - old|², λ relative to the mean energy of the columns of x."""
    gram = x.T @ x
    size = gram.shape[0]
    weight = ridge * jnp.trace(gram) / size + jnp.finfo(jnp.float32).tiny ** 0.5
    change = x.T @ (y - x @ old)
    return old + jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram + weight * jnp.eye(size)), change)


class Bias(NamedTuple):
    """What is added to a contraction: by which equation and as which operand, which leaf, along which axes."""

    eqn: int
    at: int
    leaf: int
    dims: tuple[int, ...]


def find_biases(analysis: Analysis, kernels: Mapping[int, tuple[int, int]]) -> dict[int, Bias]:
    """By contraction, the leaf that is added to its result and used nowhere else, an entry for each output."""
    program, solution = analysis.program, analysis.solution
    readers: dict[int, list[int]] = {}
    for i in live_eqns(analysis):
        for v in program.eqns[i].ins:
            if isinstance(v, int):
                readers.setdefault(v, []).append(i)
    returned = {v for v in program.outputs if isinstance(v, int)}

    def reader(v: int) -> int | None:
        return readers[v][0] if len(readers.get(v, ())) == 1 and v not in returned else None

    out = {}
    numbers = {v: leaf for leaf, v in enumerate(program.inputs[: len(analysis.modules)])}
    for i, (_, kernel_at) in kernels.items():
        eqn = program.eqns[i]
        as_matrix = linear(eqn, kernel_at, eqn.params, program.aval(eqn.ins[kernel_at]).shape)
        add = reader(eqn.outs[0])
        if as_matrix is None or add is None or program.eqns[add].name != "add":
            continue
        at = 1 - program.eqns[add].ins.index(eqn.outs[0])
        added = v = program.eqns[add].ins[at]
        while isinstance(v, int) and reader(v) is not None and v in solution.makers:
            maker = program.eqns[solution.makers[v]]
            if maker.name not in SPREADING:
                break
            v = maker.ins[0]
        if not isinstance(added, int) or not isinstance(v, int) or v not in numbers or reader(v) is None:
            continue
        dims = as_matrix.places(len(program.aval(eqn.outs[0]).shape))
        along = [leaf_axis(solution, added, v, d, SPREADING) for d in dims] == list(range(len(dims)))
        if along and program.aval(v).shape == tuple(program.aval(eqn.outs[0]).shape[d] for d in dims):
            out[i] = Bias(add, at, numbers[v], dims)
    return out


def fitted_kernels(analysis: Analysis, heads: bool) -> dict[int, tuple[int, int]]:
    """The contractions whose kernel is a leaf as it stands: their number -> the leaf's and the operand's number.

    Without `heads` only those whose result another contraction with a kernel depends on.
    """
    program, kinds = analysis.program, analysis.kinds
    uses = kernel_uses(analysis)
    number = {v: leaf for leaf, v in enumerate(program.inputs[: len(analysis.modules)])}
    out = {}
    read: set[int] = set()  # what a later kernel depends on
    for i in reversed(live_eqns(analysis)):
        eqn = program.eqns[i]
        kernel = kernel_operand(eqn, kinds)
        inner = any(v in read for v in eqn.outs)
        if kernel is not None and kernel in number and uses[number[kernel]] == 1 and (heads or inner):
            out[i] = (number[kernel], eqn.ins.index(kernel))
        if inner or kernel is not None:
            read.update(v for v in eqn.ins if isinstance(v, int))
    return dict(sorted(out.items()))
