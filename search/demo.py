"""`make demo`: the whole road on embedded data, as a user would walk it with a checkpoint of theirs.

Prepares scikit-learn's digits as a TFDS dataset, trains a small convolutional net on its `train` split, saves it with
Orbax, runs `treesurgeon search` on that checkpoint, and loads the selected model in a Python process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from treesurgeon import models
from treesurgeon.search.data import open_source, split_roles
from treesurgeon.search.finetune import Recipe, fit, objective

CHECKPOINT = Path("runs/demo-checkpoint").absolute()
RUN = Path("runs/demo").absolute()

SCORE = """
import numpy as np
from treesurgeon.search.data import open_source, split_roles
test = split_roles(open_source("digits"), ("train",)).test

from treesurgeon.engine import load
model = load("runs/demo/selected")
logits = model(test.images)

accuracy = float((np.asarray(logits).argmax(-1) == test.labels).mean())
claimed = model.manifest["metrics"][model.manifest["selected"]]["test_accuracy"]
print(f"a process of its own: test accuracy {accuracy:.2%}, as in the table: {claimed:.2%}")
assert abs(accuracy - claimed) < 1e-9
"""


def train() -> None:
    """Train `digits_cnn` on the dataset's `train` split and save it."""
    roles = split_roles(open_source("digits"), ("train",))
    module = models.resolve("digits_cnn")
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

    def train_apply(variables, x, key):
        return module.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    @jax.jit
    def error(variables):
        logits = jnp.asarray(module.apply(variables, roles.search.images))
        return jnp.float32(0), (logits.argmax(-1) != roles.search.labels).mean()

    trainable = {name: jax.tree.map(lambda _, name=name: name == "params", tree) for name, tree in variables.items()}
    data = {"x": roles.train.images, "y": roles.train.labels}
    recipe = Recipe(epochs=12, batch_size=64, learning_rate=0.1)
    result = fit(objective(train_apply), variables, trainable, data, recipe, jax.random.key(0), error)
    ocp.save(str(CHECKPOINT), jax.tree.map(np.asarray, result.params))
    print(
        f"trained digits_cnn: error on search {result.history[-1].search_error:.2%}; saved {CHECKPOINT}",
        flush=True,
    )


def main() -> None:
    """Run the demo; an earlier one's results are replaced."""
    start = time.perf_counter()
    for path in (CHECKPOINT, RUN):
        shutil.rmtree(path, ignore_errors=True)
    train()
    command = ["search", "--model", "digits_cnn", "--checkpoint", str(CHECKPOINT.relative_to(Path.cwd()))]
    command += [
        "--data",
        "digits",
        "--population",
        "24",
        "--generations",
        "10",
        "--epochs",
        "6",
        "--out",
        "runs/demo",
    ]
    print("\n$ treesurgeon " + " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "treesurgeon.search.cli", *command], check=True)
    subprocess.run([sys.executable, "-c", SCORE], check=True)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. The selected model is in runs/demo/selected.")


if __name__ == "__main__":
    main()
