"""The only door to JAX's internals: a traced function as a flat, plain program.

A `Program` is a jaxpr with its `jit` calls inlined and its variables numbered, so that the rest of the engine works
on integers, shapes and parameters and never on `jax._src` types. Calls that carry a meaning of their own (`scan`,
`while`, `cond`, `custom_jvp_call`, `custom_vjp_call`) stay equations and hold their programs in `Eqn.bodies`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import AbstractValue
from jax.extend import source_info_util
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

INLINED = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"}
CALLS: dict[str, Callable[[Mapping[str, Any]], Sequence[Any]]] = {
    "custom_jvp_call": lambda p: [p["call_jaxpr"]],
    "custom_vjp_call": lambda p: [p["call_jaxpr"]],
    "scan": lambda p: [p["jaxpr"]],
    "while": lambda p: [p["cond_jaxpr"], p["body_jaxpr"]],
    "cond": lambda p: p["branches"],
}


@dataclass(frozen=True, eq=False)
class Literal:
    """A scalar written into the program."""

    value: Any
    aval: Any


Operand: TypeAlias = int | Literal


@dataclass(frozen=True, eq=False)
class Eqn:
    """One primitive application; `ins` and `outs` are value numbers of its program.

    `across` says that it reads a named axis, which depends on where it runs, and `effects` that it does more than
    return its results.
    """

    primitive: Any
    ins: tuple[Operand, ...]
    outs: tuple[int, ...]
    params: Mapping[str, Any]
    stack: Any
    source: Any
    context: Any
    effects: bool
    across: bool
    bodies: tuple[Program, ...] = ()
    caller: Any = None

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    @cached_property
    def scope(self) -> tuple[str, ...]:
        """The path of module scopes around the equation (in its own program), transformations (`jvp(…)`) stripped."""
        return _scope(str(self.stack))

    @cached_property
    def where(self) -> str:
        """The user's source line, `file.py:12`; of the call, where the equation lies in a library's function."""
        return _line(self.source) or _line(self.caller)


@lru_cache(maxsize=4096)
def _scope(text: str) -> tuple[str, ...]:
    while (bare := re.sub(r"\b\w+\(([^()]*)\)", r"\1", text)) != text:
        text = bare
    return tuple(part for part in text.split("/") if part)


def _line(source: Any) -> str:
    line = source_info_util.summarize(source).split(" ")[0] if source is not None else ""
    head, _, tail = line.partition(":")
    return f"{head.rsplit('/', 1)[-1]}:{tail.split(':')[0]}" if tail else line


@dataclass(eq=False)
class Program:
    """Equations in execution order; `avals[v]` is the shape and dtype of value `v`."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[Operand, ...] = ()
    eqns: list[Eqn] = field(default_factory=list)
    avals: list[Any] = field(default_factory=list)
    consts: dict[int, Any] = field(default_factory=dict)

    def aval(self, operand: Operand) -> Any:
        """Shape and dtype of an operand."""
        return operand.aval if isinstance(operand, Literal) else self.avals[operand]


def flatten_program(closed: Any) -> Program:
    """A closed jaxpr as a `Program`."""
    program = Program()
    jaxpr = getattr(closed, "jaxpr", closed)

    def new(aval: Any) -> int:
        program.avals.append(aval)
        return len(program.avals) - 1

    def const(value: Any, aval: Any) -> Operand:
        v = new(aval)
        program.consts[v] = value
        return v

    def inline(
        jaxpr: Any, consts: Sequence[Any], args: Sequence[Operand], stack: Any, caller: Any = None
    ) -> list[Operand]:
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, args, strict=True))
        env |= {v: const(c, v.aval) for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> Operand:
            if hasattr(atom, "val"):
                return Literal(atom.val, atom.aval) if np.ndim(atom.val) == 0 else const(atom.val, atom.aval)
            return env[atom]

        for eqn in jaxpr.eqns:
            ins = tuple(read(v) for v in eqn.invars)
            name = eqn.primitive.name
            inner_stack = stack + eqn.source_info.name_stack
            if name in INLINED:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                results = inline(
                    getattr(inner, "jaxpr", inner),
                    getattr(inner, "consts", ()),
                    ins,
                    inner_stack,
                    caller or eqn.source_info,
                )
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            outs = tuple(new(v.aval) for v in eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
            bodies = tuple(flatten_program(body) for body in CALLS[name](eqn.params)) if name in CALLS else ()
            program.eqns.append(
                Eqn(
                    eqn.primitive,
                    ins,
                    outs,
                    eqn.params,
                    inner_stack,
                    eqn.source_info,
                    eqn.ctx,
                    any(not _named(effect) for effect in eqn.effects),
                    any(map(_named, eqn.effects)),
                    bodies,
                    caller,
                )
            )
        return [read(v) for v in jaxpr.outvars]

    program.inputs = tuple(new(v.aval) for v in jaxpr.invars)
    consts = getattr(closed, "consts", ())
    program.outputs = tuple(inline(jaxpr, consts, program.inputs, source_info_util.new_name_stack()))
    # What nobody reads must not pin what is read.
    program.eqns = [program.eqns[i] for i in sorted(live(program, program.outputs))]
    return program


def _named(effect: Any) -> bool:
    return type(effect).__name__ == "NamedAxisEffect"


def live(program: Program, roots: Iterable[Operand]) -> set[int]:
    """The numbers of the equations that the roots need, or that have effects."""
    needed = {v for v in roots if isinstance(v, int)}
    out = set()
    for i in range(len(program.eqns) - 1, -1, -1):
        eqn = program.eqns[i]
        if eqn.effects or any(v in needed for v in eqn.outs):
            out.add(i)
            needed.update(v for v in eqn.ins if isinstance(v, int))
    return out


@contextmanager
def standing_at(eqn: Eqn):
    """Bind primitives as if in the equation's own place: same module scope, source line and context."""
    stack = source_info_util.current_name_stack() + eqn.stack
    with source_info_util.user_context(eqn.source.traceback, name_stack=stack), eqn.context.manager:
        yield


def bind(eqn: Eqn, params: Mapping[str, Any], values: Sequence[Any]) -> list[Any]:
    """Apply the equation's primitive to values, with these parameters in place of its own."""
    if not eqn.bodies:
        values = varying_alike(values)
    if eqn.name == "pvary":  # only along axes where the value does not differ yet
        params = {**params, "axes": tuple(axis for axis in params["axes"] if axis not in varying(values[0]))}
        if not params["axes"]:
            return list(values)
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(dict(params)))
    return list(out) if eqn.primitive.multiple_results else [out]


def varying_alike(values: Sequence[Any]) -> list[Any]:
    """Inside `shard_map`: values that differ between devices along the same axes, as primitives ask for."""
    axes = [varying(x) for x in values]
    every = frozenset().union(*axes)
    return [
        x if over == every else lax.pcast(x, tuple(sorted(every - over)), to="varying")
        for x, over in zip(values, axes, strict=True)
    ]


@dataclass(frozen=True)
class Wiring:
    """How the operands and results of a call are wired to its programs.

    Attributes:
        ins: for each program the operand that each of its inputs takes.
        outs: for each program the result that each of its outputs gives, None for a loop's condition.
        carried: result -> the operand that it becomes in the next iteration.
        mapped_ins: the operands that are taken step by step, along their leading axis.
        mapped_outs: the results that are collected step by step, along a new leading axis.
    """

    ins: tuple[tuple[int, ...], ...]
    outs: tuple[tuple[int | None, ...], ...]
    carried: Mapping[int, int] = field(default_factory=dict)
    mapped_ins: frozenset[int] = frozenset()
    mapped_outs: frozenset[int] = frozenset()


def wiring(eqn: Eqn) -> Wiring:
    """How an equation that holds programs is wired to them."""
    n, m = len(eqn.ins), len(eqn.outs)
    if eqn.name == "cond":
        return Wiring((tuple(range(1, n)),) * len(eqn.bodies), (tuple(range(m)),) * len(eqn.bodies))
    if eqn.name == "while":
        a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = tuple(range(a + b, n))
        ins = ((*range(a), *carry), (*range(a, a + b), *carry))
        return Wiring(ins, ((None,), tuple(range(m))), {j: a + b + j for j in range(m)})
    ins, outs = (tuple(range(n)),), (tuple(range(m)),)
    if eqn.name == "scan":
        consts, carry = scan_parts(eqn)
        carried = {j: consts + j for j in range(carry)}
        return Wiring(ins, outs, carried, frozenset(range(consts + carry, n)), frozenset(range(carry, m)))
    return Wiring(ins, outs)


# JAX's own functions whose derivative rules follow their results' axes, so that tracing need not look at them.
_FOLLOWING = {"relu", "relu6", "logaddexp", "_sinc_maclaurin"}


def own_rule(eqn: Eqn) -> bool:
    """Whether an equation has a derivative rule that may relate axes in ways that the function itself does not."""
    if eqn.name not in ("custom_jvp_call", "custom_vjp_call"):
        return False
    body = eqn.params["call_jaxpr"]
    info = getattr(getattr(body, "jaxpr", body), "debug_info", None)
    of_jax = f"{os.path.dirname(jax.__file__)}{os.sep}" in str(getattr(info, "func_src_info", ""))
    return eqn.name == "custom_vjp_call" or not of_jax or getattr(info, "func_name", "") not in _FOLLOWING


def scan_parts(eqn: Eqn) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried."""
    if "ft_in" in eqn.params:  # newer versions of JAX, 0.12 among them
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def jvp_program(eqn: Eqn, differentiable: Sequence[int]) -> Program:
    """The derivative rule of a `custom_jvp_call` at its own shapes.

    Inputs are the primals, then a tangent for each operand listed in `differentiable`; outputs are the primal
    results, then their tangents.
    """
    avals = _operand_structs(eqn)

    def rule(primals, tangents):
        return jax.jvp(_some_operands(eqn, primals, differentiable), [primals[i] for i in differentiable], tangents)

    return flatten_program(jax.make_jaxpr(rule)(avals, [avals[i] for i in differentiable]))


def vjp_program(eqn: Eqn, differentiable: Sequence[int]) -> Program:
    """The derivative rule of a `custom_vjp_call` at its own shapes, its forward pass included.

    Inputs are the primals, then a cotangent for each floating-point result; outputs are the cotangents of the operands
    listed in `differentiable`.
    """
    avals = _operand_structs(eqn)
    body = eqn.bodies[0]
    outs = [struct(body.aval(v)) for v in body.outputs]

    def rule(primals, cotangents):
        call = _some_operands(eqn, primals, differentiable)
        _, pull = jax.vjp(call, *(primals[i] for i in differentiable))
        given = iter(cotangents)
        return pull([next(given) if is_float(o) else np.zeros(o.shape, jax.dtypes.float0) for o in outs])

    return flatten_program(jax.make_jaxpr(rule)(avals, [o for o in outs if is_float(o)]))


def _some_operands(eqn: Eqn, primals: Sequence[Any], chosen: Sequence[int]) -> Callable:
    def call(*values):
        full = list(primals)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return bind(eqn, eqn.params, full)

    return call


def _operand_structs(eqn: Eqn) -> list[Any]:
    body = eqn.bodies[0]
    return [struct(body.avals[v]) for v in body.inputs]


def struct(x: Any, shape: Sequence[Any] | None = None) -> jax.ShapeDtypeStruct:
    """Shape (or another one) and dtype of an array as JAX holds it: 64 bits only with x64."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    shape, weak = x.shape if shape is None else tuple(shape), getattr(x, "weak_type", False)
    if not varying(x):
        return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)
    mesh = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())  # JAX takes the axes' names from it
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh, weak_type=weak, manual_axis_type=manual(x))


def manual(x: Any) -> Any:
    """Inside `shard_map`: along which axes an array differs between devices, as JAX's types say it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.manual_axis_type
    return getattr(x if isinstance(x, AbstractValue) else jax.typeof(x), "mat", None)


def varying(x: Any) -> frozenset[str]:
    """The names of the axes along which an array differs between devices."""
    found = manual(x)
    return frozenset() if found is None else found.varying


def is_sized(aval: Any) -> bool:
    """Whether no dimension is symbolic."""
    return all(isinstance(n, int) for n in aval.shape)


def is_key(aval: Any) -> bool:
    """Whether values of this kind are PRNG keys."""
    return bool(jnp.issubdtype(aval.dtype, jax.dtypes.prng_key))


def is_float(aval: Any) -> bool:
    """Whether values of this kind have derivatives."""
    return bool(jnp.issubdtype(aval.dtype, np.inexact))


def path_name(path: Any) -> str:
    """A tree path as `a/b/0`."""
    return keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, in tree order."""
    return {path_name(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def is_array(x: Any) -> bool:
    """Arrays, tracers and shape structs are traced; every other argument leaf is held static."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
