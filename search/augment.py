"""Augmentation of batches of images, inside the compiled training step: `augment(key, x)`, x float[N, H, W, C]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array

from treesurgeon.search.config import AugmentName, RunError

Augmentation = Callable[[Array, Array], Array]
SHARE = 8  # an image moves by up to one part in so many of its size: 4 pixels of 32


def flip(key: Array, x: Array) -> Array:
    """Each image mirrored left to right with chance 1/2; arguments as for `flip_crop`."""
    return jnp.where(jax.random.bernoulli(key, shape=(len(x), 1, 1, 1)), x[:, :, ::-1], x)


def flip_crop(key: Array, x: Array) -> Array:
    """Each image mirrored left to right with chance 1/2, and moved by up to an eighth of its size.

    What comes in at the edges is the image reflected. C.-Y. Lee et al.: "Deeply-supervised nets", AISTATS 2015.

    Args:
        key: a PRNG key.
        x: `float[N, H, W, C]`.
    """
    count, height, width, channels = x.shape
    by_height, by_width = max(height // SHARE, 1), max(width // SHARE, 1)
    mirrored, down, across = jax.random.split(key, 3)
    x = flip(mirrored, x)
    padded = jnp.pad(x, ((0, 0), (by_height, by_height), (by_width, by_width), (0, 0)), mode="reflect")
    tops = jax.random.randint(down, (count,), 0, 2 * by_height + 1)
    lefts = jax.random.randint(across, (count,), 0, 2 * by_width + 1)

    def crop(image: Array, top: Array, left: Array) -> Array:
        return jax.lax.dynamic_slice(image, (top, left, 0), (height, width, channels))

    return jax.vmap(crop)(padded, tops, lefts)


AUGMENTATIONS: Mapping[AugmentName, Augmentation | None] = MappingProxyType(
    {"none": None, "flip": flip, "flip-crop": flip_crop}
)


def check_augment(name: AugmentName, input_shape: Sequence[int]) -> None:
    """Refuse to augment what is no image.

    Raises:
        RunError: the inputs are not `[H, W, C]` with at least two rows and columns, or the name is unknown.
    """
    if name not in AUGMENTATIONS:
        raise RunError(f"--augment {name}: expected one of {', '.join(AUGMENTATIONS)}")
    if name != "none" and (len(input_shape) != 3 or min(input_shape[:2]) < 2):
        raise RunError(
            f"--augment {name} changes images [H, W, C] of at least 2 rows and columns, and the model takes "
            f"inputs {list(input_shape)}: leave it out"
        )
