"""One process at a time in a run's directory, which finds it as if none had been killed there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treesurgeon.search.config import RunError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None


# What is written gets its name when it is whole; until then it is .NAME.PID, .selected.RANDOM, or as Orbax has it.
HALF = re.compile(r"\.\w+\.(csv|html|svg|png)\.\d+|\.selected\.\w{8}|.*\.orbax-checkpoint-tmp.*")


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the run of a directory while the block runs; the system lets go of it however the process ends.

    What a process that was killed has left half written is removed first.

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
        sweep(directory)
        yield


def sweep(directory: Path) -> None:
    """Remove what has been left half written in a run's directory and in its `state/`."""
    for path in [*directory.glob("*"), *directory.glob("state/*")]:
        if HALF.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
