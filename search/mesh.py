"""Many devices as a mesh of candidates × images.

Every device runs the very program that one device would run, on chunks of the same shape: along `candidate` lie chunks
of candidates, along `data` whole batches of images. The host puts together what they find, in the order in which one
device would have found it. So nothing depends on how many devices there are, down to the last bit, as long as a row of
a chunk does not depend on the other rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from treesurgeon.search.config import RunError

CANDIDATE, DATA = "candidate", "data"
EVERY = (CANDIDATE, DATA)  # both axes as one
P = PartitionSpec
COPIED = P()  # on every device


def choose_shape(devices: int, pieces: int, batches: int) -> tuple[int, int]:
    """The shape of a mesh of all devices that takes the fewest steps to show every piece every batch.

    Args:
        devices: how many there are.
        pieces: chunks of candidates in a generation.
        batches: of images.

    Returns:
        Devices along `candidate` and along `data`; of equally fast shapes the one with most of them along `candidate`,
        since there no candidate sees a batch that racing would have spared it.
    """
    shapes = [(devices // d, d) for d in range(1, devices + 1) if devices % d == 0]
    return min(shapes, key=lambda shape: (-(-pieces // shape[0]) * -(-batches // shape[1]), shape[1]))


def parse_shape(text: str) -> tuple[int, int]:
    """`4x2` as (4, 2).

    Raises:
        RunError: it is none.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise RunError(f"--mesh {text}: expected CxD, devices along candidates times devices along images, such as 4x2")
    return int(found[1]), int(found[2])


def make_mesh(shape: tuple[int, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of this shape of the first devices; of all of them where several processes share it.

    Raises:
        RunError: there are not as many.
    """
    devices = jax.devices() if devices is None else devices
    wanted, several = shape[0] * shape[1], jax.process_count() > 1
    if wanted > len(devices) or (several and wanted != len(devices)):
        raise RunError(
            f"--mesh {shape[0]}x{shape[1]} takes {wanted} devices, and there are {len(devices)}"
            f"{', all of which have to be in it' if several else ''}: choose other numbers, or leave it out"
        )
    return Mesh(np.array(devices[:wanted]).reshape(shape), EVERY)


def put(mesh: Mesh, tree: Any, spec: PartitionSpec = COPIED) -> Any:
    """Arrays laid out over the mesh, by default with a copy on each device; every process has them as a whole, or they
    lie so already.
    """
    sharding = NamedSharding(mesh, spec)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(mesh, jax.random.key_data(leaf), spec)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree)


def from_rows(
    mesh: Mesh, row: Callable[[int], np.ndarray], count: int, shape: Sequence[int], spec: PartitionSpec
) -> Array:
    """An array of so many rows of a shape, its first axis laid out by the spec; a process makes its own rows alone."""

    def part(index: Any) -> np.ndarray:
        return np.stack([made(i) for i in range(count)[index[0]]])

    made = cache(row)  # several devices may have the same
    return jax.make_array_from_callback((count, *shape), NamedSharding(mesh, spec), part)


def spread(mesh: Mesh, fn: Callable[..., Any], given: Sequence[PartitionSpec], out: Any) -> Callable[..., Any]:
    """`fn` on every device of the mesh, each with its part of the arguments, compiled once."""
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=tuple(given), out_specs=out, check_vma=False))


def whole(tree: Any) -> Any:
    """Arrays that lie spread over the mesh as NumPy has them, on every process.

    The host puts the parts together, and not a collective of the program: those of virtual devices, which share the
    threads of one CPU, may wait for each other for ever.
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """Arrays that lie spread over the mesh, now with a copy of each on every device."""
    return tree if mesh.size == 1 else put(mesh, whole(tree))


def taking(mesh: Mesh, spec: PartitionSpec) -> Callable[[Any, np.ndarray], Any]:
    """`take(tree, rows)`: these rows of every leaf, laid out by the spec."""
    return jax.jit(
        lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree), out_shardings=NamedSharding(mesh, spec)
    )


def groups(pieces: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Pieces of equal length, so many end to end; the last is filled up with its first piece."""
    out = []
    for start in range(0, len(pieces), size):
        part = list(pieces[start : start + size])
        out.append(np.concatenate(part + part[:1] * (size - len(part))))
    return out
