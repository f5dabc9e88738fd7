"""The end of a run: the frozen finalists are measured, one is selected and certified, measured on `test`, and saved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search import report
from treesurgeon.search.budget import Budget, measured_dense
from treesurgeon.search.certificate import (
    Certificate,
    Step,
    certify,
    claim_opening,
    not_certified,
    smallest_margin,
    wilson,
)
from treesurgeon.search.evaluate import batches, measurer
from treesurgeon.search.finalists import Tuned
from treesurgeon.search.selection import Finalist, Verdict, WithinMargins
from treesurgeon.search.setting import Setting
from treesurgeon.search.space import Space


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        lines: the table: dense, the finalists, the selected one marked.
        verdict: `sentence`, the selection in one; `passed`, by the numbers or by the tests; `certified`.
        path: the saved model.
    """

    lines: tuple[report.Line, ...]
    verdict: Mapping[str, Any]
    path: Path

    @property
    def sentence(self) -> str:
        """The selection in one sentence."""
        return self.verdict["sentence"]


def conclude(
    setting: Setting,
    space: Space,
    budget: Budget,
    genomes: Sequence[np.ndarray],
    tuned: Sequence[Tuned],
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
    certificate = find_certificate(setting, budget, others, dense, verdict)
    selected = verdict.selected
    if certificate.valid and not budget.limits:
        selected = measured[certificate.selected]
    outcome = _outcome(verdict, certificate, bool(budget.limits))
    chosen: Tuned = selected.ref
    lines, results = [], []
    for finalist in (dense, *sorted(others, key=lambda f: -f.cost["params"])):
        each: Tuned = finalist.ref
        line = report.Line(
            each.name,
            int(each.cost["params"]),
            int(each.cost["macs"]),
            1 - finalist.train_error,
            1 - finalist.search_error,
            1 - measurer(each.infer, roles.test)(each.variables)[1],
            selected=finalist is selected,
        )
        lines.append(line)
        results.append(_result(line, each, {split: len(getattr(roles, split)) for split in report.SPLITS}))
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
    report.write_table(config.directory / "results.csv", report.RESULT_COLUMNS, results)
    report.write_table(config.directory / "curves.csv", report.CURVE_COLUMNS, _curves(tuned))
    report.write_table(
        config.directory / "certificate.csv", report.CERTIFICATE_COLUMNS, certificate_rows(certificate.steps)
    )
    path = engine.save(
        config.directory / "selected",
        subject.spec,
        chosen.variables,
        chosen.plan,
        manifest=_manifest(setting, selected.name, outcome, lines, certificate),
        card=_card(setting, outcome, lines),
        module=subject.module,
    )
    return Outcome(tuple(lines), outcome, path)


def find_certificate(
    setting: Setting, budget: Budget, finalists: Sequence[Finalist], dense: Finalist, verdict: Verdict
) -> Certificate:
    """The certificate, or why there is none; opens `certify` where it can say something."""
    config, roles = setting.config, setting.roles
    count, name = len(roles.certify), verdict.selected.name

    def none(reason: str) -> Certificate:
        return not_certified(name, reason, config.delta, count)

    if not finalists or (budget.limits and verdict.selected is dense):
        return none("the dense model itself was chosen, so that there is nothing to test")
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


def recall(setting: Setting) -> Outcome:
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
    return Outcome(tuple(lines), manifest["verdict"], path)


def _result(line: report.Line, model: Tuned, images: Mapping[str, int]) -> dict[str, Any]:
    """A row of results.csv: costs, and each accuracy with its Wilson interval."""
    row: dict[str, Any] = {"variant": line.variant, "selected": line.selected, "gap": line.gap}
    row |= {name: value for name, value in model.cost.items() if name != "size"}
    row["bytes"] = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(model.variables))
    for split, count in images.items():
        share = getattr(line, split)
        low, high = wilson(share, count)
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
        "data": {
            "spec": config.data,
            "clean": roles.clean,
            "fitted": None if setting.fitted is None else list(setting.fitted),
            "images": {role: len(getattr(roles, role)) for role in roles.fingerprints},
            "fingerprints": roles.fingerprints,
        },
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
