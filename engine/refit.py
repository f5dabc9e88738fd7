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
from treesurgeon.engine.gating import run_gated, undifferentiated
from treesurgeon.engine.graph import Graph, Plan
from treesurgeon.engine.jaxprs import bind, path_name
from treesurgeon.engine.linear import linear
from treesurgeon.engine.masks import axis_mask
from treesurgeon.engine.narrowing import GONE, Narrowed, check_leaves, without_gone
from treesurgeon.engine.retrace import Retraced, Retracer
from treesurgeon.engine.rules.shape import SHAPE_ONLY
from treesurgeon.engine.selects import Guard
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
        fitting = Fitting(found, leaves, targets, self.heads, self.samples, self.ridge)
        inputs = [leaves.get(path, GONE) for path in graph.leaves]
        narrowed = Narrowed(graph.positions(masks))
        outs = narrowed.main(found, [*inputs, *call.arrays], masks["blocks"], fitting)
        out = without_gone(tree_unflatten(found.analysis.traced.out_tree, outs))
        return out, tree_map_with_path(lambda path, leaf: fitting.new.get(path_name(path), leaf), params)

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


@dataclass(frozen=True, eq=False)
class MaskedRefit:
    """`learn = refit_masked(fn, graph)`; see there."""

    retracer: Retracer
    whole: Refit

    def targets(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """What the dense model's contractions return, `[samples, outputs]`."""
        return self.whole.targets(params, *args, **kwargs)

    def __call__(
        self, params: Any, masks: Mapping[str, Any], targets: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        """What the function returns under masks with the new kernels and biases, and these by path.

        Neither has derivatives.
        """
        leaves = check_leaves(params, {p: leaf.shape for p, leaf in self.retracer.graph.leaves.items()}, "gate")
        made: list[Fitting] = []

        def adapt(found: Retraced) -> Fitting:
            made.append(Fitting(found, leaves, targets, self.whole.heads, self.whole.samples, self.whole.ridge))
            return made[0]

        out = run_gated(self.retracer, params, masks, args, kwargs, adapt=adapt, guard=Guard(gradients=False))
        return out, undifferentiated(made[0].new)


def refit_masked(
    fn: Callable,
    graph: Graph,
    *,
    teacher: Callable | None = None,
    heads: bool = True,
    samples: int = SAMPLES,
    ridge: float = RIDGE,
) -> MaskedRefit:
    """`refit` at dense shapes, under masks: one program for all plans.

        learn = refit_masked(train, graph)
        targets = learn.targets(params, x)                     # once
        out, leaves = learn(params, masks, targets, x)         # for each candidate

    `leaves` are the new kernels and biases by path, at dense shapes; what belongs to removed units means nothing. Cut,
    they are what `refit` finds. Each candidate has kernels of its own: a population costs as much as its candidates
    one by one.

    Args:
        fn: as `refit` takes it, and so with all that follow.
        graph: the traced graph.
        teacher: the function whose contractions are the targets.
        heads: whether kernels after which no other comes are fitted too.
        samples: places that are looked at.
        ridge: weight of the kernels as they are.
    """
    return MaskedRefit(
        Retracer(fn, graph), refit(fn, graph, Plan(), teacher=teacher, heads=heads, samples=samples, ridge=ridge)
    )


class Fitting:
    """Replaces kernels by fitted ones while a function runs, equation by equation; `new` are the leaves so far."""

    def __init__(
        self,
        found: Retraced,
        leaves: Mapping[str, Any],
        targets: Mapping[str, Any],
        heads: bool,
        samples: int,
        ridge: float,
    ):
        self.program, self.paths = found.analysis.program, found.paths
        self.kernels = fitted_kernels(found.analysis, heads)
        self.biases = find_biases(found.analysis, self.kernels)
        self.sums = {bias.eqn: i for i, bias in self.biases.items()}
        self.shifts: dict[int, jax.Array] = {}
        self.leaves, self.targets, self.samples, self.ridge = leaves, targets, samples, ridge
        self.new: dict[str, jax.Array] = {}

    def __call__(self, i: int, params: Mapping[str, Any], values: list[Any]) -> list[Any]:
        """The operands of equation `i`, a kernel among them being fitted, or a bias moved."""
        if self.sums.get(i) in self.shifts:
            return self._moved(self.biases[self.sums[i]], self.shifts[self.sums[i]], values)
        if i in self.kernels and self.paths[self.kernels[i][0]] in self.targets:
            return self._fitted(i, params, values)
        return values

    def _moved(self, bias: Bias, shift: jax.Array, values: list[Any]) -> list[Any]:
        path = self.paths[bias.leaf]
        leaf = self.leaves[path]
        self.new[path] = (leaf + shift.reshape(leaf.shape)).astype(leaf.dtype)
        y = values[1 - bias.at]
        shape = [y.shape[d] if d in bias.dims else 1 for d in range(y.ndim)]
        return [v if k == bias.at else v + shift.reshape(shape).astype(v.dtype) for k, v in enumerate(values)]

    def _fitted(self, i: int, params: Mapping[str, Any], values: list[Any]) -> list[Any]:
        path, at = self.paths[self.kernels[i][0]], self.kernels[i][1]
        old = values[at]
        as_matrix = linear(self.program.eqns[i], at, params, old.shape)
        assert as_matrix is not None
        x = as_matrix.features(values[1 - at], old, lambda count: sampled(count, self.samples)).astype(jnp.float32)
        matrices = as_matrix.matrices(old.astype(jnp.float32))
        y = self.targets[path].reshape(x.shape[1], len(matrices), -1).transpose(1, 0, 2)
        means = x.mean(1, keepdims=True), y.mean(1, keepdims=True)
        if i in self.biases:
            x, y = x - means[0], y - means[1]
        fitted = jax.vmap(lambda x, w, y: ridge_fit(x, w, y, self.ridge))(x, matrices, y)
        if i in self.biases:
            self.shifts[i] = (means[1] - means[0] @ fitted).reshape(-1)
        self.new[path] = as_matrix.kernel(fitted, old).astype(old.dtype)
        return [self.new[path] if k == at else value for k, value in enumerate(values)]


def ridge_fit(x: Any, old: Any, y: Any, ridge: float) -> Any:
    """The W that minimises |x W - y|² + λ |W - old|², λ relative to the mean energy of the columns of x."""
    gram = x.T @ x
    there = jnp.maximum((jnp.diagonal(gram) > 0).sum(), 1)  # removed units are zero, and do not count
    weight = ridge * jnp.trace(gram) / there + jnp.finfo(jnp.float32).tiny ** 0.5
    change = x.T @ (y - x @ old)
    return old + jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram + weight * jnp.eye(len(gram))), change)


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
