"""Images without labels: what the dense model answers to them, for smaller models to learn from and to be scored by.

Where inputs are shifted, its answers under the checkpoint's norm statistics and under those of the data at hand err on
different images, as do those of the fine-tuned dense model (see teaching.py), and all of them err less on an image and
its mirror image together than on one of them. The teacher is the mean of all of these: B. Lakshminarayanan et al.:
"Simple and scalable predictive uncertainty estimation using deep ensembles", NeurIPS 2017; that a student learns an
ensemble's answers from unlabelled images: C. Bucila et al.: "Model compression", KDD 2006. A new head stands on the
data's statistics alone, and so does its teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax import Array

from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import answering
from treesurgeon.search.setting import Setting, scarce
from treesurgeon.search.streaming import joined, tail
from treesurgeon.search.subject import Subject
from treesurgeon.search.transfer import adapted

MANY = 10  # times as many images as have labels


def taught(setting: Setting) -> Mapping[str, np.ndarray]:
    """The logits for a setting's unlabelled images, as `States.arrays` keeps them."""
    assert setting.unlabelled
    images = setting.calibration(0 if setting.head else setting.config.statistics_images)
    teacher = setting.teacher
    tuned = [teacher.params] if setting.distill and teacher and teacher.best_epoch else []
    return {"logits": answers(setting.subject, setting.unlabelled, images, setting.mirrored, tuned)}


def beside(setting: Setting) -> dict[str, Any]:
    """What fine-tuning takes beside `train`; see `finetune.objective`."""
    if not setting.unlabelled:
        return {}
    assert setting.taught is not None
    return {
        "unlabelled": tail(setting.unlabelled.images, setting.held),
        "taught": setting.taught[setting.held :],
    }


def weight(setting: Setting) -> float:
    """Of these in the loss: every image counts alike by default, but few labels beside many images are the teacher's.

    A small model that sees few labels again and again learns them by heart, and is no better on other images: what the
    fine-tuned dense model made of them is in its answers. T. Chen et al.: "Big self-supervised models are strong
    semi-supervised learners", NeurIPS 2020, find labels unnecessary there.
    """
    more, few = len(setting.unlabelled or ()) - setting.held, len(setting.roles.train)
    if setting.config.unlabelled_weight is not None:
        return setting.config.unlabelled_weight
    return 1.0 if setting.distill and more >= MANY * few else more / (more + few)


def scoring(setting: Setting) -> Split:
    """What scores candidates: `search`, and where that has too few images unlabelled ones, with the dense answers.

    Agreement with the dense model on many images tells candidates apart better than the labels of few.
    """
    search = setting.roles.search
    more = scarce(setting.config, setting.roles, setting.unlabelled)
    if not more:
        return search
    found = merged(search, answered(setting, more))
    order = np.random.default_rng(setting.config.seed).permutation(len(found))  # any prefix is a random sample
    return replace(found, images=found.images[order], labels=found.labels[order])


def judging(setting: Setting) -> Split:
    """What judges models that learn from unlabelled images: `search`, and where that has few images held out ones.

    Early stopping by the labels of a few dozen images is chance.
    """
    search = setting.roles.search
    return merged(search, answered(setting, setting.held)) if setting.held else search


def answered(setting: Setting, count: int) -> Split:
    """The first unlabelled images, with what the dense model answers to them for labels."""
    assert setting.unlabelled
    assert setting.taught is not None
    labels = setting.roles.search.task.decided(setting.taught[:count])
    return replace(setting.unlabelled, images=setting.unlabelled.images[:count], labels=labels)


def merged(one: Split, other: Split) -> Split:
    """Images of two kinds, end to end; where they are from is forgotten."""
    labels = np.concatenate([one.labels, other.labels])
    return replace(
        one,
        images=joined(one.images, other.images),
        labels=labels,
        indices=np.arange(len(labels)),
        origin=(),
        digests=np.zeros(0, np.uint64),
        fingerprint="",
    )


def answers(
    dense: Subject, split: Split, calibration: np.ndarray, mirrored: bool, others: Sequence[Any] = ()
) -> np.ndarray:
    """Logits `[N, outputs]` for each image of a split.

    Args:
        dense: the model.
        split: the images; labels are not looked at.
        calibration: images `[N, H, W, C]` from which norm statistics are estimated; none keep the checkpoint's alone.
        mirrored: whether mirror images mean the same.
        others: more variables of that model.
    """
    models = [dense.variables, *others]
    if dense.momenta and len(calibration):
        models.append(adapted(dense, calibration).variables)

    def infer(variables: Any, x: Array) -> Array:
        logits = dense.infer(variables, x)
        return (logits + dense.infer(variables, x[:, :, ::-1])) / 2 if mirrored else logits

    answer = answering(infer, split)
    return np.mean([answer(variables).logits for variables in models], 0)
