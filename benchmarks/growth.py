"""How do evaluations grow with the number of candidates, and with the depth of the model?

Candidate-images a second of the search's own evaluator, without calibration, beside the dense model on the same images;
and the seconds until a population has been scored once, which hold the one compilation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from harness import publish, seconds, spread
from throughput import population

from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import Evaluator, batches
from treesurgeon.search.space import build
from treesurgeon.search.subject import random_subject

BATCH = 125


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110], help="ResNets for CIFAR-10")
    parser.add_argument("--depth", type=int, default=20, help="of the model whose populations grow")
    parser.add_argument("--populations", type=int, nargs="+", default=[1, 4, 16, 64], help="candidates")
    parser.add_argument("--candidates", type=int, default=4, help="of a model whose depth grows")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = [
        *measured(options.depth, options.populations, options),
        *(row for depth in options.depths for row in measured(depth, [options.candidates], options)),
    ]
    publish(
        "growth",
        f"Evaluations as candidates and layers grow: {options.images:,} images, everything searched",
        ("what", "equations", "candidate-images/s: median (range)", "against dense", "scored once, s", "compilations"),
        rows,
        f"Random candidates, batches of {BATCH}. {options.repeats} repeats, each size in turn with the dense model. "
        "Scored once: from nothing, with tracing and the one compilation.",
    )


def measured(depth: int, populations: list[int], options: argparse.Namespace) -> list[list[str]]:
    """A row for each number of candidates of one model."""
    subject = random_subject(f"resnet{depth}")
    graph = subject.graph
    rng = np.random.default_rng(0)
    images = rng.normal(size=(options.images, *subject.spec.input_shape)).astype(np.float32)
    split = Split(images, np.zeros(len(images), np.int32), np.arange(len(images)), ("random",), "")
    data = batches(split, BATCH)
    space = build(graph, {name: rng.random(group.size) for name, group in graph.groups.items()})
    equations = len(jax.make_jaxpr(subject.infer)(subject.variables, data.images[0]).eqns)
    dense = jax.jit(subject.infer)
    cases: dict[str, Callable[[], Any]] = {"dense": lambda: [dense(subject.variables, x) for x in data.images]}
    found: dict[str, tuple[int, Evaluator, float]] = {}
    for count in populations:
        start = time.perf_counter()
        evaluator, run = population(subject, data, space, count, rng)
        run()
        name = f"resnet{depth}, {count} candidates"
        found[name] = count, evaluator, time.perf_counter() - start
        cases[name] = run
    times = seconds(cases, options.repeats)
    rate = options.images / statistics.median(times["dense"])
    rows = []
    for name, (count, evaluator, first) in found.items():
        rates = [count * options.images / t for t in times[name]]
        against = f"{statistics.median(rates) / rate:.2f}"
        rows.append([name, f"{equations:,}", spread(rates, 0), against, f"{first:.1f}", str(evaluator.compiled)])
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
