"""The examples under docs/examples run, on a selected model as a search leaves it."""

import csv
import importlib.util
import io
import json
import threading
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from laws import arr, draw
from subjects import variables_spec

from treesurgeon import engine, models
from treesurgeon.engine import ModelSpec, Plan
from treesurgeon.models import ModelSpecError

EXAMPLES = Path(__file__).parents[1] / "docs/examples"
KWARGS = {"num_classes": 4, "stages": [[4, 4]], "residual": [4], "hidden": 9}
SPEC = ModelSpec("digits_cnn", (8, 8, 1), KWARGS)
LABELS = np.arange(40) % 4
IMAGES = (np.random.default_rng(1).uniform(size=(40, 8, 8, 1)) * 0.2 + LABELS[:, None, None, None] / 5).astype("f4")
MANIFEST = {"labels": list("abcd"), "normalisation": {"mean": [0.5], "std": [0.25]}}


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dense():
    module = models.resolve("digits_cnn", **KWARGS)
    variables = draw(variables_spec(module, arr(1, *SPEC.input_shape)), 0, np.float32)
    return variables, engine.trace(engine.from_linen(module, variables)[0], variables, IMAGES[:1])


def save(path, dense, plan):
    variables, graph = dense
    return engine.save(path, SPEC, engine.cut(variables, graph, plan), plan, manifest=MANIFEST)


@pytest.fixture(scope="module")
def selected(dense, tmp_path_factory):
    plan = Plan({"stage1_0/conv": [0, 2, 3], "dense0": range(0, 9, 2)}, frozenset({"stage1_res"}))
    return save(tmp_path_factory.mktemp("run") / "selected", dense, plan)


@pytest.fixture(scope="module")
def logits(selected):
    return np.asarray(engine.load(selected)((IMAGES - 0.5) / 0.25))


def test_rebuilt_as_a_plain_module_it_computes_the_same(selected, logits):
    model = engine.load(selected)
    module, variables = models.rebuild(model)
    assert type(module) is models.DigitsCNN
    assert (module.stages, module.residual, module.hidden) == (((3, 4),), (0,), 5)
    x = (IMAGES - 0.5) / 0.25
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), logits, rtol=1e-4, atol=1e-4)
    training = {"train": True, "mutable": ["batch_stats"]}
    ours, theirs = (jax.jit(partial(f, **training))(variables, x) for f in (module.apply, model.apply))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_what_the_family_cannot_say_is_refused():
    """The second convolution alone of a block that changes the width."""
    module = models.resnet(20, 3, (4, 8, 16))
    variables = draw(variables_spec(module, arr(1, 8, 8, 3)), 0, np.float32)
    graph = engine.trace(engine.from_linen(module, variables)[0], variables, np.zeros((1, 8, 8, 3), np.float32))
    plan = Plan({}, frozenset({"layer2_0/conv2"}))
    entry = {"model": {"input_shape": [8, 8, 3], "input_dtype": "float32"}}
    model = engine.Model(module, engine.cut(variables, graph, plan), graph, plan, entry)
    with pytest.raises(ModelSpecError, match=r"plain ResNet: .*Use treesurgeon.engine.load\(…\).apply, which"):
        models.rebuild(model)


def test_a_module_of_no_family_is_refused():
    from flax import linen as nn

    with pytest.raises(ModelSpecError, match="plain Dense: it is of no family whose widths are arguments"):
        models.at_widths(nn.Dense(3), {})


def test_training_goes_on_with_a_train_state(selected, capsys):
    state = example("train_further").train(str(selected), (IMAGES - 0.5) / 0.25, LABELS, 12, 16)
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert int(state.step) == 12
    assert last < first


@pytest.mark.slow
def test_training_goes_on_in_an_nnx_loop(selected, logits, capsys):
    module = example("train_nnx")
    x = (IMAGES - 0.5) / 0.25
    np.testing.assert_allclose(module.as_nnx(str(selected))(x), logits, rtol=1e-4, atol=1e-4)
    model = module.train(str(selected), x, LABELS, 12, 16)
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert last < first
    assert jax.tree.leaves(nnx.state(model, nnx.BatchStat))


def test_a_server_around_the_exported_function(selected, logits):
    with example("serve").server(selected, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for count in (1, 3):
                found = json.loads(post(server.server_port, IMAGES[:count]))
                np.testing.assert_allclose(found["logits"], logits[:count], rtol=1e-3, atol=1e-4)
                assert found["labels"] == [MANIFEST["labels"][i] for i in logits[:count].argmax(-1)]
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(server.server_port, IMAGES[:, :7])
            assert caught.value.code == 400
            assert "expected images [N, 8, 8, 1], got [40, 7, 8, 1]" in caught.value.read().decode()
        finally:
            server.shutdown()
            thread.join()


def post(port, images):
    body = io.BytesIO()
    np.save(body, images)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", body.getvalue()) as answer:
        return answer.read()


def test_batch_scoring_without_the_models_code(selected, logits, tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    assert example("score").score(selected, tmp_path / "x.npy", tmp_path / "y.csv", batch=16) == 40
    with (tmp_path / "y.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [MANIFEST["labels"][i] for i in logits.argmax(-1)]
