"""Masks where they are needed: selects under `gate`, each mask, broadcast and result made once.

`Alive` says the same of blocks: whether something that is needed inside some of them is needed at all.

A removed position is replaced by `select`, never by a product: 0 × inf is NaN. What is read in derivatives alone is
fenced (see primitives.py), which costs a program that takes none nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treesurgeon.engine.axes import Axis
from treesurgeon.engine.jaxprs import is_float
from treesurgeon.engine.masks import alive, axis_count, axis_key, axis_mask
from treesurgeon.engine.primitives import fence, readable
from treesurgeon.engine.solve import Divisor


class Guard(NamedTuple):
    """What is guarded against besides values of removed units: their derivatives, and kernels that are not finite."""

    gradients: bool = True
    nonfinite: bool = True


ALL = Guard()


class Selects:
    """Selects under the masks `units`, shared where the same one is asked for again.

    What is shared belongs to one trace and to one context in it (see `within`).
    """

    def __init__(self, units: Mapping[str, Any], guard: Guard = ALL):
        self.units = units
        self.gradients = guard.gradients
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

    def fence(self, x: Any, axes: Mapping[int, Axis], on: Any = None) -> Any:
        """`x` as it is, with derivatives that are zero where `clear` would put `fill`."""
        found = self.joint(axes, on) if self.gradients and is_float(x) else None
        if found is None:
            return x
        mask, dims = found
        return self._once(("fence", id(x), id(mask), dims), (x, mask), lambda: fence(x, mask, dims))

    def spoil(self, x: Any, bad: Any, dims: Sequence[int]) -> Any:
        """`x`, and NaN where `bad` is True along `dims`."""
        return lax.select(self.spread(bad, x.shape, dims), lax.full_like(x, np.nan), x)

    def readable(
        self, kernel: Any, axes: Mapping[int, Axis], summed: Sequence[int], left: tuple[int, ...]
    ) -> tuple[Any, Any]:
        """A kernel with zeros where it must not be read, and which results read what is not finite and kept.

        Args:
            kernel: the kernel.
            axes: its axes (dimension -> axis).
            summed: the dimensions that are summed.
            left: the others, in the order that results have them.
        """
        inner = {d: axes[d] for d in summed}
        # What results do not keep is read by derivatives only.
        kept, reads = self.joint(axes if self.gradients else inner, None), self.joint(inner, None)
        if kept is None:
            return kernel, None

        def make() -> tuple[Any, Any]:
            mask, dims = reads or (jnp.ones((), bool), ())
            keep, bad = readable(kernel, kept[0], mask, (kept[1], dims, left))
            return self.select(keep, range(kernel.ndim), kernel, 0), bad

        key = ("readable", id(kernel), id(kept[0]), None if reads is None else id(reads[0]), left)
        return self._once(key, (kernel, kept, reads), make)


class Alive:
    """`alive` of a set of contexts, computed once for each; None stays None."""

    def __init__(self, bits: Mapping[int, Any]):
        self.bits = bits
        self.known: dict[Any, Any] = {}

    def __call__(self, contexts: Any) -> Any:
        """Whether all blocks of one of the contexts are kept."""
        if contexts is None:
            return None
        if contexts not in self.known:
            self.known[contexts] = alive(contexts, self.bits)
        return self.known[contexts]
