"""Few labels: a big pretrained net, fine-tuned, beside what the search selects of it, on the same images.

    python benchmarks/small_labels.py --checkpoint resnet56.safetensors
    python benchmarks/small_labels.py --checkpoint resnet56.safetensors --data tfds-dir:cifar10/1.0.0 --fitted train \
        --unlabelled tfds-dir:cifar10/1.0.0 --augment flip

For every number of labels a class and every seed one run of the search, with at most half of the parameters: two thirds
of the labels are `train`, one third is `search`. `certify` and `test` share the other images. Of each run: the selected
variant and the dense model fine-tuned for as many steps, their accuracy on `test`, and their gap, from `train` to
`test`. The targets: no lower an accuracy, and a narrower gap, with at most half of the parameters.

With `--unlabelled` the run has more images of the same kind without labels; then a third model is reported, the dense
one fine-tuned on these as well. The targets stay those against plain fine-tuning, to the labels.

Without `--data`, scikit-learn's digits enlarged to 32×32 and three channels: other labels than the checkpoint's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import publish
from sklearn.datasets import load_digits

from treesurgeon.search import Config, open_source, run
from treesurgeon.search.config import AugmentName

BASELINE, BOTH = "dense fine-tuned", "dense, unlabelled too"


@dataclass
class Options:
    """The command line."""

    model: str
    checkpoint: str
    data: str
    fitted: str
    unlabelled: str
    unlabelled_weight: float | None
    augment: AugmentName
    learning_rate: float
    epochs: int | None
    scratch_epochs: int | None
    finalists: int
    labels: list[int]
    seeds: int
    params: float
    generations: int
    keep: Path

    @property
    def tag(self) -> str:
        """What tells apart runs, and tables, with images without labels."""
        weight = "" if self.unlabelled_weight is None else f"-{self.unlabelled_weight:g}"
        return f"-unlabelled{weight}" if self.unlabelled else ""


@dataclass(frozen=True)
class Trial:
    """What one run found: accuracies and gaps in percent.

    Attributes:
        labels: a class.
        seed: of everything.
        name: the selected variant.
        params: its share of the dense model's parameters.
        test, gap: of the selected variant.
        plain, plain_gap: of the dense model, fine-tuned.
        both: accuracy of the dense model, fine-tuned on unlabelled images as well, if there are any.
        verdict: the certificate in a word.
    """

    labels: int
    seed: int
    name: str
    params: float
    test: float
    gap: float
    plain: float
    plain_gap: float
    both: float | None
    verdict: str

    @property
    def met(self) -> bool:
        """Whether it has what the benchmark asks for."""
        return self.params <= 0.5 and self.gap < self.plain_gap and self.test >= self.plain


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", default="", help="default: digits, enlarged")
    parser.add_argument("--fitted", default="none", help="split that the checkpoint was trained on, if of this data")
    parser.add_argument("--unlabelled", default="", help="more images, whose labels are not looked at")
    parser.add_argument("--unlabelled-weight", type=float, help="of these in the loss; default: as the search sees fit")
    parser.add_argument("--augment", default="none", help="what is done to the images of a batch")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="its peak")
    parser.add_argument("--epochs", type=int, help="of fine-tuning; default: as the search sees fit")
    parser.add_argument("--scratch-epochs", type=int, help="of what starts from random weights; default: as many")
    parser.add_argument("--finalists", type=int, default=3, help="variants that are fine-tuned")
    parser.add_argument("--labels", type=int, nargs="+", default=[20], help="labels a class, for train and search")
    parser.add_argument("--seeds", type=int, default=5, help="runs for each")
    parser.add_argument("--params", type=float, default=0.5, help="budget, a share of the dense model's")
    parser.add_argument("--generations", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("runs/small_labels"), help="where the runs are; they resume")
    options = Options(**vars(parser.parse_args()))
    options.keep.mkdir(parents=True, exist_ok=True)
    data = options.data or f"npz:{enlarged(options.keep / 'digits32.npz')}"
    trials = [trial(options, data, labels, seed) for labels in options.labels for seed in range(options.seeds)]
    report(options, name_of(data), trials)


def name_of(data: str) -> str:
    """What a dataset is called: its file, or for TFDS the directory above the version."""
    path = Path(data.partition(":")[2])
    return path.parent.name if data.startswith("tfds-dir:") else path.stem.replace(":", "-")


def enlarged(path: Path) -> Path:
    """Digits of 8×8 as images of 32×32 and three channels, in one file."""
    x, y = load_digits(return_X_y=True)
    images = np.kron(x.reshape(-1, 8, 8), np.ones((1, 4, 4))) * (255 / 16)
    np.savez(
        path, x=np.repeat(images[..., None].astype(np.uint8), 3, -1), y=y, label_names=np.array(list("0123456789"))
    )
    return path


def trial(options: Options, data: str, labels: int, seed: int) -> Trial:
    """One run, or what an earlier one left."""
    source = open_source(data)
    count, classes = sum(source.splits.values()), source.num_classes
    if options.fitted != "none":
        count -= source.splits[options.fitted]
    train, search = 2 * labels // 3 * classes, (labels - 2 * labels // 3) * classes
    rest = (count - search - (train if options.fitted == "none" else 0)) / 2
    sizes = np.array([train, search, rest, rest])
    shares = (sizes / sizes.sum()).tolist()
    config = Config(
        options.model,
        options.checkpoint,
        data,
        out=str(options.keep / f"{name_of(data)}{options.tag}-{labels}-{seed}"),
        params=options.params,
        fitted_split=(options.fitted,),
        shares=(shares[0], shares[1], shares[2], shares[3]),
        max_train=train,
        unlabelled=options.unlabelled,
        unlabelled_weight=options.unlabelled_weight,
        augment=options.augment,
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        scratch_epochs=options.scratch_epochs,
        finalists=options.finalists,
        generations=options.generations,
        formats=False,
        pictures=False,
        seed=seed,
    )
    outcome = run(config, say=partial(print, flush=True))
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    return read(manifest, labels, seed)


def read(manifest: Mapping[str, Any], labels: int, seed: int) -> Trial:
    """What a selected model's manifest says."""
    name, metrics, metric = manifest["selected"], manifest["metrics"], manifest["metric"]

    def measured(variant: str) -> tuple[float, float]:
        train, test = (100 * metrics[variant][f"{role}_{metric}"] for role in ("train", "test"))
        return test, train - test

    params = metrics[name]["params"] / metrics["dense"]["params"]
    certified = manifest["certificate"]["valid"]
    verdict = ("passed" if manifest["certificate"]["passed"] else "failed") if certified else "not certified"
    both = measured(BOTH)[0] if BOTH in metrics else None
    return Trial(labels, seed, name, params, *measured(name), *measured(BASELINE), both, verdict)


def report(options: Options, name: str, trials: Sequence[Trial]) -> None:
    """A row for each run, and what they have in common."""
    rows = [
        [
            f"{t.labels}, seed {t.seed}",
            f"{t.name}, {t.params:.0%}",
            f"{t.test:.1f}",
            f"{t.plain:.1f}",
            f"{t.gap:.1f}",
            f"{t.plain_gap:.1f}",
            t.verdict,
            "yes" if t.met else "no",
        ]
        for t in trials
    ]
    notes = []
    for labels in dict.fromkeys(t.labels for t in trials):
        mine = [t for t in trials if t.labels == labels]
        mean = {key: np.mean([getattr(t, key) for t in mine]) for key in ("test", "plain", "gap", "plain_gap")}
        both = [t.both for t in mine if t.both is not None]
        also = f" ({np.mean(both):.1f} % with the unlabelled images)" if both else ""
        notes.append(
            f"{labels} labels a class, means of {len(mine)}: selected {mean['test']:.1f} % on test and a gap of "
            f"{mean['gap']:.1f}, dense fine-tuned {mean['plain']:.1f} % and {mean['plain_gap']:.1f}{also}; all targets "
            f"met in {sum(t.met for t in mine)} of {len(mine)}."
        )
    head = ("labels a class", "selected, parameters", "test %", "dense", "gap, points", "dense", "certificate", "met")
    if options.unlabelled:
        epochs, weight = (
            "default" if given is None else given for given in (options.epochs, options.unlabelled_weight)
        )
        notes.append(
            f"The selected variant also had {Config.unlabelled_images:,} images of {name_of(options.unlabelled)} at "
            f"most, without labels; augmentation {options.augment}, peak rate {options.learning_rate}, "
            f"epochs: {epochs}, weight of these images: {weight}, finalists: {options.finalists}."
        )
    publish(
        f"small-labels-{options.model}-{name}{options.tag}",
        f"{options.model} on {name}, few labels: the selected variant beside the dense model fine-tuned",
        head,
        rows,
        "\n".join(notes)
        + "\n\nTargets: at most half of the parameters, an accuracy no lower than that of the dense model fine-tuned "
        "for as many steps on the same images, and a narrower gap, from train to test. Seeds share images of certify, "
        "so that the later runs find it opened and certify nothing.",
    )


if __name__ == "__main__":
    main()
