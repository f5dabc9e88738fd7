"""The road of a search: open, trace, rank, search, cut and fine-tune the finalists, select, save.

Everything up to `search` is cheap and deterministic and is done again when a run is resumed. The search itself is one
compiled function of a state that is saved every generation, so a run that is killed goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from treesurgeon import engine, models
from treesurgeon.search import evolve, report
from treesurgeon.search.config import Config, RunError, claim, identity
from treesurgeon.search.data import Roles, open_source, split_roles
from treesurgeon.search.evaluate import Batches, Scorer, batches, measurer
from treesurgeon.search.finetune import FitResult, Recipe, fit, objective
from treesurgeon.search.selection import Finalist, Verdict, WithinMargins, limits
from treesurgeon.search.space import Space, build, first_stage
from treesurgeon.search.state import States
from treesurgeon.search.subject import Subject, open_subject

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Setting:
    """What a configuration refers to, opened and checked."""

    config: Config
    subject: Subject
    roles: Roles
    mean: tuple[float, ...]
    std: tuple[float, ...]
    budget: Mapping[str, float]  # absolute limits


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        lines: the table: dense, the finalists, the selected one marked.
        verdict: the selection and its reasons.
        path: the saved model.
    """

    lines: tuple[report.Line, ...]
    verdict: Verdict
    path: Path


def run(config: Config, say: Say = print) -> Outcome:
    """Run or resume a search; see `Config`.

    Raises:
        TreesurgeonError, ModelError: bad input, told before anything is written.
    """
    setting = prepare(config)
    subject, roles = setting.subject, setting.roles
    selected = config.directory / "selected"
    graph, dense = subject.graph, engine.cost(subject.graph, engine.Plan())
    say(
        f"{config.model}: {dense.params:,} parameters, {dense.macs:,} multiply-accumulates; {len(graph.groups)} groups, "
        f"{len(graph.blocks)} droppable blocks"
    )
    counts = ", ".join(f"{role} {len(getattr(roles, role)):,}" for role in ("train", "search", "certify", "test"))
    say(f"{config.data}: {counts} images" + ("" if roles.clean else "; it is unknown what the checkpoint was fitted on"))
    claim(config, identity(config, {"data": roles.fingerprints, "checkpoint": fingerprint(subject.variables)}))
    if selected.exists():
        raise RunError(f"{selected} exists: this run is complete. Load it, or choose another --out to run again")
    states = States(config.directory / "state")
    scores = states.scores(lambda: rank(setting), graph)
    space = build_space(setting, scores)
    say(f"searching {len(space.groups)} groups and {len(space.blocks)} blocks, {np.prod(space.cardinality.astype(float)):.1e} variants")
    front = search(setting, space, states, say)
    candidates = finalists(setting, space, front)
    tuned = [finish(setting, f"v{i}", space.to_plan(genome), say) for i, genome in enumerate(candidates, 1)]
    return conclude(setting, space, candidates, tuned, say)


def prepare(config: Config) -> Setting:
    """Open the data and the model, and check that they fit each other and the budget."""
    config.check()
    preset = models.get(config.model) if ":" not in config.model else None
    source = open_source(config.data, config.data_dir or None)
    split, count = next(((s, n) for s, n in source.splits.items() if n), (None, 0))
    if split is None:
        raise RunError(f"--data {config.data}: no split has an image")
    shape = preset.input_shape if preset else source.read_images(split, np.array([0])).shape[1:]
    subject = open_subject(config.model, config.checkpoint, (*shape, 1) if len(shape) == 2 else shape)
    mean = config.mean or (preset.mean if preset else (0.0,))
    std = config.std or (preset.std if preset else (1.0,))
    fitted = config.fitted if config.fitted_split or preset is None else preset.fitted_splits
    roles = split_roles(
        source,
        fitted,
        num_classes=subject.num_classes,
        input_shape=subject.spec.input_shape,
        mean=mean,
        std=std,
        seed=config.seed,
        caps={"train": config.max_train},
    )
    dense = engine.cost(subject.graph, engine.Plan())._asdict()
    return Setting(config, subject, roles, tuple(mean), tuple(std), limits(config.budget, dense))


def fingerprint(tree: Any) -> str:
    """SHA-256 over the leaves of a pytree, names and shapes included."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def rank(setting: Setting) -> dict[str, np.ndarray]:
    """Score the units of every group by the configured criterion, on calibration images where it needs data."""
    subject, config = setting.subject, setting.config
    graph, variables = subject.graph, subject.variables
    data = batches(setting.roles.train, 256, 256)
    x, y = data.images[0], data.labels[0]
    grads = energy = None
    if config.criterion == "taylor":

        def loss(variables: Any) -> Array:
            logits = subject.infer(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        grads = jax.jit(jax.grad(loss, allow_int=True))(variables)
    elif config.criterion == "activation":
        energy = jax.jit(engine.activation_energy(subject.infer, graph))(variables, x)
    scores = engine.importance(config.criterion, graph, variables, grads=grads, energy=energy)
    return {name: np.asarray(score) for name, score in scores.items()}


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
                f"--{name}: the budget of {limit:,.0f} cannot be met, the smallest variant of the space has "
                f"{least[name]:,}; raise it, or protect less (--protect none)"
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

    @jax.jit
    def generation(state: evolve.State, variables: Any, calibration: Array, data: Batches) -> Any:
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
        jax.random.key(config.seed), space.cardinality, population=config.population, seeds=seeds[: config.population]
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
    compiled = generation._cache_size()
    if compiled > 1:
        raise RunError(f"the search compiled {compiled} times instead of once: please report this")
    return evolve.front(state)


def starting_points(space: Space, graph: engine.Graph, budget: Mapping[str, float]) -> np.ndarray:
    """Uniform widths at every level, the largest within the budget first."""
    seeds = space.seeds()
    costs = [engine.cost(graph, space.to_plan(seed))._asdict() for seed in seeds]
    fits = [all(cost[name] <= limit for name, limit in budget.items()) for cost in costs]
    return np.concatenate([seeds[np.array(fits)], seeds[~np.array(fits)]])


def _progress(front: evolve.Scored, done: int, config: Config, measure: str, took: float) -> str:
    rate = config.population / took
    left = (config.generations - done) * took
    feasible = front.violation == 0
    text = f"generation {done:>3}/{config.generations}  {rate:5.1f} candidates/s  {left:4.0f} s left  "
    if not feasible.any():
        return text + "nothing within the budget yet"
    best = front.objectives[feasible][front.objectives[feasible][:, 1].argmin()]
    return text + f"front {int(feasible.sum()):>3}, best loss {best[1]:.4f} at {best[0]:.0%} of dense's {measure}"


def finalists(setting: Setting, space: Space, front: evolve.Scored) -> list[np.ndarray]:
    """The genomes that go on: with a budget the best within it, else some spread over the front."""
    config = setting.config
    usable = front.violation == 0
    genomes, objectives = front.genomes[usable], front.objectives[usable]
    if not len(genomes):
        raise RunError(
            f"no candidate met the budget in {config.generations} generations: raise --generations or the budget"
        )
    reduced = (genomes != space.dense_genome()).any(1)
    genomes, objectives = genomes[reduced], objectives[reduced]
    if not len(genomes):
        return []
    order = np.argsort(objectives[:, 1], kind="stable")
    if setting.budget:
        return list(genomes[order[: config.finalists]])
    # Without a budget: the losses rise as the variants shrink; take them evenly from the better half of the range.
    losses = objectives[order, 1]
    good = order[losses <= losses[0] + 0.5 * (np.median(losses) - losses[0]) + 1.0]
    by_size = good[np.argsort(objectives[good, 0], kind="stable")]
    picks = np.unique(np.linspace(0, len(by_size) - 1, min(config.finalists, len(by_size))).round().astype(int))
    return list(genomes[by_size[picks]])


@dataclass(frozen=True, eq=False)
class Tuned:
    """A finalist: cut, fine-tuned, frozen."""

    name: str
    plan: engine.Plan
    variables: Any
    infer: Callable[[Any, Any], Any]
    fitted: FitResult | None
    cost: Mapping[str, int]


def finish(setting: Setting, name: str, plan: engine.Plan, say: Say) -> Tuned:
    """Cut a variant, re-estimate its statistics and fine-tune it on its small shapes."""
    config, subject, graph, roles = setting.config, setting.subject, setting.subject.graph, setting.roles
    small = engine.cut(subject.variables, graph, plan)
    infer = engine.narrow(subject.infer, graph, plan)
    train = engine.narrow(subject.train, graph, plan)
    key = jax.random.key(config.seed)
    if config.calibration_images:
        x = jnp.asarray(roles.train.images[: max(config.calibration_images, 512)])
        small = jax.jit(lambda v: subject.reestimate(train, v, x, key))(small)
    cost = {k: int(v) for k, v in engine.cost(graph, plan)._asdict().items()}
    if not config.epochs:
        return Tuned(name, plan, small, infer, None, cost)
    recipe = Recipe(epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate)
    data = {"x": roles.train.images, "y": roles.train.labels}
    if config.distill:
        whole = batches(roles.train, 250)
        logits = jax.jit(lambda v, xs: jax.lax.map(lambda x: subject.infer(v, x), xs))(subject.variables, whole.images)
        data["teacher"] = np.asarray(logits).reshape(-1, logits.shape[-1])[: len(roles.train)]
    trainable = jax.tree_util.tree_map_with_path(
        lambda path, _: graph.leaves[jax.tree_util.keystr(path, simple=True, separator="/")].trainable, small
    )
    loss = objective(train, distill=config.distill)
    result = fit(loss, small, trainable, data, recipe, key, measurer(infer, roles.search))
    errors = ", ".join(f"{epoch.search_error:.2%}" for epoch in result.history)
    say(f"fine-tuned {name} ({cost['params']:,} parameters): error on search {errors}; kept epoch {result.best_epoch}")
    return Tuned(name, plan, result.params, infer, result, cost)


def conclude(
    setting: Setting, space: Space, genomes: Sequence[np.ndarray], tuned: Sequence[Tuned], say: Say
) -> Outcome:
    """Measure the frozen finalists, select, measure on test once, and save."""
    config, subject, graph, roles = setting.config, setting.subject, setting.subject.graph, setting.roles
    whole = Tuned(
        "dense",
        engine.Plan(),
        subject.variables,
        subject.infer,
        None,
        {k: int(v) for k, v in engine.cost(graph, engine.Plan())._asdict().items()},
    )
    measured = {}
    for each in (whole, *tuned):
        on_train, on_search = (measurer(each.infer, split)(each.variables)[1] for split in (roles.train, roles.search))
        measured[each.name] = Finalist(each.name, each.cost, on_train, on_search, each)
    dense, others = measured["dense"], [measured[each.name] for each in tuned]
    rule = WithinMargins(config.epsilon, config.eta, next(iter(setting.budget), "params"))
    verdict = rule.select(others, dense, budget=setting.budget, clean=roles.clean)
    chosen: Tuned = verdict.selected.ref
    lines = []
    for finalist in (dense, *sorted(others, key=lambda f: -f.cost["params"])):
        each: Tuned = finalist.ref
        lines.append(
            report.Line(
                each.name,
                each.cost["params"],
                each.cost["macs"],
                1 - finalist.train_error,
                1 - finalist.search_error,
                1 - measurer(each.infer, roles.test)(each.variables)[1],
                selected=finalist is verdict.selected,
            )
        )
    records = [
        {
            "variant": f.name,
            "selected": f is verdict.selected,
            **{k: f.cost[k] for k in ("params", "macs", "activation_bytes")},
            "train_error": f.train_error,
            "search_error": f.search_error,
            "gap": f.gap,
            "best_epoch": f.ref.fitted.best_epoch if f.ref.fitted else None,
            "reason": verdict.reasons[f.name],
            "description": space.describe(genome),
            "genome": genome,
        }
        for f, genome in zip(others, genomes, strict=True)
    ]
    report.write_front(config.directory / "front.csv", records)
    path = engine.save(
        config.directory / "selected",
        subject.spec,
        chosen.variables,
        chosen.plan,
        manifest=_manifest(setting, verdict, lines),
        card=_card(setting, verdict, lines),
        module=subject.module,
    )
    report.show(lines)
    say(verdict.sentence)
    say(f"saved {path}")
    return Outcome(tuple(lines), verdict, path)


def _manifest(setting: Setting, verdict: Verdict, lines: Sequence[report.Line]) -> dict[str, Any]:
    config, roles = setting.config, setting.roles
    return {
        "metrics": {
            line.variant: {
                "params": line.params,
                "macs": line.macs,
                "train_accuracy": line.train,
                "search_accuracy": line.search,
                "test_accuracy": line.test,
                "gap": line.gap,
            }
            for line in lines
        },
        "selected": verdict.selected.name,
        "verdict": {"sentence": verdict.sentence, "passed": verdict.passed, "certified": False},
        "normalisation": {"mean": list(setting.mean), "std": list(setting.std)},
        "data": {"spec": config.data, "clean": roles.clean, "fingerprints": roles.fingerprints},
        "labels": list(roles.label_names),
        "seed": config.seed,
    }


def _card(setting: Setting, verdict: Verdict, lines: Sequence[report.Line]) -> str:
    config = setting.config
    return f"""# {config.model}, pruned

{verdict.sentence}

{report.markdown(lines)}

Accuracies are shares of right answers on the roles of `{config.data}`. `test` was never used for a choice: quote that
column. The gap is the accuracy lost from `train` to `search`, in points. Not certified: the choice was made on `search`.

```python
from treesurgeon.engine import load

model = load("selected")
logits = model(x)   # x: float32 [N, {", ".join(map(str, setting.subject.spec.input_shape))}], (image in 0..1 - mean) / std
```

mean {", ".join(map(str, setting.mean))}; std {", ".join(map(str, setting.std))}. `model.stablehlo` is the same function
without the code: `jax.export.deserialize(open("selected/model.stablehlo", "rb").read()).call(x)`.
"""
