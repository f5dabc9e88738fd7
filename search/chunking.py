"""How many candidates run as one batch, for the memory there is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from treesurgeon import engine
from treesurgeon.search.room import memory
from treesurgeon.search.subject import Subject

SHARE_OF_MEMORY = 0.2  # for cached frontiers and for a chunk's activations each
MOST_CHUNK = 8


def chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in groups of one size; the last is filled up with its first."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield np.concatenate([part, np.repeat(part[:1], size - len(part))])


def fitting_chunk(subject: Subject, images: int, population: int | None = None) -> int:
    """How many candidates may run as one batch of so many images each, for the memory there is.

    For a population the largest number that wastes least on filling up the last chunk.
    """
    wide = 3 * images * engine.cost(subject.graph, engine.Plan()).activation_bytes  # values between contractions too
    most = int(np.clip(SHARE_OF_MEMORY * memory() / max(wide, 1), 1, MOST_CHUNK))
    if population is None:
        return most
    return min(range(1, most + 1), key=lambda size: (-(-population // size) * size, -size))
