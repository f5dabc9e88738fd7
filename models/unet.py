"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with padded convolutions and batch norm: an image to a map."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn


class DoubleConv(nn.Module):
    """Two times convolution, norm, relu.

    Attributes:
        inner: channels of the first convolution.
        width: channels of the second.
    """

    inner: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H, W, width]`."""
        for i, width in enumerate((self.inner, self.width)):
            x = nn.Conv(width, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=f"bn{i}")(x))
        return x


class UNet(nn.Module):
    """`down0`, `down1`, … with max-pools between them; back up by `up…` beside what went down; `out` at each pixel.

    Attributes:
        down: `(inner, width)` at each level, from fine to coarse.
        up: `(upsampled, inner, width)` at each level but the coarsest, from fine to coarse: channels that come from
            below, and those of the two convolutions after they were put behind the level's own.
        num_classes: channels of the map.
        dropout: rate at the coarsest level in training.
    """

    down: tuple[tuple[int, int], ...]
    up: tuple[tuple[int, int, int], ...]
    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H, W, num_classes]`; sides divide by 2 at every level but the finest."""
        skips = []
        for i, (inner, width) in enumerate(self.down):
            if i:
                skips.append(x)
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = DoubleConv(inner, width, name=f"down{i}")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i, (upsampled, inner, width) in reversed(list(enumerate(self.up))):
            x = nn.ConvTranspose(upsampled, (2, 2), strides=(2, 2), padding="VALID", name=f"upsample{i}")(x)
            x = DoubleConv(inner, width, name=f"up{i}")(jnp.concatenate([skips[i], x], axis=-1), train)
        return nn.Conv(self.num_classes, (1, 1), name="out")(x)


def unet(
    num_classes: int = 2,
    down: Sequence[Sequence[int]] = tuple((w, w) for w in (64, 128, 256, 512, 1024)),
    up: Sequence[Sequence[int]] | None = None,
    dropout: float = 0.0,
) -> UNet:
    """Build a `UNet`; the default widths are the paper's.

    Args:
        num_classes: channels of the map.
        down: `(inner, width)` at each level, from fine to coarse.
        up: `(upsampled, inner, width)` at each level but the coarsest; by default the width of the way down, thrice.
        dropout: rate at the coarsest level in training.
    """
    levels = tuple((inner, width) for inner, width in down)
    back = [(width,) * 3 for _, width in levels[:-1]] if up is None else up
    if len(back) != len(levels) - 1:
        raise ValueError(f"unet: {len(levels)} levels down take {len(levels) - 1} up, got {len(back)}")
    return UNet(levels, tuple((u, inner, width) for u, inner, width in back), num_classes, dropout)
