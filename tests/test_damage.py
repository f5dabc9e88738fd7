"""Damaged checkpoints, manifests and runs: an error of ours each time, or what was meant; never a hang.

Bits are flipped, pieces cut off, moved, doubled and blanked, files swapped, JSON values replaced. Where a format has
checksums (what `save` writes, PyTorch's zip archives) what is read is what was written, or nothing. safetensors,
msgpack, PyTorch's older files and Orbax have none for numbers: there a flipped bit of a weight is another weight, and
what is promised is names, shapes, types, and that all numbers are finite.
"""

import json
import random
import shutil
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from jsontrees import replaced
from orbax.checkpoint import v1 as ocp
from rundir import make_run
from safetensors.numpy import save_file
from torchfiles import names_of_torch, pickled, zipped

from treesurgeon import engine, models
from treesurgeon.engine import TreesurgeonError
from treesurgeon.models import ModelError
from treesurgeon.search.compare import Comparison, compare
from treesurgeon.search.insight import Insight, insight
from treesurgeon.search.page import write_page
from treesurgeon.search.verify import Verification, verify

SHAPE, SECONDS = (2, 3, 1), 60
MODULE = models.mlp((7, 5), num_classes=3)
VARIABLES = jax.tree.map(np.asarray, MODULE.init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32)))
TEMPLATE = jax.eval_shape(lambda: VARIABLES)
FLAT = {name: np.asarray(value) for name, value in flatten_dict(VARIABLES, sep="/").items()}
OURS = (TreesurgeonError, ModelError)


@contextmanager
def at_once():
    """Fails where something hangs; far more time than any of it takes."""

    def late(*_):
        raise SystemExit(f"no answer for {SECONDS} s")  # which nobody catches on the way

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def as_orbax(home):
    ocp.save(str(home / "x"), VARIABLES)
    return home / "x"


def as_safetensors(home):
    save_file(FLAT, home / "x.safetensors")
    return home / "x.safetensors"


def as_msgpack(home):
    (home / "x.msgpack").write_bytes(serialization.to_bytes(VARIABLES))
    return home / "x.msgpack"


def as_zip(home):
    with names_of_torch():
        zipped(home / "x.pth", FLAT)
    return home / "x.pth"


def as_old_pickle(home):
    with names_of_torch():
        (home / "x.pth").write_bytes(pickled(FLAT))
    return home / "x.pth"


WRITERS = {each.__name__[3:]: each for each in (as_orbax, as_safetensors, as_msgpack, as_zip, as_old_pickle)}


def damaged(data, draw):
    """Bytes with something done to them."""
    data = bytearray(data)
    size, kind = len(data), draw.choice(("flip", "flip", "flip", "cut", "blank", "move", "double", "noise", "number"))
    if not size:
        return b"\x00"
    a, b = sorted((draw.randrange(size), draw.randrange(size)))
    b = min(b, a + draw.choice((1, 8, 64, size)))
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.choice((draw.randrange(size), draw.randrange(min(size, 256))))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[a : draw.choice((b, size))]
    elif kind == "blank":
        data[a:b] = bytes(b - a)
    elif kind == "move":
        piece = data[a:b]
        del data[a:b]
        at = draw.randrange(len(data) + 1)
        data[at:at] = piece
    elif kind == "double":
        data[a:a] = data[a:b]
    elif kind == "noise":
        data[a:b] = draw.randbytes(b - a)
    else:  # what may be a length
        data[a : a + 8] = struct.pack("<q", draw.choice((-1, 0, 1, 2**31, 2**40, 2**62)))
    return bytes(data)


def damage(path, draw):
    """Do something to a file, or to one of a directory; and sometimes swap two, or leave one out."""
    if path.is_file():
        path.write_bytes(damaged(path.read_bytes(), draw))
        return
    files = sorted(p for p in path.rglob("*") if p.is_file())
    one, other = draw.choice(files), draw.choice(files)
    kind = draw.choice(("inside",) * 6 + ("swap", "leave out", "copy", "empty"))
    if kind == "inside":
        one.write_bytes(damaged(one.read_bytes(), draw))
    elif kind == "swap":
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
    elif kind == "leave out":
        one.unlink()
    elif kind == "copy":
        other.write_bytes(one.read_bytes())
    else:
        one.write_bytes(b"")


def copy(source, target):
    if target.is_dir():
        shutil.rmtree(target)
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target))


def try_checkpoints(tmp_path, kind, count, seed):
    """Damage one that many times; returns how often it was told."""
    source, draw, messages = WRITERS[kind](tmp_path), random.Random(seed), []
    for _ in range(count):
        path = copy(source, tmp_path / f"y{source.suffix}")
        damage(path, draw)
        try:
            with at_once():
                found = models.load_checkpoint(path, MODULE, TEMPLATE)
        except ModelError as error:
            messages.append(str(error))
            continue
        assert jax.tree.structure(found) == jax.tree.structure(TEMPLATE)
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(TEMPLATE), strict=True):
            assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
            assert np.isfinite(leaf).all()
        if kind == "zip":  # which has checksums
            jax.tree.map(np.testing.assert_array_equal, found, VARIABLES)
    for message in messages:
        assert str(path) in message
        assert len(message) < 4000
    return len(messages)


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_checkpoints(tmp_path, kind):
    source = WRITERS[kind](tmp_path)
    jax.tree.map(np.testing.assert_array_equal, models.load_checkpoint(source, MODULE, TEMPLATE), VARIABLES)
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    count = 8 if kind == "orbax" else 100
    assert try_checkpoints(tmp_path, kind, count, 0) >= count // 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_many_damaged_checkpoints(tmp_path, kind):
    count = 300 if kind == "orbax" else 3000
    assert try_checkpoints(tmp_path, kind, count, 1) > count // 5


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    graph = engine.trace(MODULE.apply, VARIABLES, np.zeros((1, *SHAPE), np.float32))
    plan = engine.Plan({"dense0": np.array([0, 2, 5]), "dense1": np.array([1, 3])})
    spec = engine.ModelSpec("mlp", SHAPE, {"widths": [7, 5], "num_classes": 3})
    path = tmp_path_factory.mktemp("run") / "selected"
    return engine.save(path, spec, engine.cut(VARIABLES, graph, plan), plan, manifest={"metrics": {"a": 1}})


def try_models(selected, tmp_path, count, seed):
    x = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    want, draw, told = engine.load(selected)(x), random.Random(seed), 0
    for i in range(count):
        path = copy(selected, tmp_path / "y")
        if i % 3:
            damage(path / "manifest.json" if i % 3 == 1 else path, draw)
        else:
            manifest = json.loads((path / "manifest.json").read_text())
            part = draw.choice(("model", "plan", "files", "format", "digest"))
            (path / "manifest.json").write_text(json.dumps({**manifest, part: replaced(manifest[part], draw)}))
        try:
            with at_once():
                np.testing.assert_array_equal(engine.load(path)(x), want)
        except OURS:
            told += 1
    return told


def test_a_saved_model_is_itself_or_refused(selected, tmp_path):
    assert try_models(selected, tmp_path, 30, 0) > 15


@pytest.mark.slow
def test_a_saved_model_is_itself_or_refused_many_times(selected, tmp_path):
    assert try_models(selected, tmp_path, 1500, 1) > 750


def try_reports(home, count, seed):
    """Damage what a report is made of; it is made, or what is wrong is told."""
    source, draw, told = make_run(home / "run", transfer=True), random.Random(seed), 0
    files = [p for p in source.rglob("*") if p.is_file()]
    for i in range(count):
        run = copy(source, home / "y")
        name = draw.choice(("selected/manifest.json",) * 3 + ("config.json", "environment.json", "shift.json"))
        if i % 2:
            content = replaced(json.loads((run / name).read_text()), draw)
            (run / name).write_text(json.dumps(content))
        else:
            path = run / draw.choice(files).relative_to(source)
            path.write_bytes(damaged(path.read_bytes(), draw))
        try:
            with at_once():
                write_page(run)
                compare(Comparison((run,)), str)
        except OURS:
            told += 1
    return told


def test_reports_of_damaged_runs(tmp_path):
    assert try_reports(tmp_path, 15, 0) > 4


@pytest.mark.slow
def test_reports_of_many_damaged_runs(tmp_path):
    assert try_reports(tmp_path, 1000, 1) > 250


@pytest.mark.slow
def test_what_else_reads_a_manifest(selected, tmp_path):
    """`verify` and `insight` of a manifest of which anything may be something else."""
    x, y = np.random.default_rng(0).random((90, *SHAPE), np.float32), np.arange(90) % 3
    np.savez(tmp_path / "d.npz", x=x, y=y)
    path = copy(selected, tmp_path / "y")
    whole = json.loads((path / "manifest.json").read_text()) | {
        "selected": "v1", "metric": "accuracy", "labels": ["a", "b", "c"], "seed": 0,
        "metrics": {"v1": {"params": 1, "macs": 1, "test_accuracy": 0.5}},
        "normalisation": {"mean": [0.0], "std": [1.0]},
        "data": {"spec": "npz:d.npz", "fitted": [], "fingerprints": {"test": "f"}, "images": {"test": 9}},
    }  # fmt: skip
    draw, told = random.Random(0), 0
    for _ in range(60):
        part = draw.choice(("selected", "metric", "labels", "seed", "metrics", "normalisation", "data"))
        (path / "manifest.json").write_text(json.dumps({**whole, part: replaced(whole[part], draw)}))
        for command in (
            lambda: verify(Verification(path, f"npz:{tmp_path}/d.npz"), str),
            lambda: insight(Insight(str(path), f"npz:{tmp_path}/d.npz", out=str(tmp_path / "i"), images=20), str),
        ):
            try:
                with at_once():
                    command()
            except OURS:
                told += 1
    assert told > 20
