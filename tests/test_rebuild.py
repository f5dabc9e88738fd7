"""Laws 2 and 8, in inference and in float64: gated, narrowed, and rebuilt at smaller widths, a model is one function.

Each family says how to read its arguments off the shapes of a cut pytree: what is not there has width 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from laws import draw, leaves_of, random_plan
from subjects import B0_ROWS, MODELS, V2_ROWS, V3_ROWS, variables_spec

from treesurgeon import engine, models
from treesurgeon.engine import Graph, Plan, PlanError

Size = Callable[..., int]
"""`size(module, axis=-1, leaf="kernel")`: the length of an axis of `params/module/leaf`, 0 where it is gone."""
Kept = Callable[..., list[int]]
"""`kept(module, axis=-1, leaf="kernel")`: which positions of that axis are left, none where it is gone."""


def mlp(size: Size, kept: Kept) -> nn.Module:
    return models.mlp([size(f"dense{i}") for i in range(3)], 3, "gelu")


def digits_cnn(size: Size, kept: Kept) -> nn.Module:
    stages = [[size(f"stage{s}_{i}/conv") for i in range(n)] for s, n in ((1, 2), (2, 1), (3, 2))]
    return models.digits_cnn(4, stages, [size(f"stage{s}_res/conv1") for s in (1, 2, 3)], size("dense0"))


def vgg11(size: Size, kept: Kept) -> nn.Module:
    stages, i = [], 0
    for convs in (1, 1, 2, 2, 2):
        stages.append([size(f"conv{j}") for j in range(i, i + convs)])
        i += convs
    return models.vgg(11, 3, stages, [size("dense0"), size("dense1")])


def layers(size: Size, name: str = "layer{}", n: int = 2) -> list[tuple[int, ...]]:
    out = []
    for i in range(n):
        layer = name.format(i)
        query, value = f"{layer}/attention/query", f"{layer}/attention/value"
        out.append((size(query, 1), size(query), size(value), size(f"{layer}/mlp/dense0")))
    return out


def vit(size: Size, kept: Kept) -> nn.Module:
    return models.vit(num_classes=3, width=size("patch"), layers=layers(size), patch=2, scale=0.7)


def gpt(size: Size, kept: Kept, length: int, remat: bool) -> nn.Module:
    query, value = "layers/attention/query", "layers/attention/value"
    widths = size(query, 2), size(query), size(value), size("layers/mlp/dense0")
    return models.gpt(7, length, size("embed", leaf="embedding"), size(query, 0), widths, 0.7, remat)


def bert(size: Size, kept: Kept) -> nn.Module:
    return models.bert(3, 7, 5, 2, size("token", leaf="embedding"), layers(size), size("pooler"), scale=0.7)


def imagenet_resnet(size: Size, kept: Kept, depth: int, blocks: tuple[int, ...]) -> nn.Module:
    def inner(block: str) -> list[int]:
        convolutions = (1,) if depth < 50 else (1, 2)
        return [size(f"{block}/conv{i}") for i in convolutions] if size(f"{block}/conv1") else []

    rows = [[inner(f"layer{s}_{b}") for b in range(n)] for s, n in enumerate(blocks, start=1)]
    out = [size(f"layer{s}_0/downsample_0") for s in (1, 2, 3, 4)]
    return models.imagenet_resnet(depth, 3, size("conv1"), [out[0] or size("conv1"), *out[1:]], rows)


def densenet(size: Size, kept: Kept) -> nn.Module:
    layers = [f"dense{s}_{i}" for s in (1, 2) for i in (0, 1)]
    rows = [(size(f"{layer}/conv1"), size(f"{layer}/conv2")) for layer in layers]
    return models.densenet(121, 3, size("conv0"), (rows[:2], rows[2:]), [size("transition1")])


def convnext(size: Size, kept: Kept) -> nn.Module:
    hidden = [[size(f"{block}/dense0") for block in blocks] for blocks in (("stage1_0", "stage1_1"), ("stage2_0",))]
    return models.convnext("tiny", 3, (size("stem"), size("down1")), hidden, 2)


def unet(size: Size, kept: Kept) -> nn.Module:
    down = [(size(f"down{i}/conv0"), size(f"down{i}/conv1")) for i in (0, 1, 2)]
    up = [(size(f"upsample{i}"), size(f"up{i}/conv0"), size(f"up{i}/conv1")) for i in (0, 1)]
    return models.unet(2, down, up)


def swin(size: Size, kept: Kept) -> nn.Module:
    def layer(name: str) -> tuple[int, ...]:
        return size(f"{name}/attention/qkv", 2), size(f"{name}/attention/qkv", 3), size(f"{name}/mlp/dense0")

    layers = (layer("stage1_0"), layer("stage1_1")), (layer("stage2_0"),)
    return models.swin("tiny", 3, (size("patch"), size("down1")), layers, 2, 2, 0.7)


def mixer(size: Size, kept: Kept) -> nn.Module:
    hidden = [[size(f"layer{i}/{mlp}/dense0") for mlp in ("tokens", "channels")] for i in (0, 1)]
    return models.mixer("s", 3, size("patch"), hidden, 2)


def lstm(size: Size, kept: Kept) -> nn.Module:
    hidden = [(size(f"forward{i}/hi"), size(f"backward{i}/hi")) for i in (0, 1)]
    return models.lstm_tagger(7, size("embed", leaf="embedding"), hidden, 3)


def efficientnet(size: Size, kept: Kept) -> nn.Module:
    return models.efficientnet(0, 3, size("stem"), rows_of(size, B0_ROWS), size("last"))


def mobilenet(size: Size, kept: Kept, version: str, rows: list[tuple]) -> nn.Module:
    return models.mobilenet(version, 3, size("stem"), rows_of(size, rows), size("last"), size("dense0"))


def rows_of(size: Size, rows: list[tuple]) -> list[tuple]:
    """Inverted residuals at the widths that are left."""
    new = []
    for i, (kernel, stride, *_, activation, expands, residual) in enumerate(rows):
        block = f"block{i}"
        widths = size(f"{block}/depthwise"), size(f"{block}/se/dense0"), size(f"{block}/project")
        new.append((kernel, stride, *widths, activation, expands, residual))
    return new


def llama(size: Size, kept: Kept, n: int = 2, key: int = 4, tied: bool = False) -> nn.Module:
    layers, frequencies = [], []
    for i in range(n):
        query, value = f"layer{i}/attention/query", f"layer{i}/attention/value"
        layers.append((size(query, 1), size(query, 2), size(value), size(f"layer{i}/gate")))
        pairs = kept(query)[: size(query) // 2]  # then come their second halves
        frequencies.append([10.0 ** (-2 * pair / key) for pair in pairs])
    width = size("embed", leaf="embedding")
    return models.llama(7, width, layers, key, 10, frequencies, tied)


# How a family is rebuilt, and blocks that its arguments can leave out: each by the modules that go with it.
REBUILD: dict[str, tuple[Callable[[Size, Kept], nn.Module], tuple[str, ...]]] = {
    "mlp": (mlp, ("dense2",)),
    "digits_cnn": (digits_cnn, ("stage1_1", "stage2_res")),
    "vgg11": (vgg11, ("conv3 bn3", "dense1")),
    "vit": (vit, ("layer0/norm1 layer0/attention", "layer1/norm2 layer1/mlp")),
    "resnet18": (partial(imagenet_resnet, depth=18, blocks=(2, 2, 2, 2)), ()),
    "resnet50": (
        partial(imagenet_resnet, depth=50, blocks=(3, 4, 6, 3)),
        ("layer1_1/conv1 layer1_1/bn1 layer1_1/conv2 layer1_1/bn2 layer1_1/conv3 layer1_1/bn3",),
    ),
    "mobilenet_v2": (partial(mobilenet, version="v2", rows=V2_ROWS), ("block1",)),
    "mobilenet_v3": (partial(mobilenet, version="v3_small", rows=V3_ROWS), ("block1",)),
    "densenet": (densenet, ()),
    "convnext": (convnext, ("stage1_1",)),
    "unet": (unet, ()),
    "efficientnet": (efficientnet, ("block1",)),
    "mixer": (mixer, ("layer0/norm1 layer0/tokens", "layer1/norm2 layer1/channels")),
    "lstm": (lstm, ()),
    "swin": (swin, ("stage1_0/norm1 stage1_0/attention", "stage2_0/norm2 stage2_0/mlp")),
    "llama": (llama, ("layer0/norm2 layer0/gate layer0/up layer0/down", "layer1/norm1 layer1/attention")),
    "gpt": (partial(gpt, length=5, remat=False), ()),
    "gpt-remat": (partial(gpt, length=4, remat=True), ()),
    "bert": (bert, ("layer0/norm2 layer0/mlp",)),
    "llama-tied": (partial(llama, n=1, key=6, tied=True), ()),
}


def kept_of(indices: Mapping[str, Any], module: str, axis: int = -1, leaf: str = "kernel") -> list[int]:
    kept = indices.get(f"params/{module}/{leaf}")
    return [] if kept is None else kept[axis].tolist()


def block_of(graph: Graph, modules: str) -> str:
    """The block with which all leaves of these modules go, and no others."""
    inside = tuple(f"{module}/" for module in modules.split())
    leaves = {path for path in graph.leaves if path.partition("/")[2].startswith(inside)}
    return next(name for name, block in graph.blocks.items() if set(block.leaves) == leaves)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REBUILD)
def test_rebuilt_at_smaller_widths_it_computes_the_same(name, seed):
    rebuild, droppable = REBUILD[name]
    module, inputs = MODELS[name]
    with jax.enable_x64(True):
        params, xs = draw(variables_spec(module, *inputs(1)), seed, np.float64), draw(inputs(2), seed, np.float64)
        fn, _ = engine.from_linen(module, {})
        graph = engine.trace(fn, params, *xs)
        keep = random_plan(graph, seed, least=2, drop=0).keep
        plan = Plan(keep, frozenset(block_of(graph, modules) for modules in droppable if seed < 2))
        try:
            graph.masks(plan)
        except PlanError:  # the ties of what is dropped leave nothing of some group
            plan = Plan({}, plan.drop)

        small, fast = engine.cut(params, graph, plan), engine.narrow(fn, graph, plan)
        shapes = {path: leaf.shape for path, leaf in leaves_of(small).items()}
        kept = partial(kept_of, graph.indices(graph.masks(plan)))
        rebuilt = rebuild(lambda *where, **leaf: len(kept(*where, **leaf)), kept)
        template = jax.eval_shape(rebuilt.init, jax.random.key(0), *xs)
        assert {path: leaf.shape for path, leaf in leaves_of(template).items()} == shapes

        run = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        narrowed = run(fast)(small, *xs)
        gated = run(engine.gate(fn, graph))(params, graph.masks(plan), *xs)
        again = run(rebuilt.apply)(small, *xs)
    assert np.isfinite(narrowed).all()
    np.testing.assert_allclose(narrowed, gated, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(again, narrowed, rtol=1e-9, atol=1e-11)
