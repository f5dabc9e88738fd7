"""Multi-head attention whose widths are all arguments, for the transformers of the zoo.

`flax.linen.MultiHeadDotProductAttention` takes the head width, and from it the scale of the logits, from the
model's width; a pruned layer has fewer units a head and keeps the scale it was trained with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike


class LayerWidths(NamedTuple):
    """The widths of one transformer layer; 0 heads leave its attention out, 0 hidden units its MLP.

    Attributes:
        heads: attention heads.
        key: units of a query and of a key, for each head.
        value: units of a value, for each head.
        hidden: units between the two dense layers of the MLP.
    """

    heads: int
    key: int
    value: int
    hidden: int


class Attention(nn.Module):
    """Self-attention (Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762).

    Attributes:
        heads: attention heads.
        key: units of a query and of a key, for each head.
        value: units of a value, for each head.
        scale: factor on the logits, `key ** -0.5` in a dense model.
        dropout: rate on the attention weights in training.
    """

    heads: int
    key: int
    value: int
    scale: float
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, mask: ArrayLike | None = None, train: bool = False) -> jax.Array:
        """Map `[N, T, D]` to the same shape; where `mask` (`[N or 1, 1, T or 1, T]`) is False nobody looks."""
        query = nn.DenseGeneral((self.heads, self.key), name="query")(x)
        key = nn.DenseGeneral((self.heads, self.key), name="key")(x)
        value = nn.DenseGeneral((self.heads, self.value), name="value")(x)
        logits = jnp.einsum("nqhd,nkhd->nhqk", query, key) * self.scale
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        weights = nn.Dropout(self.dropout, deterministic=not train)(nn.softmax(logits))
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(jnp.einsum("nhqk,nkhd->nqhd", weights, value))


class MLP(nn.Module):
    """Two dense layers with an exact GELU between them, and dropout after each.

    Attributes:
        hidden: units between the two.
        dropout: rate in training.
    """

    hidden: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[..., D]` to the same shape."""
        y = nn.gelu(nn.Dense(self.hidden, name="dense0")(x), approximate=False)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return nn.Dropout(self.dropout, deterministic=not train)(nn.Dense(x.shape[-1], name="dense1")(y))
