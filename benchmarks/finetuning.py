"""What is a variant worth after equal fine-tuning, on labels alone and on a teacher's answers as well?

    python benchmarks/finetuning.py --checkpoint resnet56.safetensors --data tfds-dir:PATH --run runs/resnet56

The plan and the weights it starts from are those that a search with `--epochs 0` has saved.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from front import first
from harness import publish, wilson

from treesurgeon import engine
from treesurgeon.search.config import Config
from treesurgeon.search.evaluate import answering, measurer
from treesurgeon.search.finetune import Recipe, fit, objective
from treesurgeon.search.setting import DISTILL, Setting, prepare

TEACHERS = {
    "labels": "labels alone",
    "checkpoint": "and the checkpoint's answers",
    "dense": "and the fine-tuned dense model's",
}


@dataclass
class Options:
    """The command line."""

    model: str
    checkpoint: str
    data: str
    run: Path
    train: int
    epochs: int
    images: int
    seed: int
    learn: list[str]


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path, required=True, help="a run's directory: its selected model")
    parser.add_argument("--train", type=int, default=5000, help="images to fine-tune on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000, help="images of test, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn", nargs="+", choices=TEACHERS, default=list(TEACHERS), help="what the variant learns")
    options = Options(**vars(parser.parse_args()))
    setting = prepare(Config(options.model, options.checkpoint, options.data, out="unused", max_train=options.train))
    setting = replace(setting, roles=replace(setting.roles, test=first(setting.roles.test, options.images)))
    subject, train = setting.subject, setting.roles.train
    recipe = Recipe(epochs=options.epochs, batch_size=setting.recipe.batch_size)
    model = engine.load(options.run / "selected", module=subject.module)
    plan, whole = model.plan or engine.Plan(), engine.Plan()
    factor = engine.cost(subject.graph, whole).macs / engine.cost(subject.graph, plan).macs
    rows = []

    def add(name: str, factor: float, found: list[float]) -> None:
        rows.append([name, f"{factor:.2f}×", *(wilson(accuracy, len(setting.roles.test)) for accuracy in found)])
        print(rows[-1], flush=True)

    def answers(variables: Any) -> Any:
        return answering(subject.infer, train)(variables).logits

    dense, tuned = fine_tuned(setting, whole, subject.variables, recipe, options.seed)
    add("dense, labels alone", 1.0, dense)
    for name in options.learn:
        teacher = None if name == "labels" else answers(tuned if name == "dense" else subject.variables)
        accuracies, _ = fine_tuned(setting, plan, model.variables, recipe, options.seed, teacher)
        add(f"selected, {TEACHERS[name]}", factor, accuracies)
    steps = recipe.epochs * -(-len(train) // recipe.batch_size)
    publish(
        f"finetuning-{options.model}-{steps}",
        f"{options.model} after {steps} equal steps, by what it learns from",
        ("what", "fewer MACs", "accuracy before", f"after {steps} steps"),
        rows,
        f"Accuracy on {len(setting.roles.test):,} test images that nothing was chosen by, with its 95 % interval "
        f"(Wilson); one run each. {len(train):,} images, {recipe.epochs} epoch, SGD, Nesterov momentum, peak rate "
        f"{recipe.learning_rate}, batches of {recipe.batch_size}, the last step's weights; answers at weight {DISTILL} "
        "and temperature 4.",
    )


def fine_tuned(
    setting: Setting, plan: engine.Plan, variables: Any, recipe: Recipe, seed: int, teacher: Any = None
) -> tuple[list[float], Any]:
    """The accuracy of a variant on `test`, before fine-tuning and after, and its variables then.

    Args:
        setting: model and data.
        plan: the variant's.
        variables: where it starts from.
        recipe: how; without epochs there is no fine-tuning.
        seed: of the order of images.
        teacher: logits for each image of `train`, which are learnt as finalists learn them; None for labels alone.
    """
    subject, graph, roles = setting.subject, setting.subject.graph, setting.roles
    infer, train = (engine.narrow(fn, graph, plan) for fn in (subject.infer, subject.train))
    measure = measurer(infer, roles.test)
    found = [1 - measure(variables)[1]]
    if not recipe.epochs:
        return found, variables
    trainable = jax.tree_util.tree_map_with_path(
        lambda path, _: graph.leaves[engine.path_name(path)].trainable, variables
    )
    data = {"x": roles.train.images, "y": roles.train.labels}
    if teacher is not None:
        data["teacher"] = teacher
    loss = objective(train, distill=0.0 if teacher is None else DISTILL)
    seen: list[Any] = []

    def last(variables: Any) -> tuple[float, float]:  # the newest is taken to be the best: nothing is chosen here
        seen.append(variables)
        return -float(len(seen)), -float(len(seen))

    variables = fit(loss, variables, trainable, data, recipe, jax.random.key(seed), last).params
    return [*found, 1 - measure(variables)[1]], variables


if __name__ == "__main__":
    main()
