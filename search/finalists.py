"""From the front to the saved model: pick finalists, cut and fine-tune them, select one, measure on `test`, save."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.search import evolve, report
from treesurgeon.search.budget import Budget, example
from treesurgeon.search.certificate import Certificate, certify, claim_opening, not_certified, smallest_margin
from treesurgeon.search.config import RunError
from treesurgeon.search.evaluate import batches, measurer
from treesurgeon.search.finetune import FitResult, Recipe, fit, objective
from treesurgeon.search.latency import pick_measured, profile, profile_plan
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


def pick(
    setting: Setting, space: Space, budget: Budget, front: evolve.Scored, say: Callable[[str], None]
) -> list[tuple[Any, Mapping[str, float]]]:
    """The genomes that go on: with a budget the best within it, else some spread over the front.

    Each comes with what was measured of it, for the limits that are on measurements.
    """
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
    if budget.measured:
        return _within_measured(setting, space, budget, list(genomes[order]), say)
    if budget.limits:
        return [(genomes[i], {}) for i in order[: config.finalists]]
    # Without a budget sizes fall by equal factors, from a little below dense to the smallest that is not hopeless.
    good = objectives[:, 1] <= objectives[order[0], 1] + HOPELESS
    genomes, sizes = genomes[good], objectives[good, 0]
    targets = np.geomspace(sizes.max(), sizes.min(), config.finalists + 1)[1:]
    nearest = [int(np.abs(np.log(sizes / target)).argmin()) for target in targets]
    return [(genomes[i], {}) for i in dict.fromkeys(nearest)]


def measured_dense(setting: Setting, budget: Budget) -> dict[str, float]:
    """What is measured of the dense model, for the limits that are on measurements."""
    if not budget.measured:
        return {}
    found = profile(setting.subject.infer, setting.subject.variables, example(setting))
    return {name: getattr(found, name) for name in budget.measured}


def _within_measured(
    setting: Setting, space: Space, budget: Budget, genomes: list[Any], say: Callable[[str], None]
) -> list[tuple[Any, Mapping[str, float]]]:
    """The first genomes that meet the limits on what is measured: they are cut, compiled and measured."""
    subject, x = setting.subject, example(setting)
    passed, failed = pick_measured(
        genomes,
        lambda genome: profile_plan(subject.infer, subject.graph, subject.variables, space.to_plan(genome), x),
        budget.measured,
        setting.config.finalists,
    )
    wanted = ", ".join(f"{name} {limit:,.4g}" for name, limit in budget.measured.items())
    for _, found in passed:
        say(f"measured {found.latency:.2f} ms and {found.memory / 2**20:.1f} MB, within the budget ({wanted})")
    if failed:
        say(f"{len(failed)} candidates were within the budget as predicted, and not as measured")
    if not passed:
        best = {name: min(getattr(found, name) for _, found in failed) for name in budget.measured}
        nearest = ", ".join(f"{name} {value:,.4g}" for name, value in best.items())
        raise RunError(
            f"none of the {len(failed)} candidates on the front met the budget ({wanted}) when measured, the least "
            f"was {nearest}: lower the budget, so that the search looks further down, or measure on a quiet machine"
        )
    return [(genome, {name: getattr(found, name) for name in budget.measured}) for genome, found in passed]


@dataclass(frozen=True, eq=False)
class Tuned:
    """A finalist: cut, fine-tuned, frozen."""

    name: str
    plan: engine.Plan
    variables: Any
    infer: Callable[[Any, Any], Any]
    fitted: FitResult | None
    cost: Mapping[str, float]


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


def finish(
    setting: Setting, name: str, plan: engine.Plan, measured: Mapping[str, float], say: Callable[[str], None]
) -> Tuned:
    """Cut a variant, re-estimate its statistics and fine-tune it on its small shapes."""
    config, subject, graph, roles = setting.config, setting.subject, setting.subject.graph, setting.roles
    infer = engine.narrow(subject.infer, graph, plan)
    train = engine.narrow(subject.train, graph, plan)
    key = jax.random.key(config.seed)
    small = prepared(setting, plan)
    cost = {k: int(v) for k, v in engine.cost(graph, plan)._asdict().items()} | dict(measured)
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
    budget: Budget,
    genomes: Sequence[np.ndarray],
    tuned: Sequence[Tuned],
    say: Callable[[str], None],
) -> Outcome:
    """Measure the frozen finalists, select and certify, measure on test once, and save."""
    config, subject, graph, roles = setting.config, setting.subject, setting.subject.graph, setting.roles
    whole = Tuned(
        "dense",
        engine.Plan(),
        subject.variables,
        subject.infer,
        None,
        {k: int(v) for k, v in engine.cost(graph, engine.Plan())._asdict().items()} | measured_dense(setting, budget),
    )
    measured = {}
    for each in (whole, *tuned):
        on_train, on_search = (measurer(each.infer, split)(each.variables)[1] for split in (roles.train, roles.search))
        measured[each.name] = Finalist(each.name, each.cost, on_train, on_search, each)
    dense, others = measured["dense"], [measured[each.name] for each in tuned]
    rule = WithinMargins(config.epsilon, config.eta, budget.measure)
    verdict = rule.select(others, dense, budget=budget.limits, clean=roles.clean)
    certificate = _certify(setting, budget, others, dense, verdict)
    selected = verdict.selected
    if certificate.valid and not budget.limits:
        selected = measured[certificate.selected]
    outcome = _outcome(verdict, certificate, bool(budget.limits))
    chosen: Tuned = selected.ref
    lines = []
    for finalist in (dense, *sorted(others, key=lambda f: -f.cost["params"])):
        each: Tuned = finalist.ref
        lines.append(
            report.Line(
                each.name,
                int(each.cost["params"]),
                int(each.cost["macs"]),
                1 - finalist.train_error,
                1 - finalist.search_error,
                1 - measurer(each.infer, roles.test)(each.variables)[1],
                selected=finalist is selected,
            )
        )
    records = [
        {
            "variant": f.name,
            "selected": f is selected,
            **{k: v for k, v in f.cost.items() if k != "size"},
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
        manifest=_manifest(setting, selected.name, outcome, lines, certificate),
        card=_card(setting, outcome, lines),
        module=subject.module,
    )
    report.show(lines)
    say(outcome["sentence"])
    say(f"saved {path}")
    return Outcome(tuple(lines), outcome["sentence"], path)


def _certify(
    setting: Setting, budget: Budget, finalists: Sequence[Finalist], dense: Finalist, verdict: Verdict
) -> Certificate:
    """The certificate, or why there is none; opens `certify` where it can say something."""
    config, roles = setting.config, setting.roles
    count, name = len(roles.certify), verdict.selected.name

    def none(reason: str) -> Certificate:
        return not_certified(name, reason, config.delta, count)

    if not config.certify:
        return none("certify was left closed")
    if not roles.clean:
        return none("it is unknown what the checkpoint was fitted on")
    least = smallest_margin(count, config.delta)
    if least > config.epsilon:
        return none(f"{count:,} images cannot show ε = {100 * config.epsilon:g} points, only {100 * least:.2g} or more")
    there = config.directory / "config.json"
    opened = claim_opening(
        config.directory.parent / "certify-openings.jsonl",
        roles.fingerprints["certify"],
        hashlib.sha256(there.read_bytes()).hexdigest(),
        str(config.directory),
    )
    if opened is not None:
        return none(f"these images were opened before, by {opened}, so that a claim from them would not hold its level")
    data = roles.certify
    margins = {"epsilon": config.epsilon, "eta": config.eta, "delta": config.delta}
    only = name if budget.limits else None

    def wrong(finalist: Finalist) -> np.ndarray:
        each: Tuned = finalist.ref
        answers = [jax.jit(each.infer)(each.variables, x) for x in batches(data, 250).images]
        return np.concatenate([np.asarray(a).argmax(-1) for a in answers])[:count] != data.labels

    return certify(finalists, dense, wrong, **margins, measure=budget.measure, only=only)


def _outcome(verdict: Verdict, certificate: Certificate, limited: bool) -> dict[str, Any]:
    """What the manifest says of the choice."""
    alone = certificate.valid and not limited
    return {
        "sentence": certificate.sentence if alone else f"{verdict.sentence} {certificate.sentence}",
        "passed": certificate.passed if alone else verdict.passed,
        "certified": certificate.valid and certificate.passed,
    }


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


def _manifest(
    setting: Setting,
    selected: str,
    outcome: Mapping[str, Any],
    lines: Sequence[report.Line],
    certificate: Certificate,
) -> dict[str, Any]:
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
        "selected": selected,
        "verdict": outcome,
        "certificate": asdict(certificate) | {"epsilon": config.epsilon, "eta": config.eta},
        "normalisation": {"mean": list(setting.mean), "std": list(setting.std)},
        "data": {"spec": config.data, "clean": roles.clean, "fingerprints": roles.fingerprints},
        "labels": list(roles.label_names),
        "seed": config.seed,
    }


def _card(setting: Setting, outcome: Mapping[str, Any], lines: Sequence[report.Line]) -> str:
    config = setting.config
    shape = ", ".join(map(str, setting.subject.spec.input_shape))
    return f"""# {config.model}, pruned

{outcome["sentence"]}

{report.markdown(lines)}

Accuracies are shares of right answers on the roles of `{config.data}`. `test` was never used for a choice: quote
that column. The gap is the accuracy lost from `train` to `search`, in points.

```python
from treesurgeon.engine import load

model = load("selected")
logits = model(x)   # x: float32 [N, {shape}], (image in 0..1 - mean) / std
```

mean {", ".join(map(str, setting.mean))}; std {", ".join(map(str, setting.std))}. `model.stablehlo` is the same function
without the code: `jax.export.deserialize(open("selected/model.stablehlo", "rb").read()).call(x)`.
"""
