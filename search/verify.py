"""`treesurgeon verify`: does a selected model still do what its manifest says?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from treesurgeon import engine
from treesurgeon.search.certificate import wilson
from treesurgeon.search.config import RunError
from treesurgeon.search.evaluate import measurer
from treesurgeon.search.metrics import ACCURACY, METRICS, Metric
from treesurgeon.search.records import images_again, reading, units_of
from treesurgeon.search.selection import SLACK
from treesurgeon.search.tasks import class_counts


@dataclass(frozen=True)
class Verification:
    """What to measure again, and on what."""

    selected: Annotated[Path, tyro.conf.Positional]
    """The `selected` directory of a run, wherever it was copied."""
    data: str
    """The data that the run was on, as for `treesurgeon search`."""
    data_dir: str = ""
    """Where TFDS datasets are. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    tolerance: float = 0.002
    """Share of the test images, one image at least, whose answers may differ: devices and versions round differently,
    and an image whose two best answers are nearly equal then turns out otherwise."""
    allow_import: bool = False
    """Import a model outside the zoo, by the package.module:factory that the directory names."""


def verify(options: Verification, say: Callable[[str], None]) -> bool:
    """Measure a selected model and compare it with its manifest; whether they agree.

    Raises:
        ArtifactError: the directory is damaged.
        RunError: the manifest says too little to measure it again.
        DataError: the data cannot be read.
    """
    with reading(options.selected):
        return _verify(options, say)


def rounding(metric: Metric, labels: np.ndarray, tolerance: float) -> float:
    """By how much a metric may be off where the answers to this share of the images are, one image at least.

    These are the images that count most, of the rarest classes; what is no mean over images (F1, AUROC) gets double.
    """
    changed = max(math.ceil(tolerance * len(labels) - SLACK), 1)
    if not metric.per_class:
        return max(tolerance, 1 / len(labels))
    counts = class_counts(labels)
    counted = np.sort(np.repeat(1 / (len(counts) * counts), counts))[::-1]
    return float(counted[:changed].sum()) * (2 if metric.approximate else 1)


def _verify(options: Verification, say: Callable[[str], None]) -> bool:
    model = engine.load(options.selected, allow_import=options.allow_import)
    claimed, data = _claims(options.selected, model.manifest)
    test = images_again(model.manifest, "test", options.data, options.data_dir)
    if test.fingerprint != data["fingerprints"]["test"]:
        say(
            f"Not verified: {options.data} gives other test images than the {data['images']['test']:,} that the "
            f"manifest is about ({data['spec']}, seed {model.manifest['seed']}): pass the same data."
        )
        return False
    cost = engine.cost(model.graph, model.plan)
    metric = METRICS[model.manifest["metric"]]
    units = units_of(model.manifest)

    def infer(variables: Any, x: Any) -> Any:
        answers = model.apply(variables, x)
        return units.standardised(answers) if units else answers

    error = measurer(infer, test, metric=metric)(model.variables)[1]
    score, promised = metric.score(error), claimed[f"test_{metric.name}"]
    allowed = rounding(metric, test.labels, options.tolerance)
    apart = metric.amount(abs(score - promised))
    interval = ""
    if metric is ACCURACY:
        interval = " ({:.2%} to {:.2%})".format(*wilson(score, len(test)))
    faults = [
        f"it has {found:,} {words}, the manifest says {claimed[name]:,}"
        for name, words, found in (("params", "parameters", cost.params), ("macs", "multiply-accumulates", cost.macs))
        if int(found) != claimed[name]
    ]
    if not abs(score - promised) <= allowed + SLACK:
        faults.append(
            f"its {metric.name} on {len(test):,} test images is {metric.show(score)}, the manifest says "
            f"{metric.show(promised)}: {apart} apart, {metric.amount(allowed)} allowed for rounding"
        )
    if faults:
        say(f"Not verified: {'; '.join(faults)}.")
        return False
    agreement = "as in the manifest" if score == promised else f"the manifest says {metric.show(promised)}"
    say(
        f"Verified: {int(cost.params):,} parameters and {int(cost.macs):,} multiply-accumulates, as in the manifest; "
        f"{metric.name} {metric.show(score)}{interval} on {len(test):,} test images, {agreement}."
    )
    return True


def _claims(path: Path, manifest: Any) -> tuple[Any, Any]:
    """What the manifest says of the selected model and of its data."""
    try:
        claimed, data = manifest["metrics"][manifest["selected"]], manifest["data"]
        _ = (manifest["seed"], manifest["normalisation"], manifest["labels"])
        _ = (claimed["params"], claimed["macs"], claimed[f"test_{manifest['metric']}"], data["spec"], data["fitted"])
        _ = (data["fingerprints"]["test"], data["images"]["test"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{path}/manifest.json does not say {error}: it was not made by a search of this version; search again"
        ) from error
    return claimed, data
