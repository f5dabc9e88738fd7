"""ResNets for CIFAR with option-A shortcuts (He et al. 2015, arXiv:1512.03385, section 4.2).

Where a stage begins, the shortcut has no parameters: it keeps every second row and column and pads the new
channels with zeros, `lo` before and `hi` after. These two are arguments, since a pruned net keeps some of the
padded channels of either side. Convolutions pad one pixel on every side (XLA's SAME differs at stride 2).
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import linen as nn

DEPTHS = (20, 32, 44, 56, 110)


def _conv(width: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(width, (3, 3), strides=stride, padding=((1, 1), (1, 1)), use_bias=False, name=name)


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=name)


class Block(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    Attributes:
        width: channels that leave the block.
        inner: channels between its two convolutions.
        stride: of the first convolution and of the shortcut.
        zeros: `(lo, hi)` zero channels that the shortcut puts before and after those of `x`.
    """

    width: int
    inner: int
    stride: int = 1
    zeros: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H/stride, W/stride, width]`, with `lo + C + hi = width`."""
        y = _conv(self.inner, self.stride, "conv1")(x)
        y = nn.relu(_norm(train, "bn1")(y))
        y = _conv(self.width, 1, "conv2")(y)
        y = _norm(train, "bn2")(y)
        if self.stride > 1:
            x = x[:, :: self.stride, :: self.stride, :]
        if any(self.zeros):
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.zeros))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem `conv1`, `bn1`; stages of blocks `layer1_0`, `layer1_1`, …; average pool; head `linear`.

    Attributes:
        widths: channels of each stage; the stem has those of the first.
        inner: for each stage, the inner width of each of its blocks; 0 leaves a block out and the others keep
            their names.
        zeros: `(lo, hi)` of the shortcut into each stage but the first.
        num_classes: length of the logits.
    """

    widths: tuple[int, ...]
    inner: tuple[tuple[int, ...], ...]
    zeros: tuple[tuple[int, int], ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        x = nn.relu(_norm(train, "bn1")(_conv(self.widths[0], 1, "conv1")(x)))
        for s, (width, inners) in enumerate(zip(self.widths, self.inner, strict=True)):
            for b, inner in enumerate(inners):
                if inner == 0:
                    continue
                enters = s > 0 and b == 0
                stride, zeros = (2, self.zeros[s - 1]) if enters else (1, (0, 0))
                x = Block(width, inner, stride, zeros, name=f"layer{s + 1}_{b}")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="linear")(x)


def resnet(
    depth: int,
    num_classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    inner: Sequence[Sequence[int]] | None = None,
    zeros: Sequence[Sequence[int]] | None = None,
) -> ResNet:
    """Build the CIFAR ResNet of `depth` layers, or one of other widths.

    Args:
        depth: 20, 32, 44, 56 or 110.
        num_classes: length of the logits.
        widths: channels of the three stages.
        inner: inner widths, a sequence per stage of `(depth - 2) / 6` numbers; by default the stage's width.
        zeros: `(lo, hi)` of the shortcuts into stages 2 and 3; by default half of the new channels each.
    """
    if depth not in DEPTHS:
        raise ValueError(f"resnet: depth must be one of {list(DEPTHS)}, got {depth}")
    blocks, stages = (depth - 2) // 6, tuple(widths)
    inners = tuple((w,) * blocks for w in stages) if inner is None else tuple(map(tuple, inner))
    if zeros is None:
        pads = tuple(((b - a) // 2, b - a - (b - a) // 2) for a, b in pairwise(stages))
    else:
        pads = tuple((lo, hi) for lo, hi in zeros)

    if len(stages) != 3 or [len(row) for row in inners] != [blocks] * 3 or len(pads) != 2:
        raise ValueError(
            f"resnet: ResNet-{depth} takes 3 widths, 3 x {blocks} inner widths and 2 pairs of zeros, got "
            f"{len(stages)}, {[len(row) for row in inners]} and {len(pads)}; "
            "write 0 for a block that is left out"
        )
    for s, (lo, hi) in enumerate(pads):
        if min(lo, hi) < 0 or lo + stages[s] + hi != stages[s + 1] or inners[s + 1][0] == 0:
            raise ValueError(
                f"resnet: layer{s + 2}_0 takes {stages[s]} channels to {stages[s + 1]} with (lo, hi) = "
                f"{(lo, hi)} zero channels and inner width {inners[s + 1][0]}; expected lo, hi >= 0, "
                f"lo + {stages[s]} + hi = {stages[s + 1]} and an inner width of at least 1"
            )
    return ResNet(stages, inners, pads, num_classes)
