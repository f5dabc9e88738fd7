"""Go on training a selected model in an nnx loop, through `nnx.bridge`.

python docs/examples/train_nnx.py runs/demo/selected --steps 100
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from treesurgeon import engine, models
from treesurgeon.search import open_source, split_roles


def as_nnx(selected: str) -> nnx.bridge.ToNNX:
    """A selected model as an nnx module: the rebuilt linen module with its own variables."""
    module, variables = models.rebuild(engine.load(selected))
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
    for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(variables).items():
        setattr(model, name, nnx.data(value))
    return model


@nnx.jit
def step(model: nnx.bridge.ToNNX, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """One step on images `[N, H, W, C]` and labels `[N]`; returns the loss."""

    def loss(model: nnx.bridge.ToNNX) -> jax.Array:
        logits: Any = model(x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def train(selected: str, images: np.ndarray, labels: np.ndarray, steps: int, batch: int = 64) -> nnx.bridge.ToNNX:
    """Train on images normalised as the manifest says."""
    model = as_nnx(selected)
    optimizer = nnx.Optimizer(model, optax.sgd(0.01, momentum=0.9), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for i in range(steps):
        rows = rng.integers(0, len(images), batch)
        loss = step(model, optimizer, jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
        if i in (0, steps - 1):
            print(f"step {i + 1}: loss {float(loss):.4f}")
    return model


def main() -> None:
    """Train on the digits that the demo uses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("selected")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    data = split_roles(open_source("digits"), ("train",)).train
    train(options.selected, data.images, data.labels, options.steps)


if __name__ == "__main__":
    main()
