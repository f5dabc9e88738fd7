"""BERT (Devlin et al. 2018, arXiv:1810.04805): a transformer encoder that classifies sequences."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from treesurgeon.models.attention import MLP, Attention, LayerWidths

EPSILON = 1e-12


class EncoderLayer(nn.Module):
    """`norm(x + attention(x))`, then `norm(x + mlp(x))`.

    Attributes:
        widths: of the attention and of the MLP.
        scale: factor on the attention logits.
        dropout: rate in training.
    """

    widths: LayerWidths
    scale: float
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Map `[N, T, D]` to the same shape."""
        heads, key, value, hidden = self.widths
        if heads:
            y = Attention(heads, key, value, self.scale, self.dropout, name="attention")(x, mask, train)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
            x = nn.LayerNorm(epsilon=EPSILON, name="norm1")(x)
        if hidden:
            x = nn.LayerNorm(epsilon=EPSILON, name="norm2")(x + MLP(hidden, self.dropout, name="mlp")(x, train))
        return x


class BERT(nn.Module):
    """Embeddings of token, position and type, layers `layer0`, `layer1`, …, pooler, head.

    Attributes:
        vocabulary: number of tokens.
        length: the longest input.
        types: number of token types.
        width: of the embedding.
        layers: widths of each layer.
        pooler: units of the dense layer on the first token.
        num_classes: length of the logits.
        scale: factor on the attention logits.
        dropout: rate in training.
    """

    vocabulary: int
    length: int
    types: int
    width: int
    layers: tuple[LayerWidths, ...]
    pooler: int
    num_classes: int
    scale: float
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        types: jax.Array | None = None,
        mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map token numbers `[N, T]` to logits `[N, num_classes]`.

        Args:
            tokens: token numbers.
            types: which of two texts a token is of; by default the first.
            mask: 1 at tokens, 0 at padding; by default no padding.
            train: whether to drop units.
        """
        types = jnp.zeros_like(tokens) if types is None else types
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = nn.Embed(self.vocabulary, self.width, name="token")(tokens)
        x = x + nn.Embed(self.types, self.width, name="type")(types) + position[: tokens.shape[1]]
        x = nn.LayerNorm(epsilon=EPSILON, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        there = None if mask is None else (mask > 0)[:, None, None, :]
        for i, widths in enumerate(self.layers):
            x = EncoderLayer(widths, self.scale, self.dropout, name=f"layer{i}")(x, there, train)
        x = jnp.tanh(nn.Dense(self.pooler, name="pooler")(x[:, 0]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="linear")(x)


def bert(
    num_classes: int = 2,
    vocabulary: int = 30_522,
    length: int = 512,
    types: int = 2,
    width: int = 768,
    layers: Sequence[Sequence[int]] = ((12, 64, 64, 3072),) * 12,
    pooler: int = 768,
    scale: float = 64**-0.5,
    dropout: float = 0.1,
) -> BERT:
    """Build a `BERT` classifier; the default widths are those of the base model.

    Args:
        num_classes: length of the logits.
        vocabulary: number of tokens.
        length: the longest input.
        types: number of token types.
        width: of the embedding.
        layers: `(heads, key, value, hidden)` of each layer; 0 heads leave an attention out, 0 hidden units an MLP.
        pooler: units of the dense layer on the first token.
        scale: factor on the attention logits, that of 64 units a head.
        dropout: rate in training.
    """
    rows = tuple(LayerWidths(*layer) for layer in layers)
    return BERT(vocabulary, length, types, width, rows, pooler, num_classes, scale, dropout)
