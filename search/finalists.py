"""From the front to frozen finalists: pick, measure where a limit is on that, cut, refit and fine-tune them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.search import crossval, evolve, hosts
from treesurgeon.search.budget import Budget, example, met
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.evaluate import answering
from treesurgeon.search.exits import restricted
from treesurgeon.search.finetune import FitResult
from treesurgeon.search.heads import best_head
from treesurgeon.search.latency import Profile, pick_measured, profile_plan
from treesurgeon.search.metrics import Answers
from treesurgeon.search.setting import Setting
from treesurgeon.search.space import Space
from treesurgeon.search.state import States
from treesurgeon.search.subject import Subject
from treesurgeon.search.transfer import feature_finder
from treesurgeon.search.tuning import Tuned, best_tuned, tune
from treesurgeon.search.unlabelled import judging

HOPELESS = 1.5  # nats above the best loss of the front, before any fine-tuning


class Pick(NamedTuple):
    """What a genome says of a finalist.

    Attributes:
        at: the point at which it ends, see exits.py; empty for the whole depth.
        plan: of the whole model.
    """

    at: str
    plan: engine.Plan


def picked(space: Space, genome: Any) -> Pick:
    """What this genome says."""
    return Pick(space.end(genome), space.to_plan(genome))


def part(setting: Setting, pick: Pick) -> tuple[Subject, engine.Plan]:
    """The model that a pick is of, whole or up to a point, and its plan for that.

    Up to a point it has a head with a hidden layer, where that is better and within the budget.
    """
    if not pick.at:
        return setting.subject, pick.plan
    end = next(each for each in setting.exits if each.point == pick.at)
    if end.deep:
        subject = end.subject(setting.subject, deep=True)
        plan = restricted(pick.plan, setting.subject.graph, subject.graph)
        cost = engine.cost(subject.graph, plan)._asdict()
        if met(setting.budget, cost):
            return subject, plan
    subject = end.subject(setting.subject)
    return subject, restricted(pick.plan, setting.subject.graph, subject.graph)


def pick(
    setting: Setting, space: Space, budget: Budget, front: evolve.Scored, say: Callable[[str], None]
) -> list[tuple[Any, Mapping[str, float]]]:
    """The genomes that go on: with a budget the best within it, a shortlist, else some spread over the front.

    These are of the whole depth; after them comes the best of those that end at each of the exits and are smaller than
    the model up to there. Each comes with what was measured of it, for the limits that are on measurements.

    Raises:
        RunError: none meets these.
    """
    genomes, objectives = _reduced(setting.config, space, front)
    ends = np.array([space.end(genome) for genome in genomes])
    out = _pick_whole(setting, space, budget, genomes[ends == ""], objectives[ends == ""], say)
    for end, graph in zip(space.exits, budget.ends, strict=True):
        here = np.flatnonzero(ends == end)
        best = here[np.argsort(objectives[here, 1], kind="stable")]
        plans = {i: restricted(space.to_plan(genomes[i]), budget.graph, graph) for i in best}
        smaller = [genomes[i] for i, plan in plans.items() if plan.keep or plan.drop]
        if budget.measured:
            out += _within_measured(setting, space, budget, smaller, say, 1)
        else:
            out += [(genome, {}) for genome in smaller[:1]]
    if budget.measured and len(genomes) and not out and not space.exits:  # else truncations may be within it
        raise RunError(
            f"none of the candidates on the front met the budget ({in_words(budget.measured)}) when measured: lower "
            f"the budget, so that the search looks further down, or measure on a quiet machine"
        )
    return out


def in_words(numbers: Mapping[str, float]) -> str:
    """Limits, or what was measured."""
    return ", ".join(f"{name} {value:,.4g}" for name, value in numbers.items())


def _pick_whole(
    setting: Setting, space: Space, budget: Budget, genomes: Any, objectives: Any, say: Callable[[str], None]
) -> list[tuple[Any, Mapping[str, float]]]:
    """Of those of the whole depth."""
    config = setting.config
    if not len(genomes):
        return []
    order = np.argsort(objectives[:, 1], kind="stable")
    if budget.measured:
        return _within_measured(setting, space, budget, list(genomes[order]), say, shortlisted(config))
    if budget.limits:
        return [(genomes[i], {}) for i in order[: shortlisted(config)]]
    # Without a budget sizes fall by equal factors, from a little below dense to the smallest that is not hopeless.
    good = objectives[:, 1] <= objectives[order[0], 1] + HOPELESS
    genomes, sizes = genomes[good], objectives[good, 0]
    targets = np.geomspace(sizes.max(), sizes.min(), config.finalists + 1)[1:]
    nearest = [int(np.abs(np.log(sizes / target)).argmin()) for target in targets]
    return [(genomes[i], {}) for i in dict.fromkeys(nearest)]


def _reduced(config: Config, space: Space, front: evolve.Scored) -> tuple[Any, Any]:
    """Genomes and objectives of those that meet the budget and are not the dense model."""
    usable = front.violation == 0
    if not usable.any():
        raise RunError(
            f"no candidate met the budget in {config.generations} generations: raise --generations or the budget"
        )
    usable &= (front.genomes != space.dense_genome()).any(1)
    return front.genomes[usable], front.objectives[usable]


def picked_once(
    setting: Setting,
    space: Space,
    budget: Budget,
    front: evolve.Scored,
    states: States,
    say: Callable[[str], None],
) -> list[tuple[Any, Mapping[str, float]]]:
    """What is `pick`ed in a run: where it depends on measurements, a resumed run goes on with those from before."""

    def chosen() -> list[tuple[Any, Mapping[str, float]]]:
        return hosts.together(lambda: pick(setting, space, budget, front, say))

    if not budget.measured or not len(_reduced(setting.config, space, front)[0]):
        return chosen()

    def arrays() -> dict[str, np.ndarray]:
        found = chosen()
        count = {"count": np.array(len(found))}
        found = found or [(space.dense_genome(), dict.fromkeys(budget.measured, 0.0))]  # nothing cannot be saved
        genomes, costs = zip(*found, strict=True)
        measured = {name: np.array([cost[name] for cost in costs]) for name in budget.measured}
        return {"genomes": np.stack(genomes)} | count | measured

    kept = states.arrays("picked", arrays)
    costs = [{name: float(kept[name][i]) for name in budget.measured} for i in range(int(kept["count"]))]
    return list(zip(kept["genomes"], costs, strict=False))


def _within_measured(
    setting: Setting,
    space: Space,
    budget: Budget,
    genomes: list[Any],
    say: Callable[[str], None],
    enough: int,
) -> list[tuple[Any, Mapping[str, float]]]:
    """The first genomes that meet the limits on what is measured: they are cut, compiled and measured."""
    x = example(setting)

    def measured(genome: Any) -> Profile:
        subject, plan = part(setting, picked(space, genome))
        return profile_plan(subject.infer, subject.graph, subject.variables, plan, x)

    passed, failed = pick_measured(
        genomes,
        measured,
        budget.measured,
        enough,
    )
    wanted = in_words(budget.measured)
    for _, found in passed:
        say(f"measured {found.latency:.2f} ms and {found.memory / 2**20:.1f} MB, within the budget ({wanted})")
    if failed:
        least = in_words({name: min(getattr(found, name) for _, found in failed) for name in budget.measured})
        tried = len(failed) + len(passed)
        say(f"{len(failed)} of {tried} candidates were not within the budget as measured: {least} at least")
    return [(genome, {name: getattr(found, name) for name in budget.measured}) for genome, found in passed]


def shortlisted(config: Config) -> int:
    """How many candidates are refitted to find the finalists among them."""
    return max(config.shortlist or 0, config.finalists)


def appraise(setting: Setting, pick: Pick, epochs: int = 0, start: Tuned | None = None) -> tuple[float, Tuned]:
    """A candidate's loss on what judges, at the temperature that suits it best, and the candidate as it starts.

    Args:
        setting: the run's.
        pick: the candidate.
        epochs: of fine-tuning before it is measured.
        start: the candidate, if it was refitted before.
    """
    start = found = start or variant(setting, "", pick)
    if epochs:
        how = as_finalists(setting)
        found = tune(setting, start, lambda line: None, policy=setting.policy, epochs=epochs, **how)
    return answering(found.infer, judging(setting))(found.variables).calibrated_loss, start


def prepared(setting: Setting, subject: Subject, plan: engine.Plan) -> Any:
    """The variables of a variant of a model, cut, with all that can be had without a gradient step.

    Every kernel is fitted to the model's own, and norm statistics with them.
    """
    config, graph = setting.config, subject.graph
    small = engine.cut(subject.variables, graph, plan)
    if not config.calibration_images:
        return small
    x = jnp.asarray(setting.calibration(config.refit_images))
    train = subject.train if subject.momenta else subject.still
    fit = engine.refit(train, graph, plan, teacher=subject.still, heads=False)
    narrow = engine.narrow(train, graph, plan)

    @jax.jit
    def fitted(dense: Any, small: Any, x: Array) -> Any:
        key, new = jax.random.key(0), small

        def step(v: Any, x: Array, key: Array) -> Any:
            nonlocal new
            if config.reconstruct == "none":
                return narrow(v, x, key)
            out, new = fit(v, fit.targets(dense, x, key), x, key)
            return out

        if not subject.momenta:
            step(small, x, key)
            return new
        return {**engine.reestimate(step, subject.momenta)(small, x, key), "params": new["params"]}

    return fitted(subject.variables, small, x)


def finish(
    setting: Setting,
    name: str,
    pick: Pick,
    measured: Mapping[str, float],
    say: Callable[[str], None],
    start: Tuned | None = None,
) -> Tuned:
    """Cut a variant, refit it (unless it was `appraise`d) and fine-tune it on its small shapes."""
    start = start or variant(setting, name, pick)
    return fine_tuned(setting, replace(start, name=name, cost={**start.cost, **measured}), say)


def variant(setting: Setting, name: str, pick: Pick) -> Tuned:
    """What a pick makes of the model, before any fine-tuning."""
    subject, plan = part(setting, pick)
    cost = {k: int(v) for k, v in engine.cost(subject.graph, plan)._asdict().items()}
    infer = engine.narrow(subject.infer, subject.graph, plan)
    made = Tuned(name, plan, prepared(setting, subject, plan), infer, None, cost, subject)
    return reheaded(made, setting) if pick.at else made


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


def fine_tuned(setting: Setting, start: Tuned, say: Callable[[str], None]) -> Tuned:
    """A finalist after as many epochs as are configured.

    Where a cross-validation has to take the certificate's place, what it answers to the pool is noted after each epoch;
    fine-tuning does not look at that.
    """
    note = answering(start.infer, crossval.pool(setting)) if crossval.needed(setting) else None
    if not setting.recipe.epochs:
        return replace(start, trail=(note(start.variables),)) if note else start
    return best_tuned(setting, start, say, note=note, **as_finalists(setting))


def as_finalists(setting: Setting) -> dict[str, Any]:
    """What every finalist learns of the dense model beside the labels, for `tune`."""
    return {"distill": setting.distill, "unlabelled": True}


class Refined(NamedTuple):
    """A finalist that was finished on another machine: what can be sent from there, and what there was to say."""

    name: str
    pick: Pick
    variables: Any
    fitted: FitResult | None
    cost: Mapping[str, float]
    trail: tuple[Answers, ...]
    judges: str
    policy: str
    said: tuple[str, ...]


def refine(setting: Setting, name: str, pick: Pick, measured: Mapping[str, float]) -> Refined:
    """`finish`, to be `received` elsewhere."""
    said: list[str] = []
    found = finish(setting, name, pick, measured, said.append)
    variables = jax.tree.map(np.asarray, found.variables)
    fitted = replace(found.fitted, params=variables) if found.fitted else None
    parts = found.cost, found.trail, found.judges, found.policy
    return Refined(name, pick, variables, fitted, *parts, tuple(said))


def received(setting: Setting, found: Refined, say: Callable[[str], None]) -> Tuned:
    """The finalist that was refined elsewhere."""
    for line in found.said:
        say(line)
    subject, plan = part(setting, found.pick)
    infer = engine.narrow(subject.infer, subject.graph, plan)
    parts = found.fitted, found.cost, subject, found.trail, found.judges, found.policy
    return Tuned(found.name, plan, found.variables, infer, *parts)
