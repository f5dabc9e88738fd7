"""Putting a program to the laws, and telling what rounding explains."""

from __future__ import annotations

import itertools
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import quick
from laws import Bench, count_macs, leaves_of, numpied, random_plan, value_and_grads, worst

from fuzz.program import Program
from treesurgeon import engine
from treesurgeon.engine import Plan

# Without fused multiply-adds: with them `x == x.max()` (the derivative of max) fails where XLA computes x once for each
# side and contracts one of them.
FLAGS = f"{quick.FLAGS} --xla_cpu_max_isa=AVX"


@dataclass(frozen=True)
class Failure:
    """What went wrong: `kind` tells failures of one cause from others, `text` is for the reader."""

    kind: str
    text: str
    plan: Plan | None = None

    def __bool__(self) -> bool:
        return True


class Trivial(Exception):
    """A program in which nothing can be pruned, or that has no derivative."""


def attempt(what: str, f: Callable, plan: Plan | None = None) -> Failure | None:
    try:
        f()
    except Trivial:
        raise
    except AssertionError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if "/engine/" in frames[-1].filename:
            return Failure(f"{what} AssertionError at {_frame(error)}", f"{what}: {error!r} at {_frame(error)}", plan)
        law = str(error).split(":")[0].split("\n")[0]
        law = re.sub(r"the (input )?(value|gradient) \S+ changes.*", "changes", law)
        return Failure(law, str(error).split("\n")[0], plan)
    except Exception as error:  # noqa: BLE001
        at = _frame(error)
        return Failure(f"{what} {type(error).__name__} at {at}", f"{what}: {error!r} at {at}"[:1500], plan)
    return None


def _frame(error: BaseException) -> str:
    """The innermost line of the engine."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/engine/" in f.filename]
    if not frames:
        frames = traceback.extract_tb(error.__traceback__)
    f = frames[-1]
    return f"{f.filename.rsplit('/', 1)[-1]}:{f.name}:{f.lineno}"


def names(graph: Any) -> Any:
    return list(graph.groups), list(graph.blocks), str(graph)


def check(
    program: Program,
    draw_plan: Callable[[Any, int], Plan] | None = None,
    seed: int = 0,
    n_plans: int = 1,
    extra: bool = False,
    dry: bool = False,
) -> Failure | None:
    """The first law that a program breaks, None where it holds all; if `dry`, whether everything traces.

    Raises:
        Trivial: nothing in the program can be pruned, or it has no derivative.
    """
    if not program.params:
        raise Trivial
    bench = Bench(program.subject(), seed)
    with np.errstate(all="ignore"):
        if failed := attempt("trace", lambda: bench.graph):
            return failed
        graph = bench.graph
        again = engine.trace(bench.fn, bench.params, *bench.args)
        if names(graph) != names(again):
            return Failure("names", "two traces give other names")
        if not graph.groups and not graph.blocks:
            raise Trivial
        try:
            if not dry:
                jax.eval_shape(value_and_grads(bench.fn), bench.params, bench.args, bench.cts)
        except (ValueError, NotImplementedError) as error:  # a `while` has no derivative in reverse
            raise Trivial from error
        draw_plan = draw_plan or (lambda graph, k: random_plan(graph, 1000 * seed + k))
        if dry:
            plan = draw_plan(graph, 0)
            return attempt("law 7", lambda: dry_run(bench, plan), plan)
        failed = attempt("law 1", bench.law1)
        plans: list[Plan] = []
        for k in range(n_plans if not failed else 0):
            plan = draw_plan(graph, k)
            plans.append(plan)
            for what, law in (("law 7", bench.law7), ("law 2", bench.law2_and_5), ("law 3", bench.law3)):
                failed = failed or attempt(what, lambda law=law, plan=plan: law(plan), plan)
        if not failed:
            failed = attempt("law 4", lambda: bench.law4(plans), plans[-1])
        if not failed and extra:
            failed = attempt("law 5", bench.law5_transforms, plans[-1])
            if not failed and graph.groups:
                few = random_plan(graph, seed, least=2)
                failed = attempt("law 6", lambda: bench.law6(few, lambda g: random_plan(g, seed + 1)), few)
    if failed and not explained(bench, failed):
        return failed
    return None


def dry_run(bench: Bench, plan: Plan) -> None:
    """Everything but numbers: nothing is compiled."""
    masks = bench.graph.masks(plan)
    small, fast = bench.narrowed(plan)
    bench.out_kept(masks, {k: v.shape for k, v in leaves_of(jax.eval_shape(fast, small, *bench.args)).items()})
    assert engine.cost(bench.graph, plan).size == sum(np.size(x) for x in jax.tree.leaves(small)), "law 7: size"
    macs = count_macs(jax.make_jaxpr(fast)(small, *bench.args))
    assert engine.cost(bench.graph, plan).macs == macs, "law 7: MACs"
    gated = engine.gate(bench.fn, bench.graph)

    two = jax.tree.map(lambda m: np.stack([m, m]), masks)
    if jax.tree.leaves(two):
        jax.eval_shape(jax.vmap(lambda m: gated(bench.params, m, *bench.args)), two)


# Rounding: what may differ because the function itself cannot tell.

EXACT = {
    "max", "min", "reduce_max", "reduce_min", "sort", "gather", "slice", "dynamic_slice", "reshape", "squeeze",
    "expand_dims", "transpose", "broadcast_in_dim", "concatenate", "pad", "rev", "select_n", "neg", "abs", "copy",
    "dynamic_update_slice", "cummax", "cummin", "argmax", "argmin", "stop_gradient", "convert_element_type", "iota",
    "split", "sign", "floor", "ceil", "round", "clamp", "scatter", "optimization_barrier", "reduce_window_max",
    "reduce_window_min", "real", "imag", "copy_p", "mul_no_op", "select_and_gather_add", "select_and_scatter_add",
}  # fmt: skip


def rounded(closed: Any, key: Any) -> Callable:
    """A jaxpr as a function whose every arithmetic result is off by a few units in the last place.

    A loop's is off by as many as those of the shortest numbers that it computes with: a mean of bools is a float32.
    """
    counter = itertools.count()

    def blur(x: Any, least: float) -> Any:
        if not hasattr(x, "dtype") or not jax.dtypes.issubdtype(x.dtype, np.floating):
            return x
        noise = jax.random.uniform(jax.random.fold_in(key, next(counter)), jnp.shape(x), jnp.float32, -1, 1)
        eps = max(least, float(jnp.finfo(x.dtype).eps))
        return x * (1 + 4 * eps * noise.astype(jnp.float64)).astype(x.dtype)

    def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(v: Any) -> Any:
            return v.val if hasattr(v, "val") else env[v]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            name = eqn.primitive.name
            if inner is not None and name not in ("scan", "while", "cond", "reduce_window", "custom_vjp_call"):
                outs = run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), ins)
            else:
                outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(dict(eqn.params)))
                outs = list(outs) if eqn.primitive.multiple_results else [outs]
                if name not in EXACT:
                    outs = [blur(x, coarsest(eqn)) for x in outs]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return lambda *args: run(closed.jaxpr, closed.consts, args)


def coarsest(eqn: Any) -> float:
    """The largest unit in the last place, relative to one, of the numbers inside an equation's programs."""
    found = [0.0]
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        for each in inner.eqns:
            dtypes = [v.aval.dtype for v in each.outvars if hasattr(v.aval, "dtype")]
            found += [float(jnp.finfo(d).eps) for d in dtypes if jax.dtypes.issubdtype(d, np.floating)]
            found.append(coarsest(each))
    return max(found)


def unsettled(bench: Bench) -> bool:
    """Whether the dense function, compiled as a whole and operation by operation, is finite at different places."""
    both = value_and_grads(bench.fn)
    whole, single = (numpied(jax.tree.leaves(f(bench.params, bench.args, bench.cts))) for f in (jax.jit(both), both))
    return any(
        "float" in str(a.dtype) and not np.array_equal(np.isfinite(a), np.isfinite(b))
        for a, b in zip(whole, single, strict=True)
    )


def explained(bench: Bench, failure: Failure) -> bool:
    """Whether rounding alone moves the function as much as the failure says it is off.

    An infinite activation gives its kernel a gradient of 0 × inf, for removed units as for others. And where a value is
    not finite in the first place, what comes of it may depend on how the program was compiled.
    """
    if " at " not in failure.kind and not failure.kind.startswith("law 7") and unsettled(bench):
        return True
    if "has a gradient" in failure.text and failure.plan is not None:
        masks = bench.graph.masks(failure.plan)
        _, grads, _ = bench.gated(bench.params, masks, bench.args, bench.cts)
        return not all(
            np.isfinite(g).all() for g in bench.cut_by_hand(grads, masks).values() if "float" in str(g.dtype)
        )
    off = re.search(r"is (\S+) off", failure.text)
    if off is None:
        return False
    functions = [(bench.fn, bench.params)]
    if failure.plan is not None:
        masks = bench.graph.masks(failure.plan)
        small, fast = bench.narrowed(failure.plan)
        gated = engine.gate(bench.fn, bench.graph)
        functions += [(fast, small), (lambda p, *args: gated(p, masks, *args), bench.params)]
    moved = 0.0
    for f, p in functions:
        shapes = leaves_of(jax.eval_shape(f, p, *bench.args))
        cts = {k: np.ones(v.shape, v.dtype) for k, v in shapes.items() if "float" in str(v.dtype)}
        leaves, tree = jax.tree.flatten((p, bench.args, cts))

        def flat(*leaves, f=f, tree=tree):
            return value_and_grads(f)(*jax.tree.unflatten(tree, leaves))

        try:
            closed = jax.make_jaxpr(flat)(*leaves)
            exact = jax.jit(lambda *a, c=closed: rounded(c, jax.random.key(0))(*a))(*leaves)
            for seed in (1, 2):
                other = jax.jit(lambda *a, c=closed, k=seed: rounded(c, jax.random.key(k))(*a))(*leaves)
                pair = ({str(i): v for i, v in enumerate(numpied(list(t)))} for t in (exact, other))
                moved = max(moved, worst(*pair)[0])
        except Exception as error:  # noqa: BLE001
            print("cannot blur:", repr(error)[:200], file=sys.stderr)
            return False
    return moved * 100 >= float(off[1])
