"""The saved state of a search: one Orbax checkpoint a generation, and what it started from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from treesurgeon.search import hosts
from treesurgeon.search.config import RunError

KEPT = 2  # generations that stay on disk


class States:
    """The directory `state/` of a run. Orbax makes each save whole or not at all, also under kill -9."""

    def __init__(self, directory: Path):
        self.directory = directory

    def arrays(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays by name that are made once in a run: a resumed search must start from what it started from before."""
        path = self.directory / name
        if not hosts.together(path.exists):
            made = make()
            names = np.frombuffer(json.dumps(list(made)).encode(), np.uint8)
            _write(path, {"names": names, **{str(i): np.asarray(x) for i, x in enumerate(made.values())}})
        loaded: Any = _read(path)
        try:
            names = json.loads(bytes(np.asarray(loaded["names"])).decode())
            return {name: np.asarray(loaded[str(i)]) for i, name in enumerate(names)}
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} is damaged ({error!r}): move {self.directory} away to start again") from error

    def save(self, generation: int, state: Any) -> None:
        """Save the state after so many generations."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        path = self.directory / f"{generation:06d}"
        hosts.together(lambda: path.exists() and shutil.rmtree(path))
        _write(path, {str(i): leaf for i, leaf in enumerate(leaves)})
        hosts.together(self._forget)

    def latest(self, start: Any) -> Any:
        """The newest saved state, else `start`."""
        saved = hosts.together(self._saved)
        if not saved:
            return start
        loaded: Any = _read(saved[-1])
        leaves, tree = jax.tree.flatten(start)
        if not isinstance(loaded, dict) or loaded.keys() != {str(i) for i in range(len(leaves))}:
            raise RunError(f"{saved[-1]} holds the state of another search: move {self.directory} away")
        found = [np.asarray(loaded[str(i)]) for i in range(len(leaves))]
        for old, new in zip(leaves, found, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise RunError(f"{saved[-1]} holds the state of another search: move {self.directory} away")
        return jax.tree.unflatten(tree, [jax.numpy.asarray(leaf) for leaf in found])

    def _forget(self) -> None:
        for old in self._saved()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _saved(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(p for p in self.directory.iterdir() if p.is_dir() and p.name.isdigit())


def _write(path: Path, tree: Any) -> None:
    """Save with Orbax, from all processes."""
    hosts.check_room(path.parent, tree)
    try:
        ocp.save(str(path), tree)
    except Exception as error:  # Orbax raises many types for a disk that is full or may not be written
        raise RunError(hosts.unwritable(path, error)) from error


def _read(path: Path) -> Any:
    try:
        return ocp.load(str(path))
    except Exception as error:  # Orbax raises many types for a damaged checkpoint
        raise RunError(
            f"{path} cannot be read ({type(error).__name__}): remove it to go on from the generation before"
        ) from error
