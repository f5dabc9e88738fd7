"""How long is a step of fine-tuning as one program, and as two, as `search.finetune` does it on a CPU?

    python benchmarks/stepping.py
    python benchmarks/stepping.py --models resnet56:128:32 vit_tiny:32:32

A model is given as name:images a step:pixels a side. Weights and images are random.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import publish, seconds, spread

from treesurgeon import models
from treesurgeon.search.finetune import stepping
from treesurgeon.search.room import size_of

MODELS = (
    "resnet56:128:32",
    "resnet56:32:32",
    "resnet20:128:32",
    "densenet121:8:64",
    "resnet50:8:64",
    "convnext_tiny:8:64",
    "efficientnet_b0:16:64",
    "mobilenet_v2:16:64",
    "vgg11:32:32",
    "vit_tiny:32:32",
    "digits_cnn:64:8",
)


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for given in options.models:
        name, count, side = given.split(":")
        rows.append(measured(name, int(count), int(side), options.repeats))
        print(rows[-1], flush=True)
    publish(
        "stepping",
        "A step of fine-tuning in one program and in two",
        ("model", "images", "one program, ms: median (range)", "two programs", "times as fast", "MB between the two"),
        rows,
        f"Forward, backward, SGD with momentum; {options.repeats} repeats in turns. Random weights and images.",
    )


def measured(name: str, count: int, side: int, repeats: int) -> list[str]:
    """A row for one model."""
    module = models.resolve(name)
    x = np.random.default_rng(0).normal(size=(count, side, side, models.get(name).input_shape[2])).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x[:1])
    optimizer = optax.sgd(0.01, momentum=0.9)
    state = (
        variables["params"],
        {k: v for k, v in variables.items() if k != "params"},
        optimizer.init(variables["params"]),
    )

    def ahead(state: Any, x: Any) -> Any:
        params, rest, _ = state

        def loss(params: Any) -> tuple[Any, Any]:
            apply = {"train": True, "mutable": list(rest), "rngs": {"dropout": jax.random.key(1)}}
            logits, updates = module.apply({"params": params, **rest}, x, **apply)
            labels = jnp.arange(count) % logits.shape[-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        return jax.vjp(loss, params, has_aux=True)

    def learn(state: Any, value: Any, back: Any, updates: Any) -> Any:
        params, rest, memory = state
        change, memory = optimizer.update(back(jnp.ones_like(value))[0], memory, params)
        return optax.apply_updates(params, change), {**rest, **updates}, memory

    def case(room: float) -> Callable[[], Any]:
        step = stepping(ahead, learn, room)
        return lambda: step(state, x)

    times = seconds({"one": case(0), "two": case(math.inf)}, repeats)
    one, two = ([1e3 * t for t in times[name]] for name in ("one", "two"))
    between = size_of(jax.eval_shape(ahead, state, x)[1]) / 1e6
    ratio = statistics.median(one) / statistics.median(two)
    return [f"{name}, {side}×{side}", str(count), spread(one, 0), spread(two, 0), f"{ratio:.2f}", f"{between:,.0f}"]


if __name__ == "__main__":
    main()
