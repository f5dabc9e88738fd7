"""What do `narrow` and `gate` add to the time until a program runs? Trace, lowering and compilation, beside dense.

A narrowed program is smaller than the dense one, so it is also compared with the model written by hand at its widths;
with the plan that keeps everything it is the dense program again. A gate is made for derivatives, and looks after
kernels that are not finite; one for evaluation alone, as a search uses it, leaves both out. The second table counts
what masking and slicing leave behind in the compiled programs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from handwritten import LEFTOVERS, operations, random_plan, small
from harness import publish, spread

from treesurgeon import engine, models

REPEATS = 5
IMAGE = (1, 32, 32, 3)
SUBJECTS: dict[str, nn.Module] = {
    "ResNet-56": models.resnet(56),
    "ViT, 12 layers": models.vit("tiny", 10, patch=4),
}
Make = Callable[[], Callable]
"""Makes a function anew, so that nothing is remembered of the last turn."""


def makers(module: nn.Module) -> dict[str, tuple[Make, tuple[Any, ...], Callable[[], Any]]]:
    """The programs to compare, by name: how each is made, its arguments, and what has been done before."""
    x = jax.ShapeDtypeStruct(IMAGE, "float32")
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    fn, _ = engine.from_linen(module, {})
    graph = engine.trace(fn, params, x)
    plan = random_plan(graph, 0)
    cut = engine.cut(params, graph, plan)
    masks = graph.masks(plan)
    by_hand = small(module, graph, plan)

    def again() -> Callable:
        return lambda *args: fn(*args)

    def forward(fn: Callable) -> Callable:
        return engine.gate(fn, graph, gradients=False, finite=True)

    def nothing() -> None:
        pass

    def traced() -> None:
        engine.trace(fn, params, x)

    return {
        "dense": (again, (params, x), nothing),
        "narrow, everything kept": (lambda: engine.narrow(again(), graph, engine.Plan()), (params, x), nothing),
        "the same after `trace`": (lambda: engine.narrow(fn, graph, engine.Plan()), (params, x), traced),
        "narrow, a random plan": (lambda: engine.narrow(again(), graph, plan), (cut, x), nothing),
        "by hand, at that plan's widths": (lambda: lambda p, x: by_hand.apply(p, x), (cut, x), nothing),
        "gate, no masks": (lambda: engine.gate(again(), graph), (params, {}, x), nothing),
        "gate, masks as arguments": (lambda: engine.gate(again(), graph), (params, masks, x), nothing),
        "the same gate after `trace`": (lambda: engine.gate(fn, graph), (params, masks, x), traced),
        "gate for evaluation alone": (lambda: forward(again()), (params, masks, x), nothing),
        "the same evaluation after `trace`": (lambda: forward(fn), (params, masks, x), traced),
    }


def stages(make: Make, args: tuple[Any, ...], before: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds of tracing, lowering and compiling, with JAX's caches cleared."""
    jax.clear_caches()
    before()
    start = time.perf_counter()
    traced = jax.jit(make()).trace(*args)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    lowered.compile()
    return after_trace - start, after_lower - after_trace, time.perf_counter() - after_lower


def main() -> None:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that start so")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    times, counts = [], []
    for name, module in SUBJECTS.items():
        if not name.startswith(options.only):
            continue
        cases = makers(module)
        taken: dict[str, list[tuple[float, float, float]]] = {case: [] for case in cases}
        for turn in range(options.repeats + 1):  # the first warms up
            for case, (make, args, before) in cases.items():
                found = stages(make, args, before)
                if turn:
                    taken[case].append(found)
        dense = statistics.median(sum(found) for found in taken["dense"])
        for case, found in taken.items():
            total = [sum(three) for three in found]
            parts = [f"{statistics.median(column):.2f}" for column in zip(*found, strict=True)]
            times.append([f"{name}: {case}", *parts, spread(total), f"{statistics.median(total) / dense:.2f}"])
        for case, (make, args, _) in cases.items():
            if case.startswith("the same"):
                continue
            ops = operations(make(), *args)
            counts.append([f"{name}: {case}", *(str(ops[op]) for op in LEFTOVERS), str(ops.total())])
    publish(
        "overhead",
        "Time until a program runs",
        ("program", "trace, s", "lower, s", "compile, s", "together, s: median (range)", "against dense"),
        times,
        f"Medians of {options.repeats} repeats in turns, JAX's caches cleared before each. 'After `trace`': the "
        "function has been traced at these shapes, by `trace` or for another plan, and is not traced again.",
    )
    publish(
        "hlo",
        "Operations in the compiled program",
        ("program", *LEFTOVERS, "all"),
        counts,
        "Optimised HLO, fused computations included.",
    )


if __name__ == "__main__":
    main()
