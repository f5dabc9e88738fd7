"""Sizes and times of a selected model in every format, beside the dense one's."""

import importlib.util

import jax
import numpy as np
import pytest

from treesurgeon import engine, models
from treesurgeon.search import formats
from treesurgeon.search.exporting import WRITERS, Export, size

SHAPE = (4, 4, 1)
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


@pytest.fixture(scope="module")
def pair():
    """A small MLP cut from a larger one, and the larger one."""
    module = models.resolve("mlp", widths=(64, 32), num_classes=3)
    x = np.ones((2, *SHAPE), np.float32)
    variables = module.init(jax.random.key(0), x)
    graph = engine.trace(module.apply, variables, x[:1])
    plan = engine.Plan({"dense0": range(8)})
    spec = {"model": {"input_shape": SHAPE, "input_dtype": "float32"}}
    return (
        engine.Model(module, engine.cut(variables, graph, plan), graph, plan, spec),
        engine.Model(module, variables, graph, engine.Plan(), spec),
    )


def test_every_format_is_measured_beside_dense(pair, tmp_path):
    said = []
    forms = formats.measure(*pair, np.ones((5, *SHAPE), np.float32), said.append)
    assert [form.format for form in forms] == [name for name in WRITERS if HAS_ONNX or name != "onnx"]
    assert [line.startswith("onnx is not measured: ONNX export needs") for line in said] == [True] * (not HAS_ONNX)
    weights = {(form.latency, form.dense_latency) for form in forms if form.format in formats.WEIGHTS}
    assert len(weights) == 1  # one function, whatever file
    for form in forms:
        for model, claimed, name in zip(pair, (form.bytes, form.dense_bytes), "sd", strict=True):
            path = tmp_path / f"{form.format}-{name}"
            WRITERS[form.format](model, path, Export(path, form.format, path))
            # StableHLO also holds lines of source, and Orbax's store times, and at times what it has merged twice.
            apart = {"stablehlo": 0.1, "onnx": 0.1, "orbax": 0.5}.get(form.format, 0)
            assert claimed == pytest.approx(size(path), rel=apart)
        assert form.bytes < form.dense_bytes
        assert form.batch == 5
        assert form.speedup == form.dense_latency / form.latency
    table = formats.markdown(forms).splitlines()
    assert sum(line.startswith("| ") for line in table) == len(forms) + 2
    share = f"{forms[0].bytes / forms[0].dense_bytes:.0%}"
    assert any(line.startswith(f"| {forms[0].format} | {forms[0].bytes:,} | {share} | ") for line in table)
    assert formats.markdown([]) == ""


def test_a_format_that_fails_is_told_and_left_out(pair, monkeypatch):
    def too_large(*_):
        raise ValueError("Message exceeds maximum protobuf size of 2GB\nand so on")

    said = []
    monkeypatch.setattr(formats, "WRITERS", {"onnx": too_large, "msgpack": WRITERS["msgpack"]})
    forms = formats.measure(*pair, np.ones((2, *SHAPE), np.float32), said.append)
    assert said == ["onnx is not measured: Message exceeds maximum protobuf size of 2GB"]
    assert [form.format for form in forms] == ["msgpack"]


def test_what_all_processes_write_is_left_out_where_one_measures(pair, monkeypatch):
    """Orbax waits for the other processes, which do not come."""
    said = []
    monkeypatch.setattr(formats, "WRITERS", {name: WRITERS[name] for name in ("orbax", "msgpack")})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    forms = formats.measure(*pair, np.ones((2, *SHAPE), np.float32), said.append)
    assert said == ["orbax is not measured: all processes of a run take part in its saving, and this is done by one"]
    assert [form.format for form in forms] == ["msgpack"]


def test_calls_take_turns():
    made = []
    *_, repeats = formats._interleaved([lambda: made.append("small"), lambda: made.append("dense")])
    assert made == ["small", "dense"] * (2 + repeats)
    assert repeats == formats.REPEATS[1]
