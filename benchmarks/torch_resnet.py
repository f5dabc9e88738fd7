"""The CIFAR ResNet of `models/resnet.py` in PyTorch, for the benchmarks that run other tools on the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

STAGES = (16, 32, 64)


class Block(nn.Module):
    """conv-bn-relu-conv-bn beside a shortcut without parameters: every second pixel, new channels zero."""

    def __init__(self, wide: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(wide, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.zeros = stride, (width - wide) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, wide, H, W]` to `[N, width, H / stride, W / stride]`."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.zeros, self.zeros))
        return F.relu(x + y)


class ResNet(nn.Module):
    """He et al. 2015, section 4.2, for images `[N, 3, 32, 32]`."""

    def __init__(self, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STAGES[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGES[0])
        wide = STAGES[0]
        for stage, width in enumerate(STAGES, 1):
            layers = []
            for i in range(blocks):
                layers.append(Block(wide, width, 2 if stage > 1 and i == 0 else 1))
                wide = width
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(wide, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def load(checkpoint: str) -> ResNet:
    """The net whose weights a safetensors file holds, in inference mode."""
    weights = load_file(checkpoint)
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layer1."))
    net = ResNet(blocks)
    net.load_state_dict(weights, strict=False)
    return net.eval()


def answers(net: nn.Module, images: np.ndarray, batch: int = 250) -> np.ndarray:
    """Logits `float32[N, classes]` of images `float32[N, H, W, C]`, normalised already."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.inference_mode():
        return torch.cat([net(part) for part in x.split(batch)]).numpy()


def reestimate(net: nn.Module, images: np.ndarray) -> None:
    """Set the running statistics of every batch norm to those of these images, in one forward pass."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    net.train()
    answers(net, images, len(images))
    net.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def macs(net: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    """Multiply-accumulates of the convolutions and dense layers for one image."""
    counted: list[int] = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        del inputs
        assert isinstance(module, nn.Conv2d | nn.Linear)
        counted.append(output[0].numel() * module.weight[0].numel())

    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        net(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return sum(counted)


def keep_inner(net: ResNet, kept: Mapping[str, np.ndarray]) -> ResNet:
    """A copy without the other channels between the two convolutions of blocks, cut by Torch-Pruning.

    Args:
        net: the dense net.
        kept: channels by group name, `layer1_0/conv1`.
    """
    import copy

    import torch_pruning as tp

    net = copy.deepcopy(net)
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=torch.zeros(1, 3, 32, 32))
    for name, channels in kept.items():
        conv = net.get_submodule(name.replace("_", ".").replace("/", "."))
        assert isinstance(conv, nn.Conv2d)
        gone = np.setdiff1d(np.arange(conv.out_channels), channels).tolist()
        if gone:
            graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=gone).prune()
    return net
