"""`treesurgeon depth`: how much of a model these labels need, before any search.

Every point at which the model can be truncated gets a head in closed form: one forward pass over `train` and `search`
gives the features of all of them (`engine.features`), norm statistics being estimated anew on `train`, as in a search.
What classifies as well early on says that the layers behind it can go; a gap that opens says where few labels overfit.
The labels need not be the checkpoint's.

G. Alain, Y. Bengio: "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from treesurgeon.search import report
from treesurgeon.search.config import AUTO, Config, RunError
from treesurgeon.search.data import SHARES
from treesurgeon.search.depth_chart import OWN
from treesurgeon.search.setting import open_parts
from treesurgeon.search.survey import Cut, HeadName, own_head, survey, write_cuts
from treesurgeon.search.tasks import CLASSIFICATION, TaskName, Units
from treesurgeon.search.transfer import adapted


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
    head: HeadName = "ridge"
    """What is fitted to the features: least squares to one-hot labels, or logistic regression (slower)."""
    fitted_split: tuple[str, ...] = ()
    """Splits that the checkpoint was trained on (`none`: it has seen none of this data). Default: the zoo's."""
    mean: tuple[float, ...] = ()
    """Subtracted from images in 0 to 1. Default: the zoo's, else 0."""
    std: tuple[float, ...] = ()
    """Divides images. Default: the zoo's, else 1."""
    shares: tuple[float, float, float, float] = SHARES
    """How the images are dealt out to `train`, `search`, `certify` and `test`: as in the search, so that `certify` and
    `test` stay closed."""
    image_size: tuple[int, ...] = ()
    """Side, or height and width, to which the images of folder: are scaled and cropped. Default: what the zoo's model
    takes, else as they are."""
    max_train: int = 5000
    """Images of `train` that are used, at most."""
    task: TaskName | Literal["auto"] = AUTO
    """What labels are for: classification, multilabel, or regression. Default: by the labels."""
    data_dir: str = ""
    """Where TFDS datasets are. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    seed: int = 0
    """Seed of the split."""

    @property
    def directory(self) -> Path:
        """Where the results go."""
        return Path(self.out or f"runs/{self.model.replace(':', '.')}-depth").absolute()


def depth(options: Depth, say: Callable[[str], None]) -> list[Cut]:
    """Fit a head at every point, print the table, and write `depth.csv`, `depth.svg` and `depth.png`.

    Raises:
        TreesurgeonError, ModelError: bad input.
    """
    if options.max_train < 2:
        raise RunError(f"--max-train {options.max_train}: expected at least 2")
    config = Config.like(options, head="auto")
    config.check()
    opened = open_parts(config)
    subject, roles, classes = opened.subject, opened.roles, len(opened.labels.names)
    say(
        f"{options.data}: {classes} classes, train {len(roles.train):,} and search {len(roles.search):,} images"
        + ("" if roles.clean else f"; {roles.doubt}, so that gaps may be too small")
    )
    if options.head == "logistic" and roles.task.name == "regression":
        raise RunError("--head logistic: labels that are numbers take --head ridge")
    if roles.task.name == "regression":  # as in a search
        units = Units.of(roles.train.labels)
        roles = roles.map(lambda split: replace(split, labels=units.standardised(split.labels)))
    subject = adapted(subject, roles.train.images[: config.statistics_images])
    cuts = survey(subject, roles, classes, options.head)
    if not cuts:
        raise RunError(f"--model {options.model}: it has no boundary of blocks at which it could be truncated")
    if not opened.labels.replaced and roles.task.name != "regression":
        cuts.append(own_head(subject, roles))
    finish(options, cuts, say, roles.task.score)
    return cuts


def finish(options: Depth, cuts: Sequence[Cut], say: Callable[[str], None], score: str = CLASSIFICATION.score) -> None:
    """Print the table and write the files."""
    whole, best = cuts[-1], max(cuts, key=lambda cut: (cut.search, -cut.macs))
    lines = [
        report.Line(cut.point, cut.params, cut.macs, cut.train, cut.search, selected=cut is best)
        for cut in (whole, *cuts[:-1])
    ]
    report.show(lines)
    whole_is = "model, with its own head" if whole.point == OWN else "depth, with such a head"
    say(
        f"Best on search: {best.point}, {best.search:.2%} with {best.params / whole.params:.0%} of the parameters and "
        f"{best.macs / whole.macs:.0%} of the multiply-accumulates; the whole {whole_is}, "
        f"{whole.search:.2%}."
    )
    write_cuts(options.directory, options.model, cuts, score)
    say(f"wrote {options.directory / 'depth.csv'}, depth.svg and depth.png")
