"""EfficientNet (Tan and Le 2019, arXiv:1905.11946): MobileNet's inverted residuals, scaled in width and depth."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from treesurgeon.models.mobilenet import InvertedResidual, Row, conv, divisible, norm

EPSILON = 1e-3
# B0 to B7: width, depth, dropout.
SCALES = (
    (1.0, 1.0, 0.2),
    (1.0, 1.1, 0.2),
    (1.1, 1.2, 0.3),
    (1.2, 1.4, 0.3),
    (1.4, 1.8, 0.4),
    (1.6, 2.2, 0.4),
    (1.8, 2.6, 0.5),
    (2.0, 3.1, 0.5),
)
# Table 1 of the paper: kernel, expansion, width, repeats, stride.
STAGES = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)


class EfficientNet(nn.Module):
    """Convolution `stem`, inverted residuals `block0`, `block1`, …, convolution `last`, pool, head.

    Attributes:
        stem: channels of the first convolution.
        rows: the inverted residuals.
        last: channels of the last convolution.
        num_classes: length of the logits.
        dropout: rate before the head in training.
        drop_path: rate at which training leaves out the last block's branch; it rises evenly from 0 at the first.
    """

    stem: int
    rows: tuple[Row, ...]
    last: int
    num_classes: int
    dropout: float = 0.2
    drop_path: float = 0.2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        x = nn.silu(norm(train, "bn0", EPSILON)(conv(self.stem, 3, 2, "stem")(x)))
        for i, row in enumerate(self.rows):
            if row.width:
                rate = self.drop_path * i / len(self.rows)
                x = InvertedResidual(row, (nn.silu, nn.sigmoid), EPSILON, rate, name=f"block{i}")(x, train)
        x = nn.silu(norm(train, "bn1", EPSILON)(conv(self.last, 1, 1, "last")(x)))
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, name="linear")(x)


def efficientnet(
    scale: int = 0,
    num_classes: int = 1000,
    stem: int | None = None,
    rows: Sequence[Sequence] | None = None,
    last: int | None = None,
    dropout: float | None = None,
    drop_path: float = 0.2,
) -> EfficientNet:
    """Build EfficientNet-B`scale`, or one of other widths.

    Args:
        scale: 0 to 7; its widths and dropout are the default.
        num_classes: length of the logits.
        stem: channels of the first convolution.
        rows: `(kernel, stride, expanded, squeezed, width, activation, expands, residual)` of each inverted residual.
        last: channels of the last convolution.
        dropout: rate before the head in training.
        drop_path: rate at which training leaves out the last block's branch, less for those before it.
    """
    if not 0 <= scale < len(SCALES):
        raise ValueError(f"efficientnet: scale must be 0 to {len(SCALES) - 1}, got {scale}")
    wider, deeper, rate = SCALES[scale]
    first = divisible(32 * wider)
    if rows is None:
        rows, enters = [], first
        for kernel, expansion, width, repeats, stride in STAGES:
            for i in range(math.ceil(deeper * repeats)):
                step, leaves = 1 if i else stride, divisible(width * wider)
                squeezed, residual = max(1, enters // 4), step == 1 and enters == leaves
                rows.append((kernel, step, expansion * enters, squeezed, leaves, "silu", expansion != 1, residual))
                enters = leaves
    return EfficientNet(
        first if stem is None else stem,
        tuple(Row(*row) for row in rows),
        divisible(1280 * wider) if last is None else last,
        num_classes,
        rate if dropout is None else dropout,
        drop_path,
    )
