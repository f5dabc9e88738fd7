"""Saved models: round trips, what they compute, training on, and every way in which a directory can be wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import export
from laws import arr, draw, leaves_of, random_plan
from subjects import variables_spec

from treesurgeon import engine, models
from treesurgeon.engine import ArtifactError, ModelSpec, Plan, StructureError

KWARGS = {"num_classes": 4, "stages": [[4, 4], [6], [6, 6]], "residual": [0, 5, 4], "hidden": 9, "dropout": 0.2}
SPEC = ModelSpec("digits_cnn", (8, 8, 1), KWARGS)
MODULE = models.resolve("digits_cnn", **KWARGS)
VARIABLES = draw(variables_spec(MODULE, arr(1, *SPEC.input_shape)), 0, np.float32)
X = np.random.default_rng(1).normal(size=(5, 8, 8, 1)).astype(np.float32)
FN, _ = engine.from_linen(MODULE, VARIABLES)
GRAPH = engine.trace(FN, VARIABLES, X[:1])
PLAN = random_plan(GRAPH, 4, least=2, drop=0.6)
SMALL = engine.cut(VARIABLES, GRAPH, PLAN)
WANT = np.asarray(jax.jit(engine.narrow(FN, GRAPH, PLAN))(SMALL, X))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "selected"
    assert PLAN.drop
    return engine.save(path, SPEC, SMALL, PLAN, manifest={"metrics": {"acc": 0.9}, "format": 99}, card="# A card\n")


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "selected"))


def edit_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_round_trip(saved):
    model = engine.load(saved)
    mine, his = leaves_of(model.variables), leaves_of(SMALL)
    assert mine.keys() == his.keys()
    assert all(np.array_equal(mine[k], his[k]) and mine[k].dtype == his[k].dtype for k in his)
    np.testing.assert_allclose(model(X), WANT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model(X[:2]), WANT[:2], rtol=1e-5, atol=1e-6)
    assert {k: v.tolist() for k, v in model.plan.keep.items()} == {k: v.tolist() for k, v in PLAN.keep.items()}
    assert model.plan.drop == PLAN.drop
    assert model.manifest["metrics"] == {"acc": 0.9}
    assert model.manifest["format"] == 1
    assert (saved / "README.md").read_text() == "# A card\n"


def test_load_in_another_process(saved):
    program = "import sys, numpy as np; from treesurgeon.engine import load; x = np.load(sys.argv[2]); " + (
        "np.save(sys.argv[3], load(sys.argv[1])(x))"
    )
    np.save(saved.parent / "x.npy", X)
    paths = [str(saved), str(saved.parent / "x.npy"), str(saved.parent / "y.npy")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    np.testing.assert_allclose(np.load(paths[2]), WANT, rtol=1e-5, atol=1e-6)


def test_stablehlo_runs_without_the_model(saved):
    data = (saved / "model.stablehlo").read_bytes()
    assert b".py" not in data  # it tells nothing of the machine that it was made on
    call = export.deserialize(data).call
    for n in (1, 3, 5):
        np.testing.assert_allclose(call(X[:n]), WANT[:n], rtol=1e-5, atol=1e-5)
    model = engine.load(saved)
    mine = jax.grad(lambda x: call(x).sum())(X)
    np.testing.assert_allclose(mine, jax.grad(lambda x: model(x).sum())(X), rtol=1e-4, atol=1e-5)


def test_training_goes_on(saved):
    model = engine.load(saved)
    labels = np.arange(5) % 4
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(variables, state, key):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, X, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], change), **updates}, state, value

    variables, state, losses = model.variables, optimizer.init(model.variables["params"]), []
    shapes = jax.tree.map(np.shape, variables)
    for i in range(12):
        variables, state, value = step(variables, state, jax.random.key(i))
        losses.append(float(value))
    assert jax.tree.map(np.shape, variables) == shapes
    assert min(losses[-3:]) < losses[0]
    again = engine.save(saved.parent / "further", SPEC, variables, model.plan)
    np.testing.assert_allclose(engine.load(again)(X), model.apply(variables, X), rtol=1e-4, atol=1e-5)


def test_nothing_is_overwritten(saved):
    before = sorted(p.name for p in saved.parent.iterdir())
    with pytest.raises(ArtifactError, match="exists: nothing was written"):
        engine.save(saved, SPEC, SMALL, PLAN)
    with pytest.raises(StructureError):
        engine.save(saved.parent / "other", SPEC, VARIABLES, PLAN)
    assert sorted(p.name for p in saved.parent.iterdir()) == before


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        engine.save(tmp_path / "m", SPEC, SMALL, PLAN, manifest={"bad": object()})
    assert list(tmp_path.iterdir()) == []


class Odd(nn.Module):
    """A state of its own that no checkpoint holds."""

    state: Any

    @nn.compact
    def __call__(self, x):
        self.variable("own", "state", lambda: self.state)
        return nn.Dense(2)(nn.relu(nn.Dense(3)(x)))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (jax.random.key(0), "own/state is a PRNG key, which cannot be saved: save jax.random.key_data of it"),
        (np.zeros((0, 3), "f"), r"own/state has no elements \(its shape is \(0, 3\)\), which cannot be saved"),
    ],
)
def test_leaves_that_cannot_be_saved_are_named(tmp_path, state, message):
    module = Odd(state)
    variables = module.init(jax.random.key(0), np.ones((1, 5), "f"))
    with pytest.raises(ArtifactError, match=message):
        engine.save(tmp_path / "m", engine.ModelSpec("own:Odd", (5,), {}), variables, engine.Plan(), module=module)
    assert list(tmp_path.iterdir()) == []


# Directories that are wrong.


def flip_a_byte(path):
    victim = max((p for p in (path / "variables").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "1 files are missing, added or changed since it was saved"),
        (lambda p: (p / "model.stablehlo").unlink(), r"\(model.stablehlo\): copy the directory again"),
        (lambda p: (p / "extra").write_text("x"), r"changed since it was saved \(extra\)"),
        (lambda p: (p / "README.md").write_text("better"), r"\(README.md\)"),
        (lambda p: shutil.rmtree(p / "variables"), "files are missing"),
        (lambda p: (p / "manifest.json").unlink(), "has no manifest.json: it is not a saved model"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "format None; this version reads up to 2"),
        (lambda p: edit_manifest(p, lambda m: m.update(format=3)), "format 3; this version reads up to 2: upgrade"),
        (lambda p: edit_manifest(p, lambda m: m.update(format="1")), "format '1'"),
        (lambda p: edit_manifest(p, lambda m: m.pop("plan")), "lacks an entry or has one of another kind: KeyError"),
        (lambda p: edit_manifest(p, lambda m: m.update(model=3)), "has one of another kind: TypeError"),
        (lambda p: edit_manifest(p, lambda m: m["plan"].update(keep=[])), "another kind: AttributeError"),
        (shutil.rmtree, "is not a directory: pass the `selected/` directory of a run"),
    ],
)  # fmt: skip
def test_damage(copy, damage, message):
    damage(copy)
    with pytest.raises(ArtifactError, match=message):
        engine.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["plan"]["keep"].update({next(iter(m["plan"]["keep"])): [0]}), "do not fit|ties group"),
        (lambda m: m["plan"].update(drop=["nowhere"]), "'nowhere', which is not there"),
        (lambda m: m["plan"]["keep"].update({next(iter(m["plan"]["keep"])): [3, 1]}), "must be sorted"),
        (lambda m: m["model"]["kwargs"].update(num_classes=5), "do not fit"),
    ],
)
def test_a_manifest_that_was_tampered_with(copy, change, message):
    edit_manifest(copy, change)
    with pytest.raises(engine.ArtifactError, match=r"its model or plan was changed since|one of another kind"):
        engine.load(copy)
    edit_manifest(copy, lambda m: m.pop("digest"))
    with pytest.raises(engine.TreesurgeonError, match=message):
        engine.load(copy)


class Tiny(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(self.width)(x)))


def test_a_model_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nfrom test_checkpoint import Tiny\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    spec = ModelSpec("elsewhere:Tiny", (3,), {"width": 5})
    module = Tiny(5)
    variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    fn, params = engine.from_linen(module, variables)
    x = np.ones((2, 3), np.float32)
    graph = engine.trace(fn, params, x)
    plan = Plan({next(iter(graph.groups)): [0, 4]})
    small = engine.cut(params, graph, plan)
    path = engine.save(tmp_path / "m", spec, small, plan, module=module)
    with pytest.raises(ArtifactError, match=r"built by elsewhere:Tiny, which is not part of treesurgeon: pass module="):
        engine.load(path)
    assert not (tmp_path / "imported").exists(), "loading ran code that the directory names"
    want = engine.narrow(fn, graph, plan)(small, x)
    np.testing.assert_allclose(engine.load(path, module=module)(x), want, rtol=1e-5)
    np.testing.assert_allclose(engine.load(path, allow_import=True)(x), want, rtol=1e-5)
    assert (tmp_path / "imported").exists()


def test_from_linen_unboxes_and_passes_arguments():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False, scale=1.0):
            w = self.param("w", nn.with_partitioning(nn.initializers.ones, ("a", "b")), (3, 2))
            return x @ w * scale * (2 if train else 1)

    variables = Boxed().init(jax.random.key(0), jnp.ones((1, 3)))
    fn, params = engine.from_linen(Boxed(), variables, train=True)
    assert type(params) is dict
    assert leaves_of(params)["params/w"].shape == (3, 2)
    x = np.ones((1, 3), np.float32)
    assert np.asarray(fn(params, x)).tolist() == [[6, 6]]
    assert np.asarray(fn(params, x, train=False, scale=0.5)).tolist() == [[1.5, 1.5]]


def test_a_plain_number_is_saved(tmp_path):
    module = Odd(3)
    variables = module.init(jax.random.key(0), np.ones((1, 5), "f"))
    engine.save(tmp_path / "m", ModelSpec("own:Odd", (5,), {}), variables, Plan(), module=module)
    assert int(engine.load(tmp_path / "m", module=module).variables["own"]["state"]) == 3
