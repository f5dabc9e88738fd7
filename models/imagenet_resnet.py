"""ResNets for ImageNet (He et al. 2015, arXiv:1512.03385), with projections where a stage begins.

The stride of a bottleneck is that of its 3x3 convolution, and modules are named as in torchvision:
`layer1_0/downsample_0` is its `layer1.0.downsample.0`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

# Blocks of each stage, and whether they are bottlenecks.
STAGES: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


def _conv(width: int, kernel: int, stride: int, name: str) -> nn.Conv:
    pad = ((kernel // 2, kernel // 2),) * 2
    return nn.Conv(width, (kernel,) * 2, stride, pad, use_bias=False, name=name)


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=name)


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, beside a shortcut: identity, or a 1x1 convolution.

    Attributes:
        width: channels that leave the block.
        inner: channels between its convolutions, one number or two.
        stride: of the first 3x3 convolution and of the shortcut.
        projects: the shortcut is a convolution.
    """

    width: int
    inner: tuple[int, ...]
    stride: int = 1
    projects: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H/stride, W/stride, width]`."""
        kernels = (3, 3) if len(self.inner) == 1 else (1, 3, 1)
        y = x
        for i, (width, kernel) in enumerate(zip((*self.inner, self.width), kernels, strict=True), start=1):
            stride = self.stride if i == kernels.index(3) + 1 else 1
            y = nn.relu(y) if i > 1 else y
            y = _norm(train, f"bn{i}")(_conv(width, kernel, stride, f"conv{i}")(y))
        if self.projects:
            x = _norm(train, "downsample_1")(_conv(self.width, 1, self.stride, "downsample_0")(x))
        return nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """Stem `conv1`, `bn1`, max-pool; stages of blocks `layer1_0`, `layer1_1`, …; average pool; head `fc`.

    Attributes:
        stem: channels of the first convolution.
        widths: channels that leave each stage.
        inner: for each stage, the inner widths of each of its blocks; an empty tuple leaves a block out and the
            others keep their names.
        projects: for each stage, whether its first block's shortcut is a convolution.
        num_classes: length of the logits.
    """

    stem: int
    widths: tuple[int, ...]
    inner: tuple[tuple[tuple[int, ...], ...], ...]
    projects: tuple[bool, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        x = nn.relu(_norm(train, "bn1")(_conv(self.stem, 7, 2, "conv1")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType] (typed as str)
        for s, (width, blocks, projects) in enumerate(zip(self.widths, self.inner, self.projects, strict=True)):
            for b, inner in enumerate(blocks):
                if inner:
                    stride = 2 if s and not b else 1
                    block = ProjectedBlock(width, inner, stride, projects and b == 0, name=f"layer{s + 1}_{b}")
                    x = block(x, train)
        return nn.Dense(self.num_classes, name="fc")(jnp.mean(x, axis=(1, 2)))


def imagenet_resnet(
    depth: int,
    num_classes: int = 1000,
    stem: int = 64,
    widths: Sequence[int] | None = None,
    inner: Sequence[Sequence[Sequence[int]]] | None = None,
) -> ImageNetResNet:
    """Build the ImageNet ResNet of `depth` layers, or one of other widths.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: length of the logits.
        stem: channels of the first convolution.
        widths: channels of the four stages; by default the published ones.
        inner: inner widths, for each block of each stage: one number, or two in a bottleneck; none leave it out.
    """
    if depth not in STAGES:
        raise ValueError(f"imagenet_resnet: depth must be one of {list(STAGES)}, got {depth}")
    blocks, bottleneck = STAGES[depth]
    base = (64, 128, 256, 512)
    if widths is None:
        widths = [4 * w if bottleneck else w for w in base]
    if inner is None:
        inner = [[(w,) * (2 if bottleneck else 1)] * n for w, n in zip(base, blocks, strict=True)]
    rows = tuple(tuple(tuple(block) for block in stage) for stage in inner)
    convolutions = 2 if bottleneck else 1
    projects = (bottleneck or stem != widths[0], True, True, True)
    got = tuple(tuple(map(len, stage)) for stage in rows)
    if (
        len(widths) != 4
        or tuple(map(len, rows)) != blocks
        or any(n not in (0, convolutions) for stage in got for n in stage)
        or any(projected and not stage[0] for projected, stage in zip(projects, got, strict=True))
    ):
        raise ValueError(
            f"imagenet_resnet: ResNet-{depth} takes 4 widths and {list(blocks)} blocks of {convolutions} inner widths "
            f"each, got {len(widths)} widths and blocks of {list(map(list, got))}; write [] for a block that is left "
            "out, which cannot be one that changes the width"
        )
    return ImageNetResNet(stem, tuple(widths), rows, projects, num_classes)
