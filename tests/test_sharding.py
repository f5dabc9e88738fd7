"""The model split over devices: results are those of copies (test_pool.py), and it takes less of each device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from orbax.checkpoint import v1 as ocp
from test_pool import environment

from treesurgeon import engine, models
from treesurgeon.search import RunError, room, sharding
from treesurgeon.search.mesh import EVERY
from treesurgeon.search.room import size_of
from treesurgeon.search.sharding import Layout, describe_layout, one_device, pick_layout
from treesurgeon.search.subject import on_device, open_subject

EIGHT = AbstractMesh((4, 2), EVERY)
MODEL = {"kernel": np.ones((512, 128), np.float32), "bias": np.ones(128, np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_device_holds_its_part_and_the_layers_at_work(precision):
    command = [sys.executable, str(Path(__file__).parent / "sharded.py"), precision]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copied, split = map(json.loads, done.stdout.splitlines())
    assert copied["kept"] / 8 < split["kept"] < copied["kept"] / 7  # small leaves are copied
    assert len(split["temporary"]) > 6  # scoring, the dense answers and the sweep among them
    assert max(split["temporary"]) < split["model"] / 4  # a few of 16 layers are there as a whole


def test_values_that_are_asked_for_come_one_after_the_other():
    rng = np.random.default_rng(0)
    kernels, x = rng.normal(size=(3, 4, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)

    def fn(kernels, x, scale):
        for kernel in kernels:
            x = jax.numpy.tanh(x @ kernel)
        return x * scale @ kernels[0], kernels[1]

    parts = engine.split(fn, list(kernels), x, np.float32(2))
    asked = []

    def later(i):
        def value(after):
            asked.append((i, None if after is None else np.asarray(after)))
            return kernels[i]

        return value

    functions = [later(i) for i in range(3)]
    fixed = parts.once(functions)
    assert parts.passed == [0, 1, 2]
    assert fixed == functions  # what is handed on as it is stays to be asked for
    out = parts.late(fixed, parts.early(fixed, x), np.float32(2))
    wanted = fn(jax.numpy.asarray(kernels), jax.numpy.asarray(x), np.float32(2))  # NumPy's products are others
    for got, expected in zip(out, wanted, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert [i for i, _ in asked] == [0, 1, 2, 0, 1]
    first = np.tanh(x @ kernels[0])
    assert asked[0][1] is None
    np.testing.assert_allclose(asked[1][1], first, rtol=1e-6)
    np.testing.assert_allclose(asked[2][1], np.tanh(first @ kernels[1]), rtol=1e-6)


def test_a_model_is_split_where_it_does_not_fit(monkeypatch):
    room = 2 * size_of(MODEL) / (1 - 2 * sharding.SHARE_OF_MEMORY)
    shared = len(jax.local_devices())  # of a CPU
    monkeypatch.setattr(sharding, "memory", lambda: int(room * shared * 1.01))
    assert not pick_layout(EIGHT, "auto", MODEL).split
    assert pick_layout(EIGHT, "always", MODEL).split
    assert "is copied to each of 8 devices" in describe_layout(Layout(EIGHT), MODEL)
    assert describe_layout(one_device(), MODEL) == ""
    monkeypatch.setattr(sharding, "memory", lambda: int(room * shared * 0.99))
    assert pick_layout(EIGHT, "auto", MODEL).split
    assert not pick_layout(EIGHT, "never", MODEL).split
    assert not pick_layout(one_device().mesh, "auto", MODEL).split
    assert "(0.3 MB) is split over 8 devices, 0.0 MB on each" in describe_layout(Layout(EIGHT, True), MODEL)
    assert "--shard auto splits it" in describe_layout(Layout(EIGHT), MODEL)
    assert "several devices would share it" in describe_layout(one_device(), MODEL)


def test_large_leaves_are_split_and_the_others_copied():
    specs = Layout(EIGHT, True).specs(MODEL)
    assert specs == {"kernel": jax.P(EVERY), "bias": jax.P()}
    assert set(Layout(EIGHT).specs(MODEL).values()) == {jax.P()}


def test_one_device_has_nobody_to_share_with():
    with pytest.raises(RunError, match="--shard always: there is one device"):
        pick_layout(one_device().mesh, "always", MODEL)


def test_what_needs_a_whole_model_that_no_device_holds_runs_on_the_host(monkeypatch):
    monkeypatch.setattr(room, "memory", lambda: room.WHOLE * size_of(MODEL))
    with room.roomy(MODEL):
        assert jax.config.jax_default_device is None
    monkeypatch.setattr(room, "memory", lambda: room.WHOLE * size_of(MODEL) - 1)
    with room.roomy(MODEL):
        assert jax.config.jax_default_device == jax.local_devices(backend="cpu")[0]
        assert jnp.ones(3).devices() == {jax.local_devices(backend="cpu")[0]}
    assert jax.config.jax_default_device is None


@pytest.mark.parametrize(
    ("flags", "before", "threads"),
    [
        ("--xla_force_host_platform_device_count=2 --other", None, str(max(8, os.cpu_count()))),
        ("--xla_force_host_platform_device_count=64", None, str(max(256, os.cpu_count()))),
        ("--xla_force_host_platform_device_count=2", "3", "3"),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_virtual_devices_have_threads_enough(monkeypatch, flags, before, threads):
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": flags, **({"PJRT_NPROC": before} if before else {})})
    room.give_virtual_devices_threads()
    assert os.environ.get("PJRT_NPROC") == threads


def test_a_checkpoint_is_read_onto_the_host(tmp_path):
    """Nothing is on a device before it is settled where the model lies."""
    module = models.resolve("mlp")
    variables = jax.tree.map(np.asarray, module.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32)))
    ocp.save(tmp_path / "checkpoint", variables)
    opened = open_subject("mlp", str(tmp_path / "checkpoint"), (8, 8, 1))
    assert {type(leaf) for leaf in jax.tree.leaves(opened.variables)} == {np.ndarray}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device(opened).variables))
