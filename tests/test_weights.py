"""Checkpoints: PyTorch's names and axes, flat names, Orbax directories, and everything that does not fit."""

import re
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from treesurgeon import models

DATA = Path(__file__).resolve().parents[1].parent / "shared/data"
RESNET20 = DATA / "checkpoints/resnet20-cifar10-12fca82f.safetensors"
CIFAR = DATA / "tfds/cifar10_jpeg/1.0.0"


def template(module, input_shape):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *input_shape)))


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape).astype(np.float32), shapes)


def flat(variables):
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def mlp():
    module = models.mlp((6, 5), 3)
    return module, template(module, (2, 2, 2))


# PyTorch's state dicts are written here by hand, leaf by leaf, as torch would lay them out.


def torch_resnet20(rng):
    state = {}

    def draw(name, *shape):
        state[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            draw(f"{name}.{leaf}", width)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    draw("conv1.weight", 16, 3, 3, 3)
    norm("bn1", 16)
    c = 16
    for s, width in enumerate((16, 32, 64), start=1):
        for b in range(3):
            draw(f"layer{s}.{b}.conv1.weight", width, c, 3, 3)
            norm(f"layer{s}.{b}.bn1", width)
            draw(f"layer{s}.{b}.conv2.weight", width, width, 3, 3)
            norm(f"layer{s}.{b}.bn2", width)
            c = width
    draw("linear.weight", 10, 64)
    draw("linear.bias", 10)
    return state


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "data-parallel"])
@pytest.mark.parametrize("by", ["preset", "module"])
def test_resnet_in_torch_layout(tmp_path, prefix, by):
    state = torch_resnet20(np.random.default_rng(0))
    path = tmp_path / "resnet.safetensors"
    save_file({prefix + name: value for name, value in state.items()}, path)
    preset = models.get("resnet20")
    shapes = template(preset.factory(), preset.input_shape)
    got = models.load_checkpoint(path, preset if by == "preset" else preset.factory(), shapes)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, shapes)
    block = got["params"]["layer2_0"]
    np.testing.assert_array_equal(block["conv1"]["kernel"], np.einsum("oihw->hwio", state["layer2.0.conv1.weight"]))
    np.testing.assert_array_equal(block["bn2"]["scale"], state["layer2.0.bn2.weight"])
    np.testing.assert_array_equal(got["batch_stats"]["layer3_1"]["bn1"]["var"], state["layer3.1.bn1.running_var"])
    np.testing.assert_array_equal(got["batch_stats"]["bn1"]["mean"], state["bn1.running_mean"])
    np.testing.assert_array_equal(got["params"]["linear"]["kernel"], state["linear.weight"].T)


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_resnet_in_torchvisions_layout(tmp_path, depth):
    """Every name and shape of torchvision's `resnet18` and `resnet50`, at an eighth of their widths."""
    blocks, kernels = {18: ((2, 2, 2, 2), (3, 3)), 50: ((3, 4, 6, 3), (1, 3, 1))}[depth]
    rng, state = np.random.default_rng(0), {}

    def conv_bn(conv, bn, *shape):
        state[f"{conv}.weight"] = rng.normal(size=shape).astype(np.float32)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{bn}.{leaf}"] = rng.uniform(0.5, 1.5, shape[0]).astype(np.float32)
        state[f"{bn}.num_batches_tracked"] = np.array(7)

    conv_bn("conv1", "bn1", 8, 3, 7, 7)
    enters = 8
    for s, n in enumerate(blocks, start=1):
        inner = 8 * 2 ** (s - 1)
        leaves = inner if depth == 18 else 4 * inner
        for b in range(n):
            widths = [enters] + [inner] * (len(kernels) - 1) + [leaves]
            for i, k in enumerate(kernels, start=1):
                conv_bn(f"layer{s}.{b}.conv{i}", f"layer{s}.{b}.bn{i}", widths[i], widths[i - 1], k, k)
            if b == 0 and enters != leaves:
                conv_bn(f"layer{s}.{b}.downsample.0", f"layer{s}.{b}.downsample.1", leaves, enters, 1, 1)
            enters = leaves
    state["fc.weight"], state["fc.bias"] = rng.normal(size=(5, enters)).astype(np.float32), np.ones(5, np.float32)
    path = tmp_path / "resnet.safetensors"
    save_file(state, path)

    widths = [w // 8 for w in ((64, 128, 256, 512) if depth == 18 else (256, 512, 1024, 2048))]
    inner = [[[8 * 2**s] * (len(kernels) - 1)] * n for s, n in enumerate(blocks)]
    module = models.imagenet_resnet(depth, 5, 8, widths, inner)
    got = models.load_checkpoint(path, module, template(module, (32, 32, 3)))
    kernel = got["params"]["layer2_0"]["downsample_0"]["kernel"]
    np.testing.assert_array_equal(kernel, np.einsum("oihw->hwio", state["layer2.0.downsample.0.weight"]))
    norm = got["batch_stats"]["layer3_0"]["downsample_1"]
    np.testing.assert_array_equal(norm["mean"], state["layer3.0.downsample.1.running_mean"])
    np.testing.assert_array_equal(got["params"]["fc"]["kernel"], state["fc.weight"].T)
    assert models.get(f"resnet{depth}").checkpoint_layout == "resnet"


def test_a_preset_without_a_table_of_names_says_so(tmp_path):
    path = tmp_path / "mixer.safetensors"
    save_file({"stem.proj.bias": np.zeros(512, np.float32)}, path)
    preset = models.get("mixer_s16")
    with pytest.raises(models.CheckpointError, match=r"no table of PyTorch's names for 'mixer_s16'; expected flat"):
        models.load_checkpoint(path, preset, template(preset.factory(), preset.input_shape))


def test_vgg_in_torch_layout_flattens_in_torchs_order(tmp_path):
    """64 x 64 images leave 2 x 2 pixels; the first dense layer computes the same on CHW as ours on HWC."""
    module = models.vgg(13, 4, stages=((3, 4), (4, 5), (5, 6), (6, 7), (7, 8)), dense=(9, 6))
    shapes = template(module, (64, 64, 3))
    rng = np.random.default_rng(0)
    state, c = {}, 3
    # torchvision's vgg13_bn: conv, norm, relu per layer and a pool after every second one.
    for i, (at, width) in enumerate(
        zip([0, 3, 7, 10, 14, 17, 21, 24, 28, 31], [3, 4, 4, 5, 5, 6, 6, 7, 7, 8], strict=True)
    ):
        state[f"features.{at}.weight"] = rng.normal(size=(width, c, 3, 3))
        state[f"features.{at}.bias"] = np.full(width, float(i))
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"features.{at + 1}.{leaf}"] = rng.uniform(0.5, 1.5, width)
        c = width
    for at, (i, o) in {0: (32, 9), 3: (9, 6), 6: (6, 4)}.items():
        state[f"classifier.{at}.weight"] = rng.normal(size=(o, i))
        state[f"classifier.{at}.bias"] = np.full(o, float(at))
    path = tmp_path / "vgg.safetensors"
    save_file({name: value.astype(np.float32) for name, value in state.items()}, path)

    params = models.load_checkpoint(path, module, shapes)["params"]
    features = rng.normal(size=(2, 8, 2, 2)).astype(np.float32)
    ours = np.transpose(features, (0, 2, 3, 1)).reshape(2, -1) @ params["dense0"]["kernel"]
    np.testing.assert_allclose(ours, features.reshape(2, -1) @ state["classifier.0.weight"].T, rtol=1e-4, atol=1e-5)
    assert [float(params[f"conv{i}"]["bias"][0]) for i in range(10)] == list(range(10))
    assert [float(params[name]["bias"][0]) for name in ("dense0", "dense1", "linear")] == [0, 3, 6]
    np.testing.assert_allclose(params["bn4"]["scale"], state["features.15.weight"], rtol=1e-6)


def test_mlp_in_torch_layout(tmp_path, mlp):
    module, shapes = mlp
    rng = np.random.default_rng(0)
    sizes = {"dense0": (6, 8), "dense1": (5, 6), "linear": (3, 5)}
    state = {f"{name}.weight": rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    state |= {f"{name}.bias": np.ones(size[0], np.float32) for name, size in sizes.items()}
    path = tmp_path / "mlp.safetensors"
    save_file(state, path)
    with pytest.raises(models.CheckpointError, match=r"dense0\.weight follows a flattening .*input_shape=\(H, W, C\)"):
        models.load_checkpoint(path, module, shapes)
    kernel = models.load_checkpoint(path, module, shapes, input_shape=(2, 2, 2))["params"]["dense0"]["kernel"]
    x = rng.normal(size=(1, 2, 2, 2)).astype(np.float32)  # N, C, H, W
    np.testing.assert_allclose(
        np.transpose(x, (0, 2, 3, 1)).reshape(1, -1) @ kernel,
        x.reshape(1, -1) @ state["dense0.weight"].T,
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", [pytest.param("resnet20", marks=pytest.mark.slow), "digits_cnn", "mlp"])
@pytest.mark.parametrize("kind", ["orbax", "orbax-with-training-state", "flat", "msgpack", "msgpack-of-a-train-state"])
def test_saved_variables_come_back_bit_for_bit(tmp_path, name, kind):
    preset = models.get(name)
    shapes = template(preset.factory(), preset.input_shape)
    variables = random_like(shapes)
    path = tmp_path / {"flat": "x.safetensors", "msgpack": "x.msgpack"}.get(kind.split("-")[0], "x")
    if kind == "flat":
        save_file(flat(variables), path)
    elif kind == "msgpack":
        path.write_bytes(serialization.to_bytes(variables))
    elif kind == "msgpack-of-a-train-state":
        path.write_bytes(serialization.to_bytes({**variables, "step": 3, "opt_state": (jnp.ones(2), ())}))
    elif kind == "orbax":
        ocp.save(path, jax.tree.map(jnp.asarray, variables))
    else:
        ocp.save(path, {**variables, "step": 3, "opt_state": [jnp.ones(2), {"m": jnp.ones(3)}]})
    assert_same(models.load_checkpoint(path, preset, shapes), variables)


def test_any_linen_module_reads_orbax_and_flat_names_but_not_torchs(tmp_path):
    from flax import linen as nn

    module = nn.Dense(3)
    shapes = template(module, (4,))
    variables = random_like(shapes)
    ocp.save(tmp_path / "x", variables)
    assert_same(models.load_checkpoint(tmp_path / "x", module, shapes), variables)
    save_file({"weight": np.ones((3, 4), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(models.CheckpointError, match=r"names for a Dense; expected flat names.*got 'weight'"):
        models.load_checkpoint(tmp_path / "x.safetensors", module, shapes)


class OfNnx(nnx.Module):
    """An nnx model whose layers have the names of `digits_cnn`'s."""

    def __init__(self, variables, rngs):
        layers = {}
        for leaf, value in flat(variables).items():
            collection, *layer, name = leaf.split("/")
            kind = nnx.Param if collection == "params" else nnx.BatchStat
            layers.setdefault(tuple(layer), {})[name] = kind(jnp.asarray(value))
        for layer, leaves in layers.items():
            at = self
            for part in layer:
                if not hasattr(at, part):
                    setattr(at, part, nnx.Module())
                at = getattr(at, part)
            for name, value in leaves.items():
                setattr(at, name, value)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("kind", ["orbax", "orbax-pure", "msgpack"])
def test_the_state_of_an_nnx_model(tmp_path, kind):
    preset = models.get("digits_cnn")
    shapes = template(preset.factory(), preset.input_shape)
    variables = random_like(shapes)
    state = nnx.state(OfNnx(variables, nnx.Rngs(0)))
    path = tmp_path / ("x.msgpack" if kind == "msgpack" else "x")
    if kind != "msgpack":
        ocp.save(path, nnx.to_pure_dict(state) if kind == "orbax-pure" else state)
    else:
        arrays = nnx.to_pure_dict(nnx.filter_state(state, (nnx.Param, nnx.BatchStat)))
        path.write_bytes(serialization.to_bytes(arrays))
    assert_same(models.load_checkpoint(path, preset, shapes), variables)


def test_damaged_msgpack_is_told(tmp_path, mlp):
    module, shapes = mlp
    path, rng = tmp_path / "x.msgpack", np.random.default_rng(0)
    whole = serialization.to_bytes(random_like(shapes))
    for i in range(60):
        data = bytearray(whole[: rng.integers(len(whole))] if i % 2 else whole)
        if not i % 2:
            data[rng.integers(120)] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        with pytest.raises(models.CheckpointError, match=r"x\.msgpack") if i % 2 else suppress(models.CheckpointError):
            models.load_checkpoint(path, module, shapes)  # a changed number may still be one
    path.write_bytes(serialization.msgpack_serialize([1, 2]))
    with pytest.raises(models.CheckpointError, match="cannot be read as msgpack"):
        models.load_checkpoint(path, module, shapes)


def test_lower_precision_is_read_into_the_templates(tmp_path, mlp):
    module, shapes = mlp
    variables = random_like(shapes)
    save_file(
        {name: value.astype(jnp.bfloat16) for name, value in flat(variables).items()},
        tmp_path / "x.safetensors",
    )
    got = models.load_checkpoint(tmp_path / "x.safetensors", module, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(
        got["params"]["linear"]["bias"],
        variables["params"]["linear"]["bias"].astype(jnp.bfloat16).astype(np.float32),
    )


@pytest.mark.parametrize("kind", ["orbax", "flat"])
def test_everything_that_does_not_fit_is_in_one_error(tmp_path, mlp, kind):
    module, shapes = mlp
    arrays = flat(random_like(shapes))
    del arrays["params/dense1/bias"]
    arrays["params/extra/kernel"] = np.ones((2, 7), np.float32)
    arrays["params/linear/kernel"] = np.ones((5, 4), np.float32)
    arrays["params/dense0/bias"] = np.ones(6, np.int32)
    path = tmp_path / ("x.safetensors" if kind == "flat" else "x")
    if kind == "flat":
        save_file(arrays, path)
    else:
        ocp.save(path, unflatten_dict(arrays, sep="/"))
    with pytest.raises(models.CheckpointError) as caught:
        models.load_checkpoint(path, module, shapes)
    text = str(caught.value)
    for line in (
        f"checkpoint {path} does not fit the model, which has 6 arrays",
        "missing (1):\n    params/dense1/bias: expected [5]",
        "unexpected (1):\n    params/extra/kernel: got [2, 7]",
        "of another shape (1):\n    params/linear/kernel: expected [5, 3], got [5, 4]",
        "of another type (1):\n    params/dense0/bias: expected floating point, got int32",
        "fix: name the architecture",
    ):
        assert line in text


def test_another_architecture_fits_on_a_screen(tmp_path):
    save_file(torch_resnet20(np.random.default_rng(0)), tmp_path / "x.safetensors")
    preset = models.get("resnet56")
    with pytest.raises(models.CheckpointError) as caught:
        models.load_checkpoint(tmp_path / "x.safetensors", preset, template(preset.factory(), preset.input_shape))
    text = str(caught.value)
    assert len(text.splitlines()) < 25
    # 6 more blocks in each of 3 stages, each of 2 convolutions and 2 norms of 4 arrays.
    assert "missing (180)" in text
    assert "… and 174 more" in text
    assert "layer1.3.bn1.bias: expected [16]" in text
    assert "unexpected" not in text

    preset = models.get("vgg16")
    with pytest.raises(
        models.CheckpointError,
        match=r"(?s)missing \(84\).*classifier\.0\.bias.*unexpected \(97\).*bn1\.bias: got \[16\]",
    ):
        models.load_checkpoint(tmp_path / "x.safetensors", preset, template(preset.factory(), preset.input_shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_non_finite_weights_are_named(tmp_path, mlp, value):
    module, shapes = mlp
    arrays = {name: leaf.astype(np.float64) for name, leaf in flat(random_like(shapes)).items()}
    arrays["params/dense1/kernel"][2, :2] = value  # 1e300 is finite, and infinite once it is float32
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(models.CheckpointError, match=r"NaN or infinity in params/dense1/kernel \(2 of 30\);"):
        models.load_checkpoint(tmp_path / "x.safetensors", module, shapes)


@pytest.mark.parametrize("suffix", [".th", ".pt", ".pth", ".pkl"])
def test_pickles_of_other_things_are_refused_unread(tmp_path, mlp, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(models.CheckpointError, match=r"(?s)can run any code.*save_file\(.*'weights\.safetensors'"):
        models.load_checkpoint(path, *mlp)


def test_missing_path_says_what_is_there(tmp_path, mlp):
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(models.CheckpointError, match=r"no such file or directory; .* holds other\.safetensors"):
        models.load_checkpoint(tmp_path / "weights.safetensors", *mlp)
    with pytest.raises(models.CheckpointError, match=r"nowhere is not there either"):
        models.load_checkpoint(tmp_path / "nowhere/weights", *mlp)


def test_unreadable_files(tmp_path, mlp):
    (tmp_path / "x.npz").touch()
    with pytest.raises(models.CheckpointError, match=r"a \.safetensors, \.msgpack or \.pth file, got a \.npz file"):
        models.load_checkpoint(tmp_path / "x.npz", *mlp)
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(models.CheckpointError, match=r"cannot be read as safetensors: "):
        models.load_checkpoint(tmp_path / "x.safetensors", *mlp)
    (tmp_path / "empty").mkdir()
    with pytest.raises(models.CheckpointError, match=r"cannot be read as an Orbax directory \("):
        models.load_checkpoint(tmp_path / "empty", *mlp)


def test_a_directory_of_steps_names_one(tmp_path, mlp):
    for step in (4, 12):
        ocp.save(tmp_path / "run" / str(step), random_like(mlp[1]))
    with pytest.raises(
        models.CheckpointError,
        match=re.escape(f"It holds steps: pass one of them, for instance {tmp_path}/run/12 "),
    ):
        models.load_checkpoint(tmp_path / "run", *mlp)


def test_damaged_orbax_directory(tmp_path, mlp):
    ocp.save(tmp_path / "x", random_like(mlp[1]))
    for file in (tmp_path / "x").rglob("*"):
        if file.is_file() and file.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            file.write_bytes(b"\x00" * 8)
    with pytest.raises(models.CheckpointError, match="cannot be read as an Orbax directory"):
        models.load_checkpoint(tmp_path / "x", *mlp)


@pytest.mark.skipif(not RESNET20.exists() or not CIFAR.exists(), reason="needs the shared CIFAR data")
def test_published_resnet20_classifies_cifar():
    import tensorflow_datasets as tfds

    preset = models.get("resnet20")
    module = preset.factory()
    variables = models.load_checkpoint(RESNET20, preset, template(module, preset.input_shape))
    records = tfds.builder_from_directory(CIFAR).as_data_source("test").__getitems__(range(500))
    x = np.stack([record["image"] for record in records]).astype(np.float32) / 255
    x = (x - np.array(preset.mean, np.float32)) / np.array(preset.std, np.float32)
    predicted = jax.jit(module.apply)(variables, x).argmax(-1)
    # 81.0 % on all 5,000; 4 standard errors of 500 images are 7 points.
    assert np.mean(predicted == np.array([record["label"] for record in records])) > 0.74
