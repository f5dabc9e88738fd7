"""A bidirectional LSTM that tags every token (Huang et al. 2015, "Bidirectional LSTM-CRF Models", arXiv:1508.01991).

The cell is that of Hochreiter and Schmidhuber 1997, "Long Short-Term Memory". There is no CRF: tags are independent.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class LSTMTagger(nn.Module):
    """Embedding `embed`, layers `forward0` beside `backward0`, …, and a head `linear` at each token.

    Attributes:
        vocabulary: number of tokens.
        width: of the embedding.
        layers: hidden units of each layer, forward and backward; 0 for no backward pass.
        num_tags: length of the logits.
        dropout: rate before each layer and before the head in training.
    """

    vocabulary: int
    width: int
    layers: tuple[tuple[int, int], ...]
    num_tags: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Map token numbers `[N, T]` to logits `[N, T, num_tags]`."""
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        for i, (ahead, back) in enumerate(self.layers):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            y = self._run(f"forward{i}", ahead, x)
            x = jnp.concatenate([y, self._run(f"backward{i}", back, x, reverse=True)], axis=-1) if back else y
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_tags, name="linear")(x)

    def _run(self, name: str, width: int, x: jax.Array, reverse: bool = False) -> Any:
        cell = nn.OptimizedLSTMCell(width, name=name)
        carry = jnp.zeros((2, x.shape[0], width), x.dtype)  # the cell's own would be float32 whatever x is
        return nn.RNN(cell, reverse=reverse, keep_order=True)(x, initial_carry=(carry[0], carry[1]))


def lstm_tagger(
    vocabulary: int = 10_000,
    width: int = 100,
    layers: Sequence[Sequence[int]] = ((100, 100),),
    num_tags: int = 17,
    dropout: float = 0.0,
) -> LSTMTagger:
    """Build an `LSTMTagger`.

    Args:
        vocabulary: number of tokens.
        width: of the embedding.
        layers: hidden units `(forward, backward)` of each layer; 0 for no backward pass.
        num_tags: length of the logits.
        dropout: rate before each layer and before the head in training.
    """
    return LSTMTagger(vocabulary, width, tuple((ahead, back) for ahead, back in layers), num_tags, dropout)
