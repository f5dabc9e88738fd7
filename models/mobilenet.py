"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) and V3 (Howard et al. 2019, arXiv:1905.02244).

Both are rows of inverted residuals: a 1x1 convolution expands, a depthwise one filters, a 1x1 one projects. V3 adds
squeeze and excitation (Hu et al. 2017, arXiv:1709.01507) and hard activations.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Activation = Callable[[jax.Array], jax.Array]


class Row(NamedTuple):
    """One inverted residual.

    Attributes:
        kernel: side of the depthwise convolution.
        stride: of the depthwise convolution.
        expanded: channels of the depthwise convolution.
        squeezed: units of the squeeze-and-excitation; 0 for none.
        width: channels that leave; 0 leaves the block out and the others keep their names.
        activation: of the first two convolutions, a name of `flax.linen`.
        expands: a 1x1 convolution makes the expanded channels; without it they are those that enter.
        residual: what enters is added to what leaves.
    """

    kernel: int
    stride: int
    expanded: int
    squeezed: int
    width: int
    activation: str
    expands: bool
    residual: bool


def norm(train: bool, name: str, epsilon: float) -> nn.BatchNorm:
    """A batch norm whose statistics move by a hundredth."""
    return nn.BatchNorm(not train, momentum=0.99, epsilon=epsilon, name=name)


def conv(width: int, kernel: int, stride: int, name: str, groups: int = 1) -> nn.Conv:
    """A convolution without bias that pads the same on every side (XLA's SAME differs at stride 2)."""
    pad = ((kernel // 2, kernel // 2),) * 2
    return nn.Conv(width, (kernel,) * 2, stride, pad, feature_group_count=groups, use_bias=False, name=name)


class SqueezeExcite(nn.Module):
    """Weigh every channel by a function of all channels' means.

    Attributes:
        width: units between the two dense layers.
        activation: after the first of them.
        gate: after the second.
    """

    width: int
    activation: Activation
    gate: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to the same shape."""
        y = self.activation(nn.Dense(self.width, name="dense0")(jnp.mean(x, axis=(1, 2), keepdims=True)))
        return x * self.gate(nn.Dense(x.shape[-1], name="dense1")(y))


class InvertedResidual(nn.Module):
    """Convolutions `expand`, `depthwise`, `project`, a norm after each, an activation after the first two.

    Attributes:
        row: the widths.
        squeeze: `(activation, gate)` of the squeeze-and-excitation.
        epsilon: of the norms.
        drop_path: rate at which training leaves out the branch of an image where there is a residual (Huang et al.
            2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382).
    """

    row: Row
    squeeze: tuple[Activation, Activation]
    epsilon: float
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H/stride, W/stride, width]`."""
        row, y = self.row, x
        activation = getattr(nn, row.activation)
        if row.expands:
            y = activation(norm(train, "bn1", self.epsilon)(conv(row.expanded, 1, 1, "expand")(y)))
        channels = y.shape[-1]
        y = conv(channels, row.kernel, row.stride, "depthwise", groups=channels)(y)
        y = activation(norm(train, "bn2", self.epsilon)(y))
        if row.squeezed:
            y = SqueezeExcite(row.squeezed, *self.squeeze, name="se")(y)
        y = norm(train, "bn3", self.epsilon)(conv(row.width, 1, 1, "project")(y))
        if not row.residual:
            return y
        return x + nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)(y)


class MobileNet(nn.Module):
    """Convolution `stem`, inverted residuals `block0`, `block1`, …, convolution `last`, pool, dense layers, head.

    Attributes:
        stem: channels of the first convolution.
        rows: the inverted residuals.
        last: channels of the last convolution.
        hidden: units of the dense layer before the head; 0 for none.
        num_classes: length of the logits.
        activation: around the rows, a name of `flax.linen`.
        epsilon: of the norms.
        dropout: rate before the head in training.
    """

    stem: int
    rows: tuple[Row, ...]
    last: int
    hidden: int
    num_classes: int
    activation: str
    epsilon: float
    dropout: float = 0.2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        activation, squeeze = getattr(nn, self.activation), (nn.relu, nn.hard_sigmoid)
        x = activation(norm(train, "bn0", self.epsilon)(conv(self.stem, 3, 2, "stem")(x)))
        for i, row in enumerate(self.rows):
            if row.width:
                x = InvertedResidual(row, squeeze, self.epsilon, name=f"block{i}")(x, train)
        x = activation(norm(train, "bn1", self.epsilon)(conv(self.last, 1, 1, "last")(x)))
        x = jnp.mean(x, axis=(1, 2))
        if self.hidden:
            x = activation(nn.Dense(self.hidden, name="dense0")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="linear")(x)


def divisible(width: float, by: int = 8) -> int:
    """The nearest multiple of `by`, at least `by` and at least nine tenths of the width."""
    rounded = max(by, int(width + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * width else rounded


def _v2() -> tuple[Row, ...]:
    """Table 2 of the paper: expansion, width, repeats, stride."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    rows, enters = [], 32
    for expansion, width, repeats, stride in stages:
        for i in range(repeats):
            rows.append(
                Row(3, 1 if i else stride, expansion * enters, 0, width, "relu6", expansion != 1, residual=i > 0)
            )
            enters = width
    return tuple(rows)


def _v3(rows: str) -> tuple[Row, ...]:
    """Tables 1 and 2 of the paper: kernel, expanded, width, squeeze-and-excitation, activation, stride."""
    out, enters = [], 16
    for row in rows.split(","):
        kernel, expanded, width, squeezes, activation, stride = row.split()
        e, w, s = int(expanded), int(width), int(stride)
        squeezed = divisible(e / 4) if squeezes == "se" else 0
        name = {"re": "relu", "hs": "hard_swish"}[activation]
        out.append(Row(int(kernel), s, e, squeezed, w, name, e != enters, residual=s == 1 and enters == w))
        enters = w
    return tuple(out)


LARGE = """
    3 16 16 - re 1, 3 64 24 - re 2, 3 72 24 - re 1, 5 72 40 se re 2, 5 120 40 se re 1, 5 120 40 se re 1,
    3 240 80 - hs 2, 3 200 80 - hs 1, 3 184 80 - hs 1, 3 184 80 - hs 1, 3 480 112 se hs 1, 3 672 112 se hs 1,
    5 672 160 se hs 2, 5 960 160 se hs 1, 5 960 160 se hs 1
"""
SMALL = """
    3 16 16 se re 2, 3 72 24 - re 2, 3 88 24 - re 1, 5 96 40 se hs 2, 5 240 40 se hs 1, 5 240 40 se hs 1,
    5 120 48 se hs 1, 5 144 48 se hs 1, 5 288 96 se hs 2, 5 576 96 se hs 1, 5 576 96 se hs 1
"""
# Stem, rows, last convolution, hidden units, activation, epsilon.
VERSIONS = {
    "v2": (32, _v2(), 1280, 0, "relu6", 1e-5),
    "v3_large": (16, _v3(LARGE), 960, 1280, "hard_swish", 1e-3),
    "v3_small": (16, _v3(SMALL), 576, 1024, "hard_swish", 1e-3),
}


def mobilenet(
    version: str = "v2",
    num_classes: int = 1000,
    stem: int | None = None,
    rows: Sequence[Sequence] | None = None,
    last: int | None = None,
    hidden: int | None = None,
    dropout: float = 0.2,
) -> MobileNet:
    """Build MobileNetV2 or V3 (`version` v2, v3_large, v3_small), or one of other widths.

    Args:
        version: whose widths are the default, and whose activations and norms it has.
        num_classes: length of the logits.
        stem: channels of the first convolution.
        rows: `(kernel, stride, expanded, squeezed, width, activation, expands, residual)` of each inverted residual.
        last: channels of the last convolution.
        hidden: units of the dense layer before the head; 0 for none.
        dropout: rate before the head in training.
    """
    if version not in VERSIONS:
        raise ValueError(f"mobilenet: version must be one of {', '.join(VERSIONS)}, got {version!r}")
    first, table, end, units, activation, epsilon = VERSIONS[version]
    return MobileNet(
        first if stem is None else stem,
        table if rows is None else tuple(Row(*row) for row in rows),
        end if last is None else last,
        units if hidden is None else hidden,
        num_classes,
        activation,
        epsilon,
        dropout,
    )
