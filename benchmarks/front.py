"""How good is a small model before any gradient step? Criteria and ways to choose widths, rung by rung, at one budget.

    python benchmarks/front.py --checkpoint resnet56.safetensors --data tfds-dir:PATH --macs 0.474
    python benchmarks/front.py ... --run runs/resnet56        # the plan that a search has found, beside them

Rungs: as it is; norm statistics re-estimated; removed units reconstructed as well; kernels refitted as well.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness import publish, wilson

from treesurgeon import engine
from treesurgeon.search import baselines, ranking
from treesurgeon.search.config import Config
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import batches, calibrate, measurer, with_leaves
from treesurgeon.search.finalists import prepared
from treesurgeon.search.setting import Setting, prepare


@dataclass
class Options:
    """The command line."""

    model: str
    checkpoint: str
    data: str
    macs: float
    run: Path | None
    refit: bool
    criteria: tuple[str, ...]
    images: int


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--macs", type=float, default=1 / 2.11, help="share of the dense model's (default 1/2.11)")
    parser.add_argument("--run", type=Path, help="a run's directory: its selected plan is measured too")
    parser.add_argument("--refit", action="store_true", help="refit every plan, not only the run's and l2's")
    parser.add_argument("--criteria", nargs="+", default=tuple(engine.CRITERIA))
    parser.add_argument("--images", type=int, default=2000, help="images of test, at most")
    options = Options(**vars(parser.parse_args()))
    config = Config(options.model, options.checkpoint, options.data, out="unused", epochs=0)
    setting = prepare(config)
    roles = replace(setting.roles, test=first(setting.roles.test, options.images))
    setting = replace(setting, roles=roles)
    graph, test = setting.subject.graph, roles.test
    dense = engine.cost(graph, engine.Plan()).macs
    rungs = Rungs(setting)
    plans = plans_of(setting, options)
    rows = []
    for name, plan in plans.items():
        start = time.perf_counter()
        found = rungs(plan)
        if options.refit or "l2" in name or name == "search":
            found.append(refitted(setting, plan))
        cells = [wilson(1 - error, len(test)) for error in found] + [""] * (4 - len(found))
        rows.append([name, f"{dense / engine.cost(graph, plan).macs:.2f}×", *cells])
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    publish(
        f"front-{options.model}-{options.macs:.3f}",
        f"{options.model} at {options.macs:.1%} of its multiply-accumulates, no gradient step",
        ("plan", "fewer MACs", "as it is", "+ statistics", "+ reconstruction", "+ refit"),
        rows,
        f"Accuracy on {len(test):,} test images that no step has seen, with its 95 % interval (Wilson). Statistics and "
        f"maps from {config.calibration_images} training images, kernels from {config.refit_images}.",
    )


def plans_of(setting: Setting, options: Options) -> dict[str, engine.Plan]:
    """The plans by name: dense, each criterion at uniform widths and ranked globally, and the search's."""
    graph = setting.subject.graph
    out = {"dense": engine.Plan()}
    inner = [g for g in graph.groups if sum(len(graph.leaves[m.path].shape) > 1 for m in graph.groups[g].members) == 2]
    limit = options.macs
    for criterion in options.criteria:
        scores = ranking.rank(setting, criterion)
        every = partial(baselines.uniform_plan, graph, scores)
        within = partial(baselines.uniform_plan, graph, scores, groups=inner)
        out[f"{criterion}, uniform"] = baselines.to_budget(every, graph, "macs", limit)
        out[f"{criterion}, uniform within layers"] = baselines.to_budget(within, graph, "macs", limit)
        comparable = engine.normalise(scores)
        out[f"{criterion}, global"] = baselines.global_plan(graph, comparable, {"macs": limit}, least=0.1)
    if options.run:
        out["search"] = engine.load(options.run / "selected", module=setting.subject.module).plan
    return out


def first(split: Split, count: int) -> Split:
    """The first images of a split: a random sample of it."""
    return replace(split, images=split.images[:count], labels=split.labels[:count], indices=split.indices[:count])


class Rungs:
    """The error on test without any step, with statistics, and with reconstruction; compiled once for all plans."""

    def __init__(self, setting: Setting):
        self.setting, subject = setting, setting.subject
        self.x = jnp.asarray(setting.roles.train.images[: setting.config.calibration_images])
        self.data = batches(setting.roles.test, 250)

        def error(variables: Any, masks: Any, data: Any) -> Any:
            gated = engine.gate(subject.infer, subject.graph, gradients=False, finite=True)

            def wrong(batch: Any) -> Any:
                images, labels, weights = batch
                return ((gated(variables, masks, images).argmax(-1) != labels) * weights).sum()

            return jax.lax.map(wrong, (data.images, data.labels, data.weights)).sum() / data.weights.sum()

        self.error = jax.jit(error)
        self.find = jax.jit(lambda m, v, x, maps: calibrate(subject, m, v, x, maps), static_argnums=3)

    def __call__(self, plan: engine.Plan) -> list[float]:
        """The errors of one plan."""
        variables, masks = self.setting.subject.variables, self.setting.subject.graph.masks(plan)
        out = [float(self.error(variables, masks, self.data))]
        for reconstruct in ("none", "maps"):
            stats, maps = self.find(masks, variables, self.x, reconstruct)
            given = {**masks, "maps": maps}
            out.append(float(self.error(with_leaves(variables, stats), given, self.data)))
        return out


def refitted(setting: Setting, plan: engine.Plan) -> float:
    """The error on test of the cut model with refitted kernels."""
    infer = engine.narrow(setting.subject.infer, setting.subject.graph, plan)
    return measurer(infer, setting.roles.test)(prepared(setting, setting.subject, plan))[1]


if __name__ == "__main__":
    main()
