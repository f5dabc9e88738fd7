"""What `treesurgeon export` writes, read back by the tools it is for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from jax import export as jax_export
from laws import arr, draw, leaves_of
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open
from safetensors.numpy import load_file
from subjects import MODELS, variables_spec

from treesurgeon import engine, models
from treesurgeon.engine import ArtifactError, ModelSpec, Plan
from treesurgeon.engine.onnx import to_onnx
from treesurgeon.search import RunError
from treesurgeon.search.cli import main
from treesurgeon.search.exporting import WRITERS, Export, export, size

KWARGS = {"num_classes": 4, "stages": [[4], [6]], "residual": [4, 0], "hidden": 9}
SPEC = ModelSpec("digits_cnn", (8, 8, 1), KWARGS)
X = np.random.default_rng(1).normal(size=(5, 8, 8, 1)).astype(np.float32)
MANIFEST = {"selected": "v1", "labels": list("abcd"), "metrics": {"v1": {"params": 7}, "dense": {"params": 9}}}


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    module = models.resolve("digits_cnn", **KWARGS)
    variables = draw(variables_spec(module, arr(1, *SPEC.input_shape)), 0, np.float32)
    graph = engine.trace(engine.from_linen(module, variables)[0], variables, X[:1])
    plan = Plan({"stage2_0/conv": [0, 2, 3], "dense0": range(0, 9, 2)}, frozenset({"stage1_res"}))
    path = tmp_path_factory.mktemp("run") / "selected"
    return engine.save(path, SPEC, engine.cut(variables, graph, plan), plan, manifest=MANIFEST)


@pytest.fixture(scope="module")
def model(selected):
    return engine.load(selected)


def write(selected, path, to, **more):
    said = []
    out = export(Export(selected, to, path, **more), said.append)
    assert out == path
    assert said == [f"wrote {path}: {size(path):,} bytes"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing beside it
    return path


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]))


def test_stablehlo_with_and_without_its_derivative(selected, model, tmp_path):
    (tmp_path / "a").mkdir()
    plain = jax_export.deserialize(bytearray(write(selected, tmp_path / "a/m", "stablehlo").read_bytes()))
    assert plain.platforms == ("cpu", "cuda", "tpu")
    for count in (1, 5):
        np.testing.assert_allclose(plain.call(X[:count]), model(X[:count]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="No VJP is available"):
        jax.grad(lambda x: plain.call(x).sum())(X)
    with_vjp = write(selected, tmp_path / "b/m", "stablehlo", gradient=True)
    assert with_vjp.stat().st_size > (tmp_path / "a/m").stat().st_size
    call = jax_export.deserialize(bytearray(with_vjp.read_bytes())).call
    mine, his = (jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(X) for f in (call, model))
    np.testing.assert_allclose(mine, his, rtol=1e-4, atol=1e-5)


def test_weights_as_safetensors(selected, model, tmp_path):
    path = write(selected, tmp_path / "m.safetensors", "safetensors")
    assert_same(load_file(path), leaves_of(model.variables))
    with safe_open(path, framework="numpy") as file:
        found = json.loads(file.metadata()["treesurgeon"])
    assert found["plan"] == model.manifest["plan"]
    assert found["model"]["model"] == "digits_cnn"
    assert (found["labels"], found["metrics"]) == (list("abcd"), {"params": 7})


def test_weights_as_msgpack_and_orbax(selected, model, tmp_path):
    data = write(selected, tmp_path / "a/m.msgpack", "msgpack").read_bytes()
    assert_same(flatten_dict(serialization.msgpack_restore(data), sep="/"), leaves_of(model.variables))
    path = write(selected, tmp_path / "b/m", "orbax")
    assert_same(flatten_dict(ocp.load(str(path)), sep="/"), leaves_of(model.variables))
    assert ocp.metadata(str(path)).custom_metadata["plan"] == model.manifest["plan"]


def test_onnx_answers_as_the_model_does(selected, model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    path = write(selected, tmp_path / "m.onnx", "onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.shape for i in session.get_inputs()] == [["batch", 8, 8, 1]]
    assert [o.shape for o in session.get_outputs()] == [["batch", 4]]
    for count in (1, 2, 5):
        np.testing.assert_allclose(session.run(None, {"x": X[:count]})[0], model(X[:count]), rtol=1e-4, atol=1e-4)


QUICK = ("mlp",)
IMAGES = [name for name, (_, inputs) in MODELS.items() if name != "unet" and inputs(1)[0].kind == "f"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in IMAGES]
)
def test_the_zoo_has_translations(name):
    pytest.importorskip("onnxruntime")
    module, inputs = MODELS[name]
    variables = draw(variables_spec(module, *inputs(1)), 0, np.float32)
    to_onnx(lambda x: module.apply(variables, x), inputs(1)[0].shape[1:])  # compares with onnxruntime's answers


def operations(x):
    y = jax.lax.pad(x, jnp.float32(0.5), ((0, 0, 0), (1, -1, 0), (2, 0, 0)))[:, ::-1, 1:5:2]
    z = jnp.where(y > 0, y**3, jnp.expm1(y)) + jnp.log1p(jnp.abs(y)) - jax.lax.rsqrt(y * y + 1)
    a, b = jnp.split(z, 2, axis=1)
    a = jnp.unstack(jnp.stack([a, b], 2), axis=2)[1] + a
    c = jnp.einsum("nij,nkj->nik", a, jnp.clip(b, -1, 1))
    d = jnp.take(c, jnp.array([1, 0, 1]), axis=1, mode="clip")
    e = jnp.broadcast_to(d.max(axis=(1, 2))[:, None], (d.shape[0], 3)) * (d != 0).any(axis=2).astype(np.float32)
    return jnp.concatenate([e, jnp.argmax(z, axis=1).astype(np.float32)], axis=1) + jax.lax.erfc(e[:, :1])


def test_operations_that_no_model_of_the_zoo_needs():
    pytest.importorskip("onnxruntime")
    assert to_onnx(operations, (4, 6))


def test_what_has_no_translation_is_named_with_its_line():
    pytest.importorskip("onnxruntime")
    with pytest.raises(ArtifactError, match=r"no translation for sort \(test_exporting.py:\d+\): export to stablehlo"):
        to_onnx(lambda x: jnp.sort(x) + 1, (3,))
    with pytest.raises(ArtifactError, match="with one output, this one has 2"):
        to_onnx(lambda x: (x, x + 1), (3,))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_named(selected, tmp_path, monkeypatch, package):
    if package == "onnxruntime":
        pytest.importorskip("onnx")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ArtifactError, match=rf"needs {package}: pip install 'treesurgeon\[onnx\]'"):
        export(Export(selected, "onnx", tmp_path / "m.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_gradients_go_with_stablehlo(selected, tmp_path, capsys):
    (tmp_path / "m").touch()
    for more, words in ((["m"], "exists: nothing was written"), (["n", "--gradient"], "goes with --to stablehlo")):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(selected), "--to", "msgpack", "--out", str(tmp_path / more[0]), *more[1:]])
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(RunError):
        export(Export(selected, "orbax", tmp_path / "m"))
    assert set(WRITERS) == {"stablehlo", "safetensors", "msgpack", "orbax", "onnx"}
