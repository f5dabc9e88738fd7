"""The zoo: each family against an independent forward pass, rebuilt at smaller widths, resolved by name."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from treesurgeon import models

DIGITS, CIFAR = (8, 8, 1), (32, 32, 3)


def random_variables(module, input_shape, seed=0):
    """Variables with no zero or one among them, so that every leaf matters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *input_shape)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1] in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1] == "kernel" else 1
        return rng.normal(0, 1 / np.sqrt(fan_in), leaf.shape)

    flat = {path: np.asarray(draw(path, leaf), np.float32) for path, leaf in flatten_dict(shapes).items()}
    return unflatten_dict(flat)


def images(input_shape, n=3, seed=1):
    return np.random.default_rng(seed).normal(size=(n, *input_shape)).astype(np.float32)


# An oracle in NCHW, on the flat leaves, that shares nothing with flax's layers.


def conv(p, name, x, stride=1):
    kernel = jnp.transpose(p[f"params/{name}/kernel"], (3, 2, 0, 1))
    out = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return out + p.get(f"params/{name}/bias", jnp.zeros(len(kernel)))[:, None, None]


def bn(p, name, x):
    mean, var, scale, bias = (
        p[f"{c}/{name}/{leaf}"][:, None, None]
        for c, leaf in (
            ("batch_stats", "mean"),
            ("batch_stats", "var"),
            ("params", "scale"),
            ("params", "bias"),
        )
    )
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def dense(p, name, x):
    return x @ p[f"params/{name}/kernel"] + p[f"params/{name}/bias"]


def relu(x):
    return jnp.maximum(x, 0)


def pool(x):
    n, c, h, w = x.shape
    return jnp.max(x.reshape(n, c, h // 2, 2, w // 2, 2), axis=(3, 5))


def flatten_hwc(x):
    return jnp.transpose(x, (0, 2, 3, 1)).reshape(len(x), -1)


def resnet_oracle(p, x, blocks, zeros):
    x = relu(bn(p, "bn1", conv(p, "conv1", x)))
    for s in range(3):
        for b in range(blocks):
            name, stride = f"layer{s + 1}_{b}", 2 if s and not b else 1
            y = relu(bn(p, f"{name}/bn1", conv(p, f"{name}/conv1", x, stride)))
            y = bn(p, f"{name}/bn2", conv(p, f"{name}/conv2", y))
            if stride == 2:
                lo, hi = (jnp.zeros((len(x), k, *y.shape[2:])) for k in zeros[s - 1])
                x = jnp.concatenate([lo, x[:, :, ::2, ::2], hi], axis=1)
            x = relu(y + x)
    return dense(p, "linear", jnp.mean(x, axis=(2, 3)))


def vgg_oracle(p, x, stages):
    i = 0
    for widths in stages:
        for _ in widths:
            x = relu(bn(p, f"bn{i}", conv(p, f"conv{i}", x)))
            i += 1
        x = pool(x)
    x = flatten_hwc(x)
    return dense(p, "linear", relu(dense(p, "dense1", relu(dense(p, "dense0", x)))))


def digits_oracle(p, x, stages):
    for s, widths in enumerate(stages, start=1):
        x = pool(x) if s > 1 else x
        for i in range(len(widths)):
            x = relu(bn(p, f"stage{s}_{i}/bn", conv(p, f"stage{s}_{i}/conv", x)))
        if s > 1:
            name = f"stage{s}_res"
            y = relu(bn(p, f"{name}/bn1", conv(p, f"{name}/conv1", x)))
            x = relu(x + bn(p, f"{name}/bn2", conv(p, f"{name}/conv2", y)))
    return dense(p, "linear", relu(dense(p, "dense0", flatten_hwc(x))))


CASES = {
    "resnet20": (
        models.resnet(20, 7, widths=(4, 7, 12), zeros=((1, 2), (4, 1))),
        CIFAR,
        lambda p, x: resnet_oracle(p, x, 3, ((1, 2), (4, 1))),
    ),
    "vgg11": (
        models.vgg(11, 7, stages=((3,), (4,), (5, 6), (7, 6), (5, 8)), dense=(9, 8)),
        (64, 64, 3),  # 2 x 2 when flattened, so that the order of axes counts
        lambda p, x: vgg_oracle(p, x, ((3,), (4,), (5, 6), (7, 6), (5, 8))),
    ),
    "digits_cnn": (
        models.digits_cnn(),
        DIGITS,
        lambda p, x: digits_oracle(p, x, ((16, 16), (32,), (48, 48))),
    ),
    "mlp": (
        models.mlp((11, 9), 7),
        (4, 3, 2),
        lambda p, x: dense(p, "linear", relu(dense(p, "dense1", relu(dense(p, "dense0", flatten_hwc(x)))))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_an_independent_one(name):
    module, input_shape, oracle = CASES[name]
    variables, x = random_variables(module, input_shape), images(input_shape)
    p = {k: np.asarray(v, np.float64) for k, v in flatten_dict(variables, sep="/").items()}
    with jax.enable_x64(True):
        expected = np.asarray(jax.jit(oracle)(p, np.transpose(x.astype(np.float64), (0, 3, 1, 2))))
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_training_returns_new_statistics_of_the_same_structure(name):
    module, input_shape, _ = CASES[name]
    variables, x = random_variables(module, input_shape), images(input_shape)
    rngs = {"dropout": jax.random.key(0)}
    step = jax.jit(partial(module.apply, train=True, mutable=["batch_stats"]))
    logits, new = step(variables, x, rngs=rngs)
    assert logits.shape == (len(x), 7 if name != "digits_cnn" else 10)
    old = variables.get("batch_stats", {})
    assert jax.tree.structure(new.get("batch_stats", {})) == jax.tree.structure(old)
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new.get("batch_stats", {})), strict=True)
    assert not any(np.allclose(a, b) for a, b in pairs)


def test_statistics_move_by_a_tenth():
    """PyTorch's momentum 0.1 is flax's 0.9."""
    module = models.resnet(20, widths=(4, 4, 4), inner=((0, 0, 0), (1, 0, 0), (1, 0, 0)))
    variables, x = random_variables(module, CIFAR), images(CIFAR)
    stem = jax.lax.conv_general_dilated(
        x,
        variables["params"]["conv1"]["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    _, new = jax.jit(partial(module.apply, train=True, mutable=["batch_stats"]))(variables, x)
    expected = 0.9 * variables["batch_stats"]["bn1"]["mean"] + 0.1 * np.mean(stem, (0, 1, 2))
    np.testing.assert_allclose(new["batch_stats"]["bn1"]["mean"], expected, rtol=1e-4, atol=1e-6)


# Law 8: the module rebuilt at smaller widths, given the kept slices, computes what the wide one computes when
# no layer reads the removed channels. So the oracle is the wide module with the rows that read them at zero.


def sliced(variables, rows):
    """Narrow variables and zeroed wide ones; `rows(path, axis) -> kept indices or None`."""
    narrow, zeroed = {}, {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        keep = [rows(path, axis) for axis in range(leaf.ndim)]
        narrow[path], zeroed[path] = leaf, leaf.copy()
        for axis, kept in enumerate(keep):
            if kept is None:
                continue
            narrow[path] = np.take(narrow[path], kept, axis)
            if path.endswith("kernel") and axis == leaf.ndim - 2:  # the axis that reads
                removed = np.setdiff1d(np.arange(leaf.shape[axis]), kept)
                zeroed[path][(slice(None),) * axis + (removed,)] = 0
    return (unflatten_dict(flat, sep="/") for flat in (narrow, zeroed))


def assert_rebuilt(wide, variables, zeroed, small, narrow, x):
    apply = jax.jit(wide.apply)
    np.testing.assert_allclose(jax.jit(small.apply)(narrow, x), apply(zeroed, x), rtol=1e-4, atol=1e-5)
    assert not np.allclose(apply(zeroed, x), apply(variables, x), atol=1e-2)


def test_resnet_rebuilt_at_smaller_widths_computes_the_same():
    wide = models.resnet(20, widths=(4, 8, 12))
    variables = random_variables(wide, CIFAR)
    # Stage 1 keeps 0, 1, 3; they sit behind 2 zero channels of stage 2, of which 1 is kept, and so on.
    one = np.array([0, 1, 3])
    two = np.array([1, *(2 + one), 7])
    three = np.array([*(2 + two), 10, 11])
    stage = {"1": one, "2": two, "3": three}
    inner = {f"layer{s}_{b}": np.arange(1 + b, 3 + s) for s in (1, 2, 3) for b in range(3)}

    def rows(path, axis):
        parts, kernel = path.split("/"), path.endswith("kernel")
        if parts[1] == "linear":
            return three if kernel and axis == 0 else None
        writes = not kernel or axis == 3
        if not writes and axis < 2:
            return None
        if parts[1] in ("conv1", "bn1"):
            return one if writes else None
        s, b = parts[1].removeprefix("layer").split("_")
        if (parts[2] in ("conv1", "bn1")) == writes:
            return inner[parts[1]]
        return stage[s] if writes or b != "0" or s == "1" else stage[str(int(s) - 1)]

    narrow, zeroed = sliced(variables, rows)
    small = models.resolve(
        "resnet20",
        widths=[3, 5, 7],
        zeros=[[1, 1], [0, 2]],
        inner=[[len(inner[f"layer{s}_{b}"]) for b in range(3)] for s in (1, 2, 3)],
    )
    shapes = jax.eval_shape(small.init, jax.random.key(0), jnp.zeros((1, *CIFAR)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, narrow)
    x = images(CIFAR)
    assert_rebuilt(wide, variables, zeroed, small, narrow, x)


def test_vgg_rebuilt_at_smaller_widths_computes_the_same():
    widths = ((3,), (4,), (5, 6), (7, 6), (5, 8))
    wide = models.vgg(11, 7, stages=widths, dense=(9, 8))
    variables = random_variables(wide, (64, 64, 3))
    rng = np.random.default_rng(2)
    keep = {f"conv{i}": w for i, w in enumerate(w for stage in widths for w in stage)} | {
        "dense0": 9,
        "dense1": 8,
    }
    keep = {name: np.sort(rng.permutation(w)[: w - 2]) for name, w in keep.items()}
    before = dict(zip([*keep, "linear"], [None, *keep], strict=True))

    def rows(path, axis):
        name, kind = path.split("/")[1:]
        if kind != "kernel" or axis == (3 if "conv" in name else 1):
            return keep.get(name.replace("bn", "conv"))
        if axis == (2 if "conv" in name else 0) and before[name]:
            kept = keep[before[name]]
            flat = np.arange(4)[:, None] * 8 + kept  # [H·W, C] of the flattened 2 x 2 x 8
            return flat.reshape(-1) if name == "dense0" else kept
        return None

    narrow, zeroed = sliced(variables, rows)
    small = models.vgg(11, 7, stages=((1,), (2,), (3, 4), (5, 4), (3, 6)), dense=(7, 6))
    x = images((64, 64, 3))
    assert_rebuilt(wide, variables, zeroed, small, narrow, x)


@pytest.mark.parametrize(
    ("wide", "small", "dropped"),
    [
        (
            models.resnet(20),
            models.resnet(20, inner=((16, 0, 16), (32,) * 3, (64, 64, 0))),
            ("layer1_1", "layer3_2"),
        ),
        (models.digits_cnn(), models.digits_cnn(stages=((16, 0), (32,), (48, 0))), ("stage1_1", "stage3_1")),
        (models.digits_cnn(), models.digits_cnn(residual=(0, 0, 48)), ("stage2_res",)),
        (models.mlp((16, 16)), models.mlp((16, 0)), ("dense1",)),
    ],
    ids=["resnet", "digits-layers", "digits-residual", "mlp"],
)
def test_width_zero_leaves_a_layer_out_and_keeps_the_names_of_others(wide, small, dropped):
    input_shape = CIFAR if isinstance(wide, models.ResNet) else DIGITS
    names = [
        {"/".join(path) for path in flatten_dict(jax.eval_shape(m.init, jax.random.key(0), images(input_shape)))}
        for m in (wide, small)
    ]
    gone = {name for name in names[0] if name.split("/")[1] in dropped}
    assert gone
    assert names[1] == names[0] - gone


COUNTS = {
    # He et al. 2015, table 6; torchvision's configurations with a 512-512 head.
    "resnet20": 269_722,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg16": 15_253_578,
    # torchvision's.
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_small": 2_542_856,
    "mobilenet_v3_large": 5_483_032,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "convnext_tiny": 28_589_128,
    "convnext_base": 88_591_464,
    "efficientnet_b0": 5_288_548,
    # timm's.
    "swin_tiny": 28_288_354,
    "swin_base": 87_768_224,
    "mixer_s16": 18_528_264,
    "mixer_b16": 59_880_472,
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
}


@pytest.mark.parametrize("name", models.ZOO)
def test_preset_describes_its_model(name):
    preset = models.get(name)
    module = models.resolve(name)
    x = jax.ShapeDtypeStruct((2, *preset.input_shape), jnp.float32)
    logits, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert logits.shape == (2, preset.num_classes)
    assert COUNTS.keys() <= models.ZOO.keys()
    assert size(variables["params"]) == COUNTS.get(name, size(variables["params"]))
    assert len(preset.mean) == len(preset.std) == preset.input_shape[-1]
    if preset.checkpoint_layout == "resnet" and preset.input_shape == CIFAR:
        blocks = (int(name.removeprefix("resnet")) - 2) // 6
        expected = {"conv1", "bn1", "linear"} | {f"layer{s}_{b}" for s in (1, 2, 3) for b in range(blocks)}
        assert set(variables["params"]) == expected
        assert set(variables["params"]["layer3_0"]) == {"conv1", "bn1", "conv2", "bn2"}


def size(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def parameters(module, *inputs):
    return size(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


def test_parameters_of_a_unet():
    """Those of github.com/milesial/Pytorch-UNet."""
    assert parameters(models.unet(), jnp.zeros((1, 64, 64, 3))) == 31_037_698


def test_parameters_of_a_wider_and_deeper_efficientnet():
    """Those of torchvision's B1."""
    assert parameters(models.efficientnet(1), jnp.zeros((1, 64, 64, 3))) == 7_794_184


LLAMA_1B = models.llama(128_256, 2048, ((8, 4, 64, 8192),) * 16, theta=500_000.0, tied=True)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (models.llama(), 1_100_048_384),  # TinyLlama
        (LLAMA_1B, 1_235_814_400),  # Llama 3.2
        (models.gpt(), 124_439_808),  # GPT-2 small
        (models.bert(), 109_482_240 + 2 * 769),  # BERT base, uncased, and the head
    ],
)
def test_parameter_counts_of_language_models_are_the_published_ones(module, count):
    assert parameters(module, jnp.zeros((1, 8), int)) == count


@pytest.mark.parametrize(
    ("spec", "kwargs"),
    [
        ("resnet56", {"num_classes": 100, "inner": [[8] * 9] * 3}),
        ("mlp", {"widths": [5], "activation": "gelu"}),
        ("flax.linen:Dense", {"features": 3}),
        ("vit_tiny", {"width": 8, "layers": [[2, 3, 4, 5], [0, 0, 0, 6]]}),
        ("mobilenet_v2", {"rows": [[3, 1, 4, 0, 5, "relu6", False, False]]}),
        ("swin_tiny", {"widths": [8], "layers": [[[2, 3, 4]]]}),
        ("treesurgeon.models:llama", {"layers": [[1, 2, 3, 4]], "frequencies": [[1.0, 0.5]]}),
    ],
)
def test_spec_survives_json(spec, kwargs):
    again = json.loads(json.dumps({"model": spec, "kwargs": kwargs}))
    module = models.resolve(again["model"], **again["kwargs"])
    assert module == models.resolve(spec, **kwargs)
    assert hash(module) == hash(models.resolve(spec, **kwargs)) or not isinstance(module, nn.Dense)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "own_zoo.py").write_text(
        "from flax import linen as nn\n"
        "def tiny(width=3): return nn.Dense(width)\n"
        "def number(): return 3\n"
        "def fails(): raise RuntimeError('out of luck')\n"
        "net = nn.Dense(4)\n"
        "size = 5\n"
    )
    (tmp_path / "own_broken.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "own_syntax.py").write_text("def (\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("own_zoo", "own_broken", "own_syntax"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("user_module")
def test_resolve_finds_factories_in_the_current_directory():
    assert models.resolve("own_zoo:tiny", width=7) == nn.Dense(7)
    assert models.resolve("own_zoo:net") == nn.Dense(4)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("spec", "kwargs", "error", "match"),
    [
        ("resnet57", {}, models.UnknownModelError, r"'resnet57'.*resnet56.*package\.module:factory"),
        ("no_such_pkg.zoo:f", {}, models.UnknownModelError, r"no module named 'no_such_pkg'.*PYTHONPATH"),
        ("own_zoo.sub:f", {}, models.UnknownModelError, r"no module named 'own_zoo\.sub'"),
        (":f", {}, models.UnknownModelError, r"expected package\.module:factory"),
        ("own_zoo:tinny", {}, models.UnknownModelError, r"no 'tinny'; it has .*tiny"),
        ("own_zoo:number", {}, models.ModelSpecError, r"to return a flax.linen module, got builtins.int"),
        ("own_zoo:fails", {}, models.ModelSpecError, r"raised RuntimeError: out of luck"),
        ("own_zoo:tiny", {"depth": 3}, models.ModelSpecError, r"\(depth=3\), raised TypeError"),
        ("own_zoo:size", {}, models.ModelSpecError, r"expected a function .* got int"),
        ("own_zoo:net", {"width": 3}, models.ModelSpecError, r"and arguments for it"),
        ("own_broken:f", {}, models.ModelSpecError, r"needs 'not_installed_anywhere'"),
        ("own_syntax:f", {}, models.ModelSpecError, r"raised SyntaxError"),
        (
            "treesurgeon.models:vgg",
            {"depth": 12},
            models.ModelSpecError,
            r"one of \[11, 13, 16, 19\], got 12",
        ),
        (
            "vgg11",
            {"stages": [[8]]},
            models.ModelSpecError,
            r"hold \[1, 1, 2, 2, 2\] convolutions, got \[1\]",
        ),
        (
            "treesurgeon.models:resnet",
            {"depth": 21},
            models.ModelSpecError,
            r"depth must be one of .*, got 21",
        ),
        ("resnet20", {"zeros": [[8, 7], [16, 16]]}, models.ModelSpecError, r"layer2_0 .*lo \+ 16 \+ hi = 32"),
        ("resnet20", {"inner": [[9] * 3, [0, 1, 1], [1] * 3]}, models.ModelSpecError, r"width of at least 1"),
        ("resnet20", {"inner": [[16] * 2] * 3}, models.ModelSpecError, r"3 x 3 inner widths"),
        ("resnet18", {"inner": [[[64]] * 2] * 3}, models.ModelSpecError, r"\[2, 2, 2, 2\] blocks of 1 inner widths"),
        ("resnet50", {"widths": [64] * 3}, models.ModelSpecError, r"takes 4 widths .* got 3 widths"),
        ("treesurgeon.models:imagenet_resnet", {"depth": 20}, models.ModelSpecError, r"one of \[18, 34, .*got 20"),
        ("treesurgeon.models:vit", {"size": "huge"}, models.ModelSpecError, r"one of tiny, small, base, got 'huge'"),
        ("treesurgeon.models:mobilenet", {"version": "v4"}, models.ModelSpecError, r"one of v2, .*got 'v4'"),
        ("treesurgeon.models:llama", {"frequencies": [[1.0]]}, models.ModelSpecError, r"each of the 22 layers, got 1"),
        ("densenet121", {"transitions": [8]}, models.ModelSpecError, r"4 stages have 3 transitions .* got 1"),
        ("treesurgeon.models:densenet", {"depth": 9}, models.ModelSpecError, r"one of \[121, .*got 9"),
        ("convnext_tiny", {"hidden": [[8]]}, models.ModelSpecError, r"each of the 4 widths, got 1"),
        ("treesurgeon.models:convnext", {"size": "huge"}, models.ModelSpecError, r"one of tiny, .*got 'huge'"),
        ("treesurgeon.models:unet", {"up": [[8, 8, 8]]}, models.ModelSpecError, r"5 levels down take 4 up, got 1"),
        ("efficientnet_b0", {"scale": 8}, models.ModelSpecError, r"scale must be 0 to 7, got 8"),
        ("treesurgeon.models:mixer", {"size": "huge"}, models.ModelSpecError, r"one of s, b, l, got 'huge'"),
        ("swin_tiny", {"layers": [[]]}, models.ModelSpecError, r"each of the 4 widths, got 1"),
        ("treesurgeon.models:swin", {"size": "huge"}, models.ModelSpecError, r"one of tiny, .*got 'huge'"),
        ("digits_cnn", {"residual": [1]}, models.ModelSpecError, r"each of the 3 stages, got \(1,\)"),
    ],
)
def test_what_cannot_be_resolved_says_why(spec, kwargs, error, match):
    with pytest.raises(error, match=match) as caught:
        models.resolve(spec, **kwargs)
    assert len(str(caught.value).splitlines()) < 25


def test_digits_cnn_is_small():
    shapes = jax.eval_shape(models.resolve("digits_cnn").init, jax.random.key(0), jnp.zeros((1, *DIGITS)))
    assert 50_000 < sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) < 150_000
