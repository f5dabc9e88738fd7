"""Kernels fitted to the dense model's own: least squares, layer by layer, on the small shapes.

Each contraction of the narrowed model, in the order of execution, gets the kernel that comes nearest to what the same
contraction returns in the dense model, from what the kernels fitted before it feed it. With norms in training mode
every fit sees statistics that suit it. No gradient step is taken.

Y. He, X. Zhang, J. Sun: "Channel pruning for accelerating very deep neural networks", ICCV 2017 (its second step), with
the asymmetric fit of X. Zhang et al.: "Accelerating very deep convolutional networks for classification and detection",
TPAMI 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
from treesurgeon.engine.sites import kernel_uses, live_eqns, sampled

SAMPLES = 16384
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class Refit:
    """`fit = refit(fn, graph, plan)`; see there."""

    retracer: Retracer
    plan: Plan
    samples: int
    ridge: float

    def targets(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """What the dense model's contractions return at the units that the plan keeps, `[samples, outputs]`."""
        graph = self.retracer.graph
        leaves = check_leaves(params, {path: leaf.shape for path, leaf in graph.leaves.items()}, "gate")
        found, call = self.retracer(leaves, args, kwargs)
        kernels, solution = fitted_kernels(found.analysis), found.analysis.solution
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
        kernels, program = fitted_kernels(found.analysis), found.analysis.program
        new = dict(leaves)

        def adapt(i: int, params: Mapping[str, Any], values: list[Any]) -> list[Any]:
            if i not in kernels or found.paths[kernels[i][0]] not in targets:
                return values
            path, at = found.paths[kernels[i][0]], kernels[i][1]
            old = values[at]
            as_matrix = linear(program.eqns[i], at, params, old.shape)
            assert as_matrix is not None
            features = as_matrix.features(values[1 - at], old, self._chosen).astype(jnp.float32)
            matrices = as_matrix.matrices(old.astype(jnp.float32))
            wanted = targets[path].reshape(features.shape[1], len(matrices), -1).transpose(1, 0, 2)
            fitted = jax.vmap(lambda x, w, y: ridge_fit(x, w, y, self.ridge))(features, matrices, wanted)
            new[path] = as_matrix.kernel(fitted, old).astype(old.dtype)
            return [new[path] if k == at else value for k, value in enumerate(values)]

        inputs = [leaves.get(path, GONE) for path in graph.leaves]
        narrowed = Narrowed(graph.positions(masks))
        outs = narrowed.main(found, [*inputs, *call.arrays], masks["blocks"], adapt)
        out = without_gone(tree_unflatten(found.analysis.traced.out_tree, outs))
        return out, tree_map_with_path(lambda path, _: new[path_name(path)], params)

    def _chosen(self, count: int) -> np.ndarray:
        return sampled(count, self.samples)


def refit(fn: Callable, graph: Graph, plan: Plan, *, samples: int = SAMPLES, ridge: float = RIDGE) -> Refit:
    """Fit the kernels of a narrowed model to the dense model, without a gradient step.

        fit = refit(train, graph, plan)
        targets = fit.targets(params, x)
        out, small = fit(cut(params, graph, plan), targets, x)

    Kernels take part that are one parameter leaf, used once, outside of loops.

    Args:
        fn: a function of the graph's parameters: inference, or training mode where norms use the batch's statistics.
        graph: the traced graph.
        plan: what is kept.
        samples: positions (examples and places) at most that a fit looks at.
        ridge: pull towards the kernel as it is, relative to the mean energy of what it is multiplied with.
    """
    return Refit(Retracer(fn, graph), plan, samples, ridge)


def ridge_fit(x: Any, old: Any, y: Any, ridge: float) -> Any:
    """The W that minimises |x W - y|² + λ |W - old|², λ relative to the mean energy of the columns of x."""
    gram = x.T @ x
    size = gram.shape[0]
    weight = ridge * jnp.trace(gram) / size + jnp.finfo(jnp.float32).tiny ** 0.5
    change = x.T @ (y - x @ old)
    return old + jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram + weight * jnp.eye(size)), change)


def fitted_kernels(analysis: Analysis) -> dict[int, tuple[int, int]]:
    """The contractions whose kernel is a leaf as it stands: their number -> the leaf's and the operand's number."""
    program, kinds = analysis.program, analysis.kinds
    uses = kernel_uses(analysis)
    number = {v: leaf for leaf, v in enumerate(program.inputs[: len(analysis.modules)])}
    out = {}
    for i in live_eqns(analysis):
        kernel = kernel_operand(program.eqns[i], kinds)
        if kernel is not None and kernel in number and uses[number[kernel]] == 1:
            out[i] = (number[kernel], program.eqns[i].ins.index(kernel))
    return out
