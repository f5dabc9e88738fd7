"""How many candidates a second does the search evaluate, beside a loop that cuts, compiles and runs each of them?

    python benchmarks/serial.py --checkpoint resnet56.safetensors --data tfds-dir:PATH

Random widths inside of residual branches, of a pretrained model; what is asked for are the ten with the lowest loss.
Twice: in all stages, and without the first, which a search protects by default. The loop is in JAX and sees all images.
The search's evaluator keeps what lies before the first mask, and shows no more images to candidates that ten others are
better than beyond doubt.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from front import first
from harness import publish, spread
from throughput import alone

from treesurgeon import engine
from treesurgeon.search import racing
from treesurgeon.search.config import Config
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import Evaluator, batches
from treesurgeon.search.setting import prepare
from treesurgeon.search.space import Space, build, first_stage
from treesurgeon.search.subject import Subject
from treesurgeon.search.tasks import CLASSIFICATION

BATCH = 50  # images that candidates are shown at once, after which the race is judged
BEST = 10
TOGETHER = 125  # images that the loop's models see at once


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000, help="validation images")
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--serial", type=int, default=10, help="candidates of these that the loop evaluates")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    setting = prepare(Config(options.model, options.checkpoint, options.data, out="unused", epochs=0, max_train=256))
    subject, graph = setting.subject, setting.subject.graph
    split = first(setting.roles.search, options.images)
    scores = {g: np.asarray(s) for g, s in engine.importance("l2", graph, subject.variables).items()}
    rows = []
    inner = {g for g in graph.groups if g.endswith("/conv1")}
    for name, searched in (("all stages", inner), ("without the first stage", inner - first_stage(graph))):
        rng = np.random.default_rng(options.seed)
        space = build(graph, scores, protected={*graph.groups, *graph.blocks} - searched)
        genomes = np.stack([candidate(rng, space.cardinality) for _ in range(options.candidates)]).astype(np.int32)
        some = rng.permutation(len(genomes))[: options.serial]
        losses, rates = zip(*(one(subject, space, genomes[i], split) for i in some), strict=True)
        start = time.perf_counter()
        found = together(subject, space, genomes, split, race=True)
        rate, base = len(genomes) / (time.perf_counter() - start), statistics.median(rates)
        seen, whole = np.isfinite(found).mean(), np.isfinite(found[some]).all(1)
        np.testing.assert_allclose(found[some][whole].mean(1), np.array(losses)[whole], rtol=1e-3)
        rows.append([f"{name}: loop", spread(rates), "100%", "1.00"])
        rows.append([f"{name}: one program", f"{rate:.2f}", f"{seen:.0%}", f"{rate / base:.2f}"])
        print(rows[-2:], flush=True)
    publish(
        f"serial-{options.model}",
        f"Evaluating {options.candidates} candidates of {options.model} for the {BEST} best, beside a loop in JAX",
        ("searched", "candidates/s", "images seen", "against the loop"),
        rows,
        f"{len(split):,} images; compilation included. The loop: median (range) of {options.serial} of the candidates, "
        "each cut, compiled and run by itself. One program: all of them, one run. L2 order, nothing re-estimated.",
    )


def candidate(rng: np.random.Generator, cards: np.ndarray) -> np.ndarray:
    """A genome some of whose genes are drawn, a different share for each."""
    drawn = rng.random(len(cards)) < rng.random()
    return np.where(drawn, rng.integers(0, cards), 0)


def one(subject: Subject, space: Space, genome: np.ndarray, split: Split) -> tuple[float, float]:
    """The loss of a candidate that is cut, compiled and run, and how many of its kind that makes a second."""
    start = time.perf_counter()
    images = [split.images[i : i + TOGETHER] for i in range(0, len(split), TOGETHER)]
    logits = jnp.concatenate(alone(subject, space.to_plan(genome), images))
    loss = loss_of(split, logits)
    return loss, 1 / (time.perf_counter() - start)


def loss_of(split: Split, logits: Any) -> float:
    """The mean cross-entropy at the temperature that is best on the first batch, as the evaluator has it."""
    head = slice(0, BATCH)
    right = jax.nn.one_hot(split.labels, logits.shape[-1])
    factor = CLASSIFICATION.sharpness(jnp.asarray(logits[head]), right[head], jnp.ones(BATCH))
    return float(-(jax.nn.log_softmax(logits * factor) * right).sum(-1).mean())


def together(subject: Subject, space: Space, genomes: np.ndarray, split: Split, race: bool) -> np.ndarray:
    """Losses `[candidates, images]` from one program; with a race, NaN for images that a candidate was not shown."""
    data = batches(split, BATCH)
    masks = jax.jit(jax.vmap(space.decode))(genomes)
    evaluator = Evaluator(subject, jax.tree.map(lambda mask: mask[0], masks), None, data, population=len(genomes))
    nobody = racing.References.empty(0, evaluator.count)

    def keep(losses: np.ndarray) -> np.ndarray:
        return racing.judge(np.zeros(len(losses)), losses, nobody, looks=len(data.images), best=BEST)

    losses, _, _ = evaluator(masks, keep if race else None)
    if evaluator.compiled != 1:
        raise RuntimeError(f"compiled {evaluator.compiled} programs instead of one")
    return losses


if __name__ == "__main__":
    main()
