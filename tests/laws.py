"""The laws of the design as checks on one subject, with the oracles they need: slow, plain, and not the engine's.

A `Subject` is a function with parameters and arguments. `Bench` compiles what the laws share once, at the precision
of the process: float64 where x64 is on, else float32. Tolerances are the design's: 1e-10 in float64; in float32
four times the dense function's own distance from its float64 self.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from treesurgeon import engine
from treesurgeon.engine import Graph, Plan, PlanError


@dataclass(frozen=True)
class A:
    """An array to draw: shape, and a kind (`f` normal, `p` positive, `i:N` integers below N, `key`, a dtype)."""

    shape: tuple[int, ...]
    kind: str = "f"


def arr(*shape: int, kind: str = "f") -> A:
    return A(shape, kind)


@dataclass(frozen=True)
class Subject:
    """A function to put to the laws; `params` and `args` are pytrees of `A` (or of arrays)."""

    name: str
    fn: Callable
    params: Any
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    free: Mapping[str, tuple] = field(default_factory=dict)
    """Outputs that may shrink: for each axis the (leaf, axis) whose units it holds, or None."""
    free_inputs: tuple[str, ...] = ()


def is_spec(x: Any) -> bool:
    return isinstance(x, A)


def wide() -> Any:
    return np.float64 if jax.config.jax_enable_x64 else np.float32


def draw(tree: Any, seed: Any, dtype: Any) -> Any:
    """Arrays for a pytree of `A`; float64 draws rounded to float32, so that both precisions see one function."""

    def one(path: Any, spec: Any) -> Any:
        if not is_spec(spec):
            return spec
        rng = np.random.default_rng(zlib.crc32(f"{seed}{keystr(path)}".encode()))
        kind = spec.kind
        if kind == "key":
            return jax.random.key(7)
        if kind.startswith("i:"):
            return rng.integers(0, int(kind[2:]), spec.shape).astype(np.int32)
        if kind == "p":
            return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32).astype(dtype)
        fan = math.prod(spec.shape[:-1]) if len(spec.shape) > 1 else 1
        values = (rng.normal(0, 1 / math.sqrt(max(fan, 1)), spec.shape)).astype(np.float32)
        return values.astype(dtype if kind == "f" else kind)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_spec)


def leaves_of(tree: Any) -> dict[str, Any]:
    return {keystr(p, simple=True, separator="/"): x for p, x in tree_flatten_with_path(tree)[0]}


def is_float(x: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, np.floating)


def value_and_grads(f: Callable) -> Callable:
    """`run(p, args, cts)`: outputs by path, and the pull-back of `cts` to float leaves of parameters and arguments."""

    def run(p: Any, args: tuple, cts: Mapping[str, Any]) -> Any:
        leaves, tree = tree_flatten((p, args))
        floats = [i for i, x in enumerate(leaves) if is_float(x)]

        def of_floats(values):
            full = list(leaves)
            for i, v in zip(floats, values, strict=True):
                full[i] = v
            pp, aa = tree_unflatten(tree, full)
            out = leaves_of(f(pp, *aa))
            return {k: v for k, v in out.items() if k in cts}, out

        _, pull, out = jax.vjp(of_floats, [leaves[i] for i in floats], has_aux=True)
        (grads,) = pull(dict(cts))
        full = [None] * len(leaves)
        for i, g in zip(floats, grads, strict=True):
            full[i] = g
        gp, ga = tree_unflatten(tree, full)
        return out, leaves_of(gp), leaves_of(ga)

    return run


def numpied(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x) if not is_prng(x) else x, tree)


def is_prng(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def worst(a: Mapping[str, Any], b: Mapping[str, Any], skip: Any = ()) -> tuple[float, str]:
    """The largest difference between two sets of arrays, and where; shapes, keys, infinities and NaN must agree."""
    assert a.keys() == b.keys(), f"{sorted(a)} != {sorted(b)}"
    out, at = 0.0, ""
    for k in a:
        if k in skip:
            continue
        x, y = np.asarray(a[k]), np.asarray(b[k])
        assert x.shape == y.shape, f"{k}: {x.shape} != {y.shape}"
        assert x.dtype == y.dtype, f"{k}: {x.dtype} != {y.dtype}"
        x, y = x.astype(np.float64), y.astype(np.float64)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        if same.all():
            continue
        d = np.max(np.where(same, 0, np.abs(np.nan_to_num(x, nan=np.inf) - np.nan_to_num(y, nan=-np.inf))))
        if d > out:
            out, at = float(d), k
    return out, at


def scale(a: Mapping[str, Any]) -> float:
    finite = [np.abs(np.nan_to_num(np.asarray(v).astype(np.float64), posinf=0, neginf=0)) for v in a.values()]
    return max((float(v.max()) for v in finite if v.size), default=0.0)


class Bench:
    """One subject, traced once and compiled once; each `law_…` raises AssertionError where the engine is wrong."""

    def __init__(self, subject: Subject, seed: int = 0):
        self.subject = subject
        self.jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is the cost
        self.dtype = wide()
        self.params = draw(subject.params, seed, self.dtype)
        self.args = draw(subject.args, f"args{seed}", self.dtype)
        self.paths = list(leaves_of(self.params))

    def fn(self, p: Any, *args: Any) -> Any:
        return self.subject.fn(p, *args, **self.subject.kwargs)

    @cached_property
    def graph(self) -> Graph:
        free = {"free_outputs": tuple(self.subject.free), "free_inputs": self.subject.free_inputs}
        return engine.trace(self.fn, self.params, *self.args, **free)

    @cached_property
    def ones(self) -> Any:
        return self.graph.masks(Plan())

    @cached_property
    def shapes(self) -> Any:
        return leaves_of(jax.eval_shape(self.fn, self.params, *self.args))

    @cached_property
    def cts(self) -> Any:
        return draw({k: arr(*v.shape, kind=str(v.dtype)) for k, v in self.shapes.items() if is_float(v)}, "cts", None)

    @cached_property
    def dense(self) -> Any:
        return numpied(self.jit(value_and_grads(self.fn))(self.params, self.args, self.cts))

    @cached_property
    def precision(self) -> tuple[float, float]:
        """The allowance for values and for gradients, relative to the largest of each."""
        if all(x.dtype == np.float64 for x in jax.tree.leaves((self.params, self.args)) if is_float(x)):
            return 1e-10, 1e-10

        def up(x: Any) -> Any:
            return x if is_prng(x) or not is_float(x) else np.asarray(x).astype(np.float64)

        with jax.enable_x64(True):
            p, args, cts = (jax.tree.map(up, t) for t in (self.params, self.args, self.cts))
            exact = numpied(jax.jit(value_and_grads(self.fn))(p, args, cts))
        out = []
        for mine, his in ((self.dense[0], exact[0]), ({**self.dense[1]}, {**exact[1]})):
            down = {k: v.astype(np.asarray(mine[k]).dtype) if is_float(v) else v for k, v in his.items()}
            apart = worst(mine, down, skip=self.outside(mine))[0]
            eps = max((float(jnp.finfo(np.asarray(v).dtype).eps) for v in mine.values() if is_float(v)), default=0.0)
            out.append(4 * max(apart / max(scale(mine), 1e-30), eps))
        return out[0], out[1]

    def outside(self, tree: Mapping[str, Any]) -> set[str]:
        """Integer results may flip at a rounding; keys are not numbers."""
        return {k for k, v in tree.items() if not is_float(v)}

    @cached_property
    def gated(self) -> Callable:
        gated = engine.gate(self.fn, self.graph)

        def run(p, masks, args, cts):
            return value_and_grads(lambda p, *args: gated(p, masks, *args))(p, args, cts)

        jitted = self.jit(run)
        return lambda p, masks, args, cts: numpied(jitted(p, masks, args, cts))

    @cached_property
    def population(self) -> Callable:
        """Of each of several masks: values and gradients, and the values of the gate that takes no derivatives."""
        gated = engine.gate(self.fn, self.graph)
        forward = engine.gate(self.fn, self.graph, gradients=False)

        def run(p, masks, args, cts):
            out = value_and_grads(lambda p, *args: gated(p, masks, *args))(p, args, cts)
            return *out, leaves_of(forward(p, masks, *args))

        jitted = self.jit(jax.vmap(run, (None, 0, None, 0)))
        return lambda p, masks, args, cts: numpied(jitted(p, masks, args, cts))

    def close(self, mine: Mapping[str, Any], his: Mapping[str, Any], law: str, kind: int, factor: float = 1) -> None:
        apart, at = worst(mine, his, skip=self.outside(his))
        allowed = factor * self.precision[kind] * max(scale(his), scale(self.dense[kind]), 1e-30)
        assert apart <= allowed, f"{law}: {at} is {apart:.3g} off, allowed {allowed:.3g}"

    # What a plan leaves of parameters and outputs, by enumeration.

    def kept(self, masks: Any) -> dict[str, Any]:
        return self.graph.indices(masks)

    def cut_by_hand(self, tree: Mapping[str, Any], masks: Any) -> dict[str, Any]:
        """Leaves by path at what the masks keep; those that go are left out."""
        kept = self.kept(masks)
        return {
            path: np.asarray(x)[np.ix_(*kept[path])] if np.ndim(x) else x
            for path, x in tree.items()
            if kept[path] is not None
        }

    def out_kept(self, masks: Any, narrow_shapes: Mapping[str, Any]) -> dict[str, Any]:
        """The kept positions of each output that narrow returns: all, or those of the leaf that it mirrors."""
        kept = self.kept(masks)
        out = {}
        for path, shape in narrow_shapes.items():
            full = self.shapes[path].shape
            leaf = next((leaf for leaf in self.paths if path == leaf or path.endswith("/" + leaf)), None)
            if path in self.subject.free:
                out[path] = self.free_kept(path, kept)
            elif tuple(shape) != tuple(full) and leaf is not None and kept[leaf] is not None:
                out[path] = kept[leaf]
            else:
                out[path] = tuple(np.arange(n) for n in full)
        return out

    def free_kept(self, path: str, kept: Any) -> Any:
        sources = zip(self.subject.free[path], self.shapes[path].shape, strict=True)
        return tuple(np.arange(n) if source is None else kept[source[0]][source[1]] for source, n in sources)

    # The laws.

    def law1(self) -> None:
        out, gp, ga = self.gated(self.params, self.ones, self.args, self.cts)
        self.close(out, self.dense[0], "law 1, values", 0)
        self.close(gp, self.dense[1], "law 1, gradients", 1)
        self.close(ga, self.dense[2], "law 1, input gradients", 1)

    def narrowed(self, plan: Plan) -> tuple[Any, Callable]:
        return engine.cut(self.params, self.graph, plan), engine.narrow(self.fn, self.graph, plan)

    def law2_and_5(self, plan: Plan) -> None:
        """Values and gradients of narrow are those of gate, at what is kept; gate's are zero at what is not."""
        masks = self.graph.masks(plan)
        small, fast = self.narrowed(plan)
        shapes = leaves_of(jax.eval_shape(fast, small, *self.args))
        kept = self.out_kept(masks, {k: v.shape for k, v in shapes.items()})
        cts, wide_cts = {}, {}
        for k, ct in self.cts.items():
            wide_cts[k] = np.zeros_like(ct)
            if k in kept:
                at = np.ix_(*kept[k]) if ct.ndim else ()
                wide_cts[k][at] = ct[at]
                cts[k] = ct[at]
        run = self.jit(value_and_grads(fast))
        self.last = plan, lambda args: numpied(run(small, args, cts)[0])
        out, gp, ga = numpied(run(small, self.args, cts))
        wide_out, wide_gp, wide_ga = self.gated(self.params, masks, self.args, wide_cts)
        wanted = {k: wide_out[k][np.ix_(*kept[k])] if wide_out[k].ndim else wide_out[k] for k in out}
        self.close(out, wanted, "law 2", 0)
        by_hand = self.cut_by_hand(wide_gp, masks)
        self.close(gp, by_hand, "law 5, gradients", 1)
        self.close(ga, wide_ga, "law 5, input gradients", 1)
        for path, g in wide_gp.items():
            rest, at = np.array(g), self.kept(masks)[path]
            if at is not None:
                rest[np.ix_(*at) if rest.ndim else ()] = 0
            assert (rest == 0).all(), f"law 5: a removed entry of {path} has a gradient"

    def law3(self, plan: Plan, seed: int = 0) -> None:
        """What removed entries of the parameters hold changes nothing, to the bit."""
        masks = self.graph.masks(plan)
        cts = self.ct_kept(masks)
        self.junk_changes_nothing(masks, seed, lambda params: self.gated(params, masks, self.args, cts))

    def law3_in_a_population(self, plan: Plan, seed: int = 0) -> None:
        """The same where masks are stacked, so that kernels cannot be masked; another candidate may read the junk.

        Not where gradients are compared: those of a convolution's kernel, one for each candidate, are a grouped
        convolution, and XLA's multiplies the groups by each other's zeros, infinities among them.
        """
        masks = self.graph.masks(plan)
        if not jax.tree.leaves(masks):
            return
        ct = self.ct_kept(masks)

        def first(params: Any) -> Any:
            mixed, alike = (
                self.population(params, self.stacked(masks, other), self.args, self.stacked(ct, other_ct))
                for other, other_ct in ((self.ones, self.cts), (masks, ct))
            )
            return jax.tree.map(lambda x: x[0], (mixed[0], *alike[1:3], mixed[3]))

        self.junk_changes_nothing(masks, seed, first)

    def stacked(self, *trees: Any) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    def junk_changes_nothing(self, masks: Any, seed: int, call: Callable[[Any], Any]) -> None:
        kept, rng = self.kept(masks), np.random.default_rng(seed)

        def run(params: Any) -> Any:
            out, gp, ga, *more = call(params)
            read = [{k: self.read_off(k, x, masks) for k, x in values.items()} for values in (out, *more)]
            return read[0], gp, ga, *read[1:]

        clean = run(self.params)
        for junk in (None, 1e30, np.inf, -np.inf, np.nan):
            filled = []
            for path, x in leaves_of(self.params).items():
                if is_float(x):
                    value = np.asarray(rng.normal(0, 10, x.shape) if junk is None else np.full(x.shape, junk), x.dtype)
                    if kept[path] is not None:
                        at = np.ix_(*kept[path]) if x.ndim else ()
                        value[at] = np.asarray(x)[at]
                    x = value
                filled.append(x)
            got = run(tree_unflatten(jax.tree.structure(self.params), filled))
            for mine, his, what in zip(got, clean, ("value", "gradient", "input gradient", "value"), strict=False):
                for k in his:
                    same = np.array_equal(mine[k], his[k], equal_nan=is_float(his[k]))
                    assert same, f"law 3: the {what} {k} changes with {junk} in what is removed"

    def read_off(self, k: str, x: Any, masks: Any) -> Any:
        """An output at the entries that mean something."""
        kept = self.kept(masks)
        if k in self.subject.free:
            return x[np.ix_(*self.free_kept(k, kept))]
        leaf = self.mirrors(k)
        if leaf is None or not x.ndim:
            return x
        return np.zeros(()) if kept[leaf] is None else x[np.ix_(*kept[leaf])]

    def mirrors(self, k: str) -> str | None:
        return next(
            (
                leaf
                for leaf, x in leaves_of(self.params).items()
                if (k == leaf or k.endswith("/" + leaf)) and tuple(x.shape) == tuple(self.shapes[k].shape)
            ),
            None,
        )

    def ct_kept(self, masks: Any) -> dict[str, Any]:
        """Cotangents that are zero at entries that mean nothing."""
        out = {}
        for k, ct in self.cts.items():
            there = np.zeros(ct.shape, bool)
            leaf, kept = self.mirrors(k), self.kept(masks)
            if k in self.subject.free:
                there[np.ix_(*self.free_kept(k, kept))] = True
            elif leaf is None or not ct.ndim:
                there[...] = True
            elif kept[leaf] is not None:
                there[np.ix_(*kept[leaf])] = True
            out[k] = np.where(there, ct, np.zeros_like(ct))
        return out

    def law4(self, plans: list[Plan]) -> None:
        """A population is its candidates one by one, values and gradients, at what is kept."""
        masks = [self.graph.masks(plan) for plan in plans]
        if not jax.tree.leaves(masks[0]):
            return
        cts = [self.ct_kept(m) for m in masks]
        many = self.population(self.params, self.stacked(*masks), self.args, self.stacked(*cts))
        for i, (m, ct) in enumerate(zip(masks, cts, strict=True)):
            out, gp, ga, forward = jax.tree.map(lambda x, i=i: x[i], many)
            one, one_gp, one_ga = self.gated(self.params, m, self.args, ct)
            wanted = {k: self.read_off(k, one[k], m) for k in one}
            for values in (out, forward):
                self.close({k: self.read_off(k, values[k], m) for k in values}, wanted, "law 4", 0)
            cut, one_cut = (self.cut_by_hand(grads, m) for grads in (gp, one_gp))
            self.close(cut, one_cut, "law 4, gradients", 1)
            self.close(ga, one_ga, "law 4, input gradients", 1)

    def law5_transforms(self, eager: bool = False) -> None:
        """`narrow` under vmap over arguments (without jit as well, if `eager`) equals a loop; after `law2_and_5`."""
        plan, jitted = self.last
        small, fast = self.narrowed(plan)
        once = jitted(self.args)
        if eager:
            self.close(once, numpied(leaves_of(fast(small, *self.args))), "law 5, jit", 0)
        leaves = jax.tree.leaves(self.args)
        if not leaves or any(map(is_prng, leaves)):
            return
        other = draw(self.subject.args, "other", self.dtype)
        twice = jitted(other)
        both = jax.tree.map(lambda *a: np.stack(a), self.args, other)
        out = numpied(leaves_of(self.jit(jax.vmap(lambda a: fast(small, *a)))(both)))
        self.close({k: v[0] for k, v in out.items()}, once, "law 5, vmap", 0)
        self.close({k: v[1] for k, v in out.items()}, twice, "law 5, vmap", 0)

    def law6(self, first: Plan, draw_plan: Callable[[Graph], Plan]) -> None:
        small, fast = self.narrowed(first)
        if not jax.tree.leaves(small):
            return
        graph = engine.trace(fast, small, *self.args, free_outputs=tuple(self.subject.free))
        second = self.shared_part(first, graph, draw_plan(graph))
        later = graph.closed(second)
        left = self.graph.closed(first).keep  # drops may have tied units of a group to each other
        same = {n: u for n, u in later.keep.items() if len(left.get(n, ())) == graph.groups[n].size}
        whole = self.graph.then(first, Plan(same, later.drop))
        smaller, faster = engine.cut(small, graph, second), engine.narrow(fast, graph, second)
        at_once, direct = self.narrowed(whole)
        mine, his = leaves_of(smaller), leaves_of(at_once)
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in his.items()}, "law 6: shapes"
        for k in mine:
            assert np.array_equal(mine[k], his[k], equal_nan=True), f"law 6: {k}"
        a = numpied(leaves_of(self.jit(faster)(smaller, *self.args)))
        b = numpied(leaves_of(self.jit(direct)(at_once, *self.args)))
        self.close(a, b, "law 6", 0)

    def shared_part(self, first: Plan, graph: Graph, second: Plan) -> Plan:
        """What of a plan for the narrowed model has a name in the dense one: its graph may be finer or coarser."""
        held = {name: {(m.path, m.axis) for m in group.members} for name, group in self.graph.groups.items()}
        families: list[dict[str, list[tuple[str, int]]]] = [{}, {}]
        for name, units in self.graph.closed(first).keep.items():
            families[0].setdefault(name.partition("[")[0], []).append((name, len(units)))
        for name, group in graph.groups.items():
            families[1].setdefault(name.partition("[")[0], []).append((name, group.size))
        keep = {
            name: units
            for name, units in second.keep.items()
            if families[0].get(base := name.partition("[")[0]) == families[1][base]
            and {(m.path, m.axis) for m in graph.groups[name].members} <= held[name]  # else a name for other units
        }
        drop = {
            name
            for name in second.drop & self.graph.blocks.keys()
            if self.graph.blocks[name].kernels == graph.blocks[name].kernels
            and self.graph.blocks[name].turns == graph.blocks[name].turns
        }
        try:
            self.graph.masks(self.graph.then(first, graph.closed(Plan(keep, frozenset(drop)))))
        except PlanError:
            return Plan()
        return Plan(keep, frozenset(drop))

    @cached_property
    def cost_in_jit(self) -> Callable:
        return self.jit(lambda masks: engine.cost(self.graph, masks))

    def law7(self, plan: Plan) -> None:
        small, fast = self.narrowed(plan)
        masks = self.graph.masks(plan)
        cost = engine.cost(self.graph, plan)
        assert cost.size == sum(np.size(x) for x in jax.tree.leaves(small)), "law 7: size"
        by_hand = self.cut_by_hand(leaves_of(self.params), masks)
        mine = leaves_of(small)
        assert mine.keys() == by_hand.keys(), "law 7: the leaves of cut"
        for k in mine:
            assert np.array_equal(np.asarray(mine[k]), np.asarray(by_hand[k]), equal_nan=is_float(mine[k])), k
        assert cost.macs == count_macs(jax.make_jaxpr(fast)(small, *self.args)), "law 7: MACs"
        for exact, approximate in zip(cost, self.cost_in_jit(masks), strict=True):
            assert abs(int(exact) - float(approximate)) <= 1e-6 * exact, "law 7: cost in jit"


def count_macs(closed: Any) -> int:
    """Multiply-accumulates of a jaxpr, from shapes alone: calls are entered, `while` for one turn.

    What depends on none of its inputs is a constant, and computed once.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    total, known = 0, set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if not any(v in known for v in eqn.invars if not hasattr(v, "val")):
            continue
        known.update(eqn.outvars)
        shapes = [v.aval.shape for v in eqn.invars]
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][d] for d in contract)
        elif eqn.primitive.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            features = shapes[1][numbers.rhs_spec[0]]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1]) // max(features, 1)
        elif eqn.primitive.name == "cond":
            total += max(map(count_macs, eqn.params["branches"]))
        else:
            for name in ("jaxpr", "call_jaxpr", "cond_jaxpr", "body_jaxpr"):
                if name in eqn.params:
                    total += count_macs(eqn.params[name]) * eqn.params.get("length", 1)
    return total


# Plans drawn by Hypothesis.


@st.composite
def plans(draw: Any, graph: Graph, drops: bool = True, least: int = 1) -> Plan:
    """A plan of a graph: any non-empty keep of each group, any drops; drops go where the ties leave nothing."""
    keep = {}
    for name, group in graph.groups.items():
        bits = draw(st.integers(1, 2**group.size - 1))
        units = [i for i in range(group.size) if bits >> i & 1]
        extra = [i for i in range(group.size) if i not in units]
        keep[name] = np.array(sorted(units + extra[: max(0, least - len(units))]))
    dropped = frozenset(name for name in graph.blocks if drops and draw(st.booleans()))
    plan = Plan(keep, dropped)
    while dropped:
        try:
            graph.masks(plan)
        except PlanError:
            # what the ties empty keeps everything instead
            tied = {g for b in dropped for t in graph.ties[b] for g in (t.entry, t.exit)}
            if not tied & keep.keys():
                dropped = frozenset()
            keep = {name: units for name, units in keep.items() if name not in tied}
            plan = Plan(keep, dropped)
        else:
            break
    return plan


def random_plan(graph: Graph, seed: int, least: int = 1, drop: float = 0.4) -> Plan:
    """A plan without Hypothesis, for sweeps."""
    rng = np.random.default_rng(seed)
    keep = {}
    for name, group in graph.groups.items():
        n = int(rng.integers(min(least, group.size), group.size + 1))
        keep[name] = np.sort(rng.choice(group.size, n, replace=False))
    dropped = frozenset(name for name in graph.blocks if rng.random() < drop)
    for plan in (Plan(keep, dropped), Plan({}, dropped)):
        try:
            graph.masks(plan)
        except PlanError:
            continue
        return plan
    return Plan(keep)
