"""Images as a dataset stores them: whether they can be what a model takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treesurgeon.search.sources import DataError, Source


def check_images(where: str, raw: np.ndarray, local: np.ndarray, shape: Sequence[int] | None, unit: bool) -> None:
    """Refuse what cannot be images for the model; `unit`: they are normalised as images in 0 to 1 are."""
    if raw.dtype != np.uint8 and not np.issubdtype(raw.dtype, np.floating):
        raise DataError(
            f"{where}: expected images of dtype uint8 (0 to 255) or floating point, got {raw.dtype}; convert them"
        )
    if raw.ndim != 4 or (shape is not None and raw.shape[1:] != tuple(shape)):
        expected = "[H, W, C]" if shape is None else list(shape)
        raise DataError(
            f"{where}: expected images {expected}, as the model takes them, got {list(raw.shape[1:])}; "
            "resize them, or choose a model of that input"
        )
    finite = np.isfinite(raw).all(axis=(1, 2, 3))
    if not finite.all():
        raise DataError(
            f"{where}: expected finite images, got NaN or infinity in image {local[np.argmin(finite)]} "
            f"({np.sum(~finite)} of {len(raw)} images read together); mend or remove it"
        )
    low, high = (float(raw.min()), float(raw.max())) if raw.size else (0.0, 0.0)
    if raw.dtype != np.uint8 and unit and (low < -0.5 or high > 2):  # resampling overshoots by less
        fix = "store them as uint8, or divide by 255" if low >= 0 else "pass --mean 0 --std 1 if they are normalised"
        raise DataError(
            f"{where}: expected floating-point images in 0 to 1, which are normalised by --mean and --std, got values "
            f"from {low:.3g} to {high:.3g}; {fix}"
        )


def check_scale(where: str, raw: np.ndarray, source: Source) -> None:
    """Refuse bytes that are stored as numbers in one split where another one has bytes: these are scaled to 0..1."""
    if raw.dtype == np.uint8 or not raw.size or raw.min() < 0 or raw.max() <= 2:
        return
    for split, count in source.splits.items():
        if count and source.read_images(split, np.array([0])).dtype == np.uint8:
            raise DataError(
                f"{where}: expected images in 0 to 1, as those of split {split!r} are once their bytes are scaled, got "
                f"floating-point values up to {raw.max():.3g}; store them as uint8, or divide by 255"
            )


def per_channel(
    where: str, mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation as arrays `[C]` or `[1]`."""
    offset, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    fits = all(value.shape in ((1,), (channels,)) for value in (offset, scale))
    if not fits or not (np.isfinite(offset).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise DataError(
            f"{where}: expected --mean and --std of 1 or {channels} finite numbers, --std above 0, got "
            f"{list(mean)} and {list(std)}"
        )
    return offset, scale
