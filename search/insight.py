"""`treesurgeon insight`: what the units of a model answer to, on images of `search`.

For every unit its class selectivity (Morcos et al., ICLR 2018), the class it prefers and the images that it is most
active on; for every group how many directions its activity takes up. `engine/selectivity.py` says what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from treesurgeon import engine, models
from treesurgeon.search import report
from treesurgeon.search.activity import Looked, Units, measured
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.data import SHARES, Split
from treesurgeon.search.insight_page import write_insight
from treesurgeon.search.records import images_again, reading
from treesurgeon.search.setting import open_parts
from treesurgeon.search.tasks import CLASSIFICATION, Task
from treesurgeon.search.transfer import by_batch

UNIT_COLUMNS = ("group", "unit", "selectivity", "class", "activity", "by_class", "top_images")
LAYER_COLUMNS = ("group", "units", "participation_ratio", "selectivity", "inactive")


@dataclass(frozen=True)
class Insight:
    """What the units of a model answer to."""

    model: Annotated[str, tyro.conf.Positional]
    """The `selected` directory of a run; or a model of the zoo, or package.module:factory, with --checkpoint."""
    data: str
    """digits, tfds:NAME (prepared), tfds-dir:PATH, or npz:PATH; for a selected model that of its run."""
    checkpoint: str = ""
    """An Orbax directory, or a .safetensors file; not for a selected model, which has its variables."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Where units.csv, layers.csv, layers.svg, layers.png and insight.html go; earlier ones are replaced. Default:
    beside the selected model, or runs/MODEL-insight."""
    images: int = 500
    """Images of `search` that are looked at, at most."""
    show: int = 6
    """Units of each group that the page shows: the most selective ones. The tables have all."""
    top: int = 8
    """Images that each of them is most active on."""
    fitted_split: tuple[str, ...] = ()
    """Splits that the checkpoint was trained on (`none`: it has seen none of this data). Default: the zoo's."""
    mean: tuple[float, ...] = ()
    """Subtracted from images in 0 to 1. Default: the zoo's, else 0."""
    std: tuple[float, ...] = ()
    """Divides images. Default: the zoo's, else 1."""
    shares: tuple[float, float, float, float] = SHARES
    """How the images are dealt out to `train`, `search`, `certify` and `test`; a selected model knows its own."""
    image_size: tuple[int, ...] = ()
    """Side, or height and width, to which the images of folder: are scaled and cropped. Default: what the zoo's model
    takes, else as they are; a selected model knows its own."""
    data_dir: str = ""
    """Where TFDS datasets are. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    seed: int = 0
    """Seed of the split; a selected model knows its own."""
    allow_import: bool = False
    """Import a model outside the zoo, by the package.module:factory that a selected directory names."""

    @property
    def selected(self) -> Path | None:
        """The directory of a selected model, if that is what was given."""
        path = Path(self.model)
        return path.absolute() if path.is_dir() and self.model not in models.ZOO else None

    @property
    def directory(self) -> Path:
        """Where the results go."""
        if not self.out and self.selected:
            return self.selected.parent / "insight"
        return Path(self.out or f"runs/{self.model.replace(':', '.')}-insight").absolute()


def insight(options: Insight, say: Callable[[str], None]) -> list[Units]:
    """Look at every group, say it as a table, and write it: `insight.html`, `units.csv`, `layers.csv`, `.svg`, `.png`.

    Raises:
        TreesurgeonError, ModelError: bad input.
    """
    for name, least in (("images", 2), ("show", 0), ("top", 1)):
        if getattr(options, name) < least:
            raise RunError(f"--{name} {getattr(options, name)}: expected at least {least}")
    if options.selected:
        with reading(options.selected):
            looked = open_selected(options, options.selected)
    else:
        looked = open_model(options)
    if len(np.unique(looked.split.labels)) < 2:
        raise RunError(f"--images {options.images}: these are of one class, expected two or more; raise it")
    active = jax.jit(engine.unit_activity(looked.infer, looked.graph))
    every = by_batch(lambda x: active(looked.variables, x), looked.split)
    if not every:
        raise RunError(f"{looked.name} has no group that a kernel of its own reads, so that there is nothing to see")
    found = [measured(name, every[name], looked) for name in looked.graph.groups if name in every]
    say(f"{looked.name} on {len(looked.split):,} images of search, {len(looked.classes)} classes")
    head = ("group", "units", "participation ratio", "mean selectivity", "inactive")
    cells = [(u.group, str(len(u.selectivity)), f"{u.ratio:.1f}", f"{u.selectivity.mean():.2f}", str(u.idle))
             for u in found]  # fmt: skip
    say(report.aligned([head, *cells]))
    unseen = [name for name in looked.graph.groups if name not in every]
    if unseen:
        say(f"not seen, since no kernel of its own reads them: {', '.join(unseen)}")
    write_tables(options, looked, found)
    write_insight(options.directory, looked, found, options.show, options.top)
    say(f"wrote {options.directory / 'insight.html'}, layers.svg, layers.png, units.csv and layers.csv")
    return found


def open_model(options: Insight) -> Looked:
    """A dense model with its checkpoint."""
    if not options.checkpoint:
        raise RunError(
            f"{options.model} is no directory of a selected model: for a model pass --checkpoint, for a selected one "
            f"the path of its `selected` directory"
        )
    # The labels need not be the checkpoint's: neither `train` nor the head is looked at.
    config = Config.like(options, head="fit", max_train=1000)
    config.check()
    opened = open_parts(config)
    subject, classes = opened.subject, opened.labels.names
    _only_classes(opened.roles.task)
    split = first(opened.roles.search, options.images)
    return Looked(
        options.model, subject.infer, subject.variables, subject.graph, split, classes, opened.mean, opened.std
    )


def open_selected(options: Insight, path: Path) -> Looked:
    """A selected model, on the `search` images of its run."""
    if options.checkpoint:
        raise RunError(f"{path} holds its variables: leave --checkpoint out")
    model = engine.load(path, allow_import=options.allow_import)
    try:
        labels, normalisation, shape = (model.manifest[name] for name in ("labels", "normalisation", "model"))
        mean, std = (tuple(map(float, normalisation[name])) for name in ("mean", "std"))
        shape = tuple(shape["input_shape"])
        if not all(isinstance(label, str) for label in labels):
            raise TypeError(f"labels {labels}")
        split = images_again(model.manifest, "search", options.data, options.data_dir)
        _only_classes(split.task)
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{path}/manifest.json does not say {error}: it was not made by a search; search again"
        ) from error

    def infer(variables: Any, x: Any) -> Any:
        return model.apply(variables, x)

    graph = engine.trace(infer, model.variables, jax.ShapeDtypeStruct((1, *shape), "float32"))
    name = f"{model.manifest['model']['model']}, pruned"
    return Looked(name, infer, model.variables, graph, first(split, options.images), tuple(labels), mean, std)


def _only_classes(task: Task) -> None:
    if task != CLASSIFICATION:
        raise RunError(
            f"--data: labels are for {task.name}; which classes units answer to can be told where each image has one"
        )


def first(split: Split, count: int) -> Split:
    """The first images of a split; any prefix is a random sample."""
    return replace(split, images=split.images[:count], labels=split.labels[:count], indices=split.indices[:count])


def write_tables(options: Insight, looked: Looked, found: Sequence[Units]) -> None:
    """`units.csv`, a row for each unit, and `layers.csv`, one for each group; images by position in the dataset."""
    rows, layers = [], []
    for units in found:
        prefers, mean = units.prefers, units.activity.mean(0)
        for unit in range(len(prefers)):
            values = units.group, unit, units.selectivity[unit], looked.classes[prefers[unit]], mean[unit]
            top = looked.split.indices[units.top(unit, options.top)]
            rows.append(dict(zip(UNIT_COLUMNS, (*values, units.by_class[:, unit], top), strict=True)))
        values = units.group, len(prefers), units.ratio, units.selectivity.mean(), units.idle
        layers.append(dict(zip(LAYER_COLUMNS, values, strict=True)))
    report.write_table(options.directory / "units.csv", UNIT_COLUMNS, rows)
    report.write_table(options.directory / "layers.csv", LAYER_COLUMNS, layers)
