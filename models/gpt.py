"""A decoder-only language model whose layers are one layer, scanned over stacked parameters.

Pre-norm layers with learnt positions, as in GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"). `nn.scan` compiles the layer once, whatever the depth; every leaf of `layers` has the depth as first axis,
and all layers have the same widths.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn

from treesurgeon.models.attention import MLP, Attention, LayerWidths


class ScannedLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, as the body of a scan.

    Attributes:
        widths: of the attention and of the MLP.
        scale: factor on the attention logits.
        dropout: rate in training.
        train: whether this is training; an attribute, so that `nn.remat` need not be told that it is static.
    """

    widths: LayerWidths
    scale: float
    dropout: float
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Map `[N, T, D]` to the same shape."""
        heads, key, value, hidden = self.widths
        past = np.tri(x.shape[1], dtype=bool)[None, None]
        y = Attention(heads, key, value, self.scale, self.dropout, name="attention")(
            nn.LayerNorm(epsilon=1e-5, name="norm1")(x), past, self.train
        )
        x = x + nn.Dropout(self.dropout, deterministic=not self.train)(y)
        y = nn.LayerNorm(epsilon=1e-5, name="norm2")(x)
        return x + MLP(hidden, self.dropout, name="mlp")(y, self.train), None


class GPT(nn.Module):
    """Embeddings `embed` and `position`, the stack `layers`, norm, and a head that is the embedding.

    Attributes:
        vocabulary: number of tokens.
        length: the longest input.
        width: of the embedding.
        depth: number of layers.
        widths: of each layer.
        scale: factor on the attention logits.
        remat: keep no activations of a layer for its backward pass, but compute them again.
        dropout: rate in training.
    """

    vocabulary: int
    length: int
    width: int
    depth: int
    widths: LayerWidths
    scale: float
    remat: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Map token numbers `[N, T]` to the logits `[N, T, vocabulary]` of the token after each."""
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = embed(tokens) + position[: tokens.shape[1]]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        layer = nn.remat(ScannedLayer, prevent_cse=False) if self.remat else ScannedLayer
        stack = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=self.depth
        )
        x, _ = stack(self.widths, self.scale, self.dropout, train, name="layers")(x, None)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


def gpt(
    vocabulary: int = 50_257,
    length: int = 1024,
    width: int = 768,
    depth: int = 12,
    widths: Sequence[int] = (12, 64, 64, 3072),
    scale: float = 64**-0.5,
    remat: bool = False,
    dropout: float = 0.0,
) -> GPT:
    """Build a `GPT`; the default widths are those of GPT-2 small.

    Args:
        vocabulary: number of tokens.
        length: the longest input.
        width: of the embedding.
        depth: number of layers.
        widths: `(heads, key, value, hidden)` of every layer.
        scale: factor on the attention logits, that of 64 units a head.
        remat: keep no activations of a layer for its backward pass, but compute them again.
        dropout: rate in training.
    """
    return GPT(vocabulary, length, width, depth, LayerWidths(*widths), scale, remat, dropout)
