"""`treesurgeon depth`: how much of a model these labels need, before any search.

Every point at which the model can be truncated gets a head in closed form: one forward pass over `train` and `search`
gives the features of all of them (`engine.features`). What classifies as well early on says that the layers behind it
can go; a gap that opens says where few labels overfit. The labels need not be the checkpoint's.

G. Alain, Y. Bengio: "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from treesurgeon import engine
from treesurgeon.search import report
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.depth_chart import depths
from treesurgeon.search.heads import LinearHead, best_logistic, ridge
from treesurgeon.search.pictures import write_pictures
from treesurgeon.search.setting import open_parts
from treesurgeon.search.transfer import by_batch


@dataclass(frozen=True)
class Depth:
    """Accuracy against depth: truncate a model at every block, with a head in closed form."""

    model: str
    """A model of the zoo, or package.module:factory that returns a linen module."""
    checkpoint: str
    """An Orbax directory, or a .safetensors, .msgpack or .pth file."""
    data: str
    """digits, tfds:NAME (prepared), tfds-dir:PATH, npz:PATH, or folder:PATH; labels need not be the checkpoint's."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Where depth.csv, depth.svg and depth.png go; earlier ones are replaced. In a run's directory `treesurgeon report`
    shows them too. Default: runs/MODEL-depth."""
    head: Literal["ridge", "logistic"] = "ridge"
    """What is fitted to the features: least squares to one-hot labels, or logistic regression (slower)."""
    fitted_split: tuple[str, ...] = ()
    """Splits that the checkpoint was trained on (`none`: it has seen none of this data). Default: the zoo's."""
    mean: tuple[float, ...] = ()
    """Subtracted from images in 0 to 1. Default: the zoo's, else 0."""
    std: tuple[float, ...] = ()
    """Divides images. Default: the zoo's, else 1."""
    image_size: tuple[int, ...] = ()
    """Side, or height and width, to which the images of folder: are scaled and cropped. Default: what the zoo's model
    takes, else as they are."""
    max_train: int = 5000
    """Images of `train` that are used, at most."""
    data_dir: str = ""
    """Where TFDS datasets are. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    seed: int = 0
    """Seed of the split."""

    @property
    def directory(self) -> Path:
        """Where the results go."""
        return Path(self.out or f"runs/{self.model.replace(':', '.')}-depth").absolute()


@dataclass(frozen=True)
class Cut:
    """A truncated model with its head.

    Attributes:
        point: where it is cut.
        features: how many there are.
        params, macs: of all that is left, its head included; multiply-accumulates of one image.
        train, search: accuracy, shares.
        penalty: of the head.
    """

    point: str
    features: int
    params: int
    macs: int
    train: float
    search: float
    penalty: float


def depth(options: Depth, say: Callable[[str], None]) -> list[Cut]:
    """Fit a head at every point, print the table, and write `depth.csv`, `depth.svg` and `depth.png`.

    Raises:
        TreesurgeonError, ModelError: bad input.
    """
    if options.max_train < 2:
        raise RunError(f"--max-train {options.max_train}: expected at least 2")
    config = Config(
        options.model,
        options.checkpoint,
        options.data,
        fitted_split=options.fitted_split,
        mean=options.mean,
        std=options.std,
        image_size=options.image_size,
        max_train=options.max_train,
        data_dir=options.data_dir,
        seed=options.seed,
        head="fit",
    )
    config.check()
    opened = open_parts(config)
    subject, roles, classes = opened.subject, opened.roles, len(opened.labels.names)
    say(
        f"{options.data}: {classes} classes, train {len(roles.train):,} and search {len(roles.search):,} images"
        + ("" if roles.clean else "; it is unknown what the checkpoint was fitted on, so that gaps may be too small")
    )
    every = jax.jit(engine.features(subject.infer, subject.graph))
    on_train, on_search = (by_batch(lambda x: every(subject.variables, x), s) for s in (roles.train, roles.search))
    x = jax.ShapeDtypeStruct((1, *subject.spec.input_shape), subject.spec.input_dtype)
    cuts = []
    for point in engine.points(subject.infer, subject.graph, x):
        short = engine.truncate(subject.infer, subject.graph, point, x)
        cost = engine.cost(engine.trace(short, short.take(subject.variables), x), engine.Plan())
        z = on_train[point]
        head = fit_head(options.head, z, roles.train.labels, classes)
        right = [
            float((np.asarray(head(found)).argmax(1) == split.labels).mean())
            for found, split in ((z, roles.train), (on_search[point], roles.search))
        ]
        width = z.shape[1]
        params, macs = int(cost.params) + (width + 1) * classes, int(cost.macs) + width * classes
        cuts.append(Cut(point, width, params, macs, right[0], right[1], float(head.penalty)))
    finish(options, cuts, say)
    return cuts


def fit_head(kind: str, x: np.ndarray, labels: np.ndarray, classes: int) -> LinearHead:
    """A head of a kind on features `[N, F]`."""
    if kind == "ridge":
        return ridge(x, np.eye(classes, dtype=np.float32)[labels])
    return best_logistic(x, labels, classes)


def finish(options: Depth, cuts: Sequence[Cut], say: Callable[[str], None]) -> None:
    """Print the table and write the files."""
    whole, best = cuts[-1], max(cuts, key=lambda cut: (cut.search, -cut.macs))
    lines = [
        report.Line(cut.point, cut.params, cut.macs, cut.train, cut.search, selected=cut is best)
        for cut in (whole, *cuts[:-1])
    ]
    report.show(lines)
    say(
        f"Best on search: {best.point}, {best.search:.2%} with {best.params / whole.params:.0%} of the parameters and "
        f"{best.macs / whole.macs:.0%} of the multiply-accumulates; the whole model {whole.search:.2%}."
    )
    report.write_depth(
        options.directory / "depth.csv",
        [
            {
                "point": cut.point,
                "features": cut.features,
                "params": cut.params,
                "macs": cut.macs,
                "train_accuracy": cut.train,
                "search_accuracy": cut.search,
                "gap": cut.train - cut.search,
                "penalty": cut.penalty,
            }
            for cut in cuts
        ],
    )
    told = [f"{cut.point}: {cut.params:,} parameters, {cut.macs:,} multiply-accumulates" for cut in cuts]
    shares = {"train": [cut.train for cut in cuts], "search": [cut.search for cut in cuts]}
    chart = depths(f"{options.model}: accuracy against depth", [cut.point for cut in cuts], shares, told)
    write_pictures(options.directory, "depth", [chart])
    say(f"wrote {options.directory / 'depth.csv'}, depth.svg and depth.png")
