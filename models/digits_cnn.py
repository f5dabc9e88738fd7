"""A small, deliberately generous conv net for 8x8 images (0.13 M parameters; trains in seconds on a CPU)."""

from collections.abc import Sequence

import jax
from flax import linen as nn


def _conv(width: int, name: str) -> nn.Conv:
    return nn.Conv(width, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name=name)


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=name)


class ConvLayer(nn.Module):
    """`relu(bn(conv(x)))`; identity can replace it where `width` is also the width of `x`."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H, W, width]`."""
        return nn.relu(_norm(train, "bn")(_conv(self.width, "conv")(x)))


class ResidualLayer(nn.Module):
    """`relu(x + bn2(conv2(relu(bn1(conv1(x))))))` with `inner` channels between the convolutions."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to the same shape."""
        y = nn.relu(_norm(train, "bn1")(_conv(self.inner, "conv1")(x)))
        return nn.relu(x + _norm(train, "bn2")(_conv(x.shape[-1], "conv2")(y)))


class DigitsCNN(nn.Module):
    """Stages of conv layers `stage1_0`, `stage1_1`, … and a residual layer, pooled between; dense; head.

    Attributes:
        stages: width of every conv layer, a tuple per stage; 0 leaves a layer out and the others
            keep their names.
        residual: inner width of the residual layer `stage{s}_res` that ends each stage, 0 for none.
        hidden: units of the dense layer `dense0` after flattening.
        num_classes: length of the logits.
        dropout: rate after the dense layer in training.
    """

    stages: tuple[tuple[int, ...], ...]
    residual: tuple[int, ...]
    hidden: int
    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        for s, (widths, inner) in enumerate(zip(self.stages, self.residual, strict=True), start=1):
            if s > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i, width in enumerate(widths):
                if width:
                    x = ConvLayer(width, name=f"stage{s}_{i}")(x, train)
            if inner:
                x = ResidualLayer(inner, name=f"stage{s}_res")(x, train)
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(self.hidden, name="dense0")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="linear")(x)


def digits_cnn(
    num_classes: int = 10,
    stages: Sequence[Sequence[int]] = ((16, 16), (32,), (48, 48)),
    residual: Sequence[int] = (0, 32, 48),
    hidden: int = 128,
    dropout: float = 0.0,
) -> DigitsCNN:
    """Build a `DigitsCNN`: 16 channels at 8x8, 32 at 4x4, 48 at 2x2 by default."""
    widths, inner = tuple(tuple(stage) for stage in stages), tuple(residual)
    if len(widths) != len(inner):
        raise ValueError(
            f"digits_cnn: residual takes a width for each of the {len(widths)} stages, got {inner}; "
            "write 0 where a stage has no residual layer"
        )
    return DigitsCNN(widths, inner, hidden, num_classes, dropout)
