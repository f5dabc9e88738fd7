"""The dense model, fine-tuned, as the teacher of the finalists."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from smallrun import small_config

from treesurgeon import engine
from treesurgeon.search import run
from treesurgeon.search.augment import AUGMENTATIONS
from treesurgeon.search.evaluate import answering, measurer
from treesurgeon.search.finalists import Pick, fine_tuned, variant
from treesurgeon.search.finetune import fit, objective
from treesurgeon.search.selection import PLAIN
from treesurgeon.search.setting import prepare
from treesurgeon.search.state import States
from treesurgeon.search.teaching import with_teacher


def silent(line):
    pass


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, 0.5), ({"baselines": False}, 0.0), ({"epochs": 0}, 0.0), ({"distill": 0.0}, 0.0), ({"distill": 0.3}, 0.3),
    ({"distill": 0.3, "baselines": False}, 0.3),
])  # fmt: skip
def test_when_it_teaches(tmp_path, changes, expected):
    assert prepare(small_config(tmp_path, **({"epochs": 2} | changes))).distill == expected


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_finalists_learn_its_answers(tmp_path, augment):
    opened = prepare(small_config(tmp_path, epochs=2, distill=0.7, augment=augment))
    ready = with_teacher(opened, States(tmp_path / "state"), silent)
    subject, train = opened.subject, opened.roles.train
    start = variant(ready, "v1", Pick("", engine.Plan({name: [0, 1, 5] for name in list(subject.graph.groups)[:1]})))
    found = fine_tuned(ready, start, silent)

    dense, apply = ready.teacher.params, engine.narrow(subject.train, subject.graph, start.plan)
    assert any(
        np.any(np.asarray(a) != np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, (dense, subject.variables)), strict=True)
    )
    data, given, more = {"x": train.images, "y": train.labels}, {}, {}
    if augment == "none":
        data["teacher"] = answering(subject.infer, train)(dense).logits
    else:
        given, more = {"dense": dense}, {"augment": AUGMENTATIONS[augment], "teacher": subject.infer}
    trainable = jax.tree.map(lambda _: True, start.variables)
    evaluate = measurer(start.infer, opened.roles.search)
    loss = objective(apply, distill=0.7, **more)
    by_hand = fit(loss, start.variables, trainable, data, opened.recipe, jax.random.key(0), evaluate, given=given)
    assert found.fitted.history == by_hand.history
    for ours, theirs in zip(jax.tree.leaves(found.variables), jax.tree.leaves(by_hand.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_it_is_fine_tuned_once_in_a_run(tmp_path):
    opened, said = prepare(small_config(tmp_path, epochs=2, distill=0.5)), []
    first = with_teacher(opened, States(tmp_path / "state"), said.append).teacher
    assert [line.split(" (")[0] for line in said[1:]] == ["trained dense fine-tuned"]
    again = with_teacher(opened, States(tmp_path / "state"), said.append).teacher
    assert len(said) == 3
    assert first.history == again.history
    assert first.history[0].train_loss is None
    assert first.best_epoch == again.best_epoch
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


@pytest.mark.parametrize(("rate", "best"), [(0.05, True), (1e4, False)])
def test_where_fine_tuning_makes_it_no_better_that_is_said(tmp_path, rate, best):
    setting, said = prepare(small_config(tmp_path, epochs=2, learning_rate=rate)), []
    teacher = with_teacher(setting, States(tmp_path / "state"), said.append).teacher
    assert (teacher.best_epoch > 0) == best
    assert said[-1].startswith("trained" if best else "fine-tuning made the dense model no better on search")


@pytest.mark.slow
def test_it_is_the_baseline_of_the_run(tmp_path):
    config, said = small_config(tmp_path, epochs=2, distill=0.5, generations=1, finalists=1), []
    outcome = run(config, said.append)
    fitted = [line.split(" (")[0] for line in said if line.startswith("trained ")]
    assert fitted[:2] == ["trained dense fine-tuned", "trained v1"]
    assert fitted.count("trained dense fine-tuned") == 1
    found = json.loads((outcome.path / "manifest.json").read_text())["metrics"]
    plain = run(replace(config, distill=0.0, out=str(tmp_path / "plain")), silent)
    others = json.loads((plain.path / "manifest.json").read_text())["metrics"]
    assert found[PLAIN] == others[PLAIN]
