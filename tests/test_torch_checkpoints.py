"""PyTorch's files, read without PyTorch; where torch, torchvision or timm are there, their models are the oracle."""

import io
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torchfiles import Call, Pickler, Storage, names_of_torch

from treesurgeon import models
from treesurgeon.models.pickles import LEGACY, read_torch

SHARED = Path(__file__).resolve().parents[1].parent / "shared/data/checkpoints"


@pytest.fixture
def write(tmp_path):
    """Writes an object as `torch.save` does; `torch` itself is not needed, only its names."""

    def write(make, storages=(), **more):
        path, data = tmp_path / "x.pth", io.BytesIO()
        with names_of_torch() as tensor:
            Pickler(data, 2).dump(make(tensor))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", data.getvalue())
            for storage in storages:
                archive.writestr(f"x/data/{storage.key}", np.asarray(storage.values, "f4").tobytes())
            for name, content in more.items():
                archive.writestr(f"x/{name}", content)
        return path

    return write


def test_views_of_one_storage(write):
    s = Storage("0", range(6))
    path = write(lambda t: {"epoch": 3, "state_dict": {"a": t(s, 0, (2, 3), (3, 1)), "b": t(s, 1, (2,), (3,))}}, [s])
    got = read_torch(path)
    assert got.keys() == {"a", "b"}
    np.testing.assert_array_equal(got["a"], np.arange(6, dtype="f4").reshape(2, 3))
    np.testing.assert_array_equal(got["b"], [1, 4])


S = Storage("0", range(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: {"a": Call(print, "run")}, r"it names \w+\.print, which is not part of a state dict"),
        (lambda t: {"a": Call(eval, "1")}, r"it names \w+\.eval"),
        (lambda t: {"a": Path("x")}, r"it names pathlib\.\w+"),
        (lambda t: {"a": t(S, 0, (3, 3), (3, 1))}, "damaged.*reaches beyond its data"),
        (lambda t: {"a": t(S, -1, (1,), (1,))}, "damaged.*makes no sense"),
        (lambda t: {"a": t(S, 0, (2,), (1 << 62,))}, "damaged.*reaches beyond"),
        (lambda t: {"a": t(S, 0, (2, 2), (1,))}, "damaged.*makes no sense"),
        (lambda t: {"a": t("0", 0, (1,), (1,))}, "damaged"),
        (lambda t: {"epoch": 3}, "it holds no tensors, but epoch"),
        (lambda t: [t(S, 0, (1,), (1,))], "it holds a list"),
    ],
)
def test_what_is_no_state_dict_is_refused(write, make, message):
    with pytest.raises(models.CheckpointError, match=f"(?s)x.pth: .*{message}"):
        read_torch(write(make, [S]))


def test_archives_of_other_things_are_refused(write):
    make = lambda t: {"a": t(S, 0, (6,), (1,))}
    with pytest.raises(models.CheckpointError, match="it is a TorchScript program"):
        read_torch(write(make, [S], **{"code/a.py": "x"}))
    with pytest.raises(models.CheckpointError, match="its numbers are big-endian"):
        read_torch(write(make, [S], byteorder="big"))
    path = write(make, [])
    with pytest.raises(models.CheckpointError, match="damaged, or not written by"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.txt", "")
    with pytest.raises(models.CheckpointError, match=r"it holds no data\.pkl"):
        read_torch(path)


def test_a_tensor_of_more_numbers_than_there_are(write):
    for shape, steps in (((2**40,), (0,)), ((2, 6), (0, 1))):
        path = write(lambda t, shape=shape, steps=steps: {"a": t(S, 0, shape, steps)}, [S])
        with pytest.raises(models.CheckpointError, match="a tensor larger than its data"):
            read_torch(path)


@pytest.mark.parametrize("old", [False, True])
def test_numbers_of_objects_that_would_take_all_memory(tmp_path, old):
    data = b"\x80\x02}r\xff\xff\xff\x7f."  # an empty dict, object 2,147,483,647: 16 GB of them
    path = tmp_path / "x.pth"
    if old:
        path.write_bytes(LEGACY + data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", data)
    with pytest.raises(models.CheckpointError, match="object 2 is numbered 2147483647"):
        read_torch(path)


def test_damaged_bytes_are_told(write):
    make = lambda t: {"a": t(S, 0, (6,), (1,)), "b": t(S, 0, (2, 3), (3, 1))}
    path = write(make, [S])
    whole, rng, failed = path.read_bytes(), np.random.default_rng(0), 0
    for i in range(150):
        data = bytearray(whole)
        if i % 3:
            for at in rng.integers(0, len(data), 3):
                data[at] ^= 1 << rng.integers(8)
        else:
            data = data[: rng.integers(len(data))]
        path.write_bytes(data)
        try:
            read_torch(path)
        except models.CheckpointError:
            failed += 1
    assert failed > 75


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared checkpoints")
def test_the_format_before_zip_archives():
    got, want = read_torch(SHARED / "resnet56-4bfd9763.th"), load_file(SHARED / "resnet56-cifar10-4bfd9763.safetensors")
    got = {name.removeprefix("module."): value for name, value in got.items()}
    assert got.keys() >= want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    preset = models.get("resnet56")
    template = jax.eval_shape(preset.factory().init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    read = [models.load_checkpoint(path, preset, template) for path in sorted(SHARED.glob("resnet56*"))]
    jax.tree.map(np.testing.assert_array_equal, *read)


# With PyTorch at hand.


@pytest.mark.parametrize("zipped", [True, False])
def test_as_torch_writes_them(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "plain": base, "turned": base.T, "part": base[1:, 1], "half": base.half(), "brain": base.bfloat16(),
        "long": base.long(), "flag": base > 3, "scalar": base.sum(), "empty": base[:0],
        "parameter": torch.nn.Parameter(base * 2),
    }  # fmt: skip
    path = tmp_path / "x.pth"
    torch.save({"model": state, "epoch": 1, "best": 0.5}, path, _use_new_zipfile_serialization=zipped)
    got = read_torch(path)
    assert got.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(got[name].astype(float), value.detach().double().numpy(), err_msg=name)
        assert got[name].shape == tuple(value.shape)
    torch.save(torch.nn.Linear(2, 3), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(models.CheckpointError, match=r"it names torch\.nn\.modules\.linear\.Linear"):
        read_torch(path)


def resnet(tv, timm):
    net = models.imagenet_resnet(18, 5)
    return net, [("torchvision", lambda: tv.models.resnet18(num_classes=5)), ("timm", timm("resnet18", num_classes=5))]


def mobilenet_v2(tv, timm):
    net = models.mobilenet("v2", 5)
    return net, [
        ("torchvision", lambda: tv.models.mobilenet_v2(num_classes=5)),
        ("timm", timm("mobilenetv2_100", num_classes=5)),
    ]


def mobilenet_v3(tv, timm):
    return models.mobilenet("v3_small", 5), [("torchvision", lambda: tv.models.mobilenet_v3_small(num_classes=5))]


def densenet(tv, timm):
    net = models.densenet(121, 5, 8, (((16, 4),) * 2, ((16, 4),) * 3), (8,))
    shape = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "num_classes": 5}
    return net, [("torchvision", lambda: tv.models.DenseNet(**shape))]


def convnext(tv, timm):
    net = models.convnext("tiny", 5, (8, 12, 8, 8), ((32, 32), (48,), (32,), (32,)))

    def torchvision():
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        blocks = ((8, 12, 2), (12, 8, 1), (8, 8, 1), (8, None, 1))
        return ConvNeXt([CNBlockConfig(a, b, n) for a, b, n in blocks], num_classes=5)

    return net, [
        ("torchvision", torchvision),
        (
            "timm",
            lambda: __import__("timm").models.convnext.ConvNeXt(num_classes=5, depths=(2, 1, 1, 1), dims=(8, 12, 8, 8)),
        ),
    ]


def vit(tv, timm):
    net = models.vit("tiny", 5, 16, ((2, 8, 8, 24), (2, 8, 8, 24)), scale=8**-0.5)
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
    return net, [
        ("torchvision", lambda: tv.models.VisionTransformer(64, 16, 2, 2, 16, 24, num_classes=5)),
        ("timm", lambda: __import__("timm").models.vision_transformer.VisionTransformer(**shape, num_classes=5)),
    ]


@pytest.mark.parametrize("package", ["torchvision", "timm"])
@pytest.mark.parametrize("family", [resnet, mobilenet_v2, mobilenet_v3, densenet, convnext, vit])
def test_families_answer_as_their_originals_do(tmp_path, family, package):
    torch, tv = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    pytest.importorskip(package)
    module, made = family(tv, lambda name, **more: lambda: __import__("timm").create_model(name, **more))
    if package not in dict(made):
        pytest.skip(f"{package} has the same names, or another function")
    torch.manual_seed(0)
    original = dict(made)[package]().eval()
    for name, buffer in original.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    for parameter in original.parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.1 * torch.rand(parameter.shape)
    torch.save(original.state_dict(), tmp_path / "x.pth")
    tensors = {name: value.contiguous().numpy() for name, value in original.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")

    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), x)
    with torch.no_grad():
        want = original(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    for name in ("x.pth", "x.safetensors"):
        variables = models.load_checkpoint(tmp_path / name, module, template)
    got = np.asarray(jax.jit(module.apply)(variables, x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1, np.abs(want).max()))
