"""Truncated models among the finalists: the network up to a point with a new head, beside variants of the whole one.

Every boundary of blocks is a point (`engine.points`). One forward pass gives the pooled features at all of them, and
linear heads in closed form, fitted to `train`, say on `search` how much depth the task needs (see survey.py). Of the
points that no smaller one beats, the smallest within one standard error of the best are taken (the rule of L. Breiman
et al.: "Classification and Regression Trees", 1984). Candidates of the search may end there (see exits.py), and as they
are these truncated models become finalists besides, treated as all of them are: statistics estimated anew, a linear
head or one with a hidden layer (see hidden.py), fine-tuning. The rule and the certificate choose among all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from treesurgeon import engine
from treesurgeon.search import hosts
from treesurgeon.search.budget import Budget, example, met
from treesurgeon.search.exits import Exit, make_exit, restricted
from treesurgeon.search.finalists import Pick, fine_tuned, variant
from treesurgeon.search.latency import profile
from treesurgeon.search.setting import Setting
from treesurgeon.search.shortening import blank, shortened
from treesurgeon.search.space import in_words
from treesurgeon.search.state import States
from treesurgeon.search.survey import Cut, survey, write_cuts
from treesurgeon.search.tuning import Tuned

DEFAULT = 2  # where the head is new


def wanted(setting: Setting) -> int:
    """At how many points candidates may end, at most."""
    count = setting.config.truncations
    return (DEFAULT if setting.head else 0) if count is None else count


def least(setting: Setting, smallest: engine.Plan) -> list[dict[str, Any]]:
    """What the smallest variant costs; where it is over the budget, and candidates may end early, at each point too.

    Args:
        setting: the run's.
        smallest: the plan of that variant.
    """
    subject = setting.subject
    whole = engine.cost(subject.graph, smallest)._asdict()
    if met(setting.budget, whole) or not wanted(setting):
        return [whole]
    points = engine.points(subject.infer, subject.graph, subject.spec.example)[:-1]  # the last is the whole model
    return [whole, *(least_at(setting, point, smallest) for point in points)]


def least_at(setting: Setting, point: str, smallest: engine.Plan) -> dict[str, Any]:
    """What the smallest variant that ends at a point costs, with a linear head there."""
    graph = blank(setting.subject, point, setting.subject.num_classes).graph
    return engine.cost(graph, restricted(smallest, setting.subject.graph, graph))._asdict()


def find_exits(setting: Setting, smallest: engine.Plan, states: States, say: Callable[[str], None]) -> tuple[Exit, ...]:
    """The points at which candidates of a search may end, with their heads: as many as are configured, or can be had.

    Args:
        setting: the run's.
        smallest: the plan of the smallest variant of the whole depth.
        states: where the choice is kept: genomes go by it.
        say: for what is done.
    """
    config, count = setting.config, wanted(setting)
    if not count:
        return ()
    cuts = survey(setting.subject, setting.roles, setting.subject.num_classes)
    if not cuts:
        say("no truncation: the model has no boundary of blocks")
        return ()

    def choice() -> dict[str, np.ndarray]:
        whole = engine.cost(setting.subject.graph, smallest)._asdict()
        loose = met(setting.budget, whole)  # then every point has variants within the budget
        few = choose(cuts, count, lambda cut: loose or met(setting.budget, least_at(setting, cut.point, smallest)))
        return {"chosen": np.array([cut in few for cut in cuts])}

    chosen = [cut for cut, one in zip(cuts, states.arrays("exits", choice)["chosen"], strict=True) if one]
    answered = setting.roles.task.answered
    told = ", ".join(f"{cut.point} ({cut.search:.1%} {answered} on search)" for cut in chosen)
    found = (
        f"candidates may end at {told}, against {cuts[-1].search:.1%} at full depth" if chosen else "none is smaller"
    )
    say(f"{len(cuts)} depths tried with linear heads on one forward pass: {found} (--truncations; depth.csv)")
    hosts.together(lambda: write_cuts(config.directory, config.model, cuts, setting.roles.task.score))
    images = setting.calibration(config.statistics_images)
    given = setting.roles, images, config.head_widths, config.seed, setting.subject.num_classes
    out = []
    for cut in chosen:
        short, linear, deep = shortened(setting.subject, cut.point, *given)
        out.append(make_exit(setting.subject, short, linear, deep, setting.calibration(config.calibration_images)))
        if deep:
            say(f"{cut.point}: a head with {deep.width} hidden units is better on search than a linear one")
    return tuple(out)


def truncations(setting: Setting, budget: Budget, states: States, say: Callable[[str], None]) -> list[Tuned]:
    """The truncated models that keep all units and blocks, as far as they are within the budget, fine-tuned.

    Args:
        setting: the run's.
        budget: its limits.
        states: where what is measured is kept.
        say: for what is done.
    """
    out = []
    for i, each in enumerate(setting.exits):
        start = variant(setting, "", Pick(each.point, engine.Plan()))
        cost = dict(start.cost)
        if not met(budget.limits, cost):
            continue
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


def choose(cuts: Sequence[Cut], count: int, fits: Callable[[Cut], bool] = lambda cut: True) -> list[Cut]:
    """The smallest cuts that are as good as the best, as far as so many images tell; no smaller one beats them.

    The last cut is the whole model: it is compared with, and not chosen. `fits` says which ones a budget allows.
    """
    *rest, whole = cuts
    best = max(cuts, key=lambda cut: cut.search)
    bar = best.search - best.spread
    front: list[Cut] = []
    for cut in sorted(rest, key=lambda cut: (cut.params, cut.macs, -cut.search)):
        if cut.params < whole.params and (not front or cut.search > front[-1].search):
            front.append(cut)
    front = [cut for cut in front if fits(cut)]
    good = [cut for cut in front if cut.search >= bar]
    return (good or front[-1:])[:count]


def depth_of(model: Tuned) -> str:
    """What a truncated model is, in words."""
    spec, plan = model.subject.spec, model.plan
    layer = f", a hidden layer of {spec.hidden}" if spec.hidden else ""
    narrow = [f"{name} {model.subject.graph.groups[name].size}→{len(kept)}" for name, kept in plan.keep.items()]
    return "; ".join(filter(None, [f"up to {spec.at}{layer}", in_words(narrow, sorted(plan.drop))]))
