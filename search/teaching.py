"""The dense model, fine-tuned before the finalists: what they learn its answers from.

A checkpoint whose inputs or labels were others is a poor teacher as it is: half a ResNet-56 on other CIFAR-10 images is
no better for its answers after 157 steps, and more than a point better for those of the fine-tuned model
(`benchmarks/finetuning.py`). That costs nothing where it is trained as a baseline anyway. It is found once in a run: a
resumed one takes what was found before, and so do the workers of `--ray`.

G. Hinton, O. Vinyals, J. Dean: "Distilling the knowledge in a neural network", arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search.augment import AUGMENTATIONS
from treesurgeon.search.evaluate import answering, with_leaves
from treesurgeon.search.finetune import Epoch, FitResult
from treesurgeon.search.selection import PLAIN
from treesurgeon.search.setting import Setting
from treesurgeon.search.state import States
from treesurgeon.search.tuning import best_tuned, untouched
from treesurgeon.search.unlabelled import weight

HISTORY = "history"  # no path of a leaf: those of variables have a collection's name before them


def with_teacher(setting: Setting, states: States, say: Callable[[str], None]) -> Setting:
    """The setting, with the fine-tuned dense model: finalists learn from it, or are compared with it."""
    if setting.distill:
        say(how_taught(setting))
    found = states.arrays("teacher", lambda: as_arrays(plain(setting, say)))
    history = tuple(
        Epoch(int(number), None if np.isnan(train) else float(train), float(loss), float(error))
        for number, train, loss, error in found[HISTORY][:-1]
    )
    best = int(found[HISTORY][-1, 0])
    if not best:
        say("fine-tuning made the dense model no better on search: it stays as it was")
    subject, train = setting.subject, setting.roles.train
    params = jax.tree.map(np.asarray, with_leaves(subject.variables, found))
    seen = setting.distill and not AUGMENTATIONS[setting.config.augment]
    answered = answering(subject.infer, train)(params).logits if seen else None
    return replace(setting, teacher=FitResult(params, history, best), answered=answered)


def how_taught(setting: Setting) -> str:
    """What finalists learn, in words."""
    if setting.unlabelled and weight(setting) == 1:
        return (
            "the dense model is fine-tuned to the labels first; finalists learn its answers to the unlabelled images "
            "alone (--unlabelled-weight, --distill)"
        )
    return (
        f"finalists learn what the dense model answers once it is fine-tuned, at weight {setting.distill:g} beside the "
        "labels; that comes first (--distill 0 leaves it out)"
    )


def plain(setting: Setting, say: Callable[[str], None]) -> FitResult:
    """The dense model, fine-tuned to the labels alone."""
    fitted = best_tuned(setting, replace(untouched(setting), name=PLAIN), say).fitted
    assert fitted
    return fitted


def as_arrays(fitted: FitResult) -> Mapping[str, np.ndarray]:
    """As `States.arrays` keeps it: the parameters by path, a row for each epoch, and at last the best one's number."""
    rows = [
        (e.number, np.nan if e.train_loss is None else e.train_loss, e.search_loss, e.search_error)
        for e in fitted.history
    ]
    return {
        **{path: np.asarray(leaf) for path, leaf in engine.named_leaves(fitted.params).items()},
        HISTORY: np.array([*rows, (fitted.best_epoch, 0, 0, 0)], np.float64),
    }
