"""The configuration of a run that takes seconds: a zoo model with random weights on images of four kinds."""

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from treesurgeon import models
from treesurgeon.search.config import Config


def small_config(home, **changes) -> Config:
    """Write the checkpoint and the data into a directory, and refer to them."""
    rng = np.random.default_rng(0)
    variables = models.resolve("mlp").init(jax.random.key(3), np.zeros((1, 8, 8, 1), np.float32))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
    y = np.arange(240) % 4
    x = (rng.random((4, 8, 8, 1))[y] + 0.15 * rng.normal(size=(240, 8, 8, 1))).astype(np.float32)
    np.savez(home / "data.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    given = {
        "out": str(home / "run"), "fitted_split": ("train",), "head": "keep", "protect": ("none",), "population": 8,
        "generations": 2, "search_images": 32, "calibration_images": 16, "refit_images": 64, "finalists": 2,
        "epochs": 0, "certify": False, "formats": False, "pictures": False,
    }  # fmt: skip
    return Config("mlp", str(home / "checkpoint"), f"npz:{home / 'data.npz'}", **(given | changes))
