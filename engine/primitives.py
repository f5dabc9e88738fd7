"""Primitives of our own, for what `gate` cannot say with JAX's: they are the identity, or a mask, when they run.

`fence` acts on derivatives alone, so a program that takes none does not hold it once it is compiled. `readable` says
which entries of a kernel may be read under masks: for one plan those that it keeps; for a population, whose masks are
stacked, those that are finite, since the kernel has to stay one array for all. `forward_only` refuses derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from treesurgeon.engine.errors import NarrowError


def fence(x: Any, mask: Any, dims: tuple[int, ...]) -> Any:
    """`x` as it is; its tangents and cotangents are zero where `mask` is False along `dims`."""
    return fence_p.bind(x, mask, along=dims)


def readable(kernel: Any, kept: Any, summed: Any, dims: tuple[tuple[int, ...], ...]) -> tuple[Any, Any]:
    """Which entries of a kernel may be read, and which of its results read an entry that they should not.

    Args:
        kernel: any shape.
        kept: which entries are kept, along the first of `dims`.
        summed: which positions of the summed axes are kept, along the second of `dims`.
        dims: the third are the axes of the kernel that its results keep, in their order there.

    Returns:
        bool in the kernel's shape; bool in the shape of the third of `dims`, False for one plan, which has nothing
        that is kept taken away.
    """
    keep, bad = readable_p.bind(kernel, kept, summed, along=dims)
    return keep, bad


def forward_only(x: Any, why: str) -> Any:
    """`x` as it is; its derivative is an error that says why."""
    return forward_only_p.bind(x, why=why)


def spread(x: Any, shape: Sequence[Any], dims: Sequence[int]) -> Any:
    """`x` broadcast to a shape, unless it has it."""
    same = tuple(dims) == tuple(range(len(shape))) and x.shape == tuple(shape)
    return x if same else lax.broadcast_in_dim(x, tuple(shape), tuple(dims))


def _fence_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, along: tuple[int, ...]) -> tuple[Any, Any]:
    x, mask = primals
    return fence_p.bind(x, mask, along=along), _fenced(tangents[0], mask, along)


def _fence_transposed(cotangent: Any, x: Any, mask: Any, *, along: tuple[int, ...]) -> list[Any]:
    """For derivative rules of functions under masks, in which tangents are fenced."""
    assert ad.is_undefined_primal(x)
    return [_fenced(cotangent, mask, along), None]


def _fenced(derivative: Any, mask: Any, along: tuple[int, ...]) -> Any:
    if isinstance(derivative, ad.Zero):
        return derivative
    return lax.select(spread(mask, derivative.shape, along), derivative, jnp.zeros_like(derivative))


def _leading(x: Any, dim: int | None, size: int) -> Any:
    """The operand with its batch axis in front."""
    return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)


def _fence_batched(operands: Sequence[Any], where: Sequence[Any], *, along: tuple[int, ...]) -> tuple[Any, int]:
    x, mask = operands
    size = next(o.shape[d] for o, d in zip(operands, where, strict=True) if d is not None)
    x = _leading(x, where[0], size)
    behind = tuple(d + 1 for d in along)
    if where[1] is None:
        return fence_p.bind(x, mask, along=behind), 0
    return fence_p.bind(x, jnp.moveaxis(mask, where[1], 0), along=(0, *behind)), 0


fence_p = Primitive("fence")
fence_p.def_impl(lambda x, mask, *, along: x)
fence_p.def_abstract_eval(lambda x, mask, *, along: x)
ad.primitive_jvps[fence_p] = _fence_jvp
ad.primitive_transposes[fence_p] = _fence_transposed
batching.primitive_batchers[fence_p] = _fence_batched
mlir.register_lowering(fence_p, lambda ctx, x, mask, *, along: [x])


def _of_one(kernel: Any, kept: Any, summed: Any, *, along: tuple[tuple[int, ...], ...]) -> tuple[Any, Any]:
    every, _, left = along
    return spread(kept, kernel.shape, every), jnp.zeros(tuple(kernel.shape[d] for d in left), bool)


def _of_many(kernel: Any, summed: Any, at: int | None, dims: tuple[tuple[int, ...], ...]) -> tuple[Any, Any]:
    """For masks that are stacked: the entries that are finite, the same for all."""
    _, inner, left = dims
    finite = jnp.isfinite(kernel)

    def bad(summed: Any) -> Any:
        wrong = ~finite & spread(summed, kernel.shape, inner)
        found = lax.reduce_or(wrong, tuple(d for d in range(kernel.ndim) if d not in left))
        return found.transpose([sorted(left).index(d) for d in left])

    return finite, bad(summed) if at is None else jax.vmap(bad, at)(summed)


def _readable_batched(operands: Sequence[Any], where: Sequence[Any], *, along: Any) -> tuple[Any, Any]:
    kernel, kept, summed = operands
    if where[0] is None:
        return _of_many(kernel, summed, where[2], along), (None, None if where[2] is None else 0)
    return jax.vmap(partial(_of_one, along=along), where)(kernel, kept, summed), (0, 0)


def _readable_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, along: Any) -> tuple[Any, Any]:
    out = readable_p.bind(*primals, along=along)
    return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]


def _readable_aval(kernel: Any, kept: Any, summed: Any, *, along: tuple[tuple[int, ...], ...]) -> tuple[Any, Any]:
    keep = kernel.update(dtype=np.dtype(bool), weak_type=False)
    return keep, keep.update(shape=tuple(kernel.shape[d] for d in along[2]))


readable_p = Primitive("readable")
readable_p.multiple_results = True
readable_p.def_impl(_of_one)
readable_p.def_abstract_eval(_readable_aval)
ad.primitive_jvps[readable_p] = _readable_jvp
batching.primitive_batchers[readable_p] = _readable_batched
mlir.register_lowering(readable_p, mlir.lower_fun(_of_one, multiple_results=True))


def _refuse(primals: Sequence[Any], tangents: Sequence[Any], *, why: str) -> Any:
    if isinstance(tangents[0], ad.Zero):
        return forward_only_p.bind(*primals, why=why), tangents[0]
    raise NarrowError(why)


forward_only_p = Primitive("forward_only")
forward_only_p.def_impl(lambda x, *, why: x)
forward_only_p.def_abstract_eval(lambda x, *, why: x)
ad.primitive_jvps[forward_only_p] = _refuse
batching.primitive_batchers[forward_only_p] = lambda xs, where, *, why: (forward_only_p.bind(*xs, why=why), where[0])
mlir.register_lowering(forward_only_p, lambda ctx, x, *, why: [x])
