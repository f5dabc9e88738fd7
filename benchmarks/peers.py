"""The same weights, images and cores: this search beside Torch-Pruning and ModelOpt's FastNAS.

    pip install '.[peers]'
    python benchmarks/peers.py front --checkpoint resnet56.safetensors --data tfds-dir:PATH
    python benchmarks/peers.py ranking --checkpoint resnet56.safetensors --data tfds-dir:PATH

`front`: what each tool finds at one budget of multiply-accumulates, how long it takes, what the result is worth before
any gradient step and after equal fine-tuning. Torch-Pruning ranks channels by L2 and cuts one share everywhere; it may
cut between the two convolutions of a block only, since it has no rule for zero-padded shortcuts. FastNAS searches
widths in multiples of 8, twice: scored on as many images as a candidate is shown here at most, and on all that this
search is given, `search`.

`ranking`: time to the ten best of random candidates. Torch-Pruning copies, cuts and runs them one by one; here they are
masks in one program, and race.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch_resnet
from finetuning import fine_tuned
from front import first
from harness import bars, numbers, publish, wilson
from serial import BEST, candidate, loss_of, together

from treesurgeon import engine
from treesurgeon.search import baselines, pipeline, timings
from treesurgeon.search.config import Config
from treesurgeon.search.evaluate import answering
from treesurgeon.search.finetune import Recipe
from treesurgeon.search.setting import Setting, prepare
from treesurgeon.search.space import build

SHOWN = 5000  # training images that a search is given
LEARNING_RATE = 0.01
TAUGHT = "the same, with the fine-tuned dense model as teacher"
AFTER = ("measuring and selecting", "saving")  # parts of a run when the variant is there


@dataclass
class Options:
    """The command line."""

    what: str
    model: str
    checkpoint: str
    data: str
    macs: float
    images: int
    train: int
    epochs: int
    candidates: int
    fastnas: bool
    seed: int


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("front", "ranking"))
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--checkpoint", required=True, help="safetensors with PyTorch's names")
    parser.add_argument("--data", required=True)
    parser.add_argument("--macs", type=float, default=1 / 2.11, help="share of the dense model's (default 1/2.11)")
    parser.add_argument("--images", type=int, default=1000, help="ranking: validation images")
    parser.add_argument("--train", type=int, default=5000, help="front: images to fine-tune on")
    parser.add_argument("--epochs", type=int, default=1, help="front: epochs of fine-tuning, 0 for none")
    parser.add_argument("--candidates", type=int, default=200, help="ranking: how many")
    parser.add_argument("--no-fastnas", dest="fastnas", action="store_false", help="front: leave FastNAS out")
    parser.add_argument("--seed", type=int, default=0)
    options = Options(**vars(parser.parse_args()))
    (front if options.what == "front" else ranking)(options)


# --- what each finds --------------------------------------------------------------------------------------


def front(options: Options) -> None:
    """One row for each tool: all are found first, with nothing beside them, then measured and fine-tuned."""
    with TemporaryDirectory() as place:
        config = Config(
            options.model,
            options.checkpoint,
            options.data,
            out=str(Path(place) / "run"),
            macs=options.macs,
            protect=("none",),
            population=16,
            generations=1,
            finalists=1,
            epochs=0,
            certify=False,
            formats=False,
            pictures=False,
            max_train=SHOWN,
            seed=options.seed,
        )
        setting = prepare(config)
        net = torch_resnet.load(options.checkpoint)
        nets = {"dense, PyTorch": (net, 0.0)}
        start = time.perf_counter()
        pruned = torch_pruning(setting, options, net)
        took = time.perf_counter() - start
        nets["Torch-Pruning, L2"] = pruned, took
        start = time.perf_counter()
        statistics = copy.deepcopy(pruned)
        torch_resnet.reestimate(statistics, setting.roles.train.images[: config.calibration_images])
        nets["the same, statistics re-estimated"] = statistics, took + time.perf_counter() - start
        for count in (config.search_images, len(setting.roles.search)) if options.fastnas else ():
            start = time.perf_counter()
            found = fast_nas(setting, options, net, count)
            nets[f"ModelOpt FastNAS, {count:,} images"] = found, time.perf_counter() - start
        outcome = pipeline.run(config, say=partial(print, flush=True))
        parts = timings.read(config.directory / "timings.csv")
        model = engine.load(outcome.path, module=setting.subject.module)
    whole = sum(parts.values())
    took = whole - sum(parts[name] for name in AFTER)
    plan, graph = model.plan or engine.Plan(), setting.subject.graph
    factor = engine.cost(graph, engine.Plan()).macs / engine.cost(graph, plan).macs
    data = prepare(replace(config, max_train=options.train)).roles
    setting = replace(setting, roles=data)
    subject = setting.subject
    recipe = recipe_of(options, setting.recipe.batch_size)
    dense, variables = fine_tuned(setting, engine.Plan(), subject.variables, recipe, options.seed)
    ours, _ = fine_tuned(setting, plan, model.variables, recipe, options.seed)
    rows = [row("treesurgeon", factor, took, ours, setting)]
    if options.epochs:
        answers = answering(subject.infer, data.train)(variables).logits
        taught, _ = fine_tuned(setting, plan, model.variables, recipe, options.seed, answers)
        rows.append(row(TAUGHT, factor, took, taught, setting))
    rows.append(row("dense, JAX", 1.0, 0.0, dense, setting))
    rows = [tuned_torch(name, setting, options, net, *found) for name, found in nets.items()] + rows
    picture(options, rows)
    steps = options.epochs * math.ceil(len(data.train) / setting.recipe.batch_size)
    columns = ["found by", "fewer MACs", "seconds", "accuracy, no gradient step"]
    how = "Nothing was fine-tuned. "
    if steps:
        columns.append(f"after {steps} steps")
        how = (
            f"Fine-tuning: {len(data.train):,} images, {options.epochs} epoch, SGD, Nesterov momentum, peak rate "
            f"{LEARNING_RATE}, batches of {setting.recipe.batch_size}, the last step's weights, for all alike. "
        )
    publish(
        f"peers-{options.model}-{options.macs:.3f}",
        f"{options.model} at {options.macs:.1%} of its multiply-accumulates, by tool",
        columns,
        [cells[: len(columns)] for cells in rows],
        f"Accuracy on {len(data.test):,} test images that nobody was shown, in percent, with its 95 % "
        f"interval (Wilson). {how}"
        "Seconds are wall time with compilation until the variant is there; treesurgeon's whole run, which measures "
        f"dense and the variant on train, search and test as well, took {whole:.0f}: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())
        + f". torch {torch.__version__}, {torch.get_num_threads()} threads.",
    )


def picture(options: Options, rows: list[list[str]]) -> None:
    """The accuracies without a gradient step, as bars."""
    shown = []
    for name, factor, _, found, _ in rows:
        if name != TAUGHT:  # which is the same before any step
            shown.append((f"{name}, {factor}", *numbers(found)))
    title = f"{options.model}, accuracy on test before any gradient step"
    bars(f"peers-{options.model}-{options.macs:.3f}", title, shown, "percent, 95 % interval", "treesurgeon")


def row(name: str, factor: float, took: float, accuracies: list[float], setting: Setting) -> list[str]:
    """Cells of the table."""
    cells = [wilson(accuracy, len(setting.roles.test)) for accuracy in accuracies]
    found = [name, f"{factor:.2f}×", f"{took:.0f}" if took else "", *cells, *[""] * (2 - len(cells))]
    print(found, flush=True)
    return found


def torch_pruning(setting: Setting, options: Options, net: torch_resnet.ResNet) -> torch_resnet.ResNet:
    """One share of every inner width, the largest within the budget, the filters with the largest L2 norms."""
    graph = setting.subject.graph
    inner = [g for g in graph.groups if g.endswith("/conv1") and "/" in g]
    scores = engine.importance("l2", graph, setting.subject.variables)
    make = partial(baselines.uniform_plan, graph, scores, groups=inner)
    return torch_resnet.keep_inner(net, baselines.to_budget(make, graph, "macs", options.macs).keep)


def fast_nas(setting: Setting, options: Options, net: torch_resnet.ResNet, count: int) -> torch.nn.Module:
    """FastNAS, widths in multiples of 8 (its default, 32, leaves 512 nets), scored by accuracy on so many images."""
    import modelopt.torch.prune as mtp

    train, shown = setting.roles.train, first(setting.roles.search, count)
    x = torch.from_numpy(np.ascontiguousarray(train.images[:2000].transpose(0, 3, 1, 2)))
    loader = [(part, None) for part in x.split(125)]

    def score(model: torch.nn.Module) -> float:
        model.eval()
        return float((torch_resnet.answers(model, shown.images).argmax(1) == shown.labels).mean())

    rules = {"nn.Conv2d": {"*": {"channel_divisor": 8}}, "nn.BatchNorm2d": {"*": {"feature_divisor": 8}}}
    with TemporaryDirectory() as place:
        found, _ = mtp.prune(
            copy.deepcopy(net),
            mode=[("fastnas", rules)],
            constraints={"flops": f"{100 * options.macs:.2f}%"},
            dummy_input=torch.zeros(1, 3, 32, 32),
            config={
                "data_loader": loader,
                "collect_func": lambda batch: batch[0],
                "score_func": score,
                "checkpoint": str(Path(place) / "fastnas.pth"),
            },
        )
    return found.eval()


def tuned_torch(
    name: str, setting: Setting, options: Options, dense: torch_resnet.ResNet, net: torch.nn.Module, took: float
) -> list[str]:
    """Measure a net on `test`, fine-tune a copy, measure again."""
    test = setting.roles.test

    def accuracy(net: torch.nn.Module) -> float:
        return float((torch_resnet.answers(net.eval(), test.images).argmax(1) == test.labels).mean())

    found = [accuracy(net)]
    if options.epochs:
        net = copy.deepcopy(net)
        fine_tune_torch(net, setting, options)
        found.append(accuracy(net))
    return row(name, torch_resnet.macs(dense) / torch_resnet.macs(net), took, found, setting)


def recipe_of(options: Options, batch: int) -> Recipe:
    """The same for all."""
    return Recipe(epochs=options.epochs, batch_size=batch, learning_rate=LEARNING_RATE)


def fine_tune_torch(net: torch.nn.Module, setting: Setting, options: Options) -> None:
    """As `search/finetune.py` does it."""
    train, recipe = setting.roles.train, recipe_of(options, setting.recipe.batch_size)
    images = torch.from_numpy(np.ascontiguousarray(train.images.transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(train.labels.astype(np.int64))
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, recipe.learning_rate, momentum=recipe.momentum, nesterov=True)
    size = recipe.batch_size
    per_epoch = math.ceil(len(images) / size)
    steps = recipe.epochs * per_epoch
    warmup = min(round(recipe.warmup * steps), steps - 1)

    def rate(step: int) -> float:
        if step < warmup:
            return 0.1 + 0.9 * step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = np.random.default_rng(options.seed)
    net.train()
    for _ in range(recipe.epochs):
        order = np.resize(rng.permutation(len(images)), per_epoch * size).reshape(per_epoch, size)
        for index in order:
            loss = torch.nn.functional.cross_entropy(net(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


# --- how long a ranking takes -----------------------------------------------------------------------------


def ranking(options: Options) -> None:
    """One row for each way to rank the same candidates on the same images."""
    config = Config(options.model, options.checkpoint, options.data, out="unused", epochs=0, max_train=256)
    setting = prepare(config)
    subject, graph = setting.subject, setting.subject.graph
    split = first(setting.roles.search, options.images)
    net = torch_resnet.load(options.checkpoint)
    inner = {g for g in graph.groups if g.endswith("/conv1") and "/" in g}
    scores = {g: np.asarray(s) for g, s in engine.importance("l2", graph, subject.variables).items()}
    space = build(graph, scores, protected={*graph.groups, *graph.blocks} - inner)
    rng = np.random.default_rng(options.seed)
    genomes = np.stack([candidate(rng, space.cardinality) for _ in range(options.candidates)]).astype(np.int32)
    plans = [space.to_plan(genome) for genome in genomes]
    rows = []

    def timed(name: str, rank: Callable[[], tuple[np.ndarray, float]]) -> np.ndarray:
        start = time.perf_counter()
        losses, seen = rank()
        took = time.perf_counter() - start
        best = np.argsort(losses, kind="stable")[:BEST]
        rows.append([name, f"{took:.0f}", f"{len(genomes) / took:.2f}", f"{seen:.0%}", best])
        print(name, f"{took:.1f} s", f"{seen:.0%} of the images", best.tolist(), flush=True)
        return best

    def one_by_one() -> tuple[np.ndarray, float]:
        losses = [
            loss_of(split, torch_resnet.answers(torch_resnet.keep_inner(net, p.keep), split.images)) for p in plans
        ]
        return np.array(losses), 1.0

    def population(race: bool) -> tuple[np.ndarray, float]:
        losses = together(subject, space, genomes, split, race)
        whole = np.where(np.isnan(losses).any(1), np.inf, losses.mean(1))
        return whole, float(np.isfinite(losses).mean())

    theirs = timed("Torch-Pruning: copy, cut, run, one by one", one_by_one)
    timed("one program, every image", partial(population, False))
    timed("one program, racing", partial(population, True))
    for cells in rows:
        found = cells.pop()
        cells.append(f"{len(set(found) & set(theirs))} of {BEST}")
    publish(
        f"ranking-{options.model}",
        f"The {BEST} best of {options.candidates} random candidates of {options.model}",
        ("how", "seconds", "candidates/s", "images seen", "the same ten"),
        rows,
        f"Inner widths drawn at random, L2 order, loss at the best temperature on {len(split):,} images of `search`. "
        f"Wall time, compilation included; one run each. torch {torch.__version__}, {torch.get_num_threads()} threads.",
    )


if __name__ == "__main__":
    main()
