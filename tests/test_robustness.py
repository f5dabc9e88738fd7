"""What goes wrong around a run: two processes at once, Ctrl-C twice, full disks, damaged files."""

import contextlib
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jsontrees import replaced

from treesurgeon import engine, models
from treesurgeon.engine import ArtifactError, ModelSpec, Plan, TreesurgeonError
from treesurgeon.models import ModelError
from treesurgeon.search import Config, RunError
from treesurgeon.search.cli import main
from treesurgeon.search.config import claim
from treesurgeon.search.lock import alone
from treesurgeon.search.openings import claim_opening
from treesurgeon.search.state import States

KWARGS = {"widths": [6, 5], "num_classes": 3}
SPEC = ModelSpec("mlp", (2, 2, 1), KWARGS)


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    module = models.resolve("mlp", **KWARGS)
    variables = module.init(jax.random.key(0), np.zeros((1, 2, 2, 1), np.float32))
    fn, params = engine.from_linen(module, variables)
    graph = engine.trace(fn, params, np.zeros((1, 2, 2, 1), np.float32))
    plan = Plan({"dense0": [0, 2, 5]})
    return engine.save(tmp_path_factory.mktemp("run") / "selected", SPEC, engine.cut(params, graph, plan), plan)


@contextlib.contextmanager
def files_of_at_most(size):
    """As a full disk does, but for the number of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_is_held_by_one(tmp_path):
    (tmp_path / "config.json").touch()
    refused = pytest.raises(RunError, match=r"another process is at work on the run in .*choose another --out")
    with alone(tmp_path), refused, alone(tmp_path):
        pass
    with alone(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_two_processes_do_not_share_a_run(tmp_path):
    (tmp_path / "config.json").touch()
    program = (
        "import sys, time; from pathlib import Path; from treesurgeon.search.lock import alone\n"
        "with alone(Path(sys.argv[1])):\n    print('here', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        with (
            pytest.raises(RunError, match=r"another process is at work on the run in .*choose another --out"),
            alone(tmp_path),
        ):
            pass
        other.kill()
    with alone(tmp_path):  # a process that is killed lets go
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    halves = [".candidates.csv.123", ".report.html.9", ".depth.png.77", "state/000001.orbax-checkpoint-tmp-5/x",
              ".selected.ab_c1234/variables/d"]  # fmt: skip
    ours = ["config.json", "candidates.csv", ".notes.markdown", ".gitignore", "state/000001/x", "selected/README.md"]
    for name in [*halves, *ours]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with alone(tmp_path):
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*ours}


def test_a_run_that_was_killed_before_it_had_its_configuration_begins(tmp_path):
    config = Config("mlp", "checkpoint", "digits", out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.json").write_text("{")
    claim(config, {"model": "mlp"})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once():
    program = (
        "import atexit, time; from treesurgeon.search import cli\n"
        "atexit.register(time.sleep, 600)\n"
        "cli._stop('stopped; finished generations are saved')"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        assert [process.stderr.readline() for _ in range(2)][
            1
        ] == "treesurgeon: stopped; finished generations are saved\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("limit", "where", "words"),
    [
        (None, "file/m", r"treesurgeon: (File exists|Not a directory): .*/file; choose another place"),
        (100, "m", "treesurgeon: File too large: a file; files may not be that large here"),
    ],
)
def test_places_that_cannot_be_written(selected, tmp_path, capsys, limit, where, words):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught, files_of_at_most(limit) if limit else contextlib.nullcontext():
        main(["export", str(selected), "--to", "msgpack", "--out", str(tmp_path / where)])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert re.search(words, err), err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_states_and_models_that_cannot_be_written(selected, tmp_path):
    model = engine.load(selected)
    states = States(tmp_path / "state")
    states.save(1, {"a": np.arange(3)})
    big = {"a": np.random.default_rng(0).normal(size=100_000)}
    with files_of_at_most(1000):
        with pytest.raises(RunError, match=r"000002 cannot be written .*run the same command again to go on"):
            states.save(2, big)
        with pytest.raises(ArtifactError, match="cannot be written"):
            engine.save(tmp_path / "copy", SPEC, model.variables, model.plan)
    assert np.asarray(states.latest({"a": np.zeros(3, int)})["a"]).tolist() == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state"]


def test_damaged_states_registers_and_configurations(tmp_path):
    states = States(tmp_path / "state")
    states.arrays("descent", lambda: {"path": np.arange(2)})
    assert states.arrays("descent", dict)["path"].tolist() == [0, 1]
    states.save(1, {"a": np.arange(3)})
    for wrong in ({"a": np.zeros(2, int)}, {"a": np.zeros(3, int), "b": np.zeros(3)}):
        with pytest.raises(RunError, match="000001 holds the state of another search: move"):
            states.latest(wrong)
    for file in (tmp_path / "state/descent").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\x00" * 8)
    with pytest.raises(RunError, match="descent cannot be read"):
        states.arrays("descent", dict)

    register = tmp_path / "certify-openings.jsonl"
    assert claim_opening(register, "f", "a", "runs/a", [1, 2]) is None
    line = register.read_text()
    for damage in (line[:20], "[]\n", '{"certify": "f"}\n', line.replace('"images": "', '"images": "A')):
        register.write_text(damage)
        with pytest.raises(RunError, match="the register of images that were opened, cannot be read"):
            claim_opening(register, "f", "b", "runs/b", [1, 2])

    config = Config("m", "c", "d", out=str(tmp_path / "run"))
    claim(config, {"model": "m"})
    for damage in ("{", "[1]", "3", "[" * 100_000, "\udcff"):
        (tmp_path / "run/config.json").write_text(damage, errors="surrogateescape")
        with pytest.raises(RunError, match=r"config\.json cannot be read"):
            claim(config, {"model": "m"})


def test_manifests_that_were_changed_are_an_error_of_ours_or_mean_the_same(selected, tmp_path):
    path = Path(shutil.copytree(selected, tmp_path / "m"))
    whole = json.loads((path / "manifest.json").read_text())
    del whole["digest"]  # which would notice all of it
    draw, failed, x = random.Random(0), 0, np.ones((2, 2, 2, 1), np.float32)
    want = engine.load(selected)(x)
    for part in ["model", "plan"] * 20 + ["format", "files"] * 5:
        (path / "manifest.json").write_text(json.dumps({**whole, part: replaced(whole[part], draw)}))
        try:
            model = engine.load(path)
        except (TreesurgeonError, ModelError):
            failed += 1
        else:
            np.testing.assert_allclose(model(x), want, rtol=1e-5)
    assert failed > 30


def test_bytes_of_a_manifest_that_were_changed(selected, tmp_path):
    path = Path(shutil.copytree(selected, tmp_path / "m"))
    whole, rng = (path / "manifest.json").read_bytes(), np.random.default_rng(0)
    for i in range(30):
        data = bytearray(whole[: rng.integers(len(whole) - 3)] if i % 3 == 0 else whole)
        if i % 3:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (path / "manifest.json").write_bytes(data)
        with contextlib.suppress(TreesurgeonError, ModelError):
            engine.load(path)
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
        engine.load(path)
