"""`folder:PATH`, and labels that are strings: what is read, and what is refused."""

import re
import sys
import types

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from treesurgeon import models
from treesurgeon.search import Config, DataError, RunError, open_source, split_roles
from treesurgeon.search.cli import main
from treesurgeon.search.depth import Depth, depth
from treesurgeon.search.setting import open_parts


def draw(path, value, size=(6, 4), mode="RGB", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **more)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 8), ("test", 6)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                draw(tmp_path / split / name / f"{i}.png", (10 * i, 100 * label, 7))
    (tmp_path / "train/bee/notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_folders_of_splits_and_of_classes(folder):
    source = open_source(f"folder:{folder}")
    assert dict(source.splits) == {"test": 12, "train": 16}
    assert source.label_names == ("ant", "bee")
    assert source.named
    assert source.read_labels("train").tolist() == [0] * 8 + [1] * 8
    images = source.read_images("train", np.array([2, 9]))
    assert (images.shape, images.dtype) == ((2, 4, 6, 3), np.uint8)
    assert images[:, 0, 0].tolist() == [[20, 0, 7], [10, 100, 7]]
    assert dict(open_source(f"folder:{folder}/test").splits) == {"all": 12}
    roles = split_roles(source, ("train",), input_shape=(4, 6, 3))
    assert len(roles.train) == 16
    assert roles.label_names == ("ant", "bee")


def test_images_are_scaled_and_cropped_and_turned_grey(tmp_path):
    draw(tmp_path / "a/x.jpg", 200, size=(32, 20), mode="L")
    draw(tmp_path / "b/x.PNG", (0, 0, 255, 128), size=(9, 30), mode="RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    draw(tmp_path / "b/y.jpg", 50, size=(32, 20), mode="L", exif=turned)
    read = open_source(f"folder:{tmp_path}", shape=(8, 10, 3)).read_images
    assert read("all", np.arange(3)).shape == (3, 8, 10, 3)
    assert read("all", np.arange(3))[1, 4, 5].tolist() == [0, 0, 255]
    assert open_source(f"folder:{tmp_path}", shape=(8, 10, 1)).read_images("all", np.arange(3)).shape == (3, 8, 10, 1)
    as_stored = open_source(f"folder:{tmp_path}")  # grey, as the first one is
    assert as_stored.read_images("all", np.array([2])).shape == (1, 32, 20, 1)
    with pytest.raises(DataError, match=r"got \[20, 32\] of .*a/x.jpg and \[30, 9\] of .*b/x.PNG; pass --im"):
        as_stored.read_images("all", np.arange(2))


def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    levels = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    (tmp_path / "a").mkdir()
    for ending in ("png", "tif"):
        Image.fromarray(levels).save(tmp_path / f"a/deep.{ending}")
    (tmp_path / "a/deep.pgm").write_bytes(b"P5 6 4 65535\n" + levels.astype(">u2").tobytes())
    images = open_source(f"folder:{tmp_path}", labelled=False).read_images("all", np.arange(3))
    for image in images:
        assert np.abs(image[..., 0] - levels / 257.0).max() <= 0.5
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "a/other.tif")
    with pytest.raises(DataError, match=r"other.tif: expected 8 or 16 bits a channel, got 32"):
        open_source(f"folder:{tmp_path}", labelled=False).read_images("all", np.arange(4))


def test_images_are_known_again_at_another_size(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / f"{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).save(path)
    whole, half, third = (
        split_roles(
            open_source(f"folder:{tmp_path}", shape=(side, side, 3)), (), input_shape=(side, side, 3), hold=hold
        )
        for side, hold in ((12, None), (6, None), (4, 0))  # the last one is decoded by other processes
    )
    for other in (half, third):
        assert np.array_equal(whole.certify.digests, other.certify.digests)
        assert whole.certify.fingerprint != other.certify.fingerprint


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"GIF89a", lambda data: b""])
def test_a_damaged_image_is_named(folder, damage):
    path = folder / "train/ant/3.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} cannot be decoded \(.*mend or remove it"):
        open_source(f"folder:{folder}", shape=(4, 6, 3)).read_images("train", np.arange(5))


def test_places_without_images(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    for where, message in (
        ("", r"expected .*/CLASS/\*.png or .*/SPLIT/CLASS/\*.png, got no image there \(bmp, gif"),
        ("/file", "expected a directory, got a file at"),
        ("/none", "expected a directory, got nothing at"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(f"folder:{tmp_path}{where}")


@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_that_are_strings(tmp_path, kind):
    x = np.zeros((4, 2, 2), np.uint8)
    y = np.array(["dog", "cat", "dog", "ox"]).astype(kind)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])
    source = open_source(f"npz:{tmp_path}/a.npz")
    assert (source.label_names, source.named) == (("cat", "dog", "ox"), True)
    assert source.read_labels("train").tolist() == [1, 0, 1, 2]
    np.savez(tmp_path / "b.npz", x=x, y=y, label_names=["ox", "dog", "cat", "hen"])
    source = open_source(f"npz:{tmp_path}/b.npz")
    assert source.read_labels("all").tolist() == [1, 2, 1, 0]
    np.savez(tmp_path / "c.npz", x=x, y=y, label_names=["ox", "dog"])
    with pytest.raises(DataError, match="label 'cat' is not one of label_names: ox, dog"):
        open_source(f"npz:{tmp_path}/c.npz")
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=np.arange(4))
    with pytest.raises(DataError, match="expected labels of one kind, got strings only in y_train"):
        open_source(f"npz:{tmp_path}/d.npz")


def test_one_class_and_image_sizes_are_told_at_once(tmp_path):
    variables = models.resolve("mlp").init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    ocp.save(tmp_path / "checkpoint", variables)
    for i in range(12):
        draw(tmp_path / f"data/only/{i}.png", i)
    config = Config("mlp", str(tmp_path / "checkpoint"), f"folder:{tmp_path}/data", fitted_split=("none",), head="keep")
    with pytest.raises(RunError, match="all images of train are of one class; a classifier needs two"):
        open_parts(config)
    for sizes in ((0,), (1, 2, 3)):
        with pytest.raises(RunError, match="--image-size takes a side, or a height and a width"):
            Config("mlp", "c", "d", image_size=sizes).check()
        with pytest.raises(RunError, match="--image-size takes a side, or a height and a width"):
            depth(Depth("mlp", "c", "d", image_size=sizes), print)


def test_depth_of_a_model_on_a_few_images_of_another_size(tmp_path, monkeypatch, capsys):
    """Fewer images than any batch, scaled to what a model outside the zoo is to take."""
    mine = types.ModuleType("mine")
    mine.net = lambda: models.mlp((8,), num_classes=2)
    monkeypatch.setitem(sys.modules, "mine", mine)
    ocp.save(tmp_path / "checkpoint", mine.net().init(jax.random.key(0), np.zeros((1, 6, 5, 3))))
    for label, name in enumerate(("dark", "light")):
        for i in range(6):
            draw(tmp_path / f"data/{name}/{i}.png", (200 * label + i,) * 3, size=(9, 7 + i))
    command = ["depth", "--model", "mine:net", "--checkpoint", str(tmp_path / "checkpoint"), "--data",
               f"folder:{tmp_path}/data", "--fitted-split", "none", "--image-size", "6", "5",
               "--out", str(tmp_path)]  # fmt: skip
    main(command)
    assert "2 classes, train " in capsys.readouterr().out
    found = (tmp_path / "depth.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in found[-2:]] == [["before linear", "8"], ["its own head", ""]]
    assert (tmp_path / "depth.png").exists()
