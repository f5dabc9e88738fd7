"""The road end to end, as a user walks it: by the command line, on a model of the user's own, killed and resumed."""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from orbax.checkpoint import v1 as ocp
from ownmodel import own_model

from treesurgeon import engine, models
from treesurgeon.engine import TreesurgeonError
from treesurgeon.models import ModelError
from treesurgeon.search import Config, RunError, open_source, run, split_roles
from treesurgeon.search.budget import Budget
from treesurgeon.search.cli import main
from treesurgeon.search.conclusion import find_certificate, register
from treesurgeon.search.config import Criterion
from treesurgeon.search.data import SHARES
from treesurgeon.search.latency import profile_plan
from treesurgeon.search.openings import claim_opening
from treesurgeon.search.pipeline import choices
from treesurgeon.search.ranking import rank
from treesurgeon.search.records import images_again, numbers, open_run
from treesurgeon.search.selection import Finalist, Verdict
from treesurgeon.search.setting import fingerprint, prepare
from treesurgeon.search.space import build
from treesurgeon.search.start import starting_points
from treesurgeon.search.subject import SubjectError, open_subject

MODEL = """
from flax import linen as nn


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        for i in range(2):
            h = nn.Conv(8, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(x + nn.BatchNorm(use_running_average=not training, name=f"bn{i}")(h))
        x = nn.relu(nn.Dense(16, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="head")(x)
"""

SMALL = [
    "--data", "digits", "--fitted-split", "train", "--population", "6", "--generations", "4", "--search-images", "48",
    "--calibration-images", "16", "--finalists", "2", "--epochs", "1", "--max-train", "200", "--no-formats",
    "--no-pictures",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model of the user's own and an Orbax checkpoint of it."""
    home = tmp_path_factory.mktemp("user")
    own_model(home, MODEL, (8, 8, 1))
    return home


# The command line, which sends itself a signal as soon as it prints a line that starts so.
STRUCK = """
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
start, number, show = sys.argv.pop(1), int(sys.argv.pop(1)), print
def say(text="", *rest, **more):
    show(text, *rest, **more)
    if str(text).startswith(start):
        os.kill(os.getpid(), number)
builtins.print = say
from treesurgeon.search.cli import main
main()
"""


def command(
    place: Path,
    out: str,
    *more: str,
    model: str = "mine:Tiny",
    checkpoint: str = "checkpoint",
    struck: tuple[str, int] | None = None,
):
    arguments = ["search", "--model", model, "--checkpoint", checkpoint, "--out", out, *SMALL, *more]
    start = ["-m", "treesurgeon.search.cli"] if struck is None else ["-c", STRUCK, struck[0], str(int(struck[1]))]
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        cwd=place,
        env={
            **os.environ,
            "TFDS_DATA_DIR": str(place / "tfds"),
            "PYTHONUNBUFFERED": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)  # a safety net, not a measure: others may be at work
    return process.returncode, out, err


def contents(out: Path) -> dict:
    """What a run found, bit for bit: variables, plan, metrics, tables."""
    manifest = json.loads((out / "selected/manifest.json").read_text())
    return {
        "variables": fingerprint(ocp.load(str(out / "selected/variables"))),
        "manifest": {k: v for k, v in manifest.items() if k != "files"},
        "tables": [(out / f"{name}.csv").read_text() for name in ("candidates", "front", "results", "curves")],
    }


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run."""
    code, out, err = finish(command(place, "whole"))
    assert code == 0, err
    return place / "whole", out


def test_run_selects_saves_and_reports(place, whole):
    run_dir, out = whole
    assert re.search(r"^variant +params +MACs +train +search +test +gap$", out, re.M)
    assert "generation   4/4" in out
    with (run_dir / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 4
    assert {row["generation"] for row in rows} == {"0", "1", "2", "3"}


def test_a_run_leaves_all_that_a_report_needs(whole):
    run_dir, out = whole
    assert f"wrote {run_dir / 'report.html'}" in out
    found = open_run(run_dir)
    metrics = found.manifest["metrics"]
    for row in found.tables["results"]:
        named = metrics[row["variant"]]
        assert int(row["params"]) == named["params"]
        assert float(row["test"]) == named["test_accuracy"]
        assert float(row["test_low"]) < named["test_accuracy"] < float(row["test_high"])
        assert int(row["test_images"]) == found.manifest["data"]["images"]["test"]
    assert int(found.dense["bytes"]) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(ocp.load(str(run_dir.parent / "checkpoint")))
    )
    finalists = {row["variant"] for row in found.tables["front"]}
    curves = found.tables["curves"]
    trained = sorted(set(found.baselines) - {"linear probe"})
    assert [row["variant"] for row in curves if row["best"] == "True"] == [*sorted(finalists), *trained]
    assert {"dense fine-tuned", "dense from scratch", "linear probe"} <= set(found.baselines)
    assert found.manifest["baselines"]["sentence"] in out
    assert found.shift["sentence"] in out
    assert {row["epoch"] for row in curves} == {"0", "1"}
    searched = [(i, row) for i, row in enumerate(found.tables["groups"]) if row["widths"]]
    undropped = 0
    for row in found.tables["candidates"]:
        kept, genome = numbers(row["kept"]), numbers(row["genome"])
        assert all(k <= int(group["size"]) for k, group in zip(kept, found.tables["groups"], strict=True))
        if all(genome[len(searched) :]):  # no ties
            undropped += 1
            levels = [(kept[i], numbers(group["widths"])) for i, group in searched]
            assert all(k == widths[gene] for (k, widths), gene in zip(levels, genome, strict=False))
    assert undropped
    assert sum(row["searched"] == "True" for row in found.tables["blocks"]) == len(genome) - len(searched)
    assert found.environment["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, "Verified: "),
        ({"test_accuracy": 0.5}, 1, "the manifest says 50.00%"),
        ({"params": 1}, 1, "the manifest says 1"),
        ({"macs": 2}, 1, "the manifest says 2"),
        ({"seed": 5}, 1, "other test images"),
        ({"seed": None}, 2, "does not say 'seed'"),
    ],
)
def test_verify_compares_with_the_manifest(place, whole, tmp_path, monkeypatch, capsys, changes, code, words):
    monkeypatch.setenv("TFDS_DATA_DIR", str(place / "tfds"))
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    shutil.copytree(whole[0] / "selected", tmp_path / "elsewhere")
    path = tmp_path / "elsewhere/manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in changes.items():
        within = manifest if name == "seed" else manifest["metrics"][manifest["selected"]]
        within[name] = value
    if changes.get("seed", 0) is None:
        del manifest["seed"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as caught:
        main(["verify", str(path.parent), "--data", "digits", "--allow-import"])
    assert (caught.value.code if caught else 0) == code
    assert words in "".join(capsys.readouterr())


def test_what_reads_a_selected_model_deals_the_images_out_as_its_run_did(place, whole):
    selected = whole[0] / "selected"
    manifest = json.loads((selected / "manifest.json").read_text())
    assert manifest["data"]["shares"] == list(SHARES)
    for shares in (SHARES, (0.5, 0.1, 0.1, 0.3)):
        roles = split_roles(open_source("digits", place / "tfds"), ("train",), shares=shares)
        manifest["data"]["shares"] = shares
        for role in ("search", "test"):
            again = images_again(manifest, role, "digits", str(place / "tfds"))
            np.testing.assert_array_equal(again.indices, getattr(roles, role).indices)
            np.testing.assert_array_equal(again.images, getattr(roles, role).images)
    del manifest["data"]["shares"]  # a model of before they could be chosen
    assert (
        images_again(manifest, "test", "digits", str(place / "tfds")).fingerprint
        == (manifest["data"]["fingerprints"]["test"])
    )


def test_the_outcome_as_json(place, whole):
    code, out, err = finish(command(place, "whole", "--json"))
    assert code == 0, err
    assert "this run is complete" in err
    found = json.loads(out)
    manifest = json.loads((whole[0] / "selected/manifest.json").read_text())
    assert found["verdict"] == manifest["verdict"]
    assert {m["variant"]: m["test"] for m in found["models"]} == {
        name: entry["test_accuracy"] for name, entry in manifest["metrics"].items()
    }
    assert [m["variant"] for m in found["models"] if m["selected"]] == [manifest["selected"]]


def test_selected_model_scores_as_the_manifest_says_in_another_process(place, whole, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(place / "tfds"))
    run_dir, _ = whole
    roles = split_roles(open_source("digits"), ("train",))
    np.savez(place / "test.npz", x=roles.test.images, y=roles.test.labels)
    script = (
        "import numpy as np\n"
        "from treesurgeon.engine import load\n"
        f"model = load({str(run_dir / 'selected')!r}, allow_import=True)\n"
        "data = np.load('test.npz')\n"
        "print((np.asarray(model(data['x'])).argmax(-1) == data['y']).mean())\n"
        "print(model.manifest['metrics'][model.manifest['selected']]['test_accuracy'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=True)
    measured, claimed = map(float, done.stdout.split())
    assert measured == pytest.approx(claimed, abs=1e-12)


def test_killed_runs_go_on_bit_for_bit(place, whole):
    code, _, _ = finish(command(place, "killed", struck=("generation   2/", signal.SIGKILL)))
    assert code == -signal.SIGKILL
    code, out, err = finish(command(place, "killed"))
    assert code == 0, err
    assert "resumed after generation" in out
    assert contents(place / "killed") == contents(whole[0])


@pytest.mark.slow
def test_interrupted_runs_say_how_to_go_on(place, whole):
    code, _, err = finish(command(place, "interrupted", struck=("generation   1/", signal.SIGINT)))
    assert code == 130
    assert f"saved in {place / 'interrupted'}: run the same command again" in err
    assert "Traceback" not in err
    code, _, err = finish(command(place, "interrupted"))
    assert code == 0, err
    assert contents(place / "interrupted") == contents(whole[0])


KILLS = 50


def unfinished(out: Path) -> set[str]:
    """What is being written in a run's directory: files and directories that still have a name for the moment."""
    found = [*out.glob(".*"), *out.glob("state/*tmp*")]
    return {path.name for path in found if path.name != ".lock"}


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_undisturbed(place):
    """By turns after a random time, and while something is being written; whenever it ends, the result is the same."""
    quick = ["--no-baselines"]
    finish(command(place, "undisturbed-first", *quick))  # compiles
    start = time.monotonic()
    code, _, err = finish(command(place, "undisturbed", *quick))
    assert code == 0, err
    lasts, want, out = time.monotonic() - start, contents(place / "undisturbed"), place / "disturbed"
    assert want == contents(place / "undisturbed-first")
    draw, killed, writing, ended = random.Random(0), 0, 0, 0

    def ends(code: int, err: str) -> bool:
        if code == -signal.SIGKILL:
            return False
        assert code == 0, err
        assert contents(out) == want
        assert not unfinished(out)
        shutil.rmtree(out)
        return True

    while killed < KILLS:
        process, moment = command(place, out.name, *quick), time.monotonic() + draw.uniform(0, lasts)
        seen, before = unfinished(out), draw.randrange(4)  # how many writes it may finish
        while process.poll() is None and (killed % 2 or time.monotonic() < moment):
            new = unfinished(out) - seen
            seen |= new
            if killed % 2 and new and (before := before - len(new)) < 0:
                break
            time.sleep(0.001)
        process.kill()
        writing += killed % 2 and bool(unfinished(out))
        done = ends(*finish(process)[::2])
        ended, killed = ended + done, killed + (not done)
    code, _, err = finish(command(place, out.name, *quick))
    assert ends(code, err)
    print(f"{killed} kills of runs of {lasts:.0f} s, {writing} with something half written; {ended + 1} runs ended")
    assert writing > KILLS // 8


def test_a_complete_run_is_shown_again(place, whole, monkeypatch):
    before = contents(whole[0])
    code, out, err = finish(command(place, "whole"))
    assert code == 0, err
    assert "complete" in out
    assert out.splitlines()[-12:] == whole[1].splitlines()[-12:]  # the table, the sentences, the place
    assert contents(whole[0]) == before


def test_command_line_errors_take_one_screen_and_exit_with_2(place, whole):
    code, _, err = finish(command(place, "whole", "--seed", "1"))
    assert code == 2
    assert "another configuration" in err
    assert "seed: there 0, now 1" in err
    assert len(err.splitlines()) < 25
    assert "Traceback" not in err


# --- bad input: clear, at once, nothing written ---------------------------------------------------------------------


def config(place, **changes):
    given = {
        "model": "digits_cnn",
        "checkpoint": str(place / "zoo"),
        "data": "digits",
        "out": str(place / "out-of-nothing"),
        "data_dir": str(place / "tfds"),
        **changes,
    }
    return Config(**given)


@pytest.fixture(scope="module")
def zoo(place):
    module = models.resolve("digits_cnn")
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    ocp.save(str(place / "zoo"), jax.tree.map(np.asarray, variables))
    broken = jax.tree.map(np.array, variables)
    broken["params"]["linear"]["bias"][0] = np.nan
    ocp.save(str(place / "nan"), broken)
    return place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet57"}, "resnet57"),
        ({"model": "nowhere.at_all:Net"}, "no module named"),
        ({"checkpoint": "absent.safetensors"}, "absent.safetensors"),
        ({"checkpoint": "checkpoint"}, "expected"),
        ({"checkpoint": "nan"}, "linear/bias"),
        ({"data": "tfds:not_prepared"}, "not_prepared"),
        ({"data": "npz:absent.npz"}, "absent.npz"),
        ({"data": "npz:labels.npz"}, "class '0' has no image in train"),
        ({"data": "npz:labels.npz", "head": "keep"}, "labels 0 to 9"),
        ({"data": "npz:shape.npz"}, r"\[8, 8, 1\]"),
        ({"data": "npz:empty.npz"}, "no images|empty"),
        ({"fitted_split": ("training",)}, "--fitted-split"),
        ({"macs": 1e-9}, "cannot be met"),
        ({"macs": -1.0}, "--macs"),
        ({"delta": 0.0}, "--delta"),
        ({"eta": 0.0}, "--eta 0.0: expected more than 0"),
        ({"gap_max": 0.0}, "--gap-max 0.0: expected more than 0"),
        ({"latency": -1.0}, "--latency"),
        ({"activation_bytes": 1e-9}, "--activation-bytes: .* cannot be met"),
        ({"population": 1}, "--population"),
        ({"protect": ("layer9",)}, "layer9"),
        ({"criterion": "l3"}, "l3"),
        ({"metric": "f2"}, "--metric f2: expected one of accuracy"),
        ({"metric": "f1", "data": "npz:lacking.npz"}, "--metric f1: class '3' has no image in search"),
        ({"cv_folds": 1}, "--cv-folds"),
        ({"freeze": ("stage9",)}, "--freeze stage9: no parameter's path"),
        ({"layer_decay": 2.0}, "--layer-decay"),
        ({"source_data": "npz:absent.npz"}, "absent.npz"),
        ({"source_data": "npz:shape.npz"}, r"\[8, 8, 1\]"),
    ],
)
def test_bad_input(zoo, monkeypatch, changes, message):
    monkeypatch.chdir(zoo)
    rng = np.random.default_rng(0)
    x, more, y = *rng.random((2, 200, 8, 8, 1), np.float32), np.arange(200) % 10
    np.savez("labels.npz", x_train=x, y_train=y + 1, x_test=more, y_test=y)
    np.savez("shape.npz", x_train=x[:, 1:], y_train=y, x_test=more[:, 1:], y_test=y)
    np.savez("lacking.npz", x_train=x, y_train=y, x_test=more[y != 3], y_test=y[y != 3])
    np.savez("empty.npz", x_train=x[:0], y_train=y[:0], x_test=x[:0], y_test=y[:0])
    given = config(zoo, **changes)
    with pytest.raises((TreesurgeonError, ModelError), match=message) as caught:
        run(given, lambda _: None)
    assert len(str(caught.value).splitlines()) < 30
    assert not Path(given.out).exists()


class Counting(nn.Module):
    """Knows how many images there are only when they are there."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1))


class Rows(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(-1, x.shape[-1]))


class Silent(nn.Module):
    @nn.compact
    def __call__(self, x):
        if x.shape[1] != 9:
            raise AssertionError  # it says nothing
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class AnyNumber(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def test_models_take_any_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "theirs", sys.modules[__name__])
    for name, words in (
        ("Counting", r"does not take images of shape \[8, 8, 1\] in any number.*x.shape\[0\] or -1, not len\(x\)"),
        ("Silent", "does not take images of shape .*: AssertionError: AssertionError; where it needs"),
        ("Rows", r"expected logits \[N, classes\] for N images, got \(64\*n, 10\)"),
    ):
        with pytest.raises(SubjectError, match=words):
            open_subject(f"theirs:{name}", "nowhere", (8, 8, 1))
    ocp.save(tmp_path / "c", AnyNumber().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    assert open_subject("theirs:AnyNumber", str(tmp_path / "c"), (8, 8, 1)).num_classes == 10


def test_a_directory_that_is_not_a_run_is_left_alone(zoo):
    there = zoo / "taken"
    there.mkdir()
    (there / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        run(config(zoo, out=str(there)), lambda _: None)
    assert [p.name for p in there.iterdir()] == ["thesis.tex"]


# --- parts ----------------------------------------------------------------------------------------------------------


def test_momenta_are_read_off_the_update(zoo):
    subject = prepare(config(zoo)).subject
    stats = {path for path in subject.graph.leaves if path.startswith("batch_stats/")}
    assert set(subject.momenta) == stats
    assert set(np.round(list(subject.momenta.values()), 6)) == {0.9}


def test_reestimated_statistics_are_those_of_the_batch(zoo):
    setting = prepare(config(zoo))
    subject = setting.subject
    x = setting.roles.train.images[:64]
    found = engine.reestimate(subject.train, subject.momenta)(subject.variables, x, jax.random.key(0))
    kernel = subject.variables["params"]["stage1_0"]["conv"]
    first = nn.Conv(16, (3, 3), padding=1, use_bias="bias" in kernel).apply({"params": kernel}, x)
    stats = found["batch_stats"]["stage1_0"]["bn"]
    np.testing.assert_allclose(stats["mean"], first.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], first.var((0, 1, 2)), rtol=1e-4, atol=1e-5)
    assert found["params"] == subject.variables["params"]


def test_the_command_line_offers_every_criterion():
    assert get_args(Criterion) == tuple(engine.CRITERIA)


@pytest.mark.slow
def test_every_criterion_ranks_the_units(zoo):
    setting = prepare(config(zoo))
    sizes = {name: (group.size,) for name, group in setting.subject.graph.groups.items()}
    found = {}
    for criterion in engine.CRITERIA:
        found[criterion] = rank(setting, criterion)
        assert {name: score.shape for name, score in found[criterion].items()} == sizes
        assert all(np.isfinite(score).all() for score in found[criterion].values())
        if criterion != "norm_scale":  # the scales of an untrained net are all 1
            assert all(np.ptp(score) > 0 for score in found[criterion].values())
    orders = {name: np.argsort(np.concatenate(list(scores.values()))).tolist() for name, scores in found.items()}
    assert len(set(map(tuple, orders.values()))) == len(orders)


def test_starting_points_within_the_budget_come_first(zoo):
    setting = prepare(config(zoo, macs=0.5))
    graph = setting.subject.graph
    budget = Budget(graph, setting.budget, engine.cost(graph, engine.Plan())._asdict(), {})
    space = build(graph, {name: np.ones(group.size) for name, group in graph.groups.items()})

    def costs_of(genomes):
        return {"macs": np.array([engine.cost(graph, space.to_plan(genome)).macs for genome in genomes])}

    path = space.seeds()[::-1]
    costs = costs_of(starting_points(setting.config, space, budget, path, path[:1], costs_of))["macs"]
    fits = [cost <= setting.budget["macs"] for cost in costs]
    assert any(fits)
    assert fits == sorted(fits, reverse=True)


@pytest.mark.slow
def test_a_budget_on_what_is_measured(place, monkeypatch):
    """Peak memory stands in for latency: it is measured and predicted in the same way, and does not depend on load."""
    more = "--epsilon", "0.3", "--eta", "0.9", "--protect", "none", "--shortlist", "3", "--finalists", "1"
    code, out, err = finish(command(place, "measured/memory", "--memory", "0.85", "--epochs", "0", *more))
    assert code == 0, err
    assert "memory predicted from 16 measured plans" in out
    assert "within the budget (memory" in out
    with (place / "measured/memory/front.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 1
    monkeypatch.syspath_prepend(str(place))
    setting = prepare(
        Config("mine:Tiny", str(place / "checkpoint"), "digits", data_dir=str(place / "tfds"), fitted_split=("train",))
    )
    subject, x = setting.subject, setting.roles.train.images[:32]
    found = engine.load(place / "measured/memory/selected", module=subject.module)
    whole, cut = (
        profile_plan(subject.infer, subject.graph, subject.variables, plan, x, 1).memory
        for plan in (engine.Plan(), found.plan)
    )
    assert cut <= 0.85 * whole
    certificate = found.manifest["certificate"]
    assert certificate["valid"]
    assert [step["name"] for step in certificate["steps"]] == [found.manifest["selected"]]  # the best within the budget
    assert found.manifest["verdict"]["certified"] == certificate["passed"]
    (record,) = map(json.loads, (place / "measured/certify-openings.jsonl").read_text().splitlines())
    assert record["certify"] == setting.roles.fingerprints["certify"]
    code, _, err = finish(command(place, "no-memory", "--memory", "0.01", "--protect", "none"))
    assert code == 2
    assert "--memory: the budget of" in err


@pytest.mark.parametrize("why", ["left closed", "opened before", "overlap", "nothing to test", "cannot show"])
def test_what_is_not_certified_and_why(zoo, tmp_path, why):
    changes = {"left closed": {"certify": False}, "cannot show": {"epsilon": 0.001}}.get(why, {})
    setting = prepare(config(zoo, **{"epsilon": 0.3, "out": str(tmp_path / "run"), **changes}))
    budget = Budget(setting.subject.graph, {}, {}, {})
    dense, small = Finalist("dense", {"params": 2}, 0.1, 0.1), Finalist("v1", {"params": 1}, 0.1, 0.1)
    if why in ("opened before", "overlap"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text("{}")
        openings = tmp_path / "certify-openings.jsonl"
        theirs = setting.roles if why == "opened before" else prepare(config(zoo, seed=1)).roles
        claim_opening(openings, theirs.fingerprints["certify"], "another", "runs/other", theirs.certify.digests)
        if why == "overlap":
            ours, others = ({x.tobytes() for x in roles.certify.images} for roles in (setting.roles, theirs))
            assert ours & others
            why = f"{len(ours & others)} of these {len(ours)} images were opened before"
    finalists = [] if why == "nothing to test" else [small]
    found = find_certificate(setting, budget, finalists, dense, Verdict(small, True, {}, ""))
    assert not found.valid
    assert why in found.sentence


def test_other_finalists_make_another_run_and_larger_ones_are_not_tested(zoo, tmp_path):
    setting = prepare(config(zoo, epsilon=0.3, out=str(tmp_path / "run")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    dense, small = Finalist("dense", {"params": 2}, 0.1, 0.1), Finalist("v1", {"params": 1}, 0.1, 0.1)
    large = Finalist("t1", {"params": 3}, 0.1, 0.1)
    _, _, first, _ = register(setting, [small])
    assert first == register(setting, [small])[2] != register(setting, [replace(small, search_error=0.2)])[2]
    timed = replace(setting, config=replace(setting.config, latency=5.0))
    times = {register(timed, [replace(small, cost={"params": 1, "latency": each})])[2] for each in (4.27, 4.31)}
    assert len(times) == 1  # it is measured again where a run is repeated
    budget = Budget(setting.subject.graph, {}, {}, {})
    found = find_certificate(setting, budget, [large], dense, Verdict(large, True, {}, ""))
    assert (found.valid, found.steps) == (False, ())
    assert "no finalist is smaller than the dense model" in found.sentence
    assert not (tmp_path / "certify-openings.jsonl").exists()


def test_choices_are_said_with_their_flags(zoo):
    setting = prepare(config(zoo, epochs=3))
    judged, tuned = choices(setting)
    assert judged == "judged by accuracy (--metric)"
    assert tuned.startswith("finalists are fine-tuned for 3 epochs in batches of ")
    roles = setting.roles.map(lambda split: replace(split, labels=np.arange(len(split)) % 10 // 9))
    judged = choices(replace(setting, roles=roles))[0]
    assert "; classes have " in judged
    assert "balanced_accuracy" in judged
    assert len(choices(prepare(config(zoo, epochs=0)))) == 1


@pytest.mark.slow
def test_cross_validation_where_certify_is_too_small_and_another_metric(place, monkeypatch):
    more = "--metric", "cross_entropy", "--epsilon", "0.04", "--eta", "9", "--cv-repeats", "2", "--no-baselines"
    code, out, err = finish(command(place, "crossed", *more))
    assert code == 0, err
    assert "nats can be certified" in out
    assert "will take the certificate's place" in out
    assert "metric: cross_entropy" in out
    manifest = json.loads((place / "crossed/selected/manifest.json").read_text())
    assert manifest["metric"] == manifest["certificate"]["metric"] == "cross_entropy"
    assert not manifest["verdict"]["certified"]
    assert not manifest["certificate"]["valid"]
    sentence = manifest["verdict"]["sentence"]
    assert "cannot show ε = 0.04 nats" in sentence
    assert "5-fold cross-validation, 2 times" in sentence
    assert "no certificate" in sentence
    found = manifest["cross_validation"]["estimates"]
    assert all(len(each["epochs"]) == 10 for each in found.values())
    with (place / "crossed/front.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert {row["metric"] for row in rows.values()} == {"cross_entropy"}
    within = {"dense"} | {name for name, row in rows.items() if float(row["cv_difference"]) <= 0.04}
    assert manifest["selected"] in within
    sizes = {name: each["params"] for name, each in manifest["metrics"].items()}
    assert sizes[manifest["selected"]] == min(sizes[name] for name in within)
    card = (place / "crossed/selected/README.md").read_text()
    assert "**Not certified.**" in card
    assert "Cross-entropies are means in nats" in card
    openings = [json.loads(line) for line in (place / "certify-openings.jsonl").read_text().splitlines()]
    assert str(place / "crossed") in [record["where"] for record in openings]  # another run cannot certify with these
    before = contents(place / "crossed")
    code, _, err = finish(command(place, "crossed-again", *more))
    assert code == 0, err
    assert contents(place / "crossed-again") == before
