"""What a configuration refers to: data and model, opened and checked before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from treesurgeon import engine, models
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.data import Roles, open_source, split_roles
from treesurgeon.search.selection import limits
from treesurgeon.search.subject import Subject, open_subject


@dataclass(frozen=True, eq=False)
class Setting:
    """What a configuration refers to, opened and checked."""

    config: Config
    subject: Subject
    roles: Roles
    mean: tuple[float, ...]
    std: tuple[float, ...]
    budget: Mapping[str, float]  # absolute limits
    fitted: tuple[str, ...] | None  # splits that the checkpoint was fitted on; None where that is unknown


def prepare(config: Config) -> Setting:
    """Open the data and the model, and check that they fit each other and the budget."""
    config.check()
    preset = models.get(config.model) if ":" not in config.model else None
    source = open_source(config.data, config.data_dir or None)
    split = next((name for name, size in source.splits.items() if size), None)
    if split is None:
        raise RunError(f"--data {config.data}: no split has an image")
    shape = preset.input_shape if preset else source.read_images(split, np.array([0])).shape[1:]
    subject = open_subject(config.model, config.checkpoint, (*shape, 1) if len(shape) == 2 else shape)
    mean = config.mean or (preset.mean if preset else (0.0,))
    std = config.std or (preset.std if preset else (1.0,))
    fitted = config.fitted if config.fitted_split or preset is None else preset.fitted_splits
    roles = split_roles(
        source,
        fitted,
        num_classes=subject.num_classes,
        input_shape=subject.spec.input_shape,
        mean=mean,
        std=std,
        seed=config.seed,
        caps={"train": config.max_train},
    )
    dense = engine.cost(subject.graph, engine.Plan())._asdict()
    return Setting(config, subject, roles, tuple(mean), tuple(std), limits(config.budget, dense), fitted)


def fingerprint(tree: Any) -> str:
    """SHA-256 over the leaves of a pytree, names and shapes included."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
