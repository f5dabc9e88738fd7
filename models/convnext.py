"""ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

# Layers and widths of each stage.
SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
}


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, name=name)


class ConvNeXtBlock(nn.Module):
    """`x + gamma * dense1(gelu(dense0(norm(depthwise(x)))))`.

    Attributes:
        hidden: units between the dense layers.
        drop_path: rate at which training leaves out the branch of an image.
    """

    hidden: int
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to the same shape."""
        width = x.shape[-1]
        pad = ((3, 3), (3, 3))
        y = _norm("norm")(nn.Conv(width, (7, 7), padding=pad, feature_group_count=width, name="depthwise")(x))
        y = nn.gelu(nn.Dense(self.hidden, name="dense0")(y), approximate=False)
        y = nn.Dense(width, name="dense1")(y) * self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)(y)


class ConvNeXt(nn.Module):
    """`stem`; stages of blocks `stage1_0`, …, with `norm1`, `down1`, … between them; pool; norm; head.

    Attributes:
        widths: channels of each stage.
        hidden: for each stage, the hidden units of each of its blocks; 0 leaves a block out and the others keep
            their names.
        num_classes: length of the logits.
        patch: side of a patch of the stem, in pixels.
        drop_path: rate at which training leaves out the last block's branch; it rises evenly from 0 at the first
            (Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382).
        dropout: rate before the head in training.
    """

    widths: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...]
    num_classes: int
    patch: int = 4
    drop_path: float = 0.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        i, last = 0, sum(map(len, self.hidden)) - 1
        for s, (width, hidden) in enumerate(zip(self.widths, self.hidden, strict=True)):
            side = (2, 2) if s else (self.patch, self.patch)
            down = nn.Conv(width, side, strides=side, padding="VALID", name=f"down{s}" if s else "stem")
            x = down(_norm(f"norm{s}")(x)) if s else _norm("norm0")(down(x))
            for b, units in enumerate(hidden):
                if units:
                    x = ConvNeXtBlock(units, self.drop_path * i / max(last, 1), name=f"stage{s + 1}_{b}")(x, train)
                i += 1
        x = _norm("norm")(jnp.mean(x, axis=(1, 2)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="linear")(x)


def convnext(
    size: str = "tiny",
    num_classes: int = 1000,
    widths: Sequence[int] | None = None,
    hidden: Sequence[Sequence[int]] | None = None,
    patch: int = 4,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> ConvNeXt:
    """Build ConvNeXt-T, -S or -B (`size` tiny, small, base), or one of other widths.

    Args:
        size: the published widths and depths.
        num_classes: length of the logits.
        widths: channels of each stage.
        hidden: hidden units of each block of each stage, 0 for a block that is left out; by default 4 times the width.
        patch: side of a patch of the stem, in pixels.
        drop_path: rate at which training leaves out the last block's branch, less for those before it.
        dropout: rate before the head in training.
    """
    if size not in SIZES:
        raise ValueError(f"convnext: size must be one of {', '.join(SIZES)}, got {size!r}")
    depths, channels = SIZES[size]
    channels = channels if widths is None else tuple(widths)
    if hidden is None:
        hidden = [(4 * w,) * n for w, n in zip(channels, depths, strict=True)]
    rows = tuple(tuple(row) for row in hidden)
    if len(rows) != len(channels):
        raise ValueError(f"convnext: hidden takes a row for each of the {len(channels)} widths, got {len(rows)}")
    return ConvNeXt(channels, rows, num_classes, patch, drop_path, dropout)
