"""How many candidates run as one batch, for the memory there is."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search.room import memory
from treesurgeon.search.subject import Subject

SHARE_OF_MEMORY = 0.2  # for cached frontiers and for a chunk's activations each
MOST_CHUNK = 8
CACHED = 2**23  # bytes: what a layer of a chunk returns, on a CPU, which gains nothing from larger batches


def chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in groups of one size; the last is filled up with its first."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield np.concatenate([part, np.repeat(part[:1], size - len(part))])


def fitting_chunk(subject: Subject, images: int, population: int | None = None) -> int:
    """How many candidates may run as one batch of so many images each, for the memory there is.

    For a population the largest number that wastes least on filling up the last chunk. On a CPU batches stay small:
    the activations of ResNet-56, for eight candidates at a time, do not stay in its cache, which costs a sixth.
    """
    bytes_ = images * engine.cost(subject.graph, engine.Plan()).activation_bytes
    room = SHARE_OF_MEMORY * memory() / max(3 * bytes_, 1)  # values between contractions too
    if jax.default_backend() == "cpu":
        layers = int(engine.contractions(subject.graph, engine.Plan()))
        room = min(room, CACHED * layers / max(bytes_, 1))
    most = int(np.clip(room, 1, MOST_CHUNK))
    if population is None:
        return most
    return min(range(1, most + 1), key=lambda size: (-(-population // size) * size, -size))
