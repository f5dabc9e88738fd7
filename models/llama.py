"""Decoder-only language models in the manner of Llama (Touvron et al. 2023, arXiv:2302.13971).

RMS norms before each branch (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021,
arXiv:2104.09864), grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) and gated MLPs (Shazeer 2020,
"GLU Variants Improve Transformer", arXiv:2002.05202). No layer has a bias.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


class DecoderWidths(NamedTuple):
    """The widths of one layer; 0 groups leave its attention out, 0 hidden units its MLP.

    Attributes:
        groups: heads of the keys and values.
        queries: heads of the queries that share one of them.
        value: units of a value, for each head. Those of queries and keys are two a frequency.
        hidden: units of the gated MLP.
    """

    groups: int
    queries: int
    value: int
    hidden: int


def rotate(x: jax.Array, frequencies: Sequence[float]) -> jax.Array:
    """Turn pair i of units of position t (`x` is `[N, T, ..., 2 * len(frequencies)]`) by `t * frequencies[i]`.

    Units i and i + len(frequencies) are a pair.
    """
    angles = np.arange(x.shape[1])[:, None] * np.asarray(frequencies)
    angles = angles.reshape(x.shape[1], *(1,) * (x.ndim - 3), -1)
    cos, sin = jnp.asarray(np.cos(angles), x.dtype), jnp.asarray(np.sin(angles), x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class GroupedQueryAttention(nn.Module):
    """Causal attention in which `queries` heads share the keys and values of one of `groups` heads.

    Attributes:
        groups: heads of the keys and values.
        queries: heads of the queries that share one of them.
        value: units of a value, for each head.
        frequencies: of the rotary positions; a head has two units of query and key for each.
        scale: factor on the logits.
        dropout: rate on the attention weights in training.
    """

    groups: int
    queries: int
    value: int
    frequencies: tuple[float, ...]
    scale: float
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, T, D]` to the same shape."""
        units, length = 2 * len(self.frequencies), x.shape[1]
        query = nn.DenseGeneral((self.groups, self.queries, units), use_bias=False, name="query")(x)
        key = nn.DenseGeneral((self.groups, units), use_bias=False, name="key")(x)
        value = nn.DenseGeneral((self.groups, self.value), use_bias=False, name="value")(x)
        query, key = rotate(query, self.frequencies), rotate(key, self.frequencies)
        logits = jnp.einsum("ntgqd,nsgd->ngqts", query, key) * self.scale
        past = np.tri(length, dtype=bool)
        weights = nn.softmax(jnp.where(past, logits, jnp.finfo(logits.dtype).min))
        weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
        y = jnp.einsum("ngqts,nsgd->ntgqd", weights, value)
        return nn.DenseGeneral(x.shape[-1], axis=(-3, -2, -1), use_bias=False, name="out")(y)


class DecoderLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + down(silu(gate(y)) * up(y))` of `y = norm(x)`.

    Attributes:
        widths: of the attention and of the MLP.
        frequencies: of the rotary positions.
        scale: factor on the attention logits.
        epsilon: of the norms.
        dropout: rate in training.
    """

    widths: DecoderWidths
    frequencies: tuple[float, ...]
    scale: float
    epsilon: float
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, T, D]` to the same shape."""
        groups, queries, value, hidden = self.widths
        if groups:
            attention = GroupedQueryAttention(
                groups, queries, value, self.frequencies, self.scale, self.dropout, name="attention"
            )
            y = attention(nn.RMSNorm(epsilon=self.epsilon, name="norm1")(x), train)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        if hidden:
            y = nn.RMSNorm(epsilon=self.epsilon, name="norm2")(x)
            gate = nn.silu(nn.Dense(hidden, use_bias=False, name="gate")(y))
            y = gate * nn.Dense(hidden, use_bias=False, name="up")(y)
            y = nn.Dense(x.shape[-1], use_bias=False, name="down")(y)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        return x


class Llama(nn.Module):
    """Embedding `embed`, layers `layer0`, `layer1`, …, norm, and a head `linear` over the vocabulary.

    Attributes:
        vocabulary: number of tokens.
        width: of the embedding.
        layers: widths of each layer.
        frequencies: of the rotary positions, for each layer.
        scale: factor on the attention logits.
        tied: the head is the embedding, and there is no `linear`.
        epsilon: of the norms.
        dropout: rate in training.
    """

    vocabulary: int
    width: int
    layers: tuple[DecoderWidths, ...]
    frequencies: tuple[tuple[float, ...], ...]
    scale: float
    tied: bool = False
    epsilon: float = 1e-5
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Map token numbers `[N, T]` to the logits `[N, T, vocabulary]` of the token after each."""
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        x = nn.Dropout(self.dropout, deterministic=not train)(embed(tokens))
        for i, (widths, frequencies) in enumerate(zip(self.layers, self.frequencies, strict=True)):
            layer = DecoderLayer(widths, frequencies, self.scale, self.epsilon, self.dropout, name=f"layer{i}")
            x = layer(x, train)
        x = nn.RMSNorm(epsilon=self.epsilon, name="norm")(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary, use_bias=False, name="linear")(x)


def llama(
    vocabulary: int = 32_000,
    width: int = 2048,
    layers: Sequence[Sequence[int]] = ((4, 8, 64, 5632),) * 22,
    key: int = 64,
    theta: float = 10_000.0,
    frequencies: Sequence[Sequence[float]] | None = None,
    tied: bool = False,
    epsilon: float = 1e-5,
    dropout: float = 0.0,
) -> Llama:
    """Build a `Llama`; the default widths are TinyLlama's (Zhang et al. 2024, arXiv:2401.02385).

    Args:
        vocabulary: number of tokens.
        width: of the embedding.
        layers: `(groups, queries, value, hidden)` of each layer: heads of keys and values, heads of queries to each
            of them, units of a value, units of the MLP. 0 groups leave an attention out, 0 hidden units an MLP.
        key: units of a query and of a key in the dense model, for each head; the scale of the logits follows it.
        theta: the rotary positions turn pair i of a head by `theta ** (-2 i / key)` a token.
        frequencies: these numbers for each layer, where a pruned head keeps some of its pairs.
        tied: the head is the embedding.
        epsilon: of the norms.
        dropout: rate in training.
    """
    widths = tuple(DecoderWidths(*layer) for layer in layers)
    if frequencies is None:
        kept = (tuple(theta ** (-2 * i / key) for i in range(key // 2)),) * len(widths)
    else:
        kept = tuple(tuple(row) for row in frequencies)
    if len(kept) != len(widths):
        raise ValueError(f"llama: frequencies takes a row for each of the {len(widths)} layers, got {len(kept)}")
    return Llama(vocabulary, width, widths, kept, key**-0.5, tied, epsilon, dropout)
