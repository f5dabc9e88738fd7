"""The road of a search: open, trace, rank, search, cut and fine-tune the finalists, select, save.

Everything up to `search` is cheap and deterministic and is done again when a run is resumed. The search evaluates with
two compiled programs (see evaluate.py), and its state is saved every generation: a run that is killed goes on bit for
bit.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.search import crossval, evolve, hosts, racing, ranking, report, sensitivity, shift
from treesurgeon.search.budget import Budget, make_budget, refuse
from treesurgeon.search.conclusion import Outcome, conclude, recall, save
from treesurgeon.search.config import Config, RunError, claim, identity
from treesurgeon.search.evaluate import Batches, in_precision
from treesurgeon.search.finalists import finish, picked, picked_once, received, refine
from treesurgeon.search.live import Generation
from treesurgeon.search.lock import alone
from treesurgeon.search.openings import REGISTER, opened_elsewhere
from treesurgeon.search.page import write_page
from treesurgeon.search.pool import Pool
from treesurgeon.search.room import roomy
from treesurgeon.search.scoring import describe, hire, lay_out, make_scorer, make_sweep, with_ends
from treesurgeon.search.setting import Setting, prepare
from treesurgeon.search.sharding import Layout, one_device
from treesurgeon.search.shortlist import halved
from treesurgeon.search.space import Space, build, first_stage
from treesurgeon.search.start import energies, starting_points, walk
from treesurgeon.search.state import States
from treesurgeon.search.subject import on_host
from treesurgeon.search.tasks import CLASSIFICATION
from treesurgeon.search.teaching import with_teacher
from treesurgeon.search.timings import Timings
from treesurgeon.search.truncating import find_exits, least, truncations
from treesurgeon.search.tuning import Tuned
from treesurgeon.search.unlabelled import taught
from treesurgeon.search.workers import Crew, Job

Say = Callable[[str], None]
UNEVEN = 3  # times as many images of a class as of another are worth a word


def run(config: Config, say: Say = print, pool: Pool | None = None) -> Outcome:
    """Run or resume a search; see `Config`, and `Pool` for where.

    Raises:
        TreesurgeonError, ModelError: bad input, told before anything is written.
    """
    pool = pool or Pool()
    pool.check()
    if pool.distributed:
        hosts.join(pool.coordinator, pool.processes, pool.process)
        hosts.agree("versions", hosts.versions())
        say = say if hosts.lead() else lambda line: None
        say(f"{jax.process_count()} processes with {jax.device_count()} devices; if one of them ends, all do")
    with hosts.watched():
        return _run(config, say, pool)


def _run(config: Config, say: Say, pool: Pool) -> Outcome:
    start = time.perf_counter()
    setting = hosts.each(lambda: opened(config, pool.hold))
    layout = None if pool.ray else hosts.each(lambda: lay_out(setting, pool))
    if layout and layout.split:  # nobody else may hold the model on a device
        original = setting.original and on_host(setting.original)
        setting = replace(setting, subject=on_host(setting.subject), original=original)
    with roomy(setting.subject.variables):
        return _found(setting, say, pool, layout, time.perf_counter() - start)


def _found(setting: Setting, say: Say, pool: Pool, layout: Layout | None, took: float) -> Outcome:
    """Say what is searched, claim its place, and go on."""
    config, subject, roles = setting.config, setting.subject, setting.roles
    graph, dense = subject.graph, engine.cost(subject.graph, engine.Plan())
    if setting.head:
        say(setting.head.sentence)
    say(f"{config.model}: {dense.params:,} parameters, {dense.macs:,} multiply-accumulates for one image")
    say(f"{len(graph.groups)} groups of units, {len(graph.blocks)} droppable blocks")
    counts = ", ".join(f"{role} {len(getattr(roles, role)):,}" for role in ("train", "search", "certify", "test"))
    say(f"{config.data}: {counts} images" + ("" if roles.clean else f"; {roles.doubt}"))
    if roles.twice:
        again = ", ".join(f"{count:,} of {role}" for role, count in roles.twice.items())
        say(f"left out, since this role or one before has the same image: {again}")
    if setting.unlabelled:
        count, held = len(setting.unlabelled), setting.held
        say(
            f"{config.unlabelled}: {count:,} images without labels, for norm statistics, kernels and the dense model's "
            f"answers, which score candidates too where search is small; finalists learn from {count - held:,} of them "
            f"and are judged on {held:,}, beside search (--unlabelled)"
        )
    for line in choices(setting):
        say(line)
    if config.certify and roles.clean:
        say(config.judged_by.resolution(roles.certify.labels, config.epsilon, config.delta))
        at = config.directory.parent / REGISTER, roles.fingerprints["certify"], str(config.directory)
        if before := opened_elsewhere(*at, roles.certify.digests):
            say(f"{before}: a claim from them would not hold its level; none is made, unless this repeats that run")
    if crossval.needed(setting):
        say("which is too few for yours: cross-validation on search and certify will take the certificate's place")
    content = identity(config, {"data": setting.fingerprints, "checkpoint": setting.checkpoint})
    # Options first: what they differ in says more than what comes of it.
    ordered = dict(sorted(content.items(), key=lambda item: item[0] in ("data", "checkpoint")))
    hosts.agree("options, data or checkpoint", {**ordered, "out": config.directory})
    hosts.agree("devices and how the model lies on them", {"mesh": pool.mesh, "split": bool(layout and layout.split)})
    hosts.together(lambda: claim(config, content))
    with hosts.led(lambda: alone(config.directory)):
        timings = Timings(config.directory / "timings.csv" if hosts.lead() else None)
        timings.add("opening", took)
        return go_on(setting, say, pool, layout, timings)


def choices(setting: Setting) -> list[str]:
    """What errors are of and how finalists are fine-tuned, with the flags that say otherwise."""
    config, roles, recipe = setting.config, setting.roles, setting.recipe
    if config.task != CLASSIFICATION.name:
        names = ", ".join(roles.label_names[:12]) + (", …" if len(roles.label_names) > 12 else "")
        lines = [f"{config.task}: each image has {names}; judged by {config.metric} (--task, --metric)"]
    else:
        counts = np.unique(roles.train.labels, return_counts=True)[1]
        uneven = (
            f"; classes have {counts.min():,} to {counts.max():,} images of train, and balanced_accuracy, f1 and auroc "
            f"count them alike"
        )
        rare = counts.max() >= UNEVEN * counts.min() and not config.judged_by.per_class
        lines = [f"judged by {config.metric} (--metric){uneven if rare else ''}"]
    if setting.tuned_reference:
        lines.append("variants are compared with the dense model as it is once it is fine-tuned (--reference)")
    if recipe.epochs:
        lines.append(
            f"finalists are fine-tuned for {recipe.epochs} epochs in batches of {recipe.batch_size}, at a peak rate of "
            f"{recipe.learning_rate:g}, and are as they were at their best on {setting.judges} (--epochs, "
            f"--batch-size, --learning-rate)"
            + (f"; tried as well, with the better one kept: {'; '.join(setting.policies)}" if setting.policies else "")
        )
    return lines


def opened(config: Config, hold: int | None) -> Setting:
    """What the configuration refers to; what would be refused later on is, before anything is written."""
    setting = prepare(config, hold)
    refuse(setting.budget, least(setting, smallest(setting)))
    return setting


def smallest(setting: Setting) -> engine.Plan:
    """The plan that keeps least of the whole depth."""
    groups = setting.subject.graph.groups
    space = build_space(setting, {name: np.arange(group.size) for name, group in groups.items()})  # any ranking
    return space.to_plan(sensitivity.smallest(space))


def go_on(setting: Setting, say: Say, pool: Pool, layout: Layout | None, timings: Timings) -> Outcome:
    """Run a search from where it is to its end, or show the outcome of one that is complete; Ray needs no layout."""
    config = setting.config
    if hosts.together(lambda: (config.directory / "selected").exists()):
        say("this run is complete; choose another --out to run again")
        if not (config.directory / "report.html").exists():
            say(f"it has no report: treesurgeon report {config.directory} writes it")
        return hosts.together(lambda: recall(setting))
    with timings.part("data shift"):
        shifted = hosts.together(lambda: shift.look(setting))
    say(shifted.sentence)
    text = json.dumps(asdict(shifted), indent=1) + "\n"
    hosts.together(lambda: (config.directory / "shift.json").write_text(text))
    states = States(config.directory / "state")
    if setting.distill or setting.tuned_reference:
        with timings.part("fine-tuning the dense model"):
            setting = with_teacher(setting, states, say)
    if setting.unlabelled:
        with timings.part("the dense model's answers"):
            setting = replace(setting, taught=states.arrays("answers", lambda: taught(setting))["logits"])
    with timings.part("trying depths"):
        setting = replace(setting, exits=find_exits(setting, smallest(setting), states, say))
    with timings.part("ranking units"):
        space, crew = ranked(setting, states, say, pool, layout)
    ends = with_ends(setting, space)
    variants = np.prod(ends.cardinality.astype(float))
    graph = setting.subject.graph
    whole = len(space.groups) == len(graph.groups) and len(space.blocks) == len(graph.blocks)
    shares = f"{len(space.groups)} of {len(graph.groups)} groups and {len(space.blocks)} of {len(graph.blocks)} blocks"
    rest = "" if whole else " (the others are protected, have one width, or lie inside a block)"
    say(f"searching {shares}{rest}: {variants:.1e} variants")
    budget = make_budget(setting, space, states, say)
    scored = search(setting, space, budget, states, say, layout, crew, timings)
    start = time.perf_counter()
    chosen = picked_once(setting, ends, budget, scored, states, say)
    refitted: dict[str, Tuned] = {}
    early = [each for each in chosen if ends.end(each[0])]
    chosen = [each for each in chosen if not ends.end(each[0])]
    if len(chosen) > config.finalists:
        best, made = halved(setting, [picked(ends, genome) for genome, _ in chosen], states, crew, say)
        chosen = [chosen[i] for i in best]
        refitted = {f"v{k}": made[i] for k, i in enumerate(best, 1) if i in made}
    chosen += early
    finalists = [(setting, f"v{i}", picked(ends, genome), found) for i, (genome, found) in enumerate(chosen, 1)]
    if crew:
        refined = crew.done([Job("refine", tuple(given)) for _, *given in finalists])
        tuned = [received(setting, each, say) for each in refined]
    elif hosts.several():
        tuned = [received(setting, each, say) for each in hosts.shared(len(finalists), lambda i: refine(*finalists[i]))]
    else:
        tuned = [finish(*given, say, refitted.pop(given[1], None)) for given in finalists]
    genomes = {each.name: genome for each, (genome, _) in zip(tuned, chosen, strict=True)}
    tuned += truncations(setting, budget, states, say)
    timings.add("finalists", time.perf_counter() - start)
    with timings.part("measuring and selecting"):
        found = hosts.together(lambda: conclude(setting, ends, budget, genomes, tuned, say))
    with timings.part("saving"):
        save(setting, tuned, found)
    say(f"wrote {hosts.together(lambda: write_page(config.directory))}")
    say(timings.sentence)
    return found.outcome


def ranked(setting: Setting, states: States, say: Say, pool: Pool, layout: Layout | None) -> tuple[Space, Crew | None]:
    """The space that is searched, and with Ray the workers."""
    config = setting.config
    names = config.criteria or (config.criterion,)
    scores = {
        name: states.arrays(f"scores_{name}", lambda name=name: ranking.rank(setting, name, layout)) for name in names
    }
    spaces = {name: build_space(setting, found) for name, found in scores.items()}
    space = spaces[names[0]]
    chosen = dict.fromkeys(space.groups, names[0])
    crew = hire(setting, space, pool, say) if pool.ray else None
    if len(names) > 1 and space.groups:
        moved = states.arrays("criteria", lambda: ranking.moves(spaces, make_sweep(setting, space, layout, crew)))
        chosen |= ranking.choose(moved, names, space)
        space = build_space(setting, {g: scores[chosen.get(g, names[0])][g] for g in setting.subject.graph.groups})
        say(ranking.sentence(chosen))
    hosts.together(lambda: record(setting, space, chosen))
    return space, crew


def record(setting: Setting, space: Space, criteria: Mapping[str, str]) -> None:
    """Write down what is searched, and where: `groups.csv`, `blocks.csv`, `pinned.csv`, `environment.json`."""
    graph, directory = setting.subject.graph, setting.config.directory
    groups = []
    for name, group in graph.groups.items():
        made = {member.path for member in group.members if member.makes}
        inside = [i for i, block in enumerate(graph.blocks.values()) if made and made <= set(block.leaves)]
        widths, criterion = space.widths.get(name), criteria.get(name)
        row = {"group": name, "size": group.size, "widths": widths, "criterion": criterion, "blocks": inside}
        groups.append(row)
    blocks = [
        {"block": name, "parent": block.parent, "searched": name in space.blocks, "leaves": block.leaves}
        for name, block in graph.blocks.items()
    ]
    pins = [{"axis": axis, "reason": str(reason)} for axis, reason in graph.pinned.items()]
    report.write_table(directory / "groups.csv", report.GROUP_COLUMNS, groups)
    report.write_table(directory / "blocks.csv", report.BLOCK_COLUMNS, blocks)
    report.write_table(directory / "pinned.csv", report.PIN_COLUMNS, pins)
    (directory / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def environment() -> dict[str, Any]:
    """The versions and the device that results belong to; nothing that tells whose machine it is."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in hosts.PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device.device_kind} ({device.platform}), {jax.device_count()} of them",
    }


def build_space(setting: Setting, scores: Mapping[str, np.ndarray]) -> Space:
    """The space of variants."""
    graph, config = setting.subject.graph, setting.config
    protected: set[str] = set()
    for name in config.protect:
        if name == "first-stage":
            protected |= first_stage(graph)
        elif name != "none":
            protected.add(name)
    return build(graph, scores, multiple=config.multiple, protected=protected)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """A search between two generations: all that resuming needs."""

    state: evolve.State
    references: racing.References


def search(
    setting: Setting,
    space: Space,
    budget: Budget,
    states: States,
    say: Say,
    layout: Layout | None = None,
    crew: Crew | None = None,
    timings: Timings | None = None,
) -> evolve.Scored:
    """Evolve the front, or what is left of it; every generation is saved.

    The walk down is of the whole depth, `space`; candidates may end earlier.

    Returns the front; with a budget, the last population too, from which a shortlist is made.
    """
    config, measure, dense = setting.config, budget.measure, budget.dense
    timings, start = timings or Timings(), time.perf_counter()
    whole, space = space, with_ends(setting, space)
    evaluator = make_scorer(setting, space, layout, crew)
    describe(setting, evaluator, say)

    if config.precision != "float32":
        exact, ours = (answer_loss(setting, evaluator.data, dtype, layout) for dtype in ("float32", config.precision))
        say(f"in {config.precision} the dense model's loss reads {ours:.4f} instead of {exact:.4f}")

    @jax.jit
    def masks_and_costs(genomes: Array) -> Any:
        masks = jax.vmap(space.decode)(genomes)
        return masks, budget.costs(masks)

    def costs_of(genomes: np.ndarray) -> dict[str, np.ndarray]:
        """In groups of one size, so that this is compiled once."""
        size = len(space.cardinality)
        filled = np.resize(genomes, (-(-len(genomes) // size) * size, size))
        parts = [masks_and_costs(filled[i : i + size])[1] for i in range(0, len(filled), size)]
        return {name: np.concatenate([part[name] for part in parts])[: len(genomes)] for name in dense}

    def to_the_end(genomes: np.ndarray) -> np.ndarray:
        return np.pad(genomes, ((0, 0), (0, len(space.cardinality) - len(whole.cardinality))))

    def sizes(genomes: np.ndarray) -> np.ndarray:
        return costs_of(to_the_end(genomes))[measure] / dense[measure]

    rng = np.random.default_rng(config.seed)
    walked = states.arrays(
        "descent",
        lambda: walk(
            whole,
            make_sweep(setting, whole, layout, crew),
            energies(setting, whole, layout),
            sizes,
            budget.share,
            config.population,
            rng,
            say,
        ),
    )
    timings.add("walking down", time.perf_counter() - start)
    rises = sensitivity.table(whole, walked["rise"])
    path, near = (to_the_end(walked[name]) for name in ("path", "near"))
    hosts.together(lambda: report.write_sensitivity(config.directory / "sensitivity.csv", rises))
    state = evolve.init(
        jax.random.key(config.seed),
        space.cardinality,
        population=config.population,
        seeds=starting_points(config, space, budget, path, near, costs_of)[: config.population],
    )
    references = racing.References.empty(config.population, evaluator.count)
    progress = states.latest(Progress(state, references))
    state, references = progress.state, progress.references
    if int(state.generation):
        say(f"resumed after generation {int(state.generation)} of {config.generations}")
    ask = jax.jit(partial(evolve.ask, canonical=space.canonical))
    tell = jax.jit(partial(evolve.tell, canonical=space.canonical, niche=space.niche))
    canonical = jax.jit(jax.vmap(space.canonical))
    while int(state.generation) < config.generations:
        start = time.perf_counter()
        done = int(state.generation)
        children = ask(state, space.cardinality)
        hosts.agree("candidates", {"generation": done, "genomes": np.asarray(children).tolist()})
        genes = np.asarray(canonical(children))
        masks, costs = masks_and_costs(genes)
        costs = {name: np.asarray(values) for name, values in costs.items()}
        violation = budget.over(costs)
        # Well below the budget smaller is no longer better, so that the search stays where the answer is.
        size = np.maximum(costs[measure] / dense[measure], 0.8 * budget.share)
        within = np.flatnonzero(violation == 0)  # the others are ranked by how far they are off alone
        loss, error, scored = np.full(len(children), np.inf), np.ones(len(children)), 0
        if len(within):
            chosen = jax.tree.map(lambda leaf, rows=within: leaf[rows], masks)
            judge = partial(racing.judge, size[within], references=references, looks=len(evaluator.data.images))
            losses, wrong, _ = evaluator(chosen, None if space.exits else judge)
            loss[within] = racing.estimates(losses, references)
            error[within] = wrong.sum(1, where=~np.isnan(losses)) / np.maximum((~np.isnan(losses)).sum(1), 1)
            references, scored = references.joined(size[within], losses), int((~np.isnan(losses)).sum())
        state = tell(state, children, np.stack([size, loss], 1), violation)
        seen = {"genome": genes[:, : len(whole.cardinality)], "up_to": [space.end(each) for each in genes]}
        seen |= {"loss": loss, "error": error, "violation": violation, **costs}
        seen["kept"] = kept_units(space, masks)
        seen.pop("size")
        rows = [{name: values[i] for name, values in seen.items()} for i in range(config.population)]
        hosts.together(
            lambda done=done, rows=rows: report.write_generation(config.directory / "candidates.csv", done, rows)
        )
        states.save(done + 1, Progress(state, references))
        took = time.perf_counter() - start
        timings.add("generations", took)
        front, total = evolve.front(state), config.generations
        true = costs_of(np.asarray(front.genomes))[measure] / dense[measure]
        front = replace(front, objectives=np.stack([true, front.objectives[:, 1]], 1))
        say(Generation(front, done + 1, total, measure, took, config.population, scored))
    if evaluator.compiled > 2:
        raise RunError(f"the search compiled {evaluator.compiled} programs instead of 2: please report this")
    return evolve.distinct(evolve.everyone(state) if budget.limits else evolve.front(state), space.canonical)


def kept_units(space: Space, masks: Any) -> np.ndarray:
    """Units that candidates keep of every group, `int[candidates, groups]`, from their stacked masks."""
    count = len(next(iter([*masks["units"].values(), *masks["blocks"].values()])))
    units = {group: np.asarray(mask).sum(-1) for group, mask in masks["units"].items()}
    kept = [units.get(group, np.full(count, size)) for group, size in space.sizes.items()]
    found = np.array(kept, int).reshape(-1, count).T
    if space.exits:
        there = [[True] * len(space.sizes), *([name in groups for name in space.sizes] for groups, _ in space.before)]
        found *= np.array(there)[np.asarray(masks["exit"])]
    return found


def answer_loss(setting: Setting, data: Batches, precision: str, layout: Layout | None = None) -> float:
    """The dense model's loss on the scoring images, computed in this precision."""
    subject = setting.subject

    def total(v: Any, batch: tuple[Array, Array, Array]) -> Array:
        x, labels, weights = batch
        logits = subject.infer(in_precision(v, precision), x.astype(precision))
        return (data.task.losses(logits, labels) * weights).sum()

    shown = list(zip(data.images, data.labels, data.weights, strict=True))
    compiled = (layout or one_device()).over(total, subject.variables, shown[0])
    losses = [np.asarray(compiled(batch)) for batch in shown]
    return float(np.sum(losses) / np.asarray(data.weights).sum())
