"""How fast are candidates evaluated? The gated population beside the dense model and beside cutting each candidate."""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np
from harness import publish, seconds, spread

from treesurgeon import engine, models

REPEATS = 5


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    module = models.resolve(options.model)
    shape = models.get(options.model).input_shape
    x = jax.random.normal(jax.random.key(0), (options.images, *shape))
    fn, params = engine.from_linen(module, module.init(jax.random.key(1), x[:1]))
    graph = engine.trace(fn, params, x[:1])
    plans = random_plans(graph, options.candidates)
    stack = jax.tree.map(lambda *m: np.stack(m), *(graph.masks(plan) for plan in plans))
    deep = {kind: {name: m for name, m in masks.items() if name.startswith("layer3")} for kind, masks in stack.items()}
    gated = engine.gate(fn, graph)
    dense = jax.jit(fn)
    compiled: list[int] = []

    def population(params, masks, x):
        compiled.append(1)  # runs once for each compilation
        return jax.vmap(gated, (None, 0, None))(params, masks, x)

    everything = jax.jit(population)
    last_stage = jax.jit(jax.vmap(gated, (None, 0, None)))
    cases = {
        "dense model": lambda: dense(params, x),
        "population, everything gated": lambda: everything(params, stack, x),
        "population, last stage gated": lambda: last_stage(params, deep, x),
    }
    times = seconds(cases, REPEATS)
    images = {name: options.images * (1 if name == "dense model" else options.candidates) for name in cases}
    base = statistics.median(times["dense model"]) / options.images
    rows = [
        [
            name,
            spread([images[name] / t for t in values], 0),
            f"{base / (statistics.median(values) / images[name]):.2f}",
        ]
        for name, values in times.items()
    ]
    serial = []
    for plan in plans:
        start = time.perf_counter()
        small = engine.cut(params, graph, plan)
        jax.block_until_ready(jax.jit(engine.narrow(fn, graph, plan))(small, x))
        serial.append(options.images / (time.perf_counter() - start))
    rate = statistics.median(serial)
    rows.append(["one by one: cut, compile, run", spread(serial, 0), f"{base * rate:.2f}"])
    publish(
        "throughput",
        f"Evaluations of {options.model}: {options.candidates} candidates × {options.images} images",
        ("what", "candidate-images/s: median (range)", "against dense"),
        rows,
        f"Random plans (half to all units of each group kept, a fifth of the blocks dropped). {REPEATS} repeats "
        f"in turns. Compilations: population {len(compiled)}, one by one {len(plans)}.",
    )


def random_plans(graph: engine.Graph, count: int) -> list[engine.Plan]:
    """Plans that keep half to all of every group."""
    rng = np.random.default_rng(0)
    plans: list[engine.Plan] = []
    while len(plans) < count:
        keep = {
            name: np.sort(rng.choice(group.size, rng.integers(group.size // 2, group.size) + 1, replace=False))
            for name, group in graph.groups.items()
        }
        plans.append(engine.Plan(keep, frozenset(name for name in graph.blocks if rng.random() < 0.2)))
    return plans


if __name__ == "__main__":
    main()
