"""From the front to the saved model: pick finalists, cut and fine-tune them, select one, measure on `test`, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.search import evolve, report
from treesurgeon.search.config import RunError
from treesurgeon.search.evaluate import batches, measurer
from treesurgeon.search.finetune import FitResult, Recipe, fit, objective
from treesurgeon.search.selection import Finalist, Verdict, WithinMargins
from treesurgeon.search.setting import Setting
from treesurgeon.search.space import Space

HOPELESS = 1.5  # nats above the best loss of the front, before any fine-tuning


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        lines: the table: dense, the finalists, the selected one marked.
        sentence: the selection in one sentence.
        path: the saved model.
    """

    lines: tuple[report.Line, ...]
    sentence: str
    path: Path


def pick(setting: Setting, space: Space, front: evolve.Scored) -> list[Any]:
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
    # Without a budget sizes fall by equal factors, from a little below dense to the smallest that is not hopeless.
    good = objectives[:, 1] <= objectives[order[0], 1] + HOPELESS
    genomes, sizes = genomes[good], objectives[good, 0]
    targets = np.geomspace(sizes.max(), sizes.min(), config.finalists + 1)[1:]
    nearest = [int(np.abs(np.log(sizes / target)).argmin()) for target in targets]
    return [genomes[i] for i in dict.fromkeys(nearest)]


@dataclass(frozen=True, eq=False)
class Tuned:
    """A finalist: cut, fine-tuned, frozen."""

    name: str
    plan: engine.Plan
    variables: Any
    infer: Callable[[Any, Any], Any]
    fitted: FitResult | None
    cost: Mapping[str, int]


def prepared(setting: Setting, plan: engine.Plan) -> Any:
    """The variables of a variant, cut, with all that can be had without a gradient step.

    Every kernel is fitted to the dense model's, and norm statistics with them.
    """
    config, subject, graph = setting.config, setting.subject, setting.subject.graph
    small = engine.cut(subject.variables, graph, plan)
    if not config.calibration_images:
        return small
    x = jnp.asarray(setting.roles.train.images[: config.refit_images])
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
        return {**subject.reestimate(step, small, x, key), "params": new["params"]}

    return fitted(subject.variables, small, x)


def finish(setting: Setting, name: str, plan: engine.Plan, say: Callable[[str], None]) -> Tuned:
    """Cut a variant, re-estimate its statistics and fine-tune it on its small shapes."""
    config, subject, graph, roles = setting.config, setting.subject, setting.subject.graph, setting.roles
    infer = engine.narrow(subject.infer, graph, plan)
    train = engine.narrow(subject.train, graph, plan)
    key = jax.random.key(config.seed)
    small = prepared(setting, plan)
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
    setting: Setting,
    space: Space,
    genomes: Sequence[np.ndarray],
    tuned: Sequence[Tuned],
    say: Callable[[str], None],
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
    return Outcome(tuple(lines), verdict.sentence, path)


def recall(setting: Setting, say: Callable[[str], None]) -> Outcome:
    """The outcome of a run that is complete, from its manifest."""
    path = setting.config.directory / "selected"
    manifest = engine.load(path, module=setting.subject.module).manifest
    lines = [
        report.Line(
            name,
            found["params"],
            found["macs"],
            found["train_accuracy"],
            found["search_accuracy"],
            found["test_accuracy"],
            selected=name == manifest["selected"],
        )
        for name, found in manifest["metrics"].items()
    ]
    lines.sort(key=lambda line: -line.params)
    report.show(lines)
    say(manifest["verdict"]["sentence"])
    return Outcome(tuple(lines), manifest["verdict"]["sentence"], path)


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
    shape = ", ".join(map(str, setting.subject.spec.input_shape))
    return f"""# {config.model}, pruned

{verdict.sentence}

{report.markdown(lines)}

Accuracies are shares of right answers on the roles of `{config.data}`. `test` was never used for a choice: quote
that column. The gap is the accuracy lost from `train` to `search`, in points. Not certified: the choice was made on
`search`.

```python
from treesurgeon.engine import load

model = load("selected")
logits = model(x)   # x: float32 [N, {shape}], (image in 0..1 - mean) / std
```

mean {", ".join(map(str, setting.mean))}; std {", ".join(map(str, setting.std))}. `model.stablehlo` is the same function
without the code: `jax.export.deserialize(open("selected/model.stablehlo", "rb").read()).call(x)`.
"""
