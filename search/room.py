"""What memory a device has, and where a model is held as a whole."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

WHOLE = 4  # of a model's size, where it is fitted or trained: its values, gradients, momentum, and what comes of them


def memory() -> int:
    """Bytes of memory that the device has: not what is free now, so that a run that is resumed is cut up alike."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def size_of(tree: Any) -> int:
    """Bytes of a pytree of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def roomy(tree: Any) -> AbstractContextManager[Any]:
    """A context for what needs a whole model in one place: the first device, or the host's processor if that is small.

    What is compiled in it runs there, but for programs that say where they run.
    """
    if WHOLE * size_of(tree) <= memory():
        return nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def give_virtual_devices_threads() -> None:
    """Before JAX looks up its devices: so many threads that virtual ones of the CPU do not wait for each other.

    Their programs share XLA's threads, by default one for each core. In jaxlib 0.10.2 two devices on two cores may wait
    for ever.
    """
    found = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = int(found[1]) if found else 1
    if count > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(4 * count, os.cpu_count() or 1)))
