"""Swin transformers (Liu et al. 2021, "Hierarchical Vision Transformer using Shifted Windows", arXiv:2103.14030).

Attention runs inside windows of the feature map, which every second layer shifts by half a window; a learnt bias for
each relative position, and head, is added to the logits. Sides of the feature maps must divide by the window.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from treesurgeon.models.attention import MLP

# Width of the first stage and layers of each; 32 units a head, heads and widths double from stage to stage.
SIZES = {"tiny": (96, (2, 2, 6, 2)), "small": (96, (2, 2, 18, 2)), "base": (128, (2, 2, 18, 2))}

Array = TypeVar("Array", jax.Array, np.ndarray)


class WindowWidths(NamedTuple):
    """The widths of one layer; 0 heads leave its attention out, 0 hidden units its MLP.

    Attributes:
        heads: attention heads.
        units: of a query, of a key and of a value, for each head.
        hidden: units between the two dense layers of the MLP.
    """

    heads: int
    units: int
    hidden: int


def windows(x: Array, side: int) -> Array:
    """Cut maps `[N, H, W, ...]` into windows `[N, H/side * W/side, side * side, ...]`."""
    n, h, w, *rest = x.shape
    x = x.reshape((n, h // side, side, w // side, side, *rest)).swapaxes(2, 3)
    return x.reshape((n, (h // side) * (w // side), side * side, *rest))


def relative_positions(side: int) -> np.ndarray:
    """`[side², side²]`: the number, below `(2 side - 1)²`, of the offset from one position of a window to another."""
    rows, columns = np.divmod(np.arange(side * side), side)
    return (rows[:, None] - rows + side - 1) * (2 * side - 1) + columns[:, None] - columns + side - 1


def visible(height: int, width: int, side: int, shift: int) -> np.ndarray:
    """`[windows, side², side²]`: whether two positions of a shifted window were neighbours before the shift."""
    rows, columns = (np.digitize(np.arange(n), [n - side, n - shift]) for n in (height, width))
    region = windows((rows[:, None] * 3 + columns)[None], side)[0]
    return region[:, :, None] == region[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a bias for each relative position.

    Attributes:
        heads: attention heads.
        units: of a query, of a key and of a value, for each head.
        scale: factor on the logits, `units ** -0.5` in a dense model.
        side: of a window.
        shift: of the windows, down and to the right.
    """

    heads: int
    units: int
    scale: float
    side: int
    shift: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, D]` to the same shape."""
        n, h, w, width = x.shape
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
        qkv = nn.DenseGeneral((3, self.heads, self.units), name="qkv")(windows(x, self.side))
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        logits = jnp.einsum("nwqhd,nwkhd->nwhqk", query, key) * self.scale
        table = self.param("bias", nn.initializers.normal(0.02), ((2 * self.side - 1) ** 2, self.heads))
        logits = logits + jnp.transpose(table[relative_positions(self.side)], (2, 0, 1))
        if self.shift:
            seen = visible(h, w, self.side, self.shift)[:, None]
            logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
        y = jnp.einsum("nwhqk,nwkhd->nwqhd", nn.softmax(logits), value)
        y = nn.DenseGeneral(width, axis=(-2, -1), name="out")(y)
        y = y.reshape((n, h // self.side, w // self.side, self.side, self.side, width))
        y = y.swapaxes(2, 3).reshape((n, h, w, width))
        return jnp.roll(y, (self.shift, self.shift), axis=(1, 2)) if self.shift else y


class SwinLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Attributes:
        widths: of the attention and of the MLP.
        scale: factor on the attention logits.
        side: of a window; a map no larger than that is one window.
        shifted: the windows are shifted by half their side.
        dropout: rate in training.
        drop_path: rate at which training leaves out a branch of an image.
    """

    widths: WindowWidths
    scale: float
    side: int
    shifted: bool
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, D]` to the same shape."""
        heads, units, hidden = self.widths
        side = min(self.side, *x.shape[1:3])
        shift = side // 2 if self.shifted and side < min(x.shape[1:3]) else 0
        path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)
        if heads:
            y = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)
            y = WindowAttention(heads, units, self.scale, side, shift, name="attention")(y)
            x = x + path(nn.Dropout(self.dropout, deterministic=not train)(y))
        if hidden:
            y = nn.LayerNorm(epsilon=1e-5, name="norm2")(x)
            x = x + path(MLP(hidden, self.dropout, name="mlp")(y, train))
        return x


class Swin(nn.Module):
    """`patch`; stages of layers `stage1_0`, …, with `norm1`, `down1`, … between them; norm; pool; head.

    Attributes:
        widths: channels of each stage.
        layers: for each stage, the widths of each of its layers.
        scale: factor on the attention logits.
        num_classes: length of the logits.
        patch: side of a patch, in pixels.
        side: of a window, in patches.
        dropout: rate in training.
        drop_path: rate at which training leaves out the last layer's branches; it rises evenly from 0 at the first.
    """

    widths: tuple[int, ...]
    layers: tuple[tuple[WindowWidths, ...], ...]
    scale: float
    num_classes: int
    patch: int = 4
    side: int = 7
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        side = (self.patch, self.patch)
        x = nn.Conv(self.widths[0], side, strides=side, padding="VALID", name="patch")(x)
        x = nn.LayerNorm(epsilon=1e-5, name="norm0")(x)
        i, last = 0, sum(map(len, self.layers)) - 1
        for s, (width, layers) in enumerate(zip(self.widths, self.layers, strict=True)):
            if s:
                x = jnp.concatenate([x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)], axis=-1)
                x = nn.LayerNorm(epsilon=1e-5, name=f"norm{s}")(x)
                x = nn.Dense(width, use_bias=False, name=f"down{s}")(x)
            for b, widths in enumerate(layers):
                rate = self.drop_path * i / max(last, 1)
                layer = SwinLayer(
                    widths, self.scale, self.side, b % 2 == 1, self.dropout, rate, name=f"stage{s + 1}_{b}"
                )
                x, i = layer(x, train), i + 1
        x = jnp.mean(nn.LayerNorm(epsilon=1e-5, name="norm")(x), axis=(1, 2))
        return nn.Dense(self.num_classes, name="linear")(x)


def swin(
    size: str = "tiny",
    num_classes: int = 1000,
    widths: Sequence[int] | None = None,
    layers: Sequence[Sequence[Sequence[int]]] | None = None,
    patch: int = 4,
    side: int = 7,
    scale: float = 32**-0.5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Swin:
    """Build Swin-T, -S or -B (`size` tiny, small, base), or one of other widths.

    Args:
        size: the published widths and depths.
        num_classes: length of the logits.
        widths: channels of each stage.
        layers: `(heads, units, hidden)` of each layer of each stage: attention heads, units of each, units of the MLP.
            0 heads leave an attention out, 0 hidden units an MLP. By default 32 units a head, 4 times the width.
        patch: side of a patch, in pixels.
        side: of a window, in patches.
        scale: factor on the attention logits, that of 32 units a head.
        dropout: rate in training.
        drop_path: rate at which training leaves out the last layer's branches, less for those before it.
    """
    if size not in SIZES:
        raise ValueError(f"swin: size must be one of {', '.join(SIZES)}, got {size!r}")
    first, depths = SIZES[size]
    channels = tuple(first * 2**s for s in range(len(depths))) if widths is None else tuple(widths)
    if layers is None:
        layers = [[(w // 32, 32, 4 * w)] * n for w, n in zip(channels, depths, strict=True)]
    rows = tuple(tuple(WindowWidths(*layer) for layer in stage) for stage in layers)
    if len(rows) != len(channels):
        raise ValueError(f"swin: layers takes a row for each of the {len(channels)} widths, got {len(rows)}")
    return Swin(channels, rows, scale, num_classes, patch, side, dropout, drop_path)
