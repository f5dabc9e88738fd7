"""Images that stay on disk: read, decoded and normalised when they are needed, the next ones while these are used.

`Streamed` stands where the array of all images of a role would, and reads what is asked of it; `Feed` is the same cut
into batches. Decoding is done by processes, which open the dataset themselves; they are started once, at the first use.
What comes out is the array's content, bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np

from treesurgeon.search.digests import image_digest
from treesurgeon.search.sources import Address, DataError, Source

READERS = 16  # processes at most; no more than there are cores
PIECE = 8  # images that a process decodes before it takes others
SHARE_OF_MEMORY = 1 / 16  # for the images of a role, of which there are four

K = TypeVar("K")
V = TypeVar("V")


def room() -> int:
    """Bytes of images of one role that are held in memory by default."""
    return int(SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def normalised(raw: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Images as stored, `[n, H, W, C]` or `[n, H, W]`, as models take them: float32, uint8 scaled to 0..1 first."""
    raw = raw[..., None] if raw.ndim == 3 else raw
    unit = raw.astype(np.float32) / 255 if raw.dtype == np.uint8 else raw.astype(np.float32)
    return (unit - offset) / scale


@dataclass(frozen=True, eq=False)
class Streamed:
    """The images of a role, `[N, H, W, C]` float32 and normalised, as an array that is read where it is indexed.

    Attributes:
        address: of the dataset.
        splits: its splits that the images are from, with their sizes, end to end.
        indices: `[N]`, positions in them.
        image_shape: `(H, W, C)`.
        offset, scale: subtracted, and divided by, for each channel.
    """

    address: Address
    splits: tuple[tuple[str, int], ...]
    indices: np.ndarray
    image_shape: tuple[int, ...]
    offset: np.ndarray
    scale: np.ndarray

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return (len(self.indices), *self.image_shape)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Any) -> np.ndarray:
        chosen = self.indices[rows]
        places, back = np.unique(chosen, return_inverse=True)
        out = np.empty((len(places), *self.image_shape), np.float32)
        start, pieces = 0, []
        for split, size in self.splits:
            inside = np.flatnonzero((places >= start) & (places < start + size))
            pieces += [(split, places[at] - start, at) for at in _pieces(inside)]
            start += size
        decoded = _decoded(self.address, [piece[:2] for piece in pieces], _images)
        for (_, _, at), raw in zip(pieces, decoded, strict=True):
            out[at] = normalised(raw, self.offset, self.scale)
        return out[back.reshape(np.shape(chosen))]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


@dataclass(frozen=True, eq=False)
class Feed:
    """Streamed images in batches: `feed[i]` reads one, `[b, H, W, C]`; a loop over it reads ahead.

    Attributes:
        images: all of them.
        rows: `[B, b]`, those of each batch.
    """

    images: Streamed
    rows: np.ndarray

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all batches, stacked."""
        return (*self.rows.shape, *self.images.image_shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images[self.rows[i]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return in_turn(self.images.__getitem__, list(self.rows))


def joined(one: np.ndarray | Streamed, other: np.ndarray | Streamed) -> np.ndarray | Streamed:
    """Images of two roles of the same splits, end to end."""
    if isinstance(one, Streamed) and isinstance(other, Streamed):
        return replace(one, indices=np.concatenate([one.indices, other.indices]))
    return np.concatenate([one, other])


def tail(images: np.ndarray | Streamed, start: int) -> np.ndarray | Streamed:
    """Images from one on; those that are on disk stay there."""
    return replace(images, indices=images.indices[start:]) if isinstance(images, Streamed) else images[start:]


class Ahead(Generic[K, V]):
    """A function whose next value is made while the last one is used.

    Attributes:
        waited: seconds that callers had to wait for values.
    """

    def __init__(self, make: Callable[[K], V]):
        self._make, self.waited = make, 0.0
        self._thread = ThreadPoolExecutor(1)
        self._begun: tuple[K, Future[V]] | None = None

    def __call__(self, key: K, then: K | None = None) -> V:
        """`make(key)`; after that `make(then)` is begun."""
        start = time.perf_counter()
        mine = self._begun and self._begun[0] == key and self._begun[1]
        value = (mine or self._thread.submit(self._make, key)).result()
        self._begun = None if then is None else (then, self._thread.submit(self._make, then))
        self.waited += time.perf_counter() - start
        return value


def in_turn(read: Callable[[np.ndarray], V], rows: Sequence[np.ndarray]) -> Iterator[V]:
    """`read(rows[0])`, `read(rows[1])`, …, each made while the one before is used."""
    ahead: Ahead[int, V] = Ahead(lambda i: read(rows[i]))
    for i in range(len(rows)):
        yield ahead(i, i + 1 if i + 1 < len(rows) else None)


def read_stored(source: Source, split: str, indices: np.ndarray, apart: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images as stored `[n, H, W, C]`, and their digests, `uint64[n]`.

    Args:
        source: the dataset.
        split, indices: where the images are.
        apart: whether several processes decode them.
    """
    if not apart:
        return _stored(source, split, indices)
    assert source.address
    pieces = [(split, indices[at]) for at in _pieces(np.arange(len(indices)))]
    found, digests = zip(*_decoded(source.address, pieces, _stored), strict=True)
    shapes = sorted({raw.shape[1:] for raw in found})
    if len(shapes) > 1:  # each process has seen its own alone
        raise DataError(
            f"data {source.spec!r}: expected images of one shape in split {split!r}, got "
            f"{', '.join(map(str, map(list, shapes[:4])))}; resize them when the dataset is prepared"
        )
    return np.concatenate(found), np.concatenate(digests)


def _stored(source: Source, split: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = source.read_images(split, indices)
    raw = raw[..., None] if raw.ndim == 3 else raw
    if source.read_digests:
        return raw, source.read_digests(split, indices)
    return raw, np.array([image_digest(image) for image in raw], np.uint64)


def _pieces(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)]


def _decoded(
    address: Address, pieces: Iterable[tuple[str, np.ndarray]], read: Callable[[Source, str, np.ndarray], V]
) -> Iterator[V]:
    """What is read of each piece, in order."""
    readers = _readers()
    try:
        waiting = [readers.submit(_read, read, address, split, indices) for split, indices in pieces]
        for each in waiting:
            yield each.result()
    except BrokenProcessPool as error:
        _readers.cache_clear()
        raise DataError(
            f"data {address.spec!r}: a process that decodes images has ended; if it ran out of memory, make room. A "
            "script that starts a search has to do so under `if __name__ == '__main__':`, as these processes import it"
        ) from error


@cache
def _readers() -> ProcessPoolExecutor:
    count = min(READERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # Not by forking: threads of JAX would be left behind with what they hold.
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_follow)


def _follow() -> None:
    """A reader leaves Ctrl-C to the process that started it, and ends with that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


_opened = cache(Address.open)


def _read(read: Callable[[Source, str, np.ndarray], V], address: Address, split: str, indices: np.ndarray) -> V:
    return read(_opened(address), split, indices)


def _images(source: Source, split: str, indices: np.ndarray) -> np.ndarray:
    return source.read_images(split, indices)
