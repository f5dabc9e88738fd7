"""What a search believes of a variant's latency and memory, beside what the variant takes.

    python benchmarks/predicting.py

Both are predicted from some variants that are measured first (see `search/latency.py`); here the predictions meet
random variants that took no part in that. Beside them stands the simplest belief: that latency falls as
multiply-accumulates do. (These, and parameters, are counted and not predicted: law 7 in `tests/laws.py`.)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import jax
import numpy as np
from harness import publish
from scipy.stats import rankdata

from treesurgeon import engine
from treesurgeon.search import latency
from treesurgeon.search.budget import PLANS
from treesurgeon.search.space import build
from treesurgeon.search.subject import random_subject

BATCH = {"resnet56": 32, "mobilenet_v3_small": 4, "vit_tiny": 4}


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCH), help="names of the zoo")
    parser.add_argument("--plans", type=int, default=16, help="variants that predictions are compared with")
    options = parser.parse_args()
    rows = [row for name in options.models for row in compared(name, options.plans)]
    publish(
        "predicting",
        "Latency and memory, predicted and measured",
        ("model, what", "dense", "off, median", "off, worst", "measured twice, worst", "rank correlation"),
        rows,
        f"Predictions are fitted to {PLANS} random variants and compared with {options.plans} others, at "
        + ", ".join(f"{BATCH.get(name, 1)} images for {name}" for name in options.models)
        + ". 'Off': |predicted / measured - 1|, measured being the mean of two measurements (medians of "
        f"{latency.REPEATS} calls each); 'measured twice' is how far these are from each other.",
    )


def compared(name: str, count: int) -> Iterator[list[str]]:
    """A row for each prediction of a model's."""
    subject = random_subject(name)
    graph, images = subject.graph, BATCH.get(name, 1)
    x = np.asarray(jax.random.normal(jax.random.key(0), (images, *subject.spec.input_shape)))
    space = build(graph, {group: np.arange(found.size) for group, found in graph.groups.items()})
    fits = latency.calibrate(subject.infer, graph, subject.variables, latency.random_plans(space, PLANS, 0), x)
    plans = latency.random_plans(space, count + 1, 1)[1:]
    rows = np.stack([np.asarray(latency.features(graph, plan)) for plan in plans])
    twice = [
        [latency.profile_plan(subject.infer, graph, subject.variables, plan, x) for plan in plans] for _ in range(2)
    ]
    for measure, fit in fits.items():
        found = np.array([[getattr(profile, measure) for profile in turn] for turn in twice])
        yield row(f"{name}, {measure}", measure, fit.values[0], np.asarray(fit.predict(rows)), found)
        if measure == "latency":
            macs = np.array([float(engine.cost(graph, plan).macs) for plan in plans])
            share = macs / float(engine.cost(graph, engine.Plan()).macs)
            yield row(f"{name}, latency as MACs", measure, fit.values[0], share * fit.values[0], found)


def row(name: str, measure: str, dense: float, predicted: np.ndarray, found: np.ndarray) -> list[str]:
    """Cells of the table; `found` has two measurements of every plan, `[2, plans]`."""
    off, noise = np.abs(predicted / found.mean(0) - 1), np.abs(found[0] / found[1] - 1)
    shown = f"{dense:.1f} ms" if measure == "latency" else f"{dense / 2**20:.1f} MiB"
    rank = np.corrcoef(rankdata(predicted), rankdata(found.mean(0)))[0, 1]
    cells = [name, shown, f"{np.median(off):.1%}", f"{off.max():.1%}", f"{noise.max():.1%}", f"{rank:.2f}"]
    print(cells, flush=True)
    return cells


if __name__ == "__main__":
    main()
