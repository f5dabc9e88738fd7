"""How fast are candidates evaluated? Populations beside the dense model, and beside cutting and compiling each one.

Candidate-images a second of the search's own evaluator (without calibration), on random candidates: with every layer
searched, and with the last stage searched, whose frontier is kept in memory. The measured limit of the second is what
the dense model gains when only the layers behind that frontier are run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from harness import bars, publish, seconds, spread

from treesurgeon import engine
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import Evaluator, batches, with_leaves
from treesurgeon.search.space import Space, build
from treesurgeon.search.subject import Subject, random_subject


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--last", default="layer3", help="the first part of the names of the last stage's layers")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serial", type=int, default=3, help="candidates that are cut, compiled and run one by one")
    options = parser.parse_args()
    subject = random_subject(options.model)
    graph, variables = subject.graph, subject.variables
    rng = np.random.default_rng(0)
    images = rng.normal(size=(options.images, *subject.spec.input_shape)).astype(np.float32)
    split = Split(images, np.zeros(len(images), np.int32), np.arange(len(images)), ("random",), "")
    data = batches(split, 125)
    scores = {name: rng.random(group.size) for name, group in graph.groups.items()}
    everything = build(graph, scores)
    others = [name for name in (*graph.groups, *graph.blocks) if not name.startswith(options.last)]
    last = build(graph, scores, protected=others)
    dense = jax.jit(subject.infer)
    suffix = dense_suffix(subject, data.images, options.last)
    evaluators = [population(subject, data, space, options.candidates, rng) for space in (everything, last)]
    cases: dict[str, Callable[[], Any]] = {
        "dense model": lambda: [dense(variables, x) for x in data.images],
        "dense model, last stage alone": suffix,
        "population, everything searched": evaluators[0][1],
        "population, last stage searched": evaluators[1][1],
    }
    times = seconds(cases, options.repeats)
    count = {name: options.images * (options.candidates if "population" in name else 1) for name in cases}
    base = statistics.median(times["dense model"]) / options.images
    rows = [
        [
            name,
            spread([count[name] / t for t in values], 0),
            f"{base / (statistics.median(values) / count[name]):.2f}",
        ]
        for name, values in times.items()
    ]
    serial = [one_by_one(subject, everything, data.images, rng) for _ in range(options.serial)]
    rates = [options.images / t for t in serial]
    rows.append(["one by one: cut, compile, run", spread(rates, 0), f"{base * statistics.median(rates):.2f}"])
    shown = [
        (name, statistics.median(found), min(found), max(found))
        for name, found in [
            *((name, [count[name] / t for t in values]) for name, values in times.items()),
            ("one by one: cut, compile, run", rates),
        ]
    ]
    bars("throughput", f"Evaluating candidates of {options.model}", shown, "candidate-images a second", "population")
    compiled = [evaluator.compiled for evaluator, _ in evaluators]
    publish(
        "throughput",
        f"Evaluations of {options.model}: {options.candidates} candidates × {options.images:,} images",
        ("what", "candidate-images/s: median (range)", "against dense"),
        rows,
        f"Random candidates. {options.repeats} repeats in turns. Compilations: population {compiled[0]}, with the last "
        f"stage {compiled[1]}, one by one {options.serial}.",
    )


def population(subject: Subject, data: Any, space: Space, count: int, rng: Any) -> tuple[Evaluator, Callable[[], Any]]:
    """The search's evaluator on random candidates of a space."""
    genomes = np.stack([rng.integers(0, space.cardinality) for _ in range(count)]).astype(np.int32)
    masks = jax.jit(jax.vmap(space.decode))(genomes)
    one = jax.tree.map(lambda mask: mask[0], masks)
    evaluator = Evaluator(subject, one, None, data, population=count)
    return evaluator, lambda: evaluator(masks)


def dense_suffix(subject: Subject, images: Any, last: str) -> Callable[[], Any]:
    """The dense model from where the last stage's parameters come in, the values before it being at hand."""
    leaves = engine.named_leaves(subject.variables)
    late = {path: leaf for path, leaf in leaves.items() if any(part.startswith(last) for part in path.split("/"))}

    def fn(variables: Any, x: Any, late: Any) -> Any:
        return subject.infer(with_leaves(variables, late), x)

    parts = engine.split(fn, subject.variables, images[0], late)
    fixed = jax.jit(parts.once)(subject.variables)
    early = jax.jit(parts.early)
    known = [early(fixed, x) for x in images]
    run = jax.jit(parts.late)
    return lambda: [run(fixed, frontier, late) for frontier in known]


def one_by_one(subject: Subject, space: Space, images: Any, rng: Any) -> float:
    """Seconds to cut, compile and run one random candidate."""
    plan = space.to_plan(rng.integers(0, space.cardinality).astype(np.int32))
    start = time.perf_counter()
    jax.block_until_ready(alone(subject, plan, images))
    return time.perf_counter() - start


def alone(subject: Subject, plan: engine.Plan, images: Any) -> list[Any]:
    """The answers of a candidate that is cut and compiled, to each batch of images."""
    small = engine.cut(subject.variables, subject.graph, plan)
    fast = jax.jit(engine.narrow(subject.infer, subject.graph, plan))
    return [fast(small, x) for x in images]


if __name__ == "__main__":
    main()
