"""Several processes, one search: all of them run the same host loop, and share the devices; process 0 alone writes.

JAX's multi-controller runtime: every process is started with the same command and computes the same numbers, so that
only what one of them measures, reads or decides alone has to be sent to the others. Everything here does nothing in a
search of one process.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from treesurgeon.engine import TreesurgeonError
from treesurgeon.engine.errors import first_line
from treesurgeon.models.errors import ModelError
from treesurgeon.search.config import RunError

PACKAGES = ("treesurgeon", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
ROOM = 1 << 15  # bytes of what processes compare
BLOCK = 1 << 24  # bytes that are written at once
START_SECONDS = 300  # for all of them to be there
BROKEN = ("Gloo", "gloo", "UNAVAILABLE", "ABORTED", "Connection", "Socket", "NCCL")  # errors of what connects processes
END_SECONDS = 30  # to wait for the others at the end
WAIT = "--xla_cpu_collective_timeout_seconds"  # the half hour of XLA is less than a fine-tuning takes
WAIT_SECONDS = 7 * 24 * 3600

T = TypeVar("T")


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    seconds: int = START_SECONDS,
) -> None:
    """Join the other processes; what is None is read from SLURM's environment, that of TPU pods, or Open MPI's.

    Raises:
        RunError: nothing says where they are, or they are not all there in time.
    """
    if (coordinator is None) != (processes is None) or (processes is None) != (process is None):
        raise RunError("--coordinator, --processes and --process go together: give all three, or none of them")
    if coordinator and not 0 <= (process or 0) < (processes or 0):
        raise RunError(f"--process {process}: expected 0 to {(processes or 0) - 1}, one number for each process")
    flags = os.environ.get("XLA_FLAGS", "")
    if WAIT not in flags:  # it is read when the devices are looked up, which is later
        os.environ["XLA_FLAGS"] = f"{flags} {WAIT}={WAIT_SECONDS}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # where the devices are CPUs
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=seconds,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"--distributed: the processes did not find each other ({first_line(error)}). Give --coordinator "
            f"HOST:PORT (of process 0), --processes N and --process I; without these SLURM, TPU pods and Open MPI are "
            f"recognised"
        ) from error


def lead() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


@contextmanager
def led(held: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Hold what process 0 alone can hold; an error of ours is raised on all processes."""
    with ExitStack() as stack:
        together(lambda: bool(stack.enter_context(held())))
        yield


def together(make: Callable[[], T]) -> T:
    """What process 0 makes, on every process; an error of ours is raised on all of them."""
    if not several():
        return make()
    sent = b""
    if lead():
        with _alone():
            sent = _attempt(make)
    return _result(_broadcast(sent))


def each(make: Callable[[], T]) -> T:
    """What this process makes; where one of them meets an error of ours, all of them raise it."""
    if not several():
        return make()
    out, text = None, ""
    try:
        out = make()
    except (TreesurgeonError, ModelError) as error:
        text = str(error)
    for number, said in enumerate(_gather(text)):
        if said:
            raise RunError(f"process {number}: {said}")
    return out  # pyright: ignore[reportReturnType]


def shared(count: int, make: Callable[[int], T]) -> list[T]:
    """What is made for 0 to count - 1, on every process; each makes its part, all of them at the same time."""
    if not several():
        return [make(i) for i in range(count)]
    with _alone():
        mine = {i: _attempt(lambda i=i: make(i)) for i in range(jax.process_index(), count, jax.process_count())}
    return [_result(_broadcast(mine.get(i, b""), i % jax.process_count())) for i in range(count)]


def agree(what: str, content: Mapping[str, Any]) -> None:
    """Refuse to go on where processes differ.

    Args:
        what: is compared, for the message.
        content: this process's.

    Raises:
        RunError: on every process; it says which entry differs, and where.
    """
    if not several():
        return
    ours = "\n".join(f"{name} = {_short(value)}" for name, value in content.items())
    first, *others = [text.split("\n") for text in _gather(ours)]
    for number, lines in enumerate(others, 1):
        for there, here in zip(first, lines, strict=False):
            if there != here:
                raise RunError(
                    f"{what} differ between the processes of this search: process 0 has {there}, process {number} has "
                    f"{here}. Results would not be the same everywhere: make them alike, and start again"
                )


def check_room(directory: Path, tree: Any) -> None:
    """Refuse to go on, on all processes, where arrays of this size cannot be written.

    Orbax saves from all processes, which wait for each other while they do: one that fails in the middle of it can only
    end, and leave it to the others to notice that.

    Raises:
        RunError: with the reason.
    """
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))

    def write() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory) as file:
                for start in range(0, size, BLOCK):
                    file.write(bytes(min(BLOCK, size - start)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(unwritable(directory, error)) from error

    if several():
        together(write)


def unwritable(path: Path, error: BaseException) -> str:
    """What to say of a place that cannot be written."""
    return (
        f"{path} cannot be written ({type(error).__name__}: {first_line(error)}): make room, or see to the "
        "permissions, and run the same command again to go on"
    )


def versions() -> dict[str, str]:
    """What has to be the same on every host, for the same numbers everywhere."""
    device = jax.local_devices()[0]
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": device.device_kind,
        "devices of a process": str(jax.local_device_count()),
    }


@contextmanager
def watched() -> Iterator[None]:
    """Say what it means when the other processes cannot be reached any more."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # Gloo's errors are of both kinds
        if not several() or not any(word in str(error) for word in BROKEN):
            raise
        raise RunError(
            f"process {jax.process_index()} cannot reach the others any more ({first_line(error)}): one of them has "
            f"ended, its own output says why. Finished generations are saved: start all processes again to go on"
        ) from error


def _alone() -> ocp.Context:
    """In it, Orbax saves and loads as if there were no other process."""
    mine, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host = mine
    context.multiprocessing.active_processes = {mine}
    context.multiprocessing.barrier_sync_key_prefix = f"process{mine}"
    return context


def _attempt(make: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((True, make()))
    except (TreesurgeonError, ModelError) as error:
        return pickle.dumps((False, str(error)))


def _result(sent: bytes) -> Any:
    fine, value = pickle.loads(sent)  # of our own processes
    if not fine:
        raise RunError(value)
    return value


def _broadcast(sent: bytes, source: int = 0) -> bytes:
    mine = jax.process_index() == source
    size = int(multihost_utils.broadcast_one_to_all(np.array([len(sent)], np.int32), mine)[0])
    room = 1 << max(size - 1, 1).bit_length()  # few shapes, few compilations
    padded = np.frombuffer((sent if mine else b"").ljust(room, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded, mine)).astype(np.uint8).tobytes()[:size]


def _gather(text: str) -> list[str]:
    padded = np.frombuffer(text.encode()[:ROOM].ljust(ROOM, b"\0"), np.uint8)
    found = multihost_utils.process_allgather(padded)
    return [bytes(row.astype(np.uint8)).rstrip(b"\0").decode(errors="replace") for row in found]


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:40]}… ({hashlib.sha256(text.encode()).hexdigest()[:12]})"
