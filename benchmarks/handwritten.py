"""What a plan leaves of a zoo model, written by hand: the module at the kept widths, and counts of a program's HLO."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from treesurgeon import engine, models

# What masking, slicing and padding leave behind in a compiled program.
LEFTOVERS = ("gather", "pad", "select", "compare", "dynamic-slice", "dynamic-update-slice", "slice", "concatenate")


class Widths:
    """The kept positions of every leaf under a plan; modules that are gone have none."""

    def __init__(self, graph: engine.Graph, plan: engine.Plan):
        self.indices = graph.indices(graph.masks(plan))

    def kept(self, module: str, axis: int = -1, leaf: str = "kernel") -> np.ndarray:
        """Which positions of an axis of `params/module/leaf` are left."""
        found = self.indices[f"params/{module}/{leaf}"]
        return np.arange(0) if found is None else found[axis]

    def size(self, module: str, axis: int = -1, leaf: str = "kernel") -> int:
        """How many positions are left."""
        return len(self.kept(module, axis, leaf))


def small_resnet(dense: models.ResNet, graph: engine.Graph, plan: engine.Plan) -> models.ResNet:
    """The CIFAR ResNet at the plan's widths."""
    left = Widths(graph, plan)
    inner = tuple(
        tuple(left.size(f"layer{s}_{b}/conv1") for b in range(len(row))) for s, row in enumerate(dense.inner, start=1)
    )
    zeros = []
    for s, (lo, _) in enumerate(dense.zeros, start=2):
        into = left.kept(f"layer{s}_0/conv2")
        zeros.append((int((into < lo).sum()), int((into >= lo + dense.widths[s - 2]).sum())))
    widths = (left.size("conv1"), *(left.size(f"layer{s}_0/conv2") for s in (2, 3)))
    return models.ResNet(widths, inner, tuple(zeros), dense.num_classes)


def small_vit(dense: models.ViT, graph: engine.Graph, plan: engine.Plan) -> models.ViT:
    """The vision transformer at the plan's widths."""
    left = Widths(graph, plan)
    layers = tuple(
        type(widths)(
            left.size(f"layer{i}/attention/query", 1),
            left.size(f"layer{i}/attention/query"),
            left.size(f"layer{i}/attention/value"),
            left.size(f"layer{i}/mlp/dense0"),
        )
        for i, widths in enumerate(dense.layers)
    )
    return models.ViT(left.size("patch"), layers, dense.patch, dense.num_classes, dense.scale)


def small(dense: nn.Module, graph: engine.Graph, plan: engine.Plan) -> nn.Module:
    """The module at the plan's widths."""
    if isinstance(dense, models.ResNet):
        return small_resnet(dense, graph, plan)
    assert isinstance(dense, models.ViT)
    return small_vit(dense, graph, plan)


def operations(fn: Callable, *args: Any) -> Counter[str]:
    """How often each operation stands in the optimised HLO of `jit(fn)`, fused computations included."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return Counter(re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][a-z-]*)\(", text or "", re.MULTILINE))


def random_plan(graph: engine.Graph, seed: int, drop: float = 0.2) -> engine.Plan:
    """A plan that keeps half to all of every group and drops some blocks, those that `small` can leave out."""
    rng = np.random.default_rng(seed)
    keep = {
        name: np.sort(rng.choice(group.size, rng.integers(group.size // 2, group.size) + 1, replace=False))
        for name, group in graph.groups.items()
    }
    branches = [name for name, b in graph.blocks.items() if b.parent is None and not name.endswith("/conv2")]
    return engine.Plan(keep, frozenset(name for name in branches if rng.random() < drop))
