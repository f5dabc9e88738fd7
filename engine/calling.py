"""Functions of pytrees as programs: arrays go in and out flat, and everything that is not an array is held static."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, proxy

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import tree_flatten, tree_flatten_with_path, tree_unflatten

from treesurgeon.engine.jaxprs import Program, flatten_program, is_array, manual, path_name, struct


@dataclass(frozen=True, eq=False)
class Traced:
    """A function as a program: inputs are the parameter leaves, then the array leaves of the other arguments."""

    program: Program
    out_paths: tuple[str, ...]
    out_tree: Any


@dataclass(frozen=True)
class Call:
    """The arguments of one call, arrays apart from what is static."""

    arrays: tuple[Any, ...]
    names: tuple[str, ...]
    key: Hashable
    rebuild: Callable[[Sequence[Any]], tuple[tuple, dict]]


def split_call(args: tuple, kwargs: dict) -> Call:
    """Separate the array leaves of a call's arguments from the rest."""
    leaves, tree = tree_flatten((args, kwargs))
    paths = [path_name(p) for p, _ in tree_flatten_with_path((args, kwargs))[0]]
    chosen = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    static = [None if is_array(leaf) else leaf for leaf in leaves]

    def rebuild(arrays: Sequence[Any]) -> tuple[tuple, dict]:
        full = list(static)
        for i, value in zip(chosen, arrays, strict=True):
            full[i] = value
        return tree_unflatten(tree, full)

    arrays = tuple(leaves[i] for i in chosen)
    try:
        shapes = tuple((np.shape(a), a.dtype, getattr(a, "weak_type", False), manual(a)) for a in arrays)
        key: Hashable = (tree, tuple(chosen), tuple(map(_exact, static)), shapes)
        hash(key)
    except TypeError:
        key = None
    return Call(arrays, tuple(_input_name(paths[i]) for i in chosen), key, rebuild)


def _exact(value: Any) -> Hashable:  # 1 is not True, and 0.0 is not -0.0
    return type(value), value, str(value) if isinstance(value, float) else None


def _input_name(path: str) -> str:
    """`0/2/image` of (args, kwargs) as `args[2]/image`, `1/batch/image` as `batch/image`."""
    kind, _, rest = path.partition("/")
    place, slash, inner = rest.partition("/")
    return rest if kind == "1" else f"args[{place}]{slash}{inner}"


class _Flat:
    """A function over flat lists of arrays, and what was traced of it, by jaxpr; it keeps no function alive."""

    def __init__(self, fn: Callable, tree: Any, call: Call):
        self.fn, self.tree, self.rebuild = fn, tree, call.rebuild
        self.known: WeakKeyDictionary[Any, Traced] = WeakKeyDictionary()
        self.results: tuple[tuple[str, ...], Any] | None = None

    def __call__(self, leaves: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        args, kwargs = self.rebuild(arrays)
        with_paths, out_tree = tree_flatten_with_path(self.fn(tree_unflatten(self.tree, leaves), *args, **kwargs))
        self.results = tuple(path_name(p) for p, _ in with_paths), out_tree
        return [leaf for _, leaf in with_paths]


_FLAT: WeakKeyDictionary[Callable, dict[Hashable, _Flat]] = WeakKeyDictionary()


def _flat_of(fn: Callable, tree: Any, call: Call) -> _Flat:
    """The one flat form of a function for these pytrees, by which JAX knows what it has traced before."""
    if call.key is None:
        return _Flat(fn, tree, call)
    try:
        return _FLAT.setdefault(fn, {}).setdefault((tree, call.key), _Flat(proxy(fn), tree, call))
    except TypeError:  # no hash, or no weak references
        return _Flat(fn, tree, call)


def trace_call(fn: Callable, params: Any, call: Call) -> Traced:
    """Trace `fn(params, …)` to a program at the shapes of `params` and of the call; like `jax.jit`, only once."""
    leaves, tree = tree_flatten(params)
    structs = [struct(leaf) if is_array(leaf) else struct(np.asarray(leaf)) for leaf in leaves]
    arrays = [struct(a) for a in call.arrays]
    flat = _flat_of(fn, tree, call)
    flat.results = None
    closed = jax.make_jaxpr(flat)(structs, arrays)
    if closed.jaxpr in flat.known:
        return flat.known[closed.jaxpr]
    if (results := flat.results) is None:  # JAX knows a trace that was not kept here, or another thread makes one
        flat = _Flat(fn, tree, call)
        closed, results = jax.make_jaxpr(flat)(structs, arrays), flat.results
    assert results is not None
    traced = Traced(flatten_program(closed), *results)
    if concrete(traced.program):
        flat.known[closed.jaxpr] = traced
    return traced


def concrete(program: Program) -> bool:
    """Whether the program can be kept: nothing in it belongs to a trace that is under way."""
    return not any(isinstance(c, Tracer) for c in program.consts.values()) and all(
        concrete(body) for e in program.eqns for body in e.bodies
    )
