"""Under which names and in which order of axes PyTorch's checkpoints keep the leaves of the zoo's families.

The names are those of torchvision, of timm where it has others, and of the repositories that `presets.py` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from flax import linen as nn

from treesurgeon.models.convnext import ConvNeXt
from treesurgeon.models.densenet import DenseNet
from treesurgeon.models.digits_cnn import DigitsCNN
from treesurgeon.models.imagenet_resnet import ImageNetResNet
from treesurgeon.models.mlp import MLP
from treesurgeon.models.mobilenet import MobileNet
from treesurgeon.models.resnet import ResNet
from treesurgeon.models.vgg import STAGES, VGG
from treesurgeon.models.vit import ViT

# Flax's name of a leaf -> PyTorch's; a convolution's or a dense layer's "weight" also has other axes.
LEAF_NAMES = MappingProxyType(
    {
        "kernel": "weight",
        "bias": "bias",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }
)

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Entry:
    """Where a file keeps one leaf of the model, with which shape, and how it becomes the leaf."""

    leaf: str
    shape: tuple[int, ...]
    to_flax: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """How PyTorch checkpoints of a family name and lay out the model's leaves.

    Attributes:
        rename: `(path of a linen submodule, shapes of the model's leaves) -> PyTorch's name of it`.
        flattened: the first dense layer after flattening, or None. PyTorch flattens [C, H, W], flax
            [H, W, C], so the rows of its kernel are in another order.
        channels: `(shapes, input shape) -> C` where it flattens; None if it cannot be known.
        parameters: PyTorch's names of leaves that no layer holds, by their path in `params`.
        pointwise: whether a dense layer is a 1 x 1 convolution in PyTorch, by the path of its submodule.
        fused: arrays that hold the kernels or biases of query, key and value one behind the other, as a pattern for
            their names and what their parts are called.
        aliases: patterns of other names that published files have, and what stands for them here.
    """

    rename: Callable[[str, Shapes], str]
    flattened: str | None = None
    channels: Callable[[Shapes, Sequence[int] | None], int | None] = lambda shapes, input_shape: None
    parameters: Mapping[str, str] = field(default_factory=dict)
    pointwise: Callable[[str], bool] = lambda module: False
    fused: tuple[str, str] | None = None
    aliases: tuple[tuple[str, str], ...] = ()

    def split(self, arrays: Arrays) -> Arrays:
        """The arrays of a file by one set of names, those that hold query, key and value taken apart."""
        out: dict[str, np.ndarray] = {}
        for name, value in arrays.items():
            for pattern, instead in self.aliases:
                name = re.sub(pattern, instead, name)
            found = re.fullmatch(self.fused[0], name) if self.fused else None
            if self.fused is None or found is None or value.ndim == 0 or len(value) % 3:
                out[name] = value
                continue
            for part, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                out[self.fused[1].format(*found.groups(), part=part)] = piece
        return out

    def entry(self, leaf: str, shapes: Shapes, input_shape: Sequence[int] | None) -> tuple[str, Entry | None]:
        """PyTorch's name of a leaf, and its entry; None where the channels before a flattening cannot be known.

        Convolutions are [out, in, height, width], dense kernels [out, in]; heads lie one behind the other.
        """
        module, _, kind = leaf.partition("/")[2].rpartition("/")
        shape, inside = shapes[leaf], leaf.partition("/")[2]
        if name := self.parameters.get(inside):
            return name, Entry(leaf, shape, lambda x: x)
        if kind not in LEAF_NAMES:
            name = f"{self.rename(module, shapes)}.{kind}"
            if kind == "gamma" and name.endswith("layer_scale.gamma"):
                return name.removesuffix(".gamma"), Entry(leaf, (*shape, 1, 1), lambda x: x.reshape(shape))
            return name, Entry(leaf, shape, lambda x: x)
        name = f"{self.rename(module, shapes)}.{LEAF_NAMES[kind]}"
        if kind != "kernel":
            return name, Entry(leaf, (int(np.prod(shape)),), lambda x: x.reshape(shape))
        if len(shape) == 4:
            h, w, i, o = shape
            return name, Entry(leaf, (o, i, h, w), lambda x: x.transpose(2, 3, 1, 0))
        if len(shape) == 3:
            first = -1 if module.endswith("/out") else 1  # [heads, units, D], else [D, heads, units]
            rows = int(np.prod(shape[:first]))
            flat = (rows, int(np.prod(shape)) // rows)
            return name, Entry(leaf, flat[::-1], lambda x: x.T.reshape(shape))
        if module == self.flattened:
            channels = self.channels(shapes, input_shape)
            if channels is None:
                return name, None
            return name, Entry(leaf, shape[::-1], lambda x: _from_chw(x, channels))
        if self.pointwise(module):
            return name, Entry(leaf, (*shape[::-1], 1, 1), lambda x: x[:, :, 0, 0].T)
        return name, Entry(leaf, shape[::-1], lambda x: x.T)


def _from_chw(weight: np.ndarray, channels: int) -> np.ndarray:
    """`[out, C·H·W]` -> `[H·W·C, out]`."""
    out = weight.shape[0]
    return weight.reshape(out, channels, -1).transpose(2, 1, 0).reshape(-1, out)


def _dotted(module: str, shapes: Shapes) -> str:
    return module.replace("/", ".")


def _resnet(module: str, shapes: Shapes) -> str:
    """`layer1_0/conv1` -> `layer1.0.conv1`, as in torchvision and in github.com/akamaster/pytorch_resnet_cifar10."""
    return module.replace("_", ".").replace("/", ".")


def _vgg(module: str, shapes: Shapes) -> str:
    """`conv1` -> `features.3`, as in torchvision: a conv is 3 entries of `features`, a pool 1, a dense 3.

    The pools are not in `shapes`; they follow from the number of convolutions, which names the VGG.
    """
    convs = 1 + max(int(path.split("/")[1][4:]) for path in shapes if path.startswith("params/conv"))
    stages = {sum(map(len, stages)): stages for stages in STAGES.values()}.get(convs)
    if stages is None:
        return module
    kind, number = module.rstrip("0123456789"), module[len(module.rstrip("0123456789")) :]
    if kind == "linear":
        return "classifier.6"
    if kind == "dense":
        return f"classifier.{3 * int(number)}"
    ends = np.cumsum([len(stage) for stage in stages])
    first = 3 * int(number) + int(np.sum(ends <= int(number)))
    return f"features.{first if kind == 'conv' else first + 1}"


def _densenet(module: str, shapes: Shapes) -> str:
    """`dense1_0/bn1` -> `features.denseblock1.denselayer1.norm1`, as in torchvision and timm."""
    if module == "linear":
        return "classifier"
    if found := re.fullmatch(r"dense(\d+)_(\d+)/(conv|bn)(\d)", module):
        stage, layer, kind, number = found.groups()
        kind = "norm" if kind == "bn" else kind
        return f"features.denseblock{stage}.denselayer{int(layer) + 1}.{kind}{number}"
    if found := re.fullmatch(r"transition(_bn)?(\d+)", module):
        return f"features.transition{found[2]}.{'norm' if found[1] else 'conv'}"
    return {"conv0": "features.conv0", "bn0": "features.norm0", "bn": "features.norm5"}.get(module, module)


def _convnext(module: str, shapes: Shapes) -> str:
    """`stage1_0/dense0` -> `features.1.0.block.3`, as in torchvision."""
    if found := re.fullmatch(r"stage(\d+)_(\d+)(?:/(\w+))?", module):
        inner = {"depthwise": "block.0", "norm": "block.2", "dense0": "block.3", "dense1": "block.5"}
        return f"features.{2 * int(found[1]) - 1}.{found[2]}.{inner.get(found[3], 'layer_scale')}"
    if found := re.fullmatch(r"(down|norm)([1-9])", module):
        return f"features.{2 * int(found[2])}.{int(found[1] == 'down')}"
    names = {"stem": "features.0.0", "norm0": "features.0.1", "norm": "classifier.0", "linear": "classifier.2"}
    return names.get(module, module)


def _convnext_timm(module: str, shapes: Shapes) -> str:
    """`stage1_0/dense0` -> `stages.0.blocks.0.mlp.fc1`."""
    if found := re.fullmatch(r"stage(\d+)_(\d+)(?:/(\w+))?", module):
        inner = {"depthwise": ".conv_dw", "norm": ".norm", "dense0": ".mlp.fc1", "dense1": ".mlp.fc2"}
        return f"stages.{int(found[1]) - 1}.blocks.{found[2]}{inner.get(found[3], '')}"
    if found := re.fullmatch(r"(down|norm)([1-9])", module):
        return f"stages.{found[2]}.downsample.{int(found[1] == 'down')}"
    return {"stem": "stem.0", "norm0": "stem.1", "norm": "head.norm", "linear": "head.fc"}.get(module, module)


def _vit(module: str, shapes: Shapes) -> str:
    """`layer0/mlp/dense0` -> `encoder.layers.encoder_layer_0.mlp.0`, as in torchvision."""
    if found := re.fullmatch(r"layer(\d+)/(.+)", module):
        inner = {"norm1": "ln_1", "norm2": "ln_2", "mlp/dense0": "mlp.0", "mlp/dense1": "mlp.3"}
        inner |= {"attention/out": "self_attention.out_proj"}
        name = inner.get(found[2], found[2].replace("attention/", "self_attention."))
        return f"encoder.layers.encoder_layer_{found[1]}.{name}"
    return {"patch": "conv_proj", "norm": "encoder.ln", "linear": "heads.head"}.get(module, module)


def _vit_timm(module: str, shapes: Shapes) -> str:
    """`layer0/mlp/dense0` -> `blocks.0.mlp.fc1`."""
    if found := re.fullmatch(r"layer(\d+)/(.+)", module):
        inner = {"mlp/dense0": "mlp.fc1", "mlp/dense1": "mlp.fc2", "attention/out": "attn.proj"}
        return f"blocks.{found[1]}.{inner.get(found[2], found[2].replace('attention/', 'attn.'))}"
    return {"patch": "patch_embed.proj", "norm": "norm", "linear": "head"}.get(module, module)


def _mobilenet(module: str, shapes: Shapes) -> str:
    """`block1/depthwise` -> `features.2.conv.1.0` (V2) or `features.2.block.1.0` (V3), as in torchvision."""
    blocks = len({path.split("/")[1] for path in shapes if path.startswith("params/block")})
    third = any("/se/" in path for path in shapes)  # what V3 has and V2 has not
    if found := re.fullmatch(r"block(\d+)/(.+)", module):
        block, inner = found.groups()
        expands = int(f"params/block{block}/expand/kernel" in shapes)
        squeezes = int(f"params/block{block}/se/dense0/kernel" in shapes)
        project = expands + 1 + squeezes
        if third:
            places = {"expand": "0.0", "bn1": "0.1", "project": f"{project}.0", "bn3": f"{project}.1"}
        else:
            places = {"expand": "0.0", "bn1": "0.1", "project": f"{project}", "bn3": f"{project + 1}"}
        places |= {"depthwise": f"{expands}.0", "bn2": f"{expands}.1"}
        places |= {"se/dense0": f"{expands + 1}.fc1", "se/dense1": f"{expands + 1}.fc2"}
        return f"features.{int(block) + 1}.{'block' if third else 'conv'}.{places[inner]}"
    names = {"stem": "features.0.0", "bn0": "features.0.1", "dense0": "classifier.0"}
    names |= {"last": f"features.{blocks + 1}.0", "bn1": f"features.{blocks + 1}.1"}
    return names.get(module, "classifier.3" if third else "classifier.1")


def _mobilenet_timm(module: str, shapes: Shapes) -> str:
    """`block1/depthwise` -> `blocks.1.0.conv_dw`; V2 alone, since timm's V3 has norms of another epsilon."""
    if found := re.fullmatch(r"block(\d+)/(.+)", module):
        ends = np.cumsum((1, 2, 3, 4, 3, 3, 1))  # blocks of each stage
        stage = int(np.searchsorted(ends, int(found[1]), side="right"))
        place = int(found[1]) - (int(ends[stage - 1]) if stage else 0)
        expands = f"params/block{found[1]}/expand/kernel" in shapes
        names = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if not expands:
            names |= {"project": "conv_pw", "bn2": "bn1", "bn3": "bn2"}
        return f"blocks.{stage}.{place}.{names.get(found[2], found[2])}"
    names = {"stem": "conv_stem", "bn0": "bn1", "last": "conv_head", "bn1": "bn2", "linear": "classifier"}
    return names.get(module, module)


def _last_conv_channels(shapes: Shapes, input_shape: Sequence[int] | None) -> int | None:
    return [shape for shape in shapes.values() if len(shape) == 4][-1][-1]


def _input_channels(shapes: Shapes, input_shape: Sequence[int] | None) -> int | None:
    return None if input_shape is None else input_shape[-1]


_TORCHVISION_VIT = MappingProxyType({"token": "class_token", "position": "encoder.pos_embedding"})
_TIMM_VIT = MappingProxyType({"token": "cls_token", "position": "pos_embed"})
# For each family, the layouts there are; a file is read by the one whose names it has most of.
LAYOUTS: Mapping[str, tuple[Layout, ...]] = MappingProxyType(
    {
        "resnet": (Layout(_resnet),),
        "vgg": (Layout(_vgg, "dense0", _last_conv_channels),),
        "mlp": (Layout(_dotted, "dense0", _input_channels),),
        "digits_cnn": (Layout(_dotted, "dense0", _last_conv_channels),),
        "densenet": (Layout(_densenet, aliases=((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),)),),
        "convnext": (Layout(_convnext), Layout(_convnext_timm)),
        "mobilenet": (Layout(_mobilenet, pointwise=lambda module: "/se/" in module), Layout(_mobilenet_timm)),
        "vit": (
            Layout(
                _vit,
                parameters=_TORCHVISION_VIT,
                fused=(r"(.*self_attention)\.in_proj_(weight|bias)", "{0}.{part}.{1}"),
                aliases=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
            ),
            Layout(_vit_timm, parameters=_TIMM_VIT, fused=(r"(.*attn)\.qkv\.(weight|bias)", "{0}.{part}.{1}")),
        ),
    }
)
FAMILIES: Mapping[type[nn.Module], str] = MappingProxyType(
    {
        ResNet: "resnet",
        ImageNetResNet: "resnet",
        VGG: "vgg",
        MLP: "mlp",
        DigitsCNN: "digits_cnn",
        DenseNet: "densenet",
        ConvNeXt: "convnext",
        MobileNet: "mobilenet",
        ViT: "vit",
    }
)
