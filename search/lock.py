"""One process at a time in a run's directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treesurgeon.search.config import RunError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the run of a directory while the block runs; the system lets go of it however the process ends.

    Raises:
        RunError: another process holds it.
    """
    with (directory / "config.json").open("rb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"another process is at work on the run in {directory}: wait until it is done, stop it and run the "
                    "same command again, or choose another --out"
                ) from None
        yield
