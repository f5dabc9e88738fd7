"""Saved models: what goes in comes out, and what is damaged, foreign or newer is refused with a reason."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from treesurgeon import engine
from treesurgeon.engine import ArtifactError, ModelSpec, StructureError

SPEC = ModelSpec("digits_cnn", (8, 8, 1), {"stages": [[4, 4], [6]], "residual": [0, 5], "hidden": 9})
X = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    module = SPEC.build()
    fn, variables = engine.from_linen(module, module.init(jax.random.key(0), X))
    graph = engine.trace(fn, variables, X)
    first = next(name for name, group in graph.groups.items() if group.size > 3)
    plan = engine.Plan({first: np.array([0, 2])}, {next(iter(graph.blocks))})
    small = engine.cut(variables, graph, plan)
    path = engine.save(
        tmp_path_factory.mktemp("models") / "selected", SPEC, small, plan, manifest={"seed": 3}, card="# c"
    )
    return path, engine.narrow(fn, graph, plan)(small, X), small, plan


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


def edit(path, **entries):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **entries}))


def test_round_trip(made):
    path, expected, small, plan = made
    model = engine.load(path)
    np.testing.assert_allclose(model(X), expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.map(np.shape, model.variables) == jax.tree.map(np.shape, small)
    assert {k: v.tolist() for k, v in model.plan.keep.items()} == {k: v.tolist() for k, v in plan.keep.items()}
    assert model.plan.drop == plan.drop
    assert model.manifest["seed"] == 3
    assert (path / "README.md").read_text() == "# c"


def test_stablehlo_runs_without_the_model_and_has_a_gradient(made):
    path, expected, _, _ = made
    exported = export.deserialize(bytearray((path / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(exported.call(X), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(exported.call(X[:1]), expected[:1], rtol=1e-5, atol=1e-6)
    model = engine.load(path)
    slope = jax.grad(lambda x: exported.call(x).sum())(X)
    np.testing.assert_allclose(slope, jax.grad(lambda x: model(x).sum())(X), rtol=1e-4, atol=1e-6)


def test_training_goes_on_at_the_small_shapes(made):
    model = engine.load(made[0])
    y = jnp.arange(5)

    @jax.jit
    def step(variables, memory):
        def loss(params):
            out, updates = model.apply({**variables, "params": params}, X, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), updates

        (value, updates), slopes = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, memory = tx.update(slopes, memory)
        return {"params": optax.apply_updates(variables["params"], change), **updates}, memory, value

    tx = optax.sgd(0.1)
    variables, memory = model.variables, tx.init(model.variables["params"])
    values = []
    for _ in range(5):
        variables, memory, value = step(variables, memory)
        values.append(float(value))
    assert values[-1] < values[0]
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, model.variables)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables["batch_stats"], model.variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_a_loaded_model_can_be_pruned_again(made):
    model = engine.load(made[0])
    graph = engine.trace(model.apply, model.variables, X)
    name = next(iter(graph.groups))
    plan = engine.Plan({name: np.array([0])})
    small = engine.cut(model.variables, graph, plan)
    out = engine.narrow(model.apply, graph, plan)(small, X)
    gated = engine.gate(model.apply, graph)(model.variables, graph.masks(plan), X)
    np.testing.assert_allclose(out, gated, rtol=1e-4, atol=1e-5)


def test_nothing_is_overwritten_and_nothing_half_written(made, tmp_path):
    _, _, small, plan = made
    (tmp_path / "there").mkdir()
    with pytest.raises(ArtifactError, match="exists: nothing was written"):
        engine.save(tmp_path / "there", SPEC, small, plan)
    wrong = jax.tree.map(lambda x: x[..., :1], small)
    with pytest.raises(StructureError, match="do not fit"):
        engine.save(tmp_path / "new", SPEC, wrong, plan)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name", ["model.stablehlo", "README.md"])
def test_a_changed_file_is_refused(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=name):
        engine.load(copy)


def test_every_flipped_array_byte_is_refused(copy):
    data = [p for p in (copy / "variables").rglob("*") if p.is_file() and p.stat().st_size]
    assert data
    for path in data:
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(ArtifactError, match="changed"):
            engine.load(copy)
        path.write_bytes(whole)
    engine.load(copy)


def test_missing_and_added_files_are_refused(copy):
    (copy / "extra").write_text("x")
    with pytest.raises(ArtifactError, match="extra"):
        engine.load(copy)
    (copy / "extra").unlink()
    (copy / "model.stablehlo").unlink()
    with pytest.raises(ArtifactError, match=r"model\.stablehlo"):
        engine.load(copy)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 2}, "upgrade treesurgeon"),
        ({"format": "1"}, "format '1'"),
        ({"model": {}}, "lacks an entry"),
        ({"plan": 3}, "lacks an entry"),
        ({"files": {}}, "missing, added or changed"),
    ],
)
def test_manifests_that_do_not_fit(copy, entries, message):
    edit(copy, **entries)
    with pytest.raises(ArtifactError, match=message):
        engine.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '"format"', "\x00"])
def test_manifests_that_are_no_manifests(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError):
        engine.load(copy)


def test_missing_directory_and_missing_manifest(copy, tmp_path):
    with pytest.raises(ArtifactError, match="not a directory"):
        engine.load(tmp_path / "nowhere")
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        engine.load(copy)


def test_foreign_code_is_imported_only_when_allowed(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    edit(copy, model={**manifest["model"], "model": "treesurgeon.models:digits_cnn"})
    with pytest.raises(ArtifactError, match="allow_import=True"):
        engine.load(copy)
    assert engine.load(copy, allow_import=True)(X).shape == (5, 10)
    assert engine.load(copy, module=SPEC.build())(X).shape == (5, 10)
