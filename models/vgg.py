"""VGG with batch norm for CIFAR (Simonyan and Zisserman 2014, arXiv:1409.1556), with a 512-512 dense stack.

Layers are numbered through the whole net: `conv0`, `bn0`, …, then `dense0`, `dense1`, `linear`.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

# Convolution widths of each stage; a 2x2 max-pool ends every stage (configurations A, B, D, E of the paper).
STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """Stages of conv-bn-relu layers, each ended by a max-pool, then dense-relu-dropout layers and a head.

    Attributes:
        stages: width of every convolution, a tuple per stage; 0 leaves that layer out and the others keep
            their names.
        dense: width of every hidden dense layer, 0 as above.
        num_classes: length of the logits.
        dropout: rate after each hidden dense layer in training.
    """

    stages: tuple[tuple[int, ...], ...]
    dense: tuple[int, ...]
    num_classes: int
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, num_classes]`."""
        i = 0
        for widths in self.stages:
            for width in widths:
                if width:
                    x = nn.Conv(width, (3, 3), padding=((1, 1), (1, 1)), name=f"conv{i}")(x)
                    x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=f"bn{i}")(x)
                    x = nn.relu(x)
                i += 1
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        for j, width in enumerate(self.dense):
            if width:
                x = nn.relu(nn.Dense(width, name=f"dense{j}")(x))
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="linear")(x)


def vgg(
    depth: int,
    num_classes: int = 10,
    stages: Sequence[Sequence[int]] | None = None,
    dense: Sequence[int] = (512, 512),
    dropout: float = 0.5,
) -> VGG:
    """Build VGG-`depth` (11, 13, 16 or 19), or one with the widths given in `stages` and `dense`."""
    if depth not in STAGES:
        raise ValueError(f"vgg: depth must be one of {sorted(STAGES)}, got {depth}")
    widths = STAGES[depth] if stages is None else tuple(tuple(stage) for stage in stages)
    if tuple(map(len, widths)) != tuple(map(len, STAGES[depth])):
        raise ValueError(
            f"vgg: stages of VGG-{depth} hold {list(map(len, STAGES[depth]))} convolutions, "
            f"got {list(map(len, widths))}; write 0 for a layer that is left out"
        )
    return VGG(widths, tuple(dense), num_classes, dropout)
