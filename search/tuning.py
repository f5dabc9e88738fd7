"""Fine-tuning one model of a run: a finalist on its small shapes, or a baseline, on the same data by the same rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon import engine
from treesurgeon.search.augment import AUGMENTATIONS
from treesurgeon.search.evaluate import answering, measurer
from treesurgeon.search.finetune import FitResult, fit, objective
from treesurgeon.search.metrics import Answers
from treesurgeon.search.policy import EVERYTHING, Policy, held
from treesurgeon.search.setting import Setting
from treesurgeon.search.subject import Subject
from treesurgeon.search.unlabelled import beside, judging, weight


@dataclass(frozen=True, eq=False)
class Tuned:
    """A model of a run that is done: cut, fine-tuned, frozen. Before that, where it starts from.

    Attributes:
        name: unique in the run.
        plan: what is left of the dense model.
        variables: on its small shapes.
        infer: `(variables, x) -> logits`.
        fitted: how fine-tuning went; None where there was none.
        cost: see `engine.cost`, and what was measured.
        subject: what the plan is of: the dense model, or that cut in depth.
        trail: answers to the pool after each epoch, where a cross-validation needs them.
        judges: what the learning curve beside the training loss is of, in words.
        policy: which of the run's `policies` it was fine-tuned by; empty for the options as given.
    """

    name: str
    plan: engine.Plan
    variables: Any
    infer: Callable[[Any, Any], Any]
    fitted: FitResult | None
    cost: Mapping[str, float]
    subject: Subject
    trail: tuple[Answers, ...] = ()
    judges: str = "search"
    policy: str = ""


def untouched(setting: Setting) -> Tuned:
    """The dense model."""
    subject, plan = setting.subject, engine.Plan()
    cost = {name: int(value) for name, value in engine.cost(subject.graph, plan)._asdict().items()}
    return Tuned("dense", plan, subject.variables, subject.infer, None, cost, subject)


def best_tuned(setting: Setting, start: Tuned, say: Callable[[str], None], **how: Any) -> Tuned:
    """`tune` by every policy of the run; the one that is best where epochs are chosen is kept, the first of equals.

    The trail is that of all, one after the other, as if their epochs were those of one: a choice among them as well.
    """
    found = []
    for name, each in setting.tries.items():
        called = f"{start.name} ({name})" if name else start.name
        found.append(tune(each, replace(start, name=called), say, policy=each.policy, **how))
    best = min(range(len(found)), key=lambda i: found[i].fitted.merit)
    name = list(setting.tries)[best]
    if len(found) > 1:
        say(
            f"{start.name}: {name or 'the options as given'} did best of {len(found)} ways to fine-tune it (--policies)"
        )
    trail = tuple(answers for each in found for answers in each.trail)
    return replace(found[best], name=start.name, policy=name, trail=trail)


def tune(
    setting: Setting,
    start: Tuned,
    say: Callable[[str], None],
    *,
    policy: Policy = EVERYTHING,
    epochs: int | None = None,
    learning_rate: float | None = None,
    distill: float = 0.0,
    unlabelled: bool = False,
    note: Callable[[Any], Answers] | None = None,
) -> Tuned:
    """Fit a model to `train`; the epoch that is best on `search` is kept, see `unlabelled.judging`.

    Args:
        setting: the run's.
        start: the model as it starts.
        say: told how the error went.
        policy: which leaves stay, and at which rates the others learn.
        epochs: if None, the configured ones.
        learning_rate: likewise.
        distill: weight of the answers of `setting.teacher`.
        unlabelled: whether its answers to the unlabelled images, if there are any, are learnt as well.
        note: what to note after each epoch, for the trail; fine-tuning does not look at it.
    """
    config, subject, roles, dense = setting.config, start.subject, setting.roles, setting.subject
    metric = config.judged_by
    whole = not start.plan.keep and not start.plan.drop
    train = subject.train if whole else engine.narrow(subject.train, subject.graph, start.plan)
    more = beside(setting) if unlabelled else {}
    recipe = setting.recipe if more else setting.labelled
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    if learning_rate is not None:
        recipe = replace(recipe, learning_rate=learning_rate)
    data, given = {"x": roles.train.images, "y": roles.train.labels}, {}
    augment, teacher = AUGMENTATIONS[config.augment], None
    assert setting.teacher or not distill
    if setting.teacher and distill and augment:  # the teacher sees what the student sees
        given["dense"], teacher = jax.tree.map(jnp.asarray, setting.teacher.params), dense.infer
    elif setting.teacher and distill:
        answered = setting.answered
        if answered is None:  # other policies augment
            answered = answering(dense.infer, roles.train)(setting.teacher.params).logits
        data["teacher"] = answered
    trainable, rates = policy.leaves(subject.graph, start.variables)
    loss = objective(
        held(train, policy.frozen),
        task=roles.task,
        distill=distill,
        augment=augment,
        teacher=teacher,
        unlabelled=weight(setting),
        mirror=setting.mirrored,
    )
    judges, where = (judging(setting), setting.judges) if more else (roles.search, "search")
    measure, trail = measurer(start.infer, judges, metric=metric), []

    def evaluate(variables: Any) -> tuple[float, float]:
        if note:
            trail.append(note(variables))
        return measure(variables)

    key = jax.random.key(config.seed)
    result = fit(loss, start.variables, trainable, data, recipe, key, evaluate, rates=rates, given=given, beside=more)
    errors = ", ".join(metric.show(epoch.search_error) for epoch in result.history)
    say(
        f"trained {start.name} ({start.cost['params']:,} parameters): {metric.noun} on {where} {errors}; "
        f"kept epoch {result.best_epoch}"
    )
    return replace(start, variables=result.params, fitted=result, trail=tuple(trail), judges=where)
