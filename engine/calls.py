"""Equations that hold programs, made anew: loops, branches, and functions with a derivative rule of their own.

Everything is rebuilt from JAX's public functions. `run(aux, body, solution, values)` runs a program; `aux` is what it
reads besides its inputs, handed through as an argument where the rebuilt function must not close over traced values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from treesurgeon.engine.jaxprs import Eqn, Literal, is_float, wiring
from treesurgeon.engine.primitives import spread
from treesurgeon.engine.solve import Solution, derivative_rule, derived

Run: TypeAlias = Callable[[Any, Solution, Sequence[Any]], list[Any]]


def rebuild(
    eqn: Eqn,
    bodies: Sequence[Solution],
    values: Sequence[Any],
    run: Run,
    aux: Any = (),
    length: Any = None,
    rule: Solution | None = None,
) -> list[Any]:
    """The equation's results, its programs being run by `run`; a `scan` takes `length` steps.

    `rule` is the solved derivative rule of a custom call, where that is known.
    """
    n = len(eqn.ins)  # there may be more values: a loop carries them along
    pairs = zip(values[:n], eqn.ins, strict=True)
    values = [*(jnp.asarray(x, v.aval.dtype) if isinstance(v, Literal) else x for x, v in pairs), *values[n:]]
    if eqn.name == "custom_jvp_call":
        return custom_jvp(eqn, bodies[0], values, run, aux, rule)
    if eqn.name == "custom_vjp_call":
        return custom_vjp(eqn, bodies[0], values, run, aux, rule)
    if eqn.name == "cond":
        return cond(eqn, bodies, values, run, aux)
    if eqn.name == "while":
        return while_loop(eqn, bodies, values, run, aux)
    assert eqn.name == "scan"
    return scan(eqn, bodies[0], values, run, aux, length)


def custom_jvp(eqn: Eqn, body: Solution, values: Sequence[Any], run: Run, aux: Any, rule: Solution | None) -> list[Any]:
    """A `custom_jvp` function: its body and its derivative rule both go through `run`."""
    chosen = derived(eqn, body)

    @jax.custom_jvp
    def call(aux, *xs):
        return tuple(run(aux, body, xs))

    @call.defjvp
    def derive(primals, tangents):
        aux, *xs = primals
        outs = run(aux, rule or derivative_rule(eqn, body), [*xs, *(tangents[1 + k] for k in chosen)])
        half = len(outs) // 2
        return tuple(outs[:half]), tuple(outs[half:])

    return list(call(aux, *values))


def custom_vjp(eqn: Eqn, body: Solution, values: Sequence[Any], run: Run, aux: Any, rule: Solution | None) -> list[Any]:
    """A `custom_vjp` function: the forward pass is run again where its residuals are needed."""
    chosen = derived(eqn, body)

    @jax.custom_vjp
    def call(aux, *xs):
        return tuple(run(aux, body, xs))

    def forward(aux, *xs):
        return call(aux, *xs), (aux, xs)

    def backward(residuals, cotangents):
        aux, xs = residuals
        pairs = zip(cotangents, body.program.outputs, strict=True)
        given = [c for c, v in pairs if is_float(body.program.aval(v))]
        found = dict(zip(chosen, run(aux, rule or derivative_rule(eqn, body), [*xs, *given]), strict=True))
        return (None, *(found.get(k) for k in range(len(xs))))

    call.defvjp(forward, backward)
    return list(call(aux, *values))


def cond(eqn: Eqn, bodies: Sequence[Solution], values: Sequence[Any], run: Run, aux: Any) -> list[Any]:
    """Branches; the first value chooses, or the platform that the program is compiled for."""
    index, *operands = values
    branches = [lambda *xs, body=body: tuple(run(aux, body, xs)) for body in bodies]
    if platforms := eqn.params.get("branches_platforms"):
        chosen = {
            name: branch for names, branch in zip(platforms, branches, strict=True) for name in names or ("default",)
        }
        return list(lax.platform_dependent(*operands, **chosen))
    if index.dtype == jnp.bool_:
        index = index.astype(jnp.int32)
    return list(lax.switch(index, branches, *operands))


def while_loop(eqn: Eqn, bodies: Sequence[Solution], values: Sequence[Any], run: Run, aux: Any) -> list[Any]:
    """A loop; what does not change stays outside.

    Where the test has axes (a loop under `vmap`), they are the leading ones of all that is carried, and each position
    goes on for as long as its own test holds.
    """
    (test_ins, _), carried = wiring(eqn).ins, wiring(eqn).carried
    fixed = min(carried.values(), default=len(values))
    n_test = len(test_ins) - len(carried)
    test, step = values[:n_test], values[n_test:fixed]
    rank = len(bodies[0].of(bodies[0].program.outputs[0]))

    def holds(carry: Sequence[Any]) -> Any:
        return run(aux, bodies[0], [*test, *carry])[0]

    def turn(carry: Sequence[Any]) -> tuple[Any, ...]:
        new = run(aux, bodies[1], [*step, *carry])
        if not rank:
            return tuple(new)
        going, own = holds(carry), len(eqn.outs)
        pairs = zip(new[:own], carry[:own], strict=True)
        return *(lax.select(spread(going, x.shape, range(rank)), x, old) for x, old in pairs), *new[own:]

    return list(lax.while_loop(lambda carry: jnp.any(holds(carry)), turn, tuple(values[fixed:])))


def scan(eqn: Eqn, body: Solution, values: Sequence[Any], run: Run, aux: Any, length: Any, per_step: Any = None):
    """Steps along the leading axis of what is mapped; `per_step`, if given, is taken along and joined to `aux`."""
    wires = wiring(eqn)
    n_carry, n_mapped = len(wires.carried), len(wires.mapped_ins)
    n_consts = len(values) - n_carry - n_mapped
    consts, init, mapped = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]

    def step(carry, xs):
        extra, xs = xs
        outs = run(aux if per_step is None else (*aux, extra), body, [*consts, *carry, *xs])
        return tuple(outs[:n_carry]), tuple(outs[n_carry:])

    p = eqn.params
    xs = (per_step, tuple(mapped))
    carry, ys = lax.scan(step, tuple(init), xs, length=length, reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]
