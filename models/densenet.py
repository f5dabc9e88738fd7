"""DenseNet (Huang et al. 2016, "Densely Connected Convolutional Networks", arXiv:1608.06993), bottlenecks and all.

Every layer reads all channels made before it in its stage and adds its own behind them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

# Growth, stem channels, layers of each stage.
DEPTHS = {
    121: (32, 64, (6, 12, 24, 16)),
    161: (48, 96, (6, 12, 36, 24)),
    169: (32, 64, (6, 12, 32, 32)),
    201: (32, 64, (6, 12, 48, 32)),
}


def _conv(width: int, kernel: int, stride: int, name: str) -> nn.Conv:
    pad = ((kernel // 2, kernel // 2),) * 2
    return nn.Conv(width, (kernel,) * 2, stride, pad, use_bias=False, name=name)


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=name)


class DenseLayer(nn.Module):
    """`[x, conv2(relu(bn2(conv1(relu(bn1(x))))))]`.

    Attributes:
        inner: channels of the 1x1 convolution.
        growth: channels of the 3x3 convolution, put behind those that enter.
        dropout: rate on the new channels in training.
    """

    inner: int
    growth: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H, W, C + growth]`."""
        y = _conv(self.inner, 1, 1, "conv1")(nn.relu(_norm(train, "bn1")(x)))
        y = _conv(self.growth, 3, 1, "conv2")(nn.relu(_norm(train, "bn2")(y)))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nn.Module):
    """Stem `conv0`, `bn0`; stages of layers `dense1_0`, …; `transition1`, … between them; norm; pool; head.

    Attributes:
        stem: channels of the first convolution.
        stages: for each stage, the `(inner, growth)` of each of its layers; 0 growth leaves a layer out and the
            others keep their names.
        transitions: channels of the 1x1 convolution after each stage but the last.
        num_classes: length of the logits.
        dropout: rate on every layer's new channels in training.
    """

    stem: int
    stages: tuple[tuple[tuple[int, int], ...], ...]
    transitions: tuple[int, ...]
    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        x = nn.relu(_norm(train, "bn0")(_conv(self.stem, 7, 2, "conv0")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType] (typed as str)
        for s, layers in enumerate(self.stages, start=1):
            if s > 1:
                x = nn.relu(_norm(train, f"transition_bn{s - 1}")(x))
                x = _conv(self.transitions[s - 2], 1, 1, f"transition{s - 1}")(x)
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for i, (inner, growth) in enumerate(layers):
                if growth:
                    x = DenseLayer(inner, growth, self.dropout, name=f"dense{s}_{i}")(x, train)
        x = jnp.mean(nn.relu(_norm(train, "bn")(x)), axis=(1, 2))
        return nn.Dense(self.num_classes, name="linear")(x)


def densenet(
    depth: int = 121,
    num_classes: int = 1000,
    stem: int | None = None,
    stages: Sequence[Sequence[Sequence[int]]] | None = None,
    transitions: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> DenseNet:
    """Build the DenseNet of `depth` layers, or one of other widths.

    Args:
        depth: 121, 161, 169 or 201; its widths are the default.
        num_classes: length of the logits.
        stem: channels of the first convolution.
        stages: `(inner, growth)` of each layer of each stage; by default `(4 growth, growth)`.
        transitions: channels after each stage but the last; by default half of those that enter.
        dropout: rate on every layer's new channels in training.
    """
    if depth not in DEPTHS:
        raise ValueError(f"densenet: depth must be one of {list(DEPTHS)}, got {depth}")
    growth, first, layers = DEPTHS[depth]
    first = first if stem is None else stem
    if stages is None:
        stages = [[(4 * growth, growth)] * n for n in layers]
    rows = tuple(tuple((inner, new) for inner, new in stage) for stage in stages)
    if transitions is None:
        transitions, channels = [], first
        for stage in rows[:-1]:
            channels = (channels + sum(new for _, new in stage)) // 2
            transitions.append(channels)
    if len(transitions) != len(rows) - 1:
        raise ValueError(
            f"densenet: {len(rows)} stages have {len(rows) - 1} transitions between them, got {len(transitions)}"
        )
    return DenseNet(first, rows, tuple(transitions), num_classes, dropout)
