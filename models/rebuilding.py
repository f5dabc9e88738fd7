"""A pruned model of the zoo as a plain Flax module: the same family, built at the widths that are left.

```python
from treesurgeon import engine, models

module, variables = models.rebuild(engine.load("runs/demo/selected"))
logits = module.apply(variables, x)
```

Each family reads its arguments off the pruned shapes: what is not there has width 0, which leaves a layer out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import linen as nn

from treesurgeon.models.attention import LayerWidths
from treesurgeon.models.bert import BERT
from treesurgeon.models.convnext import ConvNeXt
from treesurgeon.models.densenet import DenseNet
from treesurgeon.models.digits_cnn import DigitsCNN
from treesurgeon.models.efficientnet import EfficientNet
from treesurgeon.models.errors import ModelSpecError, first_line
from treesurgeon.models.gpt import GPT
from treesurgeon.models.imagenet_resnet import ImageNetResNet
from treesurgeon.models.llama import DecoderWidths, Llama
from treesurgeon.models.lstm import LSTMTagger
from treesurgeon.models.mixer import Mixer
from treesurgeon.models.mlp import MLP
from treesurgeon.models.mobilenet import MobileNet
from treesurgeon.models.resnet import ResNet
from treesurgeon.models.swin import Swin, WindowWidths
from treesurgeon.models.unet import UNet
from treesurgeon.models.vgg import VGG
from treesurgeon.models.vit import ViT
from treesurgeon.models.weights import flatten

TOLERANCE = 1e-3  # of the largest output, or of 1

Indices = Mapping[str, tuple[np.ndarray, ...] | None]
"""For each leaf of the dense model, the positions that each of its axes keeps; None where the leaf is gone."""


class Pruned(Protocol):
    """What `treesurgeon.engine.load` returns."""

    @property
    def module(self) -> nn.Module:
        """See `treesurgeon.engine.Model`."""
        ...

    @property
    def variables(self) -> Any:
        """See `treesurgeon.engine.Model`."""
        ...

    @property
    def graph(self) -> Any:
        """See `treesurgeon.engine.Model`."""
        ...

    @property
    def plan(self) -> Any:
        """See `treesurgeon.engine.Model`."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """See `treesurgeon.engine.Model`."""
        ...

    def __call__(self, x: Any) -> Any:
        """Inference."""
        ...


class Kept:
    """What is left of a dense model, by the path of a submodule."""

    def __init__(self, indices: Indices):
        self.indices = indices

    def at(self, module: str, axis: int = -1, leaf: str = "kernel") -> list[int]:
        """The positions that are left of an axis of `params/module/leaf`, none where it is gone."""
        kept = self.indices.get(f"params/{module}/{leaf}")
        return [] if kept is None else kept[axis].tolist()

    def size(self, module: str, axis: int = -1, leaf: str = "kernel") -> int:
        """How many they are."""
        return len(self.at(module, axis, leaf))


def rebuild(pruned: Pruned) -> tuple[nn.Module, dict[str, Any]]:
    """A pruned model as a linen module of its family and the variables for it, checked to compute the same.

    Args:
        pruned: what `treesurgeon.engine.load` returned.

    Returns:
        The module, which needs nothing but Flax and its own file, and its variables.

    Raises:
        ModelSpecError: it is not of the zoo, or the plan leaves something that arguments of its family cannot say.
    """
    module = at_widths(pruned.module, pruned.graph.indices(pruned.graph.masks(pruned.plan)))
    entry = pruned.manifest["model"]
    shape, dtype = tuple(entry["input_shape"]), np.dtype(entry["input_dtype"])
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2, *shape)) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, (2, *shape))
    x = draws.astype(dtype)
    try:
        template = jax.eval_shape(module.init, jax.random.key(0), x)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _refusal(pruned.module, first_line(error)) from error
    got, want = _shapes(pruned.variables), _shapes(template)
    if differ := sorted(path for path in got.keys() | want.keys() if got.get(path) != want.get(path)):
        raise _refusal(pruned.module, f"{differ[0]} would have shape {want.get(differ[0])}, not {got.get(differ[0])}")
    ours, theirs = np.asarray(jax.jit(module.apply)(pruned.variables, x)), np.asarray(pruned(x))
    if not np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max()):
        raise _refusal(pruned.module, "built at the widths that are left it computes something else")
    return module, pruned.variables


def at_widths(module: nn.Module, indices: Indices) -> nn.Module:
    """A module of the zoo at the widths that are left.

    Raises:
        ModelSpecError: it is of no family here, or nothing is left that its arguments can say.
    """
    family = FAMILIES.get(type(module))
    if family is None:
        raise _refusal(module, "it is of no family whose widths are arguments")
    try:
        return module.clone(**family(module, Kept(indices)))
    except (IndexError, ValueError) as error:
        raise _refusal(module, str(error)) from error


def _refusal(module: nn.Module, why: str) -> ModelSpecError:
    return ModelSpecError(
        f"this variant cannot be written as a plain {type(module).__name__}: {why}. Use "
        f"treesurgeon.engine.load(…).apply, which takes the same arguments as module.apply"
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(nn.meta.unbox(tree)).items()}


# For each family, the arguments of the dense module that change.


def _mlp(m: MLP, k: Kept) -> dict[str, Any]:
    return {"widths": tuple(k.size(f"dense{i}") for i in range(len(m.widths)))}


def _digits_cnn(m: DigitsCNN, k: Kept) -> dict[str, Any]:
    rows = enumerate(m.stages, start=1)
    stages = tuple(tuple(k.size(f"stage{s}_{i}/conv") for i in range(len(row))) for s, row in rows)
    residual = tuple(k.size(f"stage{s}_res/conv1") for s in range(1, len(stages) + 1))
    return {"stages": stages, "residual": residual, "hidden": k.size("dense0")}


def _vgg(m: VGG, k: Kept) -> dict[str, Any]:
    stages, i = [], 0
    for row in m.stages:
        stages.append(tuple(k.size(f"conv{j}") for j in range(i, i + len(row))))
        i += len(row)
    return {"stages": tuple(stages), "dense": tuple(k.size(f"dense{j}") for j in range(len(m.dense)))}


def _resnet(m: ResNet, k: Kept) -> dict[str, Any]:
    rows = enumerate(m.inner, start=1)
    inner = tuple(tuple(k.size(f"layer{s}_{b}/conv1") for b in range(len(row))) for s, row in rows)
    leaves = [k.at("conv1"), *(k.at(f"layer{s}_0/conv2") for s in range(2, len(m.widths) + 1))]
    zeros = tuple(
        (sum(i < low for i in kept), sum(i >= width - high for i in kept))
        for kept, width, (low, high) in zip(leaves[1:], m.widths[1:], m.zeros, strict=True)
    )
    return {"widths": tuple(map(len, leaves)), "inner": inner, "zeros": zeros}


def _imagenet_resnet(m: ImageNetResNet, k: Kept) -> dict[str, Any]:
    def block(name: str, convolutions: int) -> tuple[int, ...]:
        widths = tuple(k.size(f"{name}/conv{i}") for i in range(1, convolutions + 1))
        return widths if all(widths) else ()

    rows = enumerate(m.inner, start=1)
    inner = tuple(tuple(block(f"layer{s}_{b}", len(old)) for b, old in enumerate(row)) for s, row in rows)
    widths = [k.size(f"layer{s}_0/downsample_0") for s in range(1, len(inner) + 1)]
    return {"stem": k.size("conv1"), "widths": (widths[0] or k.size("conv1"), *widths[1:]), "inner": inner}


def _densenet(m: DenseNet, k: Kept) -> dict[str, Any]:
    def layer(name: str) -> tuple[int, int]:
        return k.size(f"{name}/conv1"), k.size(f"{name}/conv2")

    rows = enumerate(m.stages, start=1)
    stages = tuple(tuple(layer(f"dense{s}_{i}") for i in range(len(row))) for s, row in rows)
    transitions = tuple(k.size(f"transition{i}") for i in range(1, len(m.transitions) + 1))
    return {"stem": k.size("conv0"), "stages": stages, "transitions": transitions}


def _convnext(m: ConvNeXt, k: Kept) -> dict[str, Any]:
    widths = (k.size("stem"), *(k.size(f"down{s}") for s in range(1, len(m.widths))))
    rows = enumerate(m.hidden, start=1)
    return {
        "widths": widths,
        "hidden": tuple(tuple(k.size(f"stage{s}_{b}/dense0") for b in range(len(row))) for s, row in rows),
    }


def _unet(m: UNet, k: Kept) -> dict[str, Any]:
    down = tuple((k.size(f"down{i}/conv0"), k.size(f"down{i}/conv1")) for i in range(len(m.down)))
    up = tuple((k.size(f"upsample{i}"), k.size(f"up{i}/conv0"), k.size(f"up{i}/conv1")) for i in range(len(m.up)))
    return {"down": down, "up": up}


def _rows(m: MobileNet | EfficientNet, k: Kept) -> dict[str, Any]:
    """Inverted residuals."""
    rows = tuple(
        row._replace(
            expanded=k.size(f"block{i}/depthwise"),
            squeezed=k.size(f"block{i}/se/dense0"),
            width=k.size(f"block{i}/project"),
        )
        for i, row in enumerate(m.rows)
    )
    found = {"stem": k.size("stem"), "rows": rows, "last": k.size("last")}
    return found | ({"hidden": k.size("dense0")} if isinstance(m, MobileNet) else {})


def _attention(k: Kept, layer: str, lead: int = 0) -> LayerWidths:
    """Of a transformer layer; `lead` axes stand before those of one layer's kernels."""
    query, value = f"{layer}/attention/query", f"{layer}/attention/value"
    return LayerWidths(k.size(query, 1 + lead), k.size(query), k.size(value), k.size(f"{layer}/mlp/dense0"))


def _vit(m: ViT, k: Kept) -> dict[str, Any]:
    return {"width": k.size("patch"), "layers": tuple(_attention(k, f"layer{i}") for i in range(len(m.layers)))}


def _bert(m: BERT, k: Kept) -> dict[str, Any]:
    layers = tuple(_attention(k, f"layer{i}") for i in range(len(m.layers)))
    return {"width": k.size("token", leaf="embedding"), "layers": layers, "pooler": k.size("pooler")}


def _gpt(m: GPT, k: Kept) -> dict[str, Any]:
    depth = k.size("layers/attention/query", 0)
    return {"width": k.size("embed", leaf="embedding"), "depth": depth, "widths": _attention(k, "layers", lead=1)}


def _llama(m: Llama, k: Kept) -> dict[str, Any]:
    layers, frequencies = [], []
    for i, old in enumerate(m.frequencies):
        query, value = f"layer{i}/attention/query", f"layer{i}/attention/value"
        layers.append(DecoderWidths(k.size(query, 1), k.size(query, 2), k.size(value), k.size(f"layer{i}/gate")))
        pairs = k.at(query)[: k.size(query) // 2]  # then come their second halves
        frequencies.append(tuple(old[pair] for pair in pairs))
    return {
        "width": k.size("embed", leaf="embedding"),
        "layers": tuple(layers),
        "frequencies": tuple(frequencies),
    }


def _swin(m: Swin, k: Kept) -> dict[str, Any]:
    def layer(name: str) -> WindowWidths:
        qkv = f"{name}/attention/qkv"
        return WindowWidths(k.size(qkv, 2), k.size(qkv, 3), k.size(f"{name}/mlp/dense0"))

    widths = (k.size("patch"), *(k.size(f"down{s}") for s in range(1, len(m.widths))))
    rows = enumerate(m.layers, start=1)
    return {
        "widths": widths,
        "layers": tuple(tuple(layer(f"stage{s}_{i}") for i in range(len(row))) for s, row in rows),
    }


def _mixer(m: Mixer, k: Kept) -> dict[str, Any]:
    rows = range(len(m.layers))
    layers = tuple((k.size(f"layer{i}/tokens/dense0"), k.size(f"layer{i}/channels/dense0")) for i in rows)
    return {"width": k.size("patch"), "layers": layers}


def _lstm(m: LSTMTagger, k: Kept) -> dict[str, Any]:
    layers = tuple((k.size(f"forward{i}/hi"), k.size(f"backward{i}/hi")) for i in range(len(m.layers)))
    return {"width": k.size("embed", leaf="embedding"), "layers": layers}


FAMILIES: Mapping[type[nn.Module], Callable[[Any, Kept], dict[str, Any]]] = {
    MLP: _mlp,
    DigitsCNN: _digits_cnn,
    VGG: _vgg,
    ResNet: _resnet,
    ImageNetResNet: _imagenet_resnet,
    DenseNet: _densenet,
    ConvNeXt: _convnext,
    UNet: _unet,
    MobileNet: _rows,
    EfficientNet: _rows,
    ViT: _vit,
    BERT: _bert,
    GPT: _gpt,
    Llama: _llama,
    Swin: _swin,
    Mixer: _mixer,
    LSTMTagger: _lstm,
}
