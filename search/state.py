"""The saved state of a search: one Orbax checkpoint a generation, and the ranking that the space was built from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from treesurgeon.search.config import RunError
from treesurgeon.search.evolve import State

KEPT = 2  # generations that stay on disk


class States:
    """The directory `state/` of a run. Orbax makes each save whole or not at all, also under kill -9."""

    def __init__(self, directory: Path):
        self.directory = directory

    def scores(self, make: Callable[[], Mapping[str, np.ndarray]], graph: Any) -> dict[str, np.ndarray]:
        """The units' scores of this run, made once: a resumed search must rank units just as it did before."""
        path = self.directory / "scores"
        if not path.exists():
            made = make()
            ocp.save(str(path), {str(i): np.asarray(made[name]) for i, name in enumerate(graph.groups)})
        loaded: Any = _read(path)
        return {name: np.asarray(loaded[str(i)]) for i, name in enumerate(graph.groups)}

    def save(self, generation: int, state: State) -> None:
        """Save the state after so many generations."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        path = self.directory / f"{generation:06d}"
        if path.exists():
            shutil.rmtree(path)
        ocp.save(str(path), {str(i): leaf for i, leaf in enumerate(leaves)})
        for old in self._saved()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, start: State) -> State:
        """The newest saved state, else `start`."""
        saved = self._saved()
        if not saved:
            return start
        loaded: Any = _read(saved[-1])
        leaves, tree = jax.tree.flatten(start)
        found = [np.asarray(loaded[str(i)]) for i in range(len(leaves))]
        for old, new in zip(leaves, found, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise RunError(f"{saved[-1]} holds the state of another search: move {self.directory} away")
        return jax.tree.unflatten(tree, [jax.numpy.asarray(leaf) for leaf in found])

    def _saved(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(p for p in self.directory.iterdir() if p.is_dir() and p.name.isdigit())


def _read(path: Path) -> Any:
    try:
        return ocp.load(str(path))
    except Exception as error:  # Orbax raises many types for a damaged checkpoint
        raise RunError(
            f"{path} cannot be read ({type(error).__name__}): remove it to go on from the generation before"
        ) from error
