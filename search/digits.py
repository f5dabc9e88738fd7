"""scikit-learn's 8x8 digits as a TFDS dataset, prepared without a network and without TensorFlow.

The 1,797 images are those that scikit-learn ships (the test part of E. Alpaydin and C. Kaynak's "Optical
Recognition of Handwritten Digits", UCI, 1998). The split `train` is what the demo's checkpoint is fitted on;
`test` stays clean.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

TRAIN_FRACTION = 0.6
SEED = 0


class ScikitDigits(tfds.core.GeneratorBasedBuilder):
    """8x8 images of handwritten digits, `[8, 8, 1]` float32 in 0 to 1 (sixteenths), with labels 0 to 9."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "scikit-learn's digits, 60 % train, 40 % test, stratified."}
    code_path = None  # TFDS would look it up with importlib_resources and fails for an editable install

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="scikit-learn's 8x8 handwritten digits.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
        train = _stratified(labels)
        return {
            "train": self._generate_examples(images[train], labels[train]),
            "test": self._generate_examples(images[~train], labels[~train]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}


def _stratified(labels: np.ndarray) -> np.ndarray:
    """True for `TRAIN_FRACTION` of each class, the same images on every machine."""
    order = np.argsort(np.random.PCG64(SEED).random_raw(len(labels)), kind="stable")
    train = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        train[members[: round(TRAIN_FRACTION * len(members))]] = True
    return train


def prepare(data_dir: str | Path) -> Path:
    """Write the dataset below `data_dir` unless it is there, and return its directory.

    It is written beside its place and moved there in one step, so a run that was killed leaves nothing half
    done in place, and of two that run at once one wins.

    Example:
        `tfds.builder_from_directory(prepare("data")).as_data_source("test")`
    """
    root = Path(data_dir).expanduser().absolute()
    final = root / ScikitDigits.name / str(ScikitDigits.VERSION)
    if (final / "dataset_info.json").exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=root) as scratch:
        builder = ScikitDigits(data_dir=scratch, file_format="array_record")
        config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare(download_config=config)  # it would say "Downloading", which it is not
        try:
            os.rename(builder.data_dir, final)
        except OSError:
            if (final / "dataset_info.json").exists():  # another process was faster, with the same content
                return final
            shutil.rmtree(final, ignore_errors=True)  # remains of something else; never a finished dataset
            os.rename(builder.data_dir, final)
    return final
