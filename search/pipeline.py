"""The road of a search: open, trace, rank, search, cut and fine-tune the finalists, select, save.

Everything up to `search` is cheap and deterministic and is done again when a run is resumed. The search itself is one
compiled function of a state that is saved every generation, so a run that is killed goes on bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from treesurgeon import engine
from treesurgeon.search import evolve, report
from treesurgeon.search.config import Config, RunError, claim, identity
from treesurgeon.search.evaluate import Batches, Scorer, batches
from treesurgeon.search.finalists import Outcome, conclude, finish, pick, recall
from treesurgeon.search.setting import Setting, fingerprint, prepare
from treesurgeon.search.space import LEVELS, Space, build, first_stage
from treesurgeon.search.state import States

Say = Callable[[str], None]

FISHER_IMAGES = 64  # each takes a backward pass of its own


def run(config: Config, say: Say = print) -> Outcome:
    """Run or resume a search; see `Config`.

    Raises:
        TreesurgeonError, ModelError: bad input, told before anything is written.
    """
    setting = prepare(config)
    subject, roles = setting.subject, setting.roles
    graph, dense = subject.graph, engine.cost(subject.graph, engine.Plan())
    say(f"{config.model}: {dense.params:,} parameters, {dense.macs:,} multiply-accumulates for one image")
    say(f"{len(graph.groups)} groups of units, {len(graph.blocks)} droppable blocks")
    counts = ", ".join(f"{role} {len(getattr(roles, role)):,}" for role in ("train", "search", "certify", "test"))
    say(
        f"{config.data}: {counts} images" + ("" if roles.clean else "; it is unknown what the checkpoint was fitted on")
    )
    claim(config, identity(config, {"data": roles.fingerprints, "checkpoint": fingerprint(subject.variables)}))
    if (config.directory / "selected").exists():
        say("this run is complete; choose another --out to run again")
        return recall(setting, say)
    states = States(config.directory / "state")
    scores = states.scores(lambda: rank(setting), graph)
    space = build_space(setting, scores)
    variants = np.prod(space.cardinality.astype(float))
    say(f"searching {len(space.groups)} groups and {len(space.blocks)} blocks: {variants:.1e} variants")
    front = search(setting, space, states, say)
    genomes = pick(setting, space, front)
    tuned = [finish(setting, f"v{i}", space.to_plan(genome), say) for i, genome in enumerate(genomes, 1)]
    return conclude(setting, space, genomes, tuned, say)


def rank(setting: Setting, criterion: str | None = None) -> dict[str, np.ndarray]:
    """Score the units of every group, on calibration images where that needs data.

    Args:
        setting: the run's.
        criterion: a name in `engine.CRITERIA`; if None, the configured one.
    """
    subject, config = setting.subject, setting.config
    graph, variables = subject.graph, subject.variables
    data = batches(setting.roles.train, 256, 256)
    x, y = data.images[0], data.labels[0]

    def loss(variables: Any, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(subject.infer(variables, x), y).mean()

    measures: dict[str, Callable[[], Any]] = {
        "grads": lambda: jax.jit(jax.grad(loss, allow_int=True))(variables, x, y),
        "fisher": lambda: jax.jit(engine.fisher_energy(loss, graph))(variables, x[:FISHER_IMAGES], y[:FISHER_IMAGES]),
        "energy": lambda: jax.jit(engine.activation_energy(subject.infer, graph))(variables, x),
        "zeros": lambda: jax.jit(engine.zero_share(subject.infer, graph))(variables, x),
        "grams": lambda: jax.jit(engine.gram_matrices(subject.infer, graph))(variables, x),
        "key": lambda: jax.random.key(config.seed),
    }
    name = criterion or config.criterion
    needs = engine.CRITERIA[name].needs if name in engine.CRITERIA else ""  # `importance` refuses other names
    measured = {needs: measures[needs]()} if needs else {}
    scores = engine.importance(name, graph, variables, **measured)
    return {group: np.asarray(score) for group, score in scores.items()}


def build_space(setting: Setting, scores: Mapping[str, np.ndarray]) -> Space:
    """The space, and the check that it holds something within the budget."""
    graph, config = setting.subject.graph, setting.config
    protected: set[str] = set()
    for name in config.protect:
        if name == "first-stage":
            protected |= first_stage(graph)
        elif name != "none":
            protected.add(name)
    space = build(graph, scores, multiple=config.multiple, protected=protected)
    smallest = space.cardinality - 1
    smallest[len(space.groups) :] = 0
    least = engine.cost(graph, space.to_plan(smallest))._asdict()
    for name, limit in setting.budget.items():
        if least[name] > limit:
            raise RunError(
                f"--{name.replace('_', '-')}: the budget of {limit:,.0f} cannot be met, the smallest variant of the "
                f"space has {least[name]:,}; raise it, or protect less (--protect none)"
            )
    return space


def search(setting: Setting, space: Space, states: States, say: Say) -> evolve.Scored:
    """Evolve the front, or what is left of it; every generation is saved."""
    config, subject, graph = setting.config, setting.subject, setting.subject.graph
    scorer = Scorer(subject, config.calibration_images > 0, config.chunk)
    data = batches(setting.roles.search, 128, config.search_images)
    calibration = jnp.asarray(setting.roles.train.images[: config.calibration_images])
    measure = next(iter(setting.budget), "params")
    dense = engine.cost(graph, engine.Plan())._asdict()
    floor = 0.8 * setting.budget[measure] / dense[measure] if setting.budget else 0.0

    compiled = []

    @jax.jit
    def generation(state: evolve.State, variables: Any, calibration: Array, data: Batches) -> Any:
        compiled.append(1)  # runs once for each compilation
        children = evolve.ask(state, space.cardinality)
        masks = jax.vmap(space.decode)(children)
        costs = engine.cost(graph, masks)._asdict()
        loss, error = scorer.population(variables, masks, calibration, data)
        # Well below the budget smaller is no longer better, so that the search stays where the answer is.
        size = jnp.maximum(costs[measure] / dense[measure], floor)
        over = [jnp.maximum(costs[name] / limit - 1, 0) for name, limit in setting.budget.items()]
        violation = sum(over, jnp.zeros(len(children)))
        told = evolve.tell(state, children, jnp.stack([size, loss], 1), violation)
        return told, {"genome": children, "loss": loss, "error": error, "violation": violation, **costs}

    seeds = starting_points(space, graph, setting.budget)
    state = evolve.init(
        jax.random.key(config.seed),
        space.cardinality,
        population=config.population,
        seeds=seeds[: config.population],
    )
    state = states.latest(state)
    if int(state.generation):
        say(f"resumed after generation {int(state.generation)} of {config.generations}")
    else:
        say("compiling the search, once …")
    while int(state.generation) < config.generations:
        start = time.perf_counter()
        done = int(state.generation)
        state, seen = jax.block_until_ready(generation(state, subject.variables, calibration, data))
        took = time.perf_counter() - start
        seen = {name: np.asarray(values) for name, values in seen.items()}
        rows = [{name: values[i] for name, values in seen.items()} for i in range(config.population)]
        for row in rows:
            row.pop("size", None)
        report.write_generation(config.directory / "candidates.csv", done, rows)
        states.save(done + 1, state)
        say(_progress(evolve.front(state), done + 1, config, measure, took))
    if len(compiled) > 1:
        raise RunError(f"the search compiled {len(compiled)} times instead of once: please report this")
    return evolve.front(state)


def starting_points(space: Space, graph: engine.Graph, budget: Mapping[str, float]) -> np.ndarray:
    """Uniform variants, the largest within the budget first: every width, with no, a quarter, … of the blocks gone.

    Widths shrink for all groups, or only for those within a layer (one producer, one reader): the others run along a
    residual stream, and hurt more. Blocks go at even distances.
    """
    within = [g for g in space.groups if sum(len(graph.leaves[m.path].shape) > 1 for m in graph.groups[g].members) == 2]
    seeds = set(map(tuple, space.seeds().tolist()))
    for share in LEVELS:
        for quarter in range(4):
            count = len(space.blocks) * quarter // 4
            gone = [space.blocks[round((k + 0.5) * len(space.blocks) / count - 0.5)] for k in range(count)]
            genome = space.encode({g: round(share * space.sizes[g]) for g in within}, gone)
            seeds.add(tuple(genome.tolist()))
    genomes = np.array(sorted(seeds), np.int32)
    costs = [engine.cost(graph, space.to_plan(genome)) for genome in genomes]
    fits = [all(cost._asdict()[name] <= limit for name, limit in budget.items()) for cost in costs]
    order = sorted(range(len(genomes)), key=lambda i: (not fits[i], -costs[i].macs))
    return genomes[order]


def _progress(front: evolve.Scored, done: int, config: Config, measure: str, took: float) -> str:
    rate = config.population / took
    left = (config.generations - done) * took
    feasible = front.violation == 0
    text = f"generation {done:>3}/{config.generations}  {rate:5.1f} candidates/s  {left:4.0f} s left  "
    if not feasible.any():
        return text + "nothing within the budget yet"
    best = front.objectives[feasible][front.objectives[feasible][:, 1].argmin()]
    return text + f"front {int(feasible.sum()):>3}, best loss {best[1]:.4f} at {best[0]:.0%} of dense's {measure}"
