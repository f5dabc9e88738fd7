"""A model as StableHLO: it runs anywhere XLA does, without the model's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax import export

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(fn: Callable, shape: Sequence[int], dtype: Any = "float32", gradient: bool = True) -> bytes:
    """Serialise `fn(x)` for `x` of `shape` behind a batch axis of any size, by default with its first derivative.

    Read it back with `jax.export.deserialize(data).call(x)`.
    """
    (batch,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, *shape), dtype)
    with _without_paths():
        exported = export.export(jax.jit(fn), platforms=PLATFORMS)(x)
        return bytes(exported.serialize(vjp_order=int(gradient)))


@contextmanager
def _without_paths() -> Iterator[None]:
    """Operations keep the names of their modules, and forget in which file of this machine they were written."""
    wanted = {"jax_hlo_source_file_canonicalization_regex": ".*", "jax_include_full_tracebacks_in_locations": False}
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
