"""Go on training a selected model with `flax.training.TrainState` and optax, as any linen module.

    python docs/examples/train_further.py runs/demo/selected --steps 100

`models.rebuild` gives the plain module of the zoo at the widths that are left. Where it cannot (a variant that its
family's arguments do not describe, a model of your own), `engine.load(…).apply` takes its place, line for line.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from treesurgeon import engine, models
from treesurgeon.search import open_source, split_roles


class TrainState(train_state.TrainState):
    """Parameters and optimiser, and the running statistics of the norms."""

    batch_stats: Any


@jax.jit
def step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    """One step on images `[N, H, W, C]` and labels `[N]`; returns the loss as well."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), value


def train(selected: str, images: np.ndarray, labels: np.ndarray, steps: int, batch: int = 64) -> TrainState:
    """Train on images normalised as the manifest says."""
    module, variables = models.rebuild(engine.load(selected))
    state = TrainState.create(
        apply_fn=module.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=optax.sgd(0.01, momentum=0.9),
    )
    rng = np.random.default_rng(0)
    for i in range(steps):
        rows = rng.integers(0, len(images), batch)
        state, loss = step(state, jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
        if i in (0, steps - 1):
            print(f"step {i + 1}: loss {float(loss):.4f}")
    return state


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
