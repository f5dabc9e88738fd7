"""Labels with nothing in common with the checkpoint's: the dense layers after the last pool kept, or not.

    python benchmarks/dense_stack.py

A `digits_cnn` is trained on the digits 0 to 4 and taken to 5 to 9, with few labels a class for `train` and `search`
together. By default its dense layer goes (`--head auto`); `--head fit` keeps it and fits the last layer alone. Of both:
accuracy on the images that are left, with the new head as it is fitted in closed form, and fine-tuned.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from harness import publish
from orbax.checkpoint import v1 as ocp
from sklearn.datasets import load_digits

from treesurgeon import models
from treesurgeon.search import Config
from treesurgeon.search.evaluate import measurer
from treesurgeon.search.finetune import Recipe, fit, objective
from treesurgeon.search.setting import prepare
from treesurgeon.search.teaching import plain

CLASSES = 5  # of the checkpoint, and of the data


def five(num_classes: int = CLASSES) -> nn.Module:
    """The model, as the search builds it."""
    return models.resolve("digits_cnn", num_classes=num_classes)


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 20, 40], help="labels a class")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as home:
        ocp.save(f"{home}/checkpoint", trained(x[y < CLASSES], y[y < CLASSES]))
        names = np.array(["five", "six", "seven", "eight", "nine"])
        np.savez(f"{home}/data.npz", x=x[y >= CLASSES], y=y[y >= CLASSES] - CLASSES, label_names=names)
        for labels in options.labels:
            heads: tuple[Literal["auto", "fit"], ...] = ("auto", "fit")
            for head in heads:
                found = [accuracies(Path(home), labels, head, seed) for seed in range(options.seeds)]
                params, *shares = zip(*found, strict=True)
                cells = [f"{np.mean(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in shares]
                kept = "it goes" if head == "auto" else "it stays"
                rows.append([f"{labels}, {kept}", f"{min(params):,} to {max(params):,}", *cells])
    publish(
        "dense-stack-digits_cnn",
        "digits_cnn from the digits 0 to 4 to 5 to 9: the dense layer after the last pool",
        ("labels a class", "parameters", "head in closed form, %", "fine-tuned, %"),
        rows,
        f"Means of {options.seeds} seeds, with their range: accuracy on about half of the images that are not for "
        "`train` or `search`. Where the layer goes, the head has a hidden layer if that is better on `search`.",
    )


def trained(x: np.ndarray, y: np.ndarray) -> dict:
    """Variables of the model, trained on these images."""
    module = five()
    variables = module.init(jax.random.key(0), x[:1])

    def apply(variables: dict, x: jax.Array, key: jax.Array) -> Any:
        return module.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    recipe, falling = Recipe(epochs=10, batch_size=64, learning_rate=0.1), itertools.count(0.0, -1.0)
    trainable = {name: jax.tree.map(lambda _, name=name: name == "params", tree) for name, tree in variables.items()}
    data = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    given = trainable, data, recipe, jax.random.key(0)
    result = fit(objective(apply), variables, *given, lambda _: (0.0, next(falling)))  # the last epoch is kept
    return jax.tree.map(np.asarray, result.params)


def accuracies(home: Path, labels: int, head: Literal["auto", "fit"], seed: int) -> tuple[int, float, float]:
    """Parameters, and accuracy in percent before and after fine-tuning."""
    with np.load(home / "data.npz") as data:
        count = len(data["y"])
    train, search = 2 * labels // 3 * CLASSES, (labels - 2 * labels // 3) * CLASSES
    rest = (count - train - search) / 2
    setting = prepare(
        Config(
            "dense_stack:five",
            str(home / "checkpoint"),
            f"npz:{home / 'data.npz'}",
            source_labels=("zero", "one", "two", "three", "four"),
            out=str(home / "run"),
            fitted_split=("none",),
            shares=(train / count, search / count, rest / count, rest / count),
            head=head,
            seed=seed,
        )
    )
    wrong = measurer(setting.subject.infer, setting.roles.test)
    tuned = plain(setting, partial(print, flush=True)).params
    before, after = (100 * (1 - wrong(variables)[1]) for variables in (setting.subject.variables, tuned))
    return sum(leaf.size for leaf in jax.tree.leaves(setting.subject.variables["params"])), before, after


if __name__ == "__main__":
    main()
