"""Masks where they are needed: selects under `gate`, each mask, broadcast and result made once.

A removed position is replaced by `select`, never by a product: 0 × inf is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treesurgeon.engine.axes import Axis
from treesurgeon.engine.masks import axis_count, axis_key, axis_mask
from treesurgeon.engine.solve import Divisor


class Selects:
    """Selects under the masks `units`, shared where the same one is asked for again.

    What is shared belongs to one trace and to one context in it (see `within`).
    """

    def __init__(self, units: Mapping[str, Any]):
        self.units = units
        self.context: Any = None
        self.masks: dict[int, tuple[Axis, Any]] = {}
        self.known: dict[Hashable, tuple[Any, Any]] = {}

    def within(self, context: Any) -> None:
        """Share nothing with what was made in another context: on another device, under another mesh."""
        if context is not self.context:
            self.known.clear()
            self.masks.clear()
            self.context = context

    def _once(self, key: Hashable, holds: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key; `holds` keeps alive what the key names by its id."""
        if key not in self.known:
            self.known[key] = (holds, make())
        return self.known[key][1]

    def mask(self, axis: Axis) -> Any:
        """The kept positions of an axis, None where nothing can be removed."""
        if id(axis) not in self.masks:
            mask = self._once(("mask", axis_key(axis)), None, lambda: axis_mask(axis, self.units, jnp))
            self.masks[id(axis)] = (axis, mask)
        return self.masks[id(axis)][1]

    def masked(self, axes: Sequence[Axis]) -> bool:
        """Whether a mask acts on one of the axes."""
        return any(self.mask(axis) is not None for axis in axes)

    def divisor(self, divisor: Divisor, dtype: Any) -> Any:
        """The divisor of a mean at the kept number of positions."""

        def make() -> Any:
            count: Any = 1
            for axis in divisor.axes:
                count = count * axis_count(axis, self.units)
            value = jnp.asarray(count - divisor.ddof).astype(dtype)
            return 1 / value if divisor.inverse else value

        axes = tuple(map(axis_key, divisor.axes))
        return self._once(("divisor", axes, divisor.ddof, divisor.inverse, dtype), None, make)

    def joint(self, axes: Mapping[int, Axis], on: Any) -> tuple[Any, tuple[int, ...]] | None:
        """One mask for several axes (dimension -> axis) and for whether a block is on; its dimensions."""
        masks = {d: mask for d in sorted(axes) if (mask := self.mask(axes[d])) is not None}
        if not masks:
            return None if on is None else (on, ())
        dims = tuple(masks)

        def make() -> Any:
            out = on
            for k, mask in enumerate(masks.values()):
                mask = mask.reshape(*(-1 if j == k else 1 for j in range(len(dims))))
                out = mask if out is None else out & mask
            return out

        key = ("joint", *(id(mask) for mask in masks.values()), id(on))
        return self._once(key, (masks, on), make), dims

    def spread(self, x: Any, shape: Sequence[Any], dims: Sequence[int]) -> Any:
        """`x` broadcast to a shape."""
        key = ("spread", id(x), tuple(shape), tuple(dims))
        return self._once(key, x, lambda: lax.broadcast_in_dim(x, tuple(shape), tuple(dims)))

    def select(self, mask: Any, dims: Sequence[int], x: Any, fill: Any) -> Any:
        """`x` where the mask is True along `dims`, else `fill`."""
        full = self._once(("full", jax.typeof(x), repr(fill)), None, lambda: lax.full_like(x, fill))
        if np.ndim(mask) not in (0, np.ndim(x)):
            mask = self.spread(mask, np.shape(x), dims)
        return lax.select(mask, x, full)

    def clear(self, x: Any, axes: Mapping[int, Axis], fill: Any, on: Any = None) -> Any:
        """`x` with `fill` at the removed positions of `axes` (dimension -> axis), and everywhere if `on` is False."""
        found = self.joint(axes, on)
        if found is None:
            return x
        mask, dims = found
        key = ("clear", id(x), id(mask), dims, repr(fill))
        return self._once(key, (x, mask), lambda: self.select(mask, dims, x, fill))

    def settle(self, x: Any, axes: Mapping[int, Axis], on: Any, bad: Any, bad_dims: tuple[int, ...]) -> Any:
        """`x` cleared, and NaN where `bad` is True along `bad_dims`."""
        found = self.joint(axes, on)
        if found is None or not set(found[1]) <= set(bad_dims):
            return self.clear(self.select(~bad, bad_dims, x, np.nan), axes, 0, on)
        mask, dims = found
        kept = self.spread(mask, bad.shape, tuple(bad_dims.index(d) for d in dims))
        fill = lax.select(kept & bad, *(jnp.full(bad.shape, value, x.dtype) for value in (np.nan, 0)))
        keep = lax.broadcast_in_dim(kept & ~bad, x.shape, bad_dims)
        return lax.select(keep, x, lax.broadcast_in_dim(fill, x.shape, bad_dims))

    def finite(self, kernel: Any, axes: Mapping[int, Axis], out_of: Mapping[int, int]) -> tuple[Any, Any]:
        """A kernel with zeros for entries that are not finite, and where results read those through kept units.

        `axes` are the axes of the kernel that are summed; the second result's are the others, in the order that
        `out_of` gives them.
        """
        found = self.joint(axes, None)

        def make() -> tuple[Any, Any]:
            finite = jnp.isfinite(kernel)
            wrong = ~finite
            if found is not None:
                wrong = wrong & self.spread(found[0], kernel.shape, found[1])
            kept = sorted(out_of)
            bad = lax.reduce_or(wrong, tuple(d for d in range(kernel.ndim) if d not in out_of))
            order = sorted(range(len(kept)), key=lambda k: out_of[kept[k]])
            bad = bad if order == sorted(order) else bad.transpose(order)
            return self.select(finite, range(kernel.ndim), kernel, 0), bad

        key = ("finite", id(kernel), None if found is None else (id(found[0]), found[1]), tuple(sorted(out_of.items())))
        return self._once(key, (kernel, found), make)
