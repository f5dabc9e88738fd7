"""A multilayer perceptron: flatten, dense layers, a linear head."""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn


class MLP(nn.Module):
    """Dense layers `dense0`, `dense1`, … with an activation and dropout after each, then `linear`.

    Attributes:
        widths: units of each hidden layer; 0 leaves that layer out and the others keep their names.
        num_classes: length of the logits.
        activation: elementwise function after each hidden layer.
        dropout: rate in training; 0 in inference.
    """

    widths: tuple[int, ...]
    num_classes: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map a batch `[N, ...]` to logits `[N, num_classes]`."""
        x = x.reshape((x.shape[0], -1))
        for i, width in enumerate(self.widths):
            if width == 0:
                continue
            x = self.activation(nn.Dense(width, name=f"dense{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="linear")(x)


def mlp(
    widths: Sequence[int] = (256, 128),
    num_classes: int = 10,
    activation: str = "relu",
    dropout: float = 0.0,
) -> MLP:
    """Build an `MLP`; `activation` names a function of `flax.linen`, so that it can be written to JSON."""
    return MLP(tuple(widths), num_classes, getattr(nn, activation), dropout)
