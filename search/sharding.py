"""The dense model split over the devices of a mesh, where it does not fit on each.

A large leaf lies as one vector, of which every device has an equal part; the others are copied. In a program every
equation that reads a leaf first puts it together: that moves numbers and changes none, so results are those of whole
leaves. They are put together one after the other, each when what came of the one before is there
(`engine.splitting.run`): XLA can neither begin by gathering everything nor keep what a later equation reads again. So a
device holds its part of the model, and as a whole what is at work.

What a scan reads is gathered for all its steps: of a model whose layers are stacked for one, all are there at once.

S. Rajbhandari et al.: "ZeRO: memory optimizations toward training trillion parameter models", SC 2020, the third stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

from treesurgeon import engine
from treesurgeon.search.chunking import SHARE_OF_MEMORY
from treesurgeon.search.config import RunError
from treesurgeon.search.mesh import EVERY, P, make_mesh, put, spread
from treesurgeon.search.pool import Shard
from treesurgeon.search.room import memory, size_of

SMALL = 2**12
COPIES = 2  # of the model that are held at once: as it is, and as it was made ready for scoring


@dataclass(frozen=True)
class Laid:
    """A pytree of arrays on the devices of a mesh: `arrays` as they lie, `shapes` as they are when put together."""

    arrays: Any
    shapes: Any


@dataclass(frozen=True)
class Program:
    """A compiled function of values that are `Laid` and of other arguments; `alone`: nothing may run beside it."""

    compiled: Any
    alone: bool

    def __call__(self, values: Laid, *rest: Any) -> Any:
        """Its results; those of a program with collectives are awaited, see `mesh.whole`."""
        found = self.compiled(values.arrays, *rest)
        return jax.block_until_ready(found) if self.alone else found


@dataclass(frozen=True)
class Layout:
    """How what depends on the dense model alone lies on the devices.

    Attributes:
        mesh: the devices.
        split: whether large leaves are split over them; otherwise each device has all of them.
    """

    mesh: Mesh
    split: bool = False

    def parted(self, leaf: Any) -> bool:
        """Whether a leaf is split, by its whole shape."""
        return self.split and leaf.size >= SMALL and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)

    def specs(self, shapes: Any) -> Any:
        """How leaves of these shapes lie."""
        return jax.tree.map(lambda leaf: P(EVERY) if self.parted(leaf) else P(), shapes)

    def put(self, tree: Any) -> Laid:
        """Arrays laid out; each device is sent its own part alone."""

        def one(leaf: Any) -> Any:
            if not self.parted(leaf):
                return put(self.mesh, leaf)
            flat = np.asarray(leaf).reshape(-1)
            filling = self._length(leaf) * self.mesh.size - leaf.size
            return put(self.mesh, np.pad(flat, (0, filling)), P(EVERY))

        return Laid(jax.tree.map(one, tree), jax.eval_shape(lambda tree: tree, tree))

    def once(self, parts: engine.Split, shapes: Any) -> Callable[[Laid], Laid]:
        """`parts.once`, compiled, of variables of these shapes, laid out like them; what it hands on as it is is not
        held twice.
        """
        known = jax.eval_shape(parts.once, shapes)
        fresh = [shape for shape, leaf in zip(known, parts.passed, strict=True) if leaf is None]

        def made(variables: Any) -> list[Any]:
            values = zip(parts.once(variables), parts.passed, strict=True)
            return [self._own(value) for value, leaf in values if leaf is None]

        program = self.program(made, shapes, (), self.specs(fresh))

        def call(variables: Laid) -> Laid:
            leaves, new = jax.tree.leaves(variables.arrays), iter(program(variables) if fresh else ())
            return Laid([next(new) if leaf is None else leaves[leaf] for leaf in parts.passed], known)

        return call

    def program(self, fn: Callable[..., Any], shapes: Any, given: Sequence[PartitionSpec], out: Any) -> Program:
        """`fn(values, …)` on every device of the mesh, compiled once and called with values that are `Laid`.

        Args:
            fn: of values, where a leaf that is split is a function that puts it together, see `engine.splitting.run`.
            shapes: of the values.
            given: how the other arguments lie.
            out: how the results lie.
        """

        def local(arrays: Any, *rest: Any) -> Any:
            return fn(jax.tree.map(self._whole, arrays, shapes), *rest)

        return Program(spread(self.mesh, local, (self.specs(shapes), *given), out), self.split)

    def over(self, fn: Callable[[Any, Any], Any], variables: Any, data: Any) -> Callable[[Any], Any]:
        """`fn(variables, data)` compiled, as a function of the data; where nothing is split, on one device."""
        if not self.split:
            compiled = jax.jit(fn)
            return lambda data: compiled(variables, data)
        parts = engine.split(lambda variables, data, _: fn(variables, data), variables, data, ())
        laid = self.put(variables)
        fixed = self.once(parts, laid.shapes)(laid)

        def whole(fixed: Any, data: Any) -> Any:
            return parts.late(fixed, parts.early(fixed, data), ())

        run = self.program(whole, fixed.shapes, (P(),), P())
        return lambda data: run(fixed, put(self.mesh, data))

    def _whole(self, mine: Array, shape: Any) -> Any:
        """Inside a program: a leaf, or the function that puts it together, see `engine.splitting.run`."""
        if not self.parted(shape):
            return mine

        def gather(after: Any) -> Array:
            part = mine if after is None else _waiting(mine, after)
            return lax.all_gather(part, EVERY, tiled=True)[: shape.size].reshape(shape.shape)

        return gather

    def _own(self, value: Array) -> Array:
        """Inside a program: this device's part of a whole value."""
        if not self.parted(value):
            return value
        each = self._length(value)
        flat = jnp.pad(value.reshape(-1), (0, each * self.mesh.size - value.size))
        return lax.dynamic_slice(flat, (lax.axis_index(EVERY) * each,), (each,))

    def _length(self, leaf: Any) -> int:
        """Numbers of a leaf that each device has; the last device's last one is always filling, see `_waiting`."""
        return leaf.size // self.mesh.size + 1


@custom_vmap
def _waiting(part: Array, after: Array) -> Array:
    """A device's part, which is not there before another value is: on the last device it takes the place of filling.

    An `optimization_barrier` around both would keep XLA from fusing what computes that value, and so change its last
    bits; and XLA drops one from which the part alone is read.
    """
    if not after.size or jnp.issubdtype(after.dtype, jax.dtypes.extended):
        return part
    ours = lax.axis_index(EVERY) == lax.axis_size(EVERY) - 1
    # Setting one entry, XLA would copy the parts of all leaves first.
    filling = ours & (lax.iota(jnp.int32, len(part)) == len(part) - 1)
    return jnp.where(filling, after[(0,) * after.ndim].astype(part.dtype), part)


@_waiting.def_vmap
def _waiting_for_all(_: int, batched: Sequence[bool], part: Array, after: Array) -> tuple[Array, bool]:
    """One of a batch stands for all: the part is the same for each."""
    return _waiting(part, after[0] if batched[1] else after), False


def one_device() -> Layout:
    """The first device alone."""
    return Layout(make_mesh((1, 1)))


def fits(tree: Any) -> bool:
    """Whether every device can have copies of a model, beside the frontiers and the activations of a chunk."""
    room, devices = memory(), jax.local_devices()
    if devices[0].platform == "cpu":  # they share it
        room //= len(devices)
    return COPIES * size_of(tree) <= (1 - 2 * SHARE_OF_MEMORY) * room


def pick_layout(mesh: Mesh, shard: Shard, variables: Any) -> Layout:
    """How a model lies on a mesh: split as asked for, else where it does not fit each device.

    Raises:
        RunError: one device cannot share it with others.
    """
    if shard == "always" and mesh.size == 1:
        raise RunError("--shard always: there is one device, and nothing to split the model over: leave it out")
    return Layout(mesh, mesh.size > 1 and (shard == "always" or (shard == "auto" and not fits(variables))))


def describe_layout(layout: Layout, variables: Any) -> str:
    """Where the model lies, in words; nothing where it fits the only device."""
    whole, count = f"{size_of(variables) / 2**20:.1f} MB", layout.mesh.size
    if layout.split:
        each = sum(
            -(-size_of(leaf) // count) if layout.parted(leaf) else size_of(leaf) for leaf in jax.tree.leaves(variables)
        )
        return (
            f"the model ({whole}) is split over {count} devices, {each / 2**20:.1f} MB on each, while candidates are "
            f"scored (--shard); what comes before and after the search holds all of it in one place"
        )
    if not fits(variables):
        return f"the model ({whole}) may not fit a device beside what candidates need" + (
            ": --shard auto splits it" if count > 1 else "; several devices would share it"
        )
    return f"the model ({whole}) is copied to each of {count} devices (--shard)" if count > 1 else ""
