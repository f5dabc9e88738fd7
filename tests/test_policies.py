"""Several ways to fine-tune, of which every model keeps the one that suits it."""

import csv
from dataclasses import replace

import jax
import numpy as np
import pytest
from smallrun import small_config

from treesurgeon import engine
from treesurgeon.search import RunError, run
from treesurgeon.search.config import Config
from treesurgeon.search.crossval import cross_validate, pool
from treesurgeon.search.evaluate import answering
from treesurgeon.search.finalists import Pick, fine_tuned, variant
from treesurgeon.search.policy import overruled
from treesurgeon.search.setting import prepare
from treesurgeon.search.state import States
from treesurgeon.search.teaching import with_teacher
from treesurgeon.search.tuning import best_tuned, tune

HARMFUL, HELPFUL = "learning-rate=0.0001", "learning-rate=0.1,weight-decay=0"


def test_what_a_policy_says():
    config = Config("m", "c", "d", policies=("a", "b"))
    found = overruled(config, "freeze=2+stem, layer-decay=0.5,optimizer=adamw,patience=3,augment=flip,clip=0")
    changes = {"freeze": ("2", "stem"), "layer_decay": 0.5, "optimizer": "adamw", "patience": 3, "augment": "flip"}
    assert found == replace(config, policies=(), clip=0.0, **changes)


@pytest.mark.parametrize(("policy", "message"), [
    ("epochs=3", "'epochs' is none of freeze, layer-decay"), ("freeze", "freeze = '': expected levels or paths"),
    ("layer-decay=half", "layer-decay = 'half': expected a number"), ("", "'' is none of"),
    ("layer-decay=2", "--layer-decay above 0 and at most 1"), ("patience=1.5", "expected a whole number"),
    ("optimizer=adam", "expected one of sgd, adamw"), ("augment=cutout", "expected one of none, flip"),
    ("freeze=99", "--freeze 99"), ("freeze=nowhere", "nowhere"),
])  # fmt: skip
def test_what_it_cannot_say(tmp_path, policy, message):
    with pytest.raises(RunError, match=message):
        prepare(small_config(tmp_path, epochs=1, policies=(policy,)))


def test_the_one_that_is_best_on_search_is_kept(tmp_path):
    setting = prepare(
        small_config(tmp_path, epochs=2, learning_rate=0.001, policies=(HARMFUL, HELPFUL, "augment=flip"))
    )
    setting = with_teacher(setting, States(tmp_path / "state"), lambda line: None)
    start, said = variant(setting, "v1", Pick("", engine.Plan())), []
    found = fine_tuned(setting, start, said.append)
    each = {name: tune(one, start, lambda line: None, distill=0.5, policy=one.policy)
            for name, one in setting.tries.items()}  # fmt: skip
    merits = [one.fitted.merit for one in each.values()]
    assert list(each) == ["", HARMFUL, HELPFUL, "augment=flip"]
    assert merits.index(min(merits)) == 2
    assert (found.name, found.policy, found.fitted.merit) == ("v1", HELPFUL, min(merits))
    jax.tree.map(np.testing.assert_array_equal, found.variables, each[HELPFUL].variables)
    assert [line.split(" (")[0] for line in said[:2]] == ["trained v1", "trained v1"]
    assert said[-1] == f"v1: {HELPFUL} did best of 4 ways to fine-tune it (--policies)"


def test_among_equals_the_options_as_given(tmp_path):
    setting = prepare(small_config(tmp_path, epochs=1, policies=("clip=5.0", "layer-decay=1")))
    start = variant(setting, "v1", Pick("", engine.Plan()))
    assert best_tuned(setting, start, lambda line: None).policy == ""


def test_a_cross_validation_repeats_the_choice_among_them(tmp_path):
    setting = prepare(small_config(tmp_path, epochs=1, learning_rate=0.001, policies=(HELPFUL,)))
    start = variant(setting, "v1", Pick("", engine.Plan()))
    note = answering(start.infer, pool(setting))
    found = best_tuned(setting, start, lambda line: None, note=note)
    assert len(found.trail) == 4  # two ways, before and after an epoch
    given = {"folds": 2, "repeats": 1, "seed": 0, "delta": 0.05}
    estimate = cross_validate(found.trail, note(start.variables), setting.config.judged_by, **given)
    assert set(estimate.epochs) == {3}


@pytest.mark.slow
def test_a_run_says_which(tmp_path):
    said = []
    run(small_config(tmp_path, epochs=1, generations=1, learning_rate=0.001, policies=(HELPFUL,)), said.append)
    assert any(f"tried as well, with the better one kept: {HELPFUL}" in str(line) for line in said)
    assert any(str(line).startswith(f"dense fine-tuned: {HELPFUL} did best of 2 ways") for line in said)
    with (tmp_path / "run" / "front.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["variant"].startswith("v")]
    assert all(row["description"].endswith(f"; fine-tuned with {HELPFUL}") for row in rows)
