"""Frozen models as a rule sees them: their errors, what they are compared with, and where the images leave it open.

What variants are compared with is the dense model: as the checkpoint has it where its labels are the data's; where it
has a new head, and nobody would use it as it is, fine-tuned to the labels for as many steps, as the baseline is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from treesurgeon.search import crossval
from treesurgeon.search.crossval import Estimate, cross_validate
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import answering, measurer
from treesurgeon.search.metrics import Metric
from treesurgeon.search.openings import REGISTER, record_opening
from treesurgeon.search.selection import PLAIN, Finalist, level
from treesurgeon.search.setting import Setting
from treesurgeon.search.tuning import Tuned, untouched
from treesurgeon.search.unlabelled import judging, merged


def reference(setting: Setting) -> Tuned:
    """The dense model that variants are compared with: fine-tuned where the setting has it so."""
    whole, teacher = untouched(setting), setting.teacher
    if not setting.tuned_reference:
        return whole
    assert teacher
    return replace(whole, name=PLAIN, variables=teacher.params, fitted=teacher)


def measure(setting: Setting, model: Tuned) -> Finalist:
    """A frozen model as the rule sees it."""
    metric, roles = setting.config.judged_by, setting.roles
    on_train, on_search = (error_on(model, split, metric) for split in (roles.train, roles.search))
    return Finalist(model.name, model.cost, on_train, on_search, model)


def estimate(setting: Setting, dense: Tuned, tuned: Sequence[Tuned]) -> dict[str, Estimate]:
    """By cross-validation, for each finalist by name, where `certify` is too small; this opens it."""
    if not tuned or not crossval.needed(setting):
        return {}
    config, certify = setting.config, setting.roles.certify
    record_opening(*register(setting), certify.digests)
    answers = answering(dense.infer, crossval.pool(setting))(dense.variables)
    shape = {"folds": crossval.fold_count(setting), "repeats": config.cv_repeats, "judges": setting.held}
    return {
        each.name: cross_validate(each.trail, answers, config.judged_by, **shape, seed=config.seed, delta=config.delta)
        for each in tuned
    }


def judged(
    finalists: Sequence[Finalist], dense: Finalist, estimates: Mapping[str, Estimate]
) -> tuple[list[Finalist], Finalist]:
    """The models as the rule is to see them: with errors from cross-validation, where there are any."""
    if not estimates:
        return list(finalists), dense
    error = next(iter(estimates.values())).dense_error
    return [replace(f, search_error=estimates[f.name].error) for f in finalists], replace(dense, search_error=error)


def alike(setting: Setting, model: Finalist, best: Finalist) -> bool:
    """Whether the images leave it open which of two has the lower error: those of `search`, or of the pool.

    Where the error is a loss itself, it decides alone.
    """
    metric, roles = setting.config.judged_by, setting.roles
    if metric.loss:
        return level(model, best)
    split = merged(roles.search, roles.certify) if crossval.needed(setting) else roles.search
    return metric.alike(*(metric.observe(answering(f.ref.infer, split)(f.ref.variables)) for f in (model, best)))


def loss(setting: Setting, model: Finalist) -> float:
    """On what judges, at the temperature that suits the model best."""
    split = crossval.pool(setting) if crossval.needed(setting) else judging(setting)
    return answering(model.ref.infer, split)(model.ref.variables).calibrated_loss


def register(setting: Setting, finalists: Sequence[Finalist] = ()) -> tuple[Path, str, str, str]:
    """Of opened images: the file, what would be opened, which run this is and what it tests, and where."""
    directory, timed = setting.config.directory, setting.config.measured  # which differ where a run is repeated
    costs = [sorted((name, cost) for name, cost in each.cost.items() if name not in timed) for each in finalists]
    tested = [(f.name, cost, f.train_error, f.search_error) for f, cost in zip(finalists, costs, strict=True)]
    identity = hashlib.sha256((directory / "config.json").read_bytes() + repr(tested).encode()).hexdigest()
    fingerprint = setting.roles.fingerprints["certify"]
    return directory.parent / REGISTER, fingerprint, identity, str(directory)


def error_on(each: Tuned, split: Split, metric: Metric) -> float:
    """The metric's error of a finalist on a split."""
    return measurer(each.infer, split, metric=metric)(each.variables)[1]
