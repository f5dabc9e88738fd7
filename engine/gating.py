"""`gate`: remove units by masks, without changing a shape, so that many plans run as one batch.

Junk may flow through removed units as long as nobody reads it. Selects stand at the borders of every operation that
mixes positions, on both sides, so that junk (infinities and NaN included) reaches neither a value nor a gradient:

- before a contraction or reduction, removed positions of what it mixes hold the identity of the operation;
- behind a contraction stands a fence (see primitives.py): in the backward pass it zeroes the cotangent before the
  transposed contraction mixes it. Where no derivative is taken it is nothing;
- where something is broadcast along a prunable axis, that is fenced too: the transpose of a broadcast is a sum;
- parameters and free inputs are fenced as they enter, except kernels (see `flow.shared_kernels`): those stay one array
  for a whole population of masks. A removed slice of a kernel meets only zeros, so it is enough that it is finite:
  under one plan's masks it is zeroed; for a population entries that are not finite are, and a result that reads such an
  entry through kept units is NaN;
- the contractions of a dropped block compute on zeros, its `while` loops end at once, and its exit is its entry;
  neither does a `while` loop go on for removed units alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from treesurgeon.engine import rules
from treesurgeon.engine.axes import Axis
from treesurgeon.engine.calls import rebuild, scan
from treesurgeon.engine.errors import NarrowError
from treesurgeon.engine.flow import Shared, shared_kernels
from treesurgeon.engine.graph import Graph, check_masks
from treesurgeon.engine.jaxprs import Eqn, Literal, Operand, Program, bind, is_float, is_key, standing_at, wiring
from treesurgeon.engine.narrowing import check_leaves
from treesurgeon.engine.primitives import forward_only
from treesurgeon.engine.retrace import Retraced, Retracer
from treesurgeon.engine.rules import Contraction, lookup
from treesurgeon.engine.rules.base import identity
from treesurgeon.engine.selects import ALL, Alive, Guard, Selects
from treesurgeon.engine.sites import Site, apply_map, check_maps
from treesurgeon.engine.solve import Solution

Mend: TypeAlias = Callable[[Site, Any], Any | None]
Adapt: TypeAlias = Callable[[int, Mapping[str, Any], list[Any]], list[Any]]


def gate(fn: Callable, graph: Graph, *, gradients: bool = True, finite: bool = False) -> Callable:
    """The model under masks: `gate(fn, graph)(params, masks, *args, **kwargs)`, with dense parameters and shapes.

    On kept entries it equals `narrow(fn, graph, plan)(cut(params, graph, plan), …)` for `masks = graph.masks(plan)`.
    `jax.vmap` over stacked masks evaluates a population: kernels stay shared, and what no mask touches is computed
    once. Groups and blocks that `masks` leaves out are kept and cost nothing.

    Under `masks["maps"]` (see `reconstruct`) contractions read combinations of kept units in place of removed ones.

    Masks that are not closed over the ties of dropped blocks are allowed: the exit of a dropped block then holds zeros
    where its entry was removed.

    Args:
        fn: the traced function, or another primal function of the same parameters.
        graph: the traced graph.
        gradients: whether derivatives will be taken. Without them less of the program depends on masks, so more of it
            is computed once for a population; taking one all the same is an error.
        finite: whether all parameters are known to be finite. Then kernels are not looked at for entries that are not.

    Raises:
        PlanError: on call, masks name what is not there or have another shape.
        StructureError: on call, the parameters are not the dense ones.
        NarrowError: on call, `fn` reads a group in a way that the traced function did not; or a derivative is taken
            without `gradients`.
    """
    return gate_retraced(Retracer(fn, graph), Guard(gradients, not finite))


def gate_retraced(
    retracer: Retracer, guard: Guard, also: Callable[[Retraced], Sequence[int]] | None = None
) -> Callable:
    """`gate`, which returns further values of the program as well: `(outputs, values)`, where `also` names any.

    Removed units of these values hold zeros.
    """

    def gated(params: Any, masks: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        maps = masks.get("maps", {})

        def mend(site: Site, x: Any) -> Any | None:
            known = maps.get(site.name)
            if known is None:
                return None
            for name, matrix in known.items():
                x = apply_map(x, site.dim, site.places[name], matrix)
            return x

        return run_gated(retracer, params, masks, args, kwargs, mend if maps else None, guard=guard, also=also)

    return gated


def run_gated(
    retracer: Retracer,
    params: Any,
    masks: Mapping[str, Any],
    args: tuple,
    kwargs: dict,
    mend: Mend | None = None,
    adapt: Callable[[Retraced], Adapt] | None = None,
    guard: Guard = ALL,
    also: Callable[[Retraced], Sequence[int]] | None = None,
) -> Any:
    """Run a function under masks.

    Args:
        retracer, params, masks, args, kwargs: the function and what it is called with.
        mend: may replace what a contraction reads at a site, its removed units being zero.
        adapt: of the function as it was traced again, what may replace the operands of each equation.
        guard: against what.
        also: see `gate_retraced`.
    """
    graph = retracer.graph
    leaves = check_leaves(params, {path: leaf.shape for path, leaf in graph.leaves.items()}, "gate")
    units, blocks = check_masks(graph, masks)
    units = graph.positions({"units": units, "blocks": blocks})
    found, call = retracer(leaves, args, kwargs)
    for name in found.conflicts:
        if name in units:
            raise NarrowError(
                f"{found.conflict(graph, name)}, so it cannot be gated: trace this function instead, or leave the "
                f"group out of the masks"
            )
    found.require(graph, blocks)
    sites = found.sites if mend is not None else {}
    check_maps(masks.get("maps", {}), sites)
    gate = _Gate(units, mend=mend, sites=sites, adapt=adapt(found) if adapt else None, guard=guard)
    wanted = also(found) if also else ()
    outs, values = gate.main(found, graph, [*(leaves[path] for path in graph.leaves), *call.arrays], blocks, wanted)
    if not guard.gradients:
        outs, values = undifferentiated((outs, values))
    out = jax.tree.unflatten(found.analysis.traced.out_tree, outs)
    return (out, values) if also else out


def undifferentiated(tree: Any) -> Any:
    """What was computed without regard for derivatives; taking one raises a `NarrowError`."""
    why = "this was computed under masks without what derivatives need: differentiate gate(fn, graph) instead"
    return jax.tree.map(lambda x: forward_only(x, why) if is_float(jax.typeof(x)) else x, tree)


class _Gate:
    """Runs a solved program under masks."""

    def __init__(
        self,
        units: Mapping[str, Any],
        on: Any = None,
        shared: dict[Program, list[bool]] | None = None,
        mend: Mend | None = None,
        sites: Mapping[int, Sequence[Site]] | None = None,
        adapt: Adapt | None = None,
        guard: Guard = ALL,
    ):
        self.units = units
        self.adapt = adapt
        self.mend, self.sites = mend, sites or {}
        self.shared = {} if shared is None else shared
        self.guard, self.selects = guard, Selects(units, guard)
        self.on = on  # whether the block that is being run is kept, None for always

    def main(
        self, found: Retraced, graph: Graph, inputs: list[Any], blocks: Mapping[str, Any], wanted: Sequence[int]
    ) -> tuple[list[Any], list[Any]]:
        """Run a whole function: what it returns, and these values without what is removed of them."""
        analysis = found.analysis
        program, solution = analysis.program, analysis.solution
        shared = shared_kernels(program, analysis.kinds)
        self._note(program, shared)
        bits = {b: blocks[name] for b, name in found.blocks.items() if name in blocks}
        exits = {analysis.regions[b].exit: (analysis.regions[b].entry, bit) for b, bit in bits.items()}
        alive = Alive(bits)
        origin = dict(enumerate(analysis.uses.values))
        for i, eqn in enumerate(program.eqns):  # others may need what is made along with a value
            origin.update({v: analysis.uses.eqns[i] for v in eqn.outs if len(eqn.outs) > 1})
        env: dict[int, Any] = dict(program.consts)
        env.update(zip(program.inputs, inputs, strict=True))
        for v in program.inputs[: len(graph.leaves)]:
            if not shared.values[v] and not is_key(program.avals[v]):
                env[v] = self._enter(env[v], solution.axes[v], alive(analysis.uses.values[v]))
        for v in program.inputs[len(graph.leaves) :]:
            if not is_key(program.avals[v]):
                env[v] = self._enter(env[v], solution.axes[v], alive(analysis.uses.values[v]))
        for i, eqn in enumerate(program.eqns):
            contexts = analysis.uses.eqns[i]
            if contexts is None:
                continue
            self.on = alive(contexts)

            def read(v: Operand, contexts: Any = contexts) -> Any:
                if isinstance(v, Literal):
                    return v.value
                x = env[v]
                enters = self.on is not None and origin[v] != contexts and not solution.constant[v]
                if enters and is_float(x) and not shared.values[v]:  # from outside into a block: no derivative back
                    x = self.selects.fence(x, {}, self.on)
                return x

            self.selects.within(eqn.context)
            with standing_at(eqn):
                outs = self.apply(i, solution, [read(v) for v in eqn.ins])
                for v, x in zip(eqn.outs, outs, strict=True):
                    env[v] = x
                    if v in exits:
                        entry, bit = exits[v]
                        env[v] = lax.select(bit, x, self._passed(env[entry], solution.axes[entry], solution.axes[v]))
        self.on = None
        values = [self.selects.clear(env[v], dict(enumerate(solution.axes[v])), 0) for v in wanted]
        return [v.value if isinstance(v, Literal) else env[v] for v in program.outputs], values

    def _enter(self, x: Any, axes: Sequence[Axis], on: Any) -> Any:
        """A parameter or an input as the function reads it."""
        where = dict(enumerate(axes))
        if on is None and not self.selects.masked(axes):
            return x
        x = jnp.asarray(x)
        return self.selects.fence(x, where, on) if is_float(x) else self.selects.clear(x, where, 1)

    def _passed(self, x: Any, axes: Sequence[Axis], exit_: Sequence[Axis]) -> Any:
        """A block's entry as its exit: zero where the entry is removed, without a derivative where the exit is."""
        pairs = enumerate(zip(axes, exit_, strict=True))
        differ = [d for d, (a, b) in pairs if self.selects.mask(a) is not self.selects.mask(b)]
        x = self.selects.clear(x, {d: axes[d] for d in differ}, 0)
        return self.selects.fence(x, {d: exit_[d] for d in differ})

    def _note(self, program: Program, shared: Shared) -> None:
        self.shared[program] = shared.values
        for i, found in shared.bodies.items():
            for body, inner in zip(program.eqns[i].bodies, found, strict=True):
                self._note(body, inner)

    def run(self, solution: Solution, inputs: Sequence[Any]) -> list[Any]:
        """Run a program inside an equation."""
        program = solution.program
        env: dict[int, Any] = {**dict(zip(program.inputs, inputs, strict=True)), **program.consts}
        for i, eqn in enumerate(program.eqns):
            values = [v.value if isinstance(v, Literal) else env[v] for v in eqn.ins]
            self.selects.within(eqn.context)
            with standing_at(eqn):
                outs = self.apply(i, solution, values)
            env.update(zip(eqn.outs, outs, strict=True))
        return [v.value if isinstance(v, Literal) else env[v] for v in program.outputs]

    def apply(self, i: int, solution: Solution, values: list[Any]) -> list[Any]:
        """One equation under the masks."""
        eqn = solution.program.eqns[i]
        if solution.fixed(i):
            return self._bind(i, eqn, values)
        if eqn.bodies:
            return self._call(i, solution, values)
        shared = self.shared.get(solution.program)
        constant = [not isinstance(v, int) or solution.constant[v] for v in eqn.ins]
        # Constants (a blur, a Fourier basis) are kernels too: masked, they would differ between candidates.
        kernel = [
            fixed or (isinstance(v, int) and bool(shared and shared[v]))
            for fixed, v in zip(constant, eqn.ins, strict=True)
        ]
        rule = lookup(eqn.name)
        if rule is None:
            return self._bind(i, eqn, values)
        site = solution.site(i)
        if rule.contraction is not None:
            sites = self.sites.get(i, ())
            return [self._contract(i, eqn, site, rule.contraction(site), values, kernel, sites)]
        for operand, dims, kind in rule.mixes(site) if rule.mixes else ():
            x = values[operand]
            values[operand] = self.selects.clear(x, {d: site.ins[operand][d] for d in dims}, identity(kind, x.dtype))
        if i in solution.divisors:
            values[solution.divisors[i].operand] = self._divisor(solution, i)
        if rule.spreads is not None:
            outs = self._bind(i, eqn, values)
            if not any(is_float(x) and not fixed for x, fixed in zip(values, constant, strict=True)):
                return outs
            return [self.selects.fence(outs[0], {d: site.outs[0][d] for d in rule.spreads(site)})]
        if rule.broadcasts and len(site.outs) == 1:
            for k, x in enumerate(values):
                if not constant[k]:
                    values[k] = self._stretch(site, k, x)
        return self._bind(i, eqn, values)

    def _bind(self, i: int, eqn: Eqn, values: list[Any]) -> list[Any]:
        return bind(eqn, eqn.params, values if self.adapt is None else self.adapt(i, eqn.params, values))

    def _call(self, i: int, solution: Solution, values: list[Any]) -> list[Any]:
        """An equation that holds programs."""
        eqn, bodies = solution.program.eqns[i], solution.bodies[i]
        length = eqn.params.get("length")
        steps = self.selects.mask(solution.lengths[i]) if i in solution.lengths else None
        rule = solution.rules.get(i)
        plain = steps is None and all(map(self._plain, bodies)) and (rule is None or self._plain(rule))
        if plain and not self._ends(eqn, bodies):
            return bind(eqn, eqn.params, values)
        if steps is not None:
            return scan(eqn, bodies[0], values, partial(self._step, eqn), (), length, steps)
        if eqn.name.startswith("custom_"):
            shared = self.shared.get(solution.program)
            for k, v in enumerate(eqn.ins):  # a kernel is not fenced as it enters, and the rule may read it otherwise
                if isinstance(v, int) and shared and shared[v]:
                    values[k] = self.selects.fence(values[k], dict(enumerate(solution.operands(i)[k])), self.on)

            def run(aux: Any, body: Solution, xs: Sequence[Any]) -> list[Any]:
                return _Gate(*aux, guard=self.guard).run(body, xs)

            return rebuild(eqn, bodies, values, run, (self.units, self.on), length, rule)

        def inside(_: Any, body: Solution, xs: Sequence[Any]) -> list[Any]:
            inner = self._inner(self.on)
            outs = inner.run(body, xs)
            if eqn.name == "while" and body is bodies[0]:  # neither junk nor a dropped block keeps a loop going
                axes = body.of(body.program.outputs[0])
                outs = [inner.selects.clear(jnp.asarray(outs[0]), dict(enumerate(axes)), False, self.on)]
            return outs

        return rebuild(eqn, bodies, values, inside, (), length)

    def _ends(self, eqn: Eqn, bodies: Sequence[Solution]) -> bool:
        """Whether an equation is a loop that masks may end."""
        return eqn.name == "while" and (
            self.on is not None or self.selects.masked(bodies[0].of(bodies[0].program.outputs[0]))
        )

    def _inner(self, on: Any) -> _Gate:
        """A gate for a program inside an equation: what it caches belongs to another trace."""
        return _Gate(self.units, on, self.shared, guard=self.guard)

    def _step(self, eqn: Eqn, aux: Any, body: Solution, values: Sequence[Any]) -> list[Any]:
        """One step of a `scan` that may be removed: it computes on zeros, and what it carries passes it by."""
        (bit,) = aux
        inner = self._inner(bit if self.on is None else self.on & bit)
        shared = self.shared.get(body.program)
        inputs = [
            inner.selects.clear(x, {}, 0, inner.on) if is_float(x) and not (shared and shared[v]) else x
            for x, v in zip(values, body.program.inputs, strict=True)
        ]
        outs = inner.run(body, inputs)
        for j, k in wiring(eqn).carried.items():
            outs[j] = lax.select(bit, outs[j], values[k])
        return outs

    def _plain(self, body: Solution) -> bool:
        """Whether no mask acts inside a body, so that it can be called as it is."""
        program = body.program
        for i, eqn in enumerate(program.eqns):
            if body.fixed(i):
                continue
            if eqn.bodies:
                if not all(map(self._plain, body.bodies[i])) or any(map(self.selects.masked, body.operands(i))):
                    return False
                if self._ends(eqn, body.bodies[i]):
                    return False
                continue
            rule = lookup(eqn.name)
            touched = self.on is not None or i in body.divisors
            if not touched and not any(
                map(self.selects.masked, [*body.operands(i), *(body.axes[v] for v in eqn.outs)])
            ):
                continue
            if touched and rule is None:
                continue
            if rule is not None and (rule.mixes or rule.contraction or rule.spreads or i in body.divisors):
                return False
            shape = program.avals[eqn.outs[0]].shape if eqn.outs else ()
            for v in eqn.ins:
                if isinstance(v, int) and not body.constant[v] and program.avals[v].shape != shape:
                    return False
        return True

    def _stretch(self, site: rules.Site, k: int, x: Any) -> Any:
        """An operand that broadcasts implicitly along a masked axis, stretched and fenced there."""
        if not is_float(x) or not self.guard.gradients:
            return x
        shape, target = site.in_shapes[k], site.out_shapes[0]
        grown = [
            d
            for d in range(len(target))
            if (not shape or (shape[d] == 1 and target[d] != 1)) and self.selects.mask(site.outs[0][d]) is not None
        ]
        if not grown:
            return x
        full = tuple(target) if not shape else tuple(target[d] if d in grown else n for d, n in enumerate(shape))
        x = self.selects.spread(x, full, range(len(shape)))
        return self.selects.fence(x, {d: site.outs[0][d] for d in grown})

    def _contract(
        self,
        i: int,
        eqn: Eqn,
        site: rules.Site,
        contraction: Contraction,
        values: list[Any],
        kernel: Sequence[bool],
        sites: Sequence[Site],
    ) -> Any:
        summed = [(0, contraction.lhs), (1, contraction.rhs)]
        free = {out: site.outs[0][out] for m in (contraction.lhs_out, contraction.rhs_out) for out in m.values()}
        masked = self.selects.masked([*(site.ins[k][d] for k, dims in summed for d in dims), *free.values()])
        if not masked and self.on is None and not sites:
            return self._bind(i, eqn, values)[0]
        mended = self._mend(site, sites, values)
        bad, bad_dims = None, ()
        for k, dims in summed:
            every = {d: axis for d, axis in enumerate(site.ins[k]) if (k, d) not in mended}
            out_of = contraction.rhs_out if k else contraction.lhs_out
            slides = contraction.extra > 1 and not k  # it is what a window slides over, and no kernel
            if not kernel[k] or slides:
                values[k] = self._summed(values[k], every, dims)
            elif (
                masked and self.guard.nonfinite and is_float(values[k])
            ):  # else the select before and the fence behind are enough
                left = tuple(sorted(out_of, key=out_of.__getitem__))
                summed_here = [d for d in dims if (k, d) not in mended]
                values[k], bad = self.selects.readable(values[k], every, summed_here, left)
                bad_dims = tuple(sorted(out_of.values()))
        out = self._bind(i, eqn, values)[0]
        if bad is not None:
            out = self.selects.spoil(out, bad, bad_dims)
        return self.selects.fence(out, free, self.on)

    def _summed(self, x: Any, axes: Mapping[int, Axis], dims: Sequence[int]) -> Any:
        """An operand without what a contraction must not sum, nor its transpose, which sums the other axes."""
        if self.guard.gradients:
            return self.selects.clear(x, axes, 0, self.on)
        return self.selects.clear(x, {d: axis for d, axis in axes.items() if d in dims}, 0)

    def _mend(self, site: rules.Site, sites: Sequence[Site], values: list[Any]) -> set[tuple[int, int]]:
        """Replace what a contraction reads by what `mend` makes of it; the (operand, axis) pairs that are whole now."""
        mended: set[tuple[int, int]] = set()
        if not sites or self.mend is None:
            return mended
        data = sites[0].data
        x = self._summed(values[data], dict(enumerate(site.ins[data])), (sites[0].dim,))
        for each in sites:
            mapped = self.mend(each, x)
            if mapped is not None:
                values[data] = x = mapped
                mended |= {(data, each.dim), (1 - data, each.kernel_dim)}
        return mended

    def _divisor(self, solution: Solution, i: int) -> Any:
        divisor = solution.divisors[i]
        aval = solution.program.aval(solution.program.eqns[i].ins[divisor.operand])
        return self.selects.spread(self.selects.divisor(divisor, aval.dtype), aval.shape, ())
