"""The end of a run: the frozen finalists are measured, one is selected and certified, measured on `test`, and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search import contenders, crossval, formats, hosts, report
from treesurgeon.search.activity import Looked
from treesurgeon.search.budget import Budget, example, measured_dense
from treesurgeon.search.card import card
from treesurgeon.search.certificate import Certificate, Step, certify, not_certified, undominated, wilson
from treesurgeon.search.crossval import Estimate
from treesurgeon.search.evaluate import answering
from treesurgeon.search.exits import counterparts
from treesurgeon.search.frozen import alike, estimate, judged, loss, measure, reference, register
from treesurgeon.search.metrics import ACCURACY
from treesurgeon.search.openings import claim_opening
from treesurgeon.search.selection import Finalist, Verdict, WithinMargins
from treesurgeon.search.selective import write_selective
from treesurgeon.search.setting import Setting
from treesurgeon.search.space import Space
from treesurgeon.search.tasks import CLASSIFICATION
from treesurgeon.search.transfer import in_units
from treesurgeon.search.truncating import depth_of
from treesurgeon.search.tuning import Tuned, untouched

LOOKED = 500  # images of `search` on which units are looked at


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        lines: the table: dense, the finalists, the selected one marked.
        verdict: `sentence`, the selection in one; `passed`, by the numbers or by the tests; `certified`.
        path: the saved model.
        baselines: how they compare with the selected model on `test`, in one sentence; empty where there are none.
    """

    lines: tuple[report.Line, ...]
    verdict: Mapping[str, Any]
    path: Path
    baselines: str = ""

    @property
    def sentence(self) -> str:
        """The selection in one sentence."""
        return self.verdict["sentence"]


@dataclass(frozen=True)
class Conclusion:
    """What a run found, and what is to be saved of it.

    Attributes:
        outcome: what it found.
        selected: the name of the selected model.
        manifest, card: see `engine.save`.
    """

    outcome: Outcome
    selected: str
    manifest: Mapping[str, Any]
    card: str


def conclude(
    setting: Setting,
    space: Space,
    budget: Budget,
    genomes: Mapping[str, np.ndarray],
    tuned: Sequence[Tuned],
    say: Callable[[str], None],
) -> Conclusion:
    """Measure the frozen finalists, select and certify, train the baselines, measure on test once, and write tables."""
    config, roles, metric = setting.config, setting.roles, setting.config.judged_by
    extra = measured_dense(setting, budget)
    models = [replace(each, cost={**each.cost, **extra}) for each in (untouched(setting), reference(setting))]
    whole, against = models
    measured = {each.name: measure(setting, each) for each in (*{each.name: each for each in models}.values(), *tuned)}
    dense, others = measured[against.name], [measured[each.name] for each in tuned]
    rule = WithinMargins(
        config.epsilon,
        config.eta,
        config.gap_max,
        budget.measure,
        metric,
        alike=partial(alike, setting),
        loss=partial(loss, setting),
    )
    estimates = estimate(setting, against, tuned)
    if estimates:
        rule = replace(rule, where="in cross-validation")
    verdict = rule.select(*judged(others, dense, estimates), budget=budget.limits, clean=roles.clean)
    certificate = find_certificate(setting, budget, others, dense, verdict)
    selected = measured[certificate.selected if certificate.valid and not budget.limits else verdict.selected.name]
    outcome = _outcome(verdict, certificate, bool(budget.limits))
    if estimates:
        found = estimates.get(selected.name)
        outcome["sentence"] += " " + crossval.sentence(setting, found, selected.name, dense.title)
    chosen: Tuned = selected.ref
    trained = contenders.train(setting, chosen, whole, say)
    trained.pop(chosen.name, None)
    lines, results, on_test = [], [], {}
    everyone = [measured.pop("dense"), *sorted(measured.values(), key=lambda f: -f.cost["params"])]
    everyone = [f for f in everyone if f.name not in trained]
    for finalist in (*everyone, *(measure(setting, each) for each, _ in trained.values())):
        each: Tuned = finalist.ref
        on_test[each.name] = metric.observe(answering(each.infer, roles.test)(each.variables))
        line = report.Line(
            each.name,
            int(each.cost["params"]),
            int(each.cost["macs"]),
            metric.score(finalist.train_error),
            metric.score(finalist.search_error),
            metric.score(metric.error(on_test[each.name])),
            selected=finalist is selected,
            metric=metric,
        )
        lines.append(line)
        row = _result(line, each, {split: len(getattr(roles, split)) for split in report.SPLITS})
        wrong = finalist.search_error
        if metric is not ACCURACY:
            wrong = float(np.mean(answering(each.infer, roles.search)(each.variables).wrong))
        results.append(row | {"wrong": wrong})
    size = dense.cost["params"]
    contrasts = {
        name: contenders.contrast(metric, on_test[name], on_test[chosen.name], what, each.cost["params"] / size)
        for name, (each, what) in trained.items()
    }
    baselines = contenders.record(metric, chosen.name, chosen.cost["params"] / size, contrasts)
    records = [
        {
            "variant": f.name,
            "selected": f is selected,
            **{k: v for k, v in f.cost.items() if k != "size"},
            "metric": metric.name,
            "train_error": f.train_error,
            "search_error": f.search_error,
            "gap": f.gap,
            **({f"cv_{end}": getattr(estimates[f.name], end) for end in report.ENDS} if estimates else {}),
            "best_epoch": f.ref.fitted.best_epoch if f.ref.fitted else None,
            "reason": verdict.reasons[f.name],
            "description": (space.describe(genomes[f.name]) if f.ref.subject is setting.subject else depth_of(f.ref))
            + (f"; fine-tuned with {f.ref.policy}" if f.ref.policy else ""),
            "genome": genomes.get(f.name, ())[: len(space.groups) + len(space.blocks)],
        }
        for f in others
    ]
    report.write_front(config.directory / "front.csv", records)
    report.write_table(config.directory / "results.csv", report.RESULT_COLUMNS, results)
    report.write_table(
        config.directory / "curves.csv",
        report.CURVE_COLUMNS,
        _curves([*tuned, *(f.ref for f in everyone if f not in others), *(each for each, _ in trained.values())]),
    )
    report.write_table(
        config.directory / "certificate.csv", report.CERTIFICATE_COLUMNS, certificate_rows(certificate.steps)
    )
    if config.pictures and roles.task == CLASSIFICATION:
        write_selective(config.directory, looked_at(setting, chosen))
    forms = measure_formats(setting, chosen, whole, say)
    path = config.directory / "selected"
    return Conclusion(
        Outcome(tuple(lines), outcome, path, baselines["sentence"]),
        chosen.name,
        {
            **_manifest(setting, chosen, outcome, lines, certificate, estimates),
            "baselines": baselines,
            "reference": dense.name,
        },
        card(setting, outcome, lines, estimates, baselines["sentence"]) + formats.markdown(forms),
    )


def save(setting: Setting, tuned: Sequence[Tuned], found: Conclusion) -> None:
    """Save the selected model; all processes of a run take part in this."""
    chosen = {each.name: each for each in (untouched(setting), reference(setting), *tuned)}[found.selected]
    hosts.check_room(found.outcome.path.parent, chosen.variables)
    variables = in_units(chosen.subject, chosen.variables, setting.units) if setting.units else chosen.variables
    engine.save(
        found.outcome.path,
        chosen.subject.spec,
        variables,
        chosen.plan,
        manifest=found.manifest,
        card=found.card,
        module=chosen.subject.module,
    )


def looked_at(setting: Setting, model: Tuned) -> Looked:
    """A frozen model and some images of `search`."""
    search, count = setting.roles.search, LOOKED
    split = replace(search, images=search.images[:count], labels=search.labels[:count], indices=search.indices[:count])
    x = jax.ShapeDtypeStruct((1, *setting.subject.spec.input_shape), setting.subject.spec.input_dtype)
    graph = engine.trace(model.infer, model.variables, x)
    parts = split, tuple(setting.roles.label_names), setting.mean, setting.std
    return Looked(model.name, model.infer, model.variables, graph, *parts)


def measure_formats(setting: Setting, chosen: Tuned, whole: Tuned, say: Callable[[str], None]) -> list[formats.Form]:
    """What the selected model takes in every format, into `formats.csv` as well; nothing where it is the dense one."""
    config, subject = setting.config, setting.subject
    if not config.formats or (chosen.subject is whole.subject and chosen.plan == whole.plan):
        return []
    say(f"writing {chosen.name} in every format, and timing it beside dense (--no-formats leaves this out)")
    spec = {"input_shape": subject.spec.input_shape, "input_dtype": subject.spec.input_dtype}
    small, dense = (
        engine.Model(each.subject.module, each.variables, each.subject.graph, each.plan, {"model": spec})
        for each in (chosen, whole)
    )
    forms = formats.measure(small, dense, example(setting).astype(subject.spec.input_dtype), say)
    report.write_table(config.directory / "formats.csv", report.FORMAT_COLUMNS, [asdict(form) for form in forms])
    return forms


def find_certificate(
    setting: Setting, budget: Budget, finalists: Sequence[Finalist], dense: Finalist, verdict: Verdict
) -> Certificate:
    """The certificate, or why there is none; opens `certify` where it can say something.

    Variants that are not smaller than the dense model, and those that a smaller one beats on `search`, are not tested
    (see `certificate.undominated`).
    """
    config, roles = setting.config, setting.roles
    count, name, metric = len(roles.certify), verdict.selected.name, config.judged_by

    def none(reason: str) -> Certificate:
        return not_certified(name, reason, config.delta, count, metric)

    if not finalists or (budget.limits and verdict.selected.name == dense.name):
        return none("the dense model itself was chosen, so that there is nothing to test")
    if not config.certify:
        return none("certify was left closed")
    if not roles.clean:
        return none(roles.doubt)
    least = metric.smallest_margin(roles.certify.labels, config.delta)
    if least > config.epsilon:
        wanted, can = f"{metric.scale * config.epsilon:g} {metric.unit}", f"{metric.scale * least:.2g}"
        return none(f"{count:,} images cannot show ε = {wanted}, only {can} or more")
    only = name if budget.limits else None
    tested = finalists
    if not only:
        smaller = [each for each in finalists if each.cost[budget.measure] < dense.cost[budget.measure]]
        tested = undominated(smaller, dense, config.epsilon, config.eta, budget.measure, config.gap_max)
        if not tested:
            return none("no finalist is smaller than the dense model, so that there is nothing to test")
    opened = claim_opening(*register(setting, finalists), roles.certify.digests)
    if opened is not None:
        return none(f"{opened}, so that a claim from them would not hold its level")
    margins = {"epsilon": config.epsilon, "eta": config.eta, "gap_max": config.gap_max, "delta": config.delta}

    def observed(finalist: Finalist) -> Any:
        each: Tuned = finalist.ref
        return metric.observe(answering(each.infer, roles.certify)(each.variables))

    return certify(tested, dense, observed, **margins, measure=budget.measure, only=only, metric=metric)


def _outcome(verdict: Verdict, certificate: Certificate, limited: bool) -> dict[str, Any]:
    """What the manifest says of the choice. That the dense model is as good as itself is no claim to certify."""
    alone = certificate.valid and not limited
    return {
        "sentence": certificate.sentence if alone else f"{verdict.sentence} {certificate.sentence}",
        "passed": certificate.passed if alone else verdict.passed,
        "certified": any(step.passed and step.name == certificate.selected for step in certificate.steps),
    }


def recall(setting: Setting) -> Outcome:
    """The outcome of a run that is complete, from its manifest."""
    path = setting.config.directory / "selected"
    manifest = engine.load(path, module=setting.subject.module).manifest
    metric = setting.config.judged_by
    lines = [
        report.Line(
            name,
            found["params"],
            found["macs"],
            *(found[f"{role}_{metric.name}"] for role in ("train", "search", "test")),
            selected=name == manifest["selected"],
            metric=metric,
        )
        for name, found in manifest["metrics"].items()
    ]
    record = manifest.get("baselines", {"found": {}, "sentence": ""})  # older runs have none
    baselines = list(record["found"])
    lines.sort(key=lambda line: (line.variant in baselines, -line.params if line.variant not in baselines else 0))
    return Outcome(tuple(lines), manifest["verdict"], path, record["sentence"])


def _result(line: report.Line, model: Tuned, images: Mapping[str, int]) -> dict[str, Any]:
    """A row of results.csv: costs, and each score, an accuracy with its Wilson interval."""
    row: dict[str, Any] = {"variant": line.variant, "selected": line.selected, "gap": line.gap}
    row |= {name: value for name, value in model.cost.items() if name != "size"}
    row["bytes"] = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(model.variables))
    for split, count in images.items():
        share = getattr(line, split)
        low, high = wilson(share, count) if line.metric is ACCURACY else (None, None)
        row |= {split: share, f"{split}_low": low, f"{split}_high": high, f"{split}_images": count}
    return row


def _curves(tuned: Sequence[Tuned]) -> list[dict[str, Any]]:
    """The rows of curves.csv."""
    return [
        {
            "variant": each.name,
            "epoch": epoch.number,
            "train_loss": epoch.train_loss,
            "search_loss": epoch.search_loss,
            "search_error": epoch.search_error,
            "best": epoch.number == each.fitted.best_epoch,
            "judges": each.judges,
        }
        for each in tuned
        if each.fitted
        for epoch in each.fitted.history
    ]


def certificate_rows(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The rows of certificate.csv."""
    return [
        {
            "variant": step.name,
            "worse": step.worse,
            "better": step.better,
            "error_margin": step.margins[0],
            "gap_margin": step.margins[1],
            "error_p_value": step.p_values[0],
            "gap_p_value": step.p_values[1],
            "passed": step.passed,
        }
        for step in steps
    ]


def _left(whole: engine.Graph, part: engine.Graph) -> dict[str, dict[str, str]]:
    """What a model that is cut in depth still has: the names of the whole model, and those that it has there."""
    names = zip(("groups", "blocks"), counterparts(whole, part), strict=True)
    return {kind: {of: name for name, of in found.items()} for kind, found in names}


def _manifest(
    setting: Setting,
    chosen: Tuned,
    outcome: Mapping[str, Any],
    lines: Sequence[report.Line],
    certificate: Certificate,
    estimates: Mapping[str, Estimate],
) -> dict[str, Any]:
    config, roles, metric = setting.config, setting.roles, setting.config.judged_by
    graph, spec = chosen.subject.graph, chosen.subject.spec
    cross_validation = {
        "folds": crossval.fold_count(setting),
        "repeats": config.cv_repeats,
        "level": 1 - 2 * config.delta,
        "estimates": {name: asdict(found) for name, found in estimates.items()},
    }
    return {
        "metric": metric.name,
        "metrics": {
            line.variant: {
                "params": line.params,
                "macs": line.macs,
                f"train_{metric.name}": line.train,
                f"search_{metric.name}": line.search,
                f"test_{metric.name}": line.test,
                "gap": line.gap,
            }
            for line in lines
        },
        "selected": chosen.name,
        "verdict": outcome,
        "certificate": asdict(certificate) | {"epsilon": config.epsilon, "eta": config.eta, "gap_max": config.gap_max},
        "cross_validation": cross_validation if estimates else None,
        "normalisation": {"mean": list(setting.mean), "std": list(setting.std)},
        "data": {
            "spec": config.data,
            "clean": roles.clean,
            "fitted": None if setting.fitted is None else list(setting.fitted),
            "shares": list(config.shares),
            "unlabelled": config.unlabelled or None,
            "images": setting.images,
            "fingerprints": setting.fingerprints,
        },
        "task": roles.task.name,
        "units": asdict(setting.units) if setting.units else None,
        "labels": list(roles.label_names),
        "seed": config.seed,
        **({"head": asdict(setting.head)} if setting.head else {}),
        **({"left": {"at": spec.at, **_left(setting.subject.graph, graph)}} if spec.at else {}),
    }
