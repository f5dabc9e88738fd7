"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601): one MLP across patches, one across channels, in turns."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from treesurgeon.models.attention import MLP

# Width and layers; half of the width across patches and four times the width across channels.
SIZES = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}


class MixerLayer(nn.Module):
    """`x + tokens(norm(x))` across patches, then `x + channels(norm(x))` across channels.

    Attributes:
        tokens: hidden units across patches; 0 leaves that MLP out.
        channels: hidden units across channels; 0 likewise.
        dropout: rate in training.
    """

    tokens: int
    channels: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, T, D]` to the same shape."""
        if self.tokens:
            y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x).swapaxes(1, 2)
            x = x + MLP(self.tokens, self.dropout, name="tokens")(y, train).swapaxes(1, 2)
        if self.channels:
            y = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
            x = x + MLP(self.channels, self.dropout, name="channels")(y, train)
        return x


class Mixer(nn.Module):
    """Patches, layers `layer0`, `layer1`, …, norm, mean over patches, head.

    Attributes:
        width: channels of a patch.
        layers: hidden units of each layer, `(across patches, across channels)`.
        patch: side of a patch, in pixels.
        num_classes: length of the logits.
        dropout: rate in training.
    """

    width: int
    layers: tuple[tuple[int, int], ...]
    patch: int
    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, strides=side, padding="VALID", name="patch")(x)
        x = x.reshape((x.shape[0], -1, x.shape[-1]))
        for i, (tokens, channels) in enumerate(self.layers):
            x = MixerLayer(tokens, channels, self.dropout, name=f"layer{i}")(x, train)
        x = jnp.mean(nn.LayerNorm(epsilon=1e-6, name="norm")(x), axis=1)
        return nn.Dense(self.num_classes, name="linear")(x)


def mixer(
    size: str = "s",
    num_classes: int = 1000,
    width: int | None = None,
    layers: Sequence[Sequence[int]] | None = None,
    patch: int = 16,
    dropout: float = 0.0,
) -> Mixer:
    """Build Mixer-S, -B or -L (`size` s, b, l), or one of other widths.

    Args:
        size: the published widths and depths.
        num_classes: length of the logits.
        width: channels of a patch.
        layers: hidden units of each layer, `(across patches, across channels)`; 0 leaves an MLP out.
        patch: side of a patch, in pixels.
        dropout: rate in training.
    """
    if size not in SIZES:
        raise ValueError(f"mixer: size must be one of {', '.join(SIZES)}, got {size!r}")
    full, depth = SIZES[size]
    rows = ((full // 2, 4 * full),) * depth if layers is None else tuple((t, c) for t, c in layers)
    return Mixer(width or full, rows, patch, num_classes, dropout)
