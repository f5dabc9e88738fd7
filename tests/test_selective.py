"""Pictures of what the most selective units answer to, for bright squares of which units see one corner each."""

import csv
import io

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from treesurgeon import engine
from treesurgeon.search.activity import Looked
from treesurgeon.search.data import Split
from treesurgeon.search.selective import EACH, IMAGES, as_plane, most_selective, write_selective
from treesurgeon.search.strips import GREY, SIDE, ending, strip


class Corners(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (1, 1), use_bias=False, name="see")(x))
        x = nn.relu(nn.Conv(4, (1, 1), use_bias=False, name="mix")(x))
        return nn.Dense(2, use_bias=False, name="head")(x.reshape(len(x), -1))


def looked():
    """Class 0 is a red square on the left, class 1 a green one on the right; unit 0 sees red, 1 green, 2 nothing."""
    labels = np.arange(20) % 2
    images = np.zeros((20, 8, 8, 3), np.float32)
    for i, label in enumerate(labels):
        images[i, 2:6, slice(4, 8) if label else slice(0, 4), label] = 0.5 + i / 40
    module = Corners()
    variables = jax.tree.map(np.asarray, module.init(jax.random.key(0), images[:1]))
    variables["params"]["see"]["kernel"] = np.diag([1.0, 1, 0]).astype(np.float32)[None, None]
    mix = np.zeros((1, 1, 3, 4), np.float32)
    mix[..., 0, 0] = mix[..., 1, 1] = mix[..., 0, 2] = mix[..., 1, 2] = mix[..., 1, 3] = 1
    variables["params"]["mix"]["kernel"] = mix
    graph = engine.trace(module.apply, variables, images[:1])
    split = Split(images, labels, np.arange(100, 120), ("test",), "print")
    return Looked("corners", module.apply, variables, graph, split, ("left", "right"), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    write_selective(home, looked())
    with (home / "selective.csv").open(newline="") as file:
        return home, list(csv.DictReader(file))


def test_the_most_selective_units_of_each_group_are_told(seen):
    home, rows = seen
    assert [(row["group"], row["unit"], row["class"]) for row in rows] == [
        ("see", "0", "left"), ("see", "1", "right"), ("mix", "0", "left"), ("mix", "1", "right"),
    ]  # fmt: skip
    assert {row["selectivity"] for row in rows} == {"1.0"}
    assert rows[1]["top_images"].split() == [str(100 + i) for i in (19, 17, 15, 13, 11, 9)]
    assert rows[1]["top_labels"] == " ".join("1" * IMAGES)
    assert [row["maps"] for row in rows] == ["True"] * 4  # those behind a flattening as well
    assert sorted(path.name for path in (home / "selective").iterdir()) == [f"{i}.png" for i in range(4)]


def test_maps_show_where(seen):
    home, _ = seen
    for k, side in enumerate(("left", "right", "left", "right")):
        pixels = np.asarray(Image.open(home / f"selective/{k}.png").convert("RGB")).astype(int)
        below = pixels[SIDE + 2 : 2 * SIDE + 2, :SIDE]  # the first image in the second row
        orange = below[..., 0] - below[..., 2]
        left, right = orange[20:44, 4:28].mean(), orange[20:44, 36:60].mean()
        assert (left > 100 > 20 > right) if side == "left" else (right > 100 > 20 > left)


def test_maps_are_what_units_are_active_by():
    at = looked()
    maps = engine.activity_maps(at.infer, at.graph)(at.variables, at.split.images)
    mean = engine.unit_activity(at.infer, at.graph)(at.variables, at.split.images)
    assert {name: value.shape for name, value in maps.items()} == {"see": (20, 8, 8, 3), "mix": (20, 64, 4)}
    for name, value in maps.items():
        np.testing.assert_allclose(value.reshape(20, -1, value.shape[-1]).mean(1), mean[name], rtol=1e-5)
    np.testing.assert_allclose(maps["see"][3, ..., 1], at.split.images[3, ..., 1])


def test_no_more_than_some_of_each_group():
    class Found:
        selectivity, activity = np.array([0.5, 0.9, 0.7, 1.0]), np.array([[1, 1, 1, 0]])

        def __init__(self, group):
            self.group = group

    chosen = most_selective([Found("a"), Found("b")])
    assert [(units.group, unit) for units, unit in chosen] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert len(chosen) == 2 * EACH  # and none that is never active


def test_positions_as_a_plane():
    assert as_plane(np.zeros((2, 5, 7)), (10, 14)).shape == (2, 5, 7)
    assert as_plane(np.arange(2 * 50).reshape(2, 50), (20, 40)).shape == (2, 5, 10)
    assert as_plane(np.zeros((2, 197)), (224, 224)) is None  # a class token
    assert as_plane(np.zeros((2,)), (8, 8)) is None
    assert as_plane(np.zeros((2, 1)), (8, 8)) is None


def test_strips_of_small_and_of_large_images():
    small = strip(np.ones((3, 28, 28, 1)))
    assert ending(small) == "png"
    picture = Image.open(io.BytesIO(small))
    assert picture.size == (3 * (84 + 2), 84 + 2)
    assert {colour for _, colour in picture.getcolors()} == {(255, 255, 255), (GREY,) * 3}
    large = strip(np.random.default_rng(0).random((2, 224, 448, 3)), np.ones((2, 7, 14)))
    assert ending(large) == "jpg"
    assert Image.open(io.BytesIO(large)).size == (2 * (2 * SIDE + 2), 2 * (SIDE + 2))
    assert len(large) < 30_000
