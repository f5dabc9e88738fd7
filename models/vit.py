"""Vision transformers (Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv:2010.11929).

The small and tiny widths are those of Touvron et al. 2020 (DeiT, arXiv:2012.12877).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from treesurgeon.models.attention import MLP, Attention, LayerWidths

# Embedding width and heads; 12 layers, 64 units a head, 4 times the width in the MLP.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


class Layer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Attributes:
        widths: of the attention and of the MLP.
        scale: factor on the attention logits.
        dropout: rate in training.
    """

    widths: LayerWidths
    scale: float
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, T, D]` to the same shape."""
        heads, key, value, hidden = self.widths
        if heads:
            y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
            y = Attention(heads, key, value, self.scale, name="attention")(y, train=train)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        if hidden:
            y = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
            x = x + MLP(hidden, self.dropout, name="mlp")(y, train)
        return x


class ViT(nn.Module):
    """Patches and a class token with learnt positions, layers `layer0`, `layer1`, …, and a head on the class token.

    Attributes:
        width: of the embedding.
        layers: widths of each layer.
        patch: side of a patch, in pixels.
        num_classes: length of the logits.
        scale: factor on the attention logits.
        dropout: rate in training.
    """

    width: int
    layers: tuple[LayerWidths, ...]
    patch: int
    num_classes: int
    scale: float
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, strides=side, padding="VALID", name="patch")(x)
        x = x.reshape((x.shape[0], -1, x.shape[-1]))
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i, widths in enumerate(self.layers):
            x = Layer(widths, self.scale, self.dropout, name=f"layer{i}")(x, train)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        return nn.Dense(self.num_classes, name="linear")(x[:, 0])


def vit(
    size: str = "small",
    num_classes: int = 1000,
    width: int | None = None,
    layers: Sequence[Sequence[int]] | None = None,
    patch: int = 16,
    scale: float = 64**-0.5,
    dropout: float = 0.0,
) -> ViT:
    """Build ViT-Ti, ViT-S or ViT-B (`size` tiny, small, base), or one of other widths.

    Args:
        size: the published width and heads.
        num_classes: length of the logits.
        width: of the embedding; by default the size's.
        layers: `(heads, key, value, hidden)` of each layer; by default 12 of the size's. 0 heads leave an
            attention out, 0 hidden units an MLP.
        patch: side of a patch, in pixels.
        scale: factor on the attention logits, that of 64 units a head.
        dropout: rate in training.
    """
    if size not in SIZES:
        raise ValueError(f"vit: size must be one of {', '.join(SIZES)}, got {size!r}")
    full, heads = SIZES[size]
    widths = ((heads, 64, 64, 4 * full),) * 12 if layers is None else layers
    return ViT(width or full, tuple(LayerWidths(*layer) for layer in widths), patch, num_classes, scale, dropout)
