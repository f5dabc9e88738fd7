"""The one file that knows Flax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta, unfreeze

from treesurgeon.engine.errors import StructureError


class Appliable(Protocol):
    """What is initialised and applied as a linen module is."""

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Random variables."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's output; with `mutable`, and the new values of these collections."""


def from_linen(module: Appliable, variables: Mapping[str, Any], **apply_kwargs: Any) -> tuple[Callable, dict[str, Any]]:
    """A linen module as a pure function of its variables.

    Args:
        module: the module.
        variables: what `module.init` returned, or a checkpoint of it: `{"params": …, "batch_stats": …}`.
        apply_kwargs: keyword arguments that every call passes on to `module.apply` (`train=False`, `method=…`).

    Returns:
        `fn(variables, *args, **kwargs)`, which is `module.apply`, and the variables as plain dicts of arrays.
    """
    params = meta.unbox(unfreeze(dict(variables)))

    def fn(params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return module.apply(params, *args, **{**apply_kwargs, **kwargs})

    return fn, dict(params)


def from_nnx(model: nnx.Module, **call_kwargs: Any) -> tuple[Callable, dict[str, Any]]:
    """An nnx model as a pure function of its variables.

    The model is left as it is; its mode (`model.eval()`, `model.train()`) is the one it has now, and so are its random
    streams: pass `rngs=` to modules that take it for noise of your own.

    Args:
        model: the model; one of `nnx.eval_shape` does for tracing.
        call_kwargs: keyword arguments that every call passes on to it; `method="encode"` calls that method instead.

    Returns:
        `fn(variables, *args, **kwargs)`, and the variables as plain nested dicts, by collection as in linen,
        `{"params": …, "batch_stats": …, "variables": …}` (those there are). With `mutable=True`, or the names of
        collections, `fn` returns `(out, collections after the call)`, as linen's `apply` does.
    """
    if not isinstance(model, nnx.Module):
        raise StructureError(f"from_nnx takes an nnx.Module, got {type(model).__name__}; linen goes through from_linen")
    graphdef, random, *found = nnx.split(model, nnx.RngState, *_COLLECTIONS.values())
    random = jax.tree.map(_seeded, random)
    states = {name: state for name, state in zip(_COLLECTIONS, found, strict=True) if jax.tree.leaves(state)}
    empty = {name: state for name, state in zip(_COLLECTIONS, found, strict=True) if name not in states}

    def fn(params: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        filled = {name: jax.tree.map(lambda x: x, state) for name, state in states.items()}
        for name, state in filled.items():
            nnx.replace_by_pure_dict(state, dict(params[name]))
        at_hand = nnx.merge(
            graphdef, jax.tree.map(lambda x: x, random), *({**filled, **empty}[name] for name in _COLLECTIONS)
        )
        kwargs = {**call_kwargs, **kwargs}
        out = getattr(at_hand, kwargs.pop("method", "__call__"))(*args, **kwargs)
        if not mutable:
            return out
        names = states if mutable is True else [mutable] if isinstance(mutable, str) else mutable
        _, _, *after = nnx.split(at_hand, nnx.RngState, *_COLLECTIONS.values())
        changed = dict(zip(_COLLECTIONS, after, strict=True))
        return out, {name: nnx.to_pure_dict(changed[name]) for name in names if name in states}

    return fn, {name: nnx.to_pure_dict(state) for name, state in states.items()}


def _seeded(x: Any) -> Any:
    """Something in the place of a key or counter of which only the shape is known."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.zeros(x.shape, x.dtype)
    return jax.random.split(jax.random.key(0), x.shape) if x.shape else jax.random.key(0)


_COLLECTIONS: dict[str, Any] = {"params": nnx.Param, "batch_stats": nnx.BatchStat, "variables": ...}
