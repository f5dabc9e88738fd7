"""Truncated models among the finalists: the network up to a point with a new head, beside variants of the whole one.

Every boundary of blocks is a point (`engine.points`). One forward pass gives the pooled features at all of them, and
linear heads in closed form, fitted to `train`, say on `search` how much depth the task needs (see survey.py). Of the
points that no smaller one beats, the smallest within one standard error of the best are taken (the rule of L. Breiman
et al.: "Classification and Regression Trees", 1984), and then treated as all finalists are: statistics estimated anew,
a linear head or one with a hidden layer (see hidden.py), fine-tuning. Each comes a second time, with the widths and
blocks that a variant of the whole depth keeps. The rule and the certificate choose among all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from treesurgeon import engine
from treesurgeon.search import hosts
from treesurgeon.search.budget import Budget, example
from treesurgeon.search.finalists import fine_tuned, variant
from treesurgeon.search.heads import best_head
from treesurgeon.search.latency import profile
from treesurgeon.search.setting import Setting
from treesurgeon.search.shortening import shortened
from treesurgeon.search.space import in_words
from treesurgeon.search.state import States
from treesurgeon.search.subject import Subject
from treesurgeon.search.survey import Cut, survey, write_cuts
from treesurgeon.search.transfer import feature_finder
from treesurgeon.search.tuning import Tuned

DEFAULT = 2  # where the head is new


def truncations(
    setting: Setting, budget: Budget, states: States, say: Callable[[str], None], plan: engine.Plan | None = None
) -> list[Tuned]:
    """The truncated finalists, fine-tuned: as many as are configured, or can be had.

    Args:
        setting: the run's.
        budget: its limits.
        states: where what is measured is kept.
        say: for what is done.
        plan: of a variant of the whole depth: what it keeps is tried with each truncation as well.
    """
    config = setting.config
    count = config.truncations if config.truncations is not None else DEFAULT if setting.head else 0
    if not count:
        return []
    cuts = survey(setting.subject, setting.roles, setting.subject.num_classes)
    if not cuts:
        say("no truncation: the model has no boundary of blocks")
        return []
    chosen = choose(cuts, budget, count)
    answered = setting.roles.task.answered
    told = ", ".join(f"{cut.point} ({cut.search:.1%} {answered} on search)" for cut in chosen)
    found = f"{told} become finalists, against {cuts[-1].search:.1%} at full depth" if chosen else "none is smaller"
    say(f"{len(cuts)} depths tried with linear heads on one forward pass: {found} (--truncations; depth.csv)")
    hosts.together(lambda: write_cuts(config.directory, config.model, cuts, setting.roles.task.score))
    starts = []
    for cut in chosen:
        subject = headed(setting, cut.point, budget, say)
        starts.append(Tuned("", engine.Plan(), subject.variables, subject.infer, None, costs(subject), subject))
        within = restricted(plan, subject.graph) if plan else engine.Plan()
        if within.keep or within.drop:
            starts.append(reheaded(variant(setting, subject, "", within), setting))
    out = []
    for i, start in enumerate(starts):
        cost = dict(start.cost)
        if budget.measured:

            def measured(start: Tuned = start) -> dict[str, np.ndarray]:
                found = hosts.together(partial(profile, start.infer, start.variables, example(setting)))
                return {name: np.array(getattr(found, name)) for name in budget.measured}

            cost |= {name: float(value) for name, value in states.arrays(f"truncated_{i}", measured).items()}
            if any(cost[name] > limit for name, limit in budget.measured.items()):
                say(f"{depth_of(start)} is not within the budget as measured")
                continue
        out.append(fine_tuned(setting, replace(start, name=f"t{len(out) + 1}", cost=cost), say))
    return out


def restricted(plan: engine.Plan, graph: engine.Graph) -> engine.Plan:
    """What a plan for the whole model says about a part of it; groups that other layers joined are left out."""
    keep = {
        name: kept
        for name, kept in plan.keep.items()
        if name in graph.groups and len(kept) < graph.groups[name].size and kept[-1] < graph.groups[name].size
    }
    return engine.Plan(keep, plan.drop & graph.blocks.keys())


def choose(cuts: Sequence[Cut], budget: Budget, count: int) -> list[Cut]:
    """The smallest cuts that are as good as the best, as far as so many images tell; no smaller one beats them.

    The last cut is the whole model: it is compared with, and not chosen.
    """
    *rest, whole = cuts
    best = max(cuts, key=lambda cut: cut.search)
    bar = best.search - best.spread
    front: list[Cut] = []
    for cut in sorted(rest, key=lambda cut: (cut.params, cut.macs, -cut.search)):
        within = all(cut.cost[name] <= limit for name, limit in budget.limits.items() if name in cut.cost)
        if within and cut.params < whole.params and (not front or cut.search > front[-1].search):
            front.append(cut)
    good = [cut for cut in front if cut.search >= bar]
    return (good or front[-1:])[:count]


def headed(setting: Setting, at: str, budget: Budget, say: Callable[[str], None]) -> Subject:
    """The model up to a point, its running statistics estimated anew, with a head fitted to `train`.

    It is a linear one, unless `search` tells that one with a hidden layer is better and the budget has room for it.
    """
    config = setting.config
    images = setting.calibration(config.statistics_images)
    given = setting.roles, images, config.head_widths, config.seed, setting.subject.num_classes
    short, _, deep = shortened(setting.subject, at, *given)
    if deep:
        cost, units = costs(deep), f"{deep.spec.hidden} hidden units"
        if all(cost[name] <= limit for name, limit in budget.limits.items() if name in cost):
            say(f"{at}: its head has {units}, which are better on search than none")
            return deep
        say(f"{at}: {units} would be better on search than none, and are not within the budget")
    return short


def reheaded(model: Tuned, setting: Setting) -> Tuned:
    """The truncated variant with its linear head fitted again, to the features that it has; other heads stay."""
    module, train = model.subject.module, setting.roles.train
    assert isinstance(module, engine.Shortened)
    if module.hidden:
        return model
    graph = engine.trace(model.infer, model.variables, model.subject.spec.example)
    z = feature_finder(model.infer, graph, model.variables)(train)
    linear = best_head(train.task, z, train.labels, module.outputs)
    return replace(model, variables=module.with_head(model.variables, linear.kernel, linear.bias))


def costs(subject: Subject) -> dict[str, int]:
    """Of a model as it is, see `engine.cost`."""
    return {name: int(value) for name, value in engine.cost(subject.graph, engine.Plan())._asdict().items()}


def depth_of(model: Tuned) -> str:
    """What a truncated model is, in words."""
    spec, plan = model.subject.spec, model.plan
    layer = f", a hidden layer of {spec.hidden}" if spec.hidden else ""
    narrow = [f"{name} {model.subject.graph.groups[name].size}→{len(kept)}" for name, kept in plan.keep.items()]
    return "; ".join(filter(None, [f"up to {spec.at}{layer}", in_words(narrow, sorted(plan.drop))]))
