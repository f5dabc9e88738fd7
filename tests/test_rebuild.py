"""Laws 2 and 8, in inference and in float64: gated, narrowed and rebuilt narrower, a model is one function."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from laws import draw, leaves_of, random_plan
from subjects import MODELS, variables_spec

from treesurgeon import engine, models
from treesurgeon.engine import Graph, Plan, PlanError

# Blocks that a family's arguments can leave out: each by the modules that go with it.
REBUILD: dict[str, tuple[str, ...]] = {
    "mlp": ("dense2",),
    "digits_cnn": ("stage1_1", "stage2_res"),
    "vgg11": ("conv3 bn3", "dense1"),
    "resnet20": ("layer1_1", "layer3_2"),
    "vit": ("layer0/norm1 layer0/attention", "layer1/norm2 layer1/mlp"),
    "resnet18": (),
    "resnet50": ("layer1_1/conv1 layer1_1/bn1 layer1_1/conv2 layer1_1/bn2 layer1_1/conv3 layer1_1/bn3",),
    "mobilenet_v2": ("block1",),
    "mobilenet_v3": ("block1",),
    "densenet": (),
    "convnext": ("stage1_1",),
    "unet": (),
    "efficientnet": ("block1",),
    "mixer": ("layer0/norm1 layer0/tokens", "layer1/norm2 layer1/channels"),
    "lstm": (),
    "swin": ("stage1_0/norm1 stage1_0/attention", "stage2_0/norm2 stage2_0/mlp"),
    "llama": ("layer0/norm2 layer0/gate layer0/up layer0/down", "layer1/norm1 layer1/attention"),
    "gpt": (),
    "gpt-remat": (),
    "bert": ("layer0/norm2 layer0/mlp",),
    "llama-tied": (),
}


def block_of(graph: Graph, modules: str) -> str:
    """The block with which all leaves of these modules go, and no others."""
    inside = tuple(f"{module}/" for module in modules.split())
    leaves = {path for path in graph.leaves if path.partition("/")[2].startswith(inside)}
    return next(name for name, block in graph.blocks.items() if set(block.leaves) == leaves)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REBUILD)
def test_rebuilt_at_smaller_widths_it_computes_the_same(name, seed):
    droppable = REBUILD[name]
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
        rebuilt = models.at_widths(module, graph.indices(graph.masks(plan)))
        template = jax.eval_shape(rebuilt.init, jax.random.key(0), *xs)
        assert {path: leaf.shape for path, leaf in leaves_of(template).items()} == shapes

        run = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        narrowed = run(fast)(small, *xs)
        gated = run(engine.gate(fn, graph))(params, graph.masks(plan), *xs)
        again = run(rebuilt.apply)(small, *xs)
    assert np.isfinite(narrowed).all()
    np.testing.assert_allclose(narrowed, gated, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(again, narrowed, rtol=1e-9, atol=1e-11)
