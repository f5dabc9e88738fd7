"""`treesurgeon insight` on images whose classes are bright spots, and on a network with a unit for each spot."""

import csv
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import BROWSER, browser
from orbax.checkpoint import v1 as ocp

from treesurgeon import engine, models
from treesurgeon.search.cli import main

SPOTS = (0, 9, 27)  # the pixel that is bright in images of each class
NAMES = ("left", "upper", "<middle>")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An MLP whose unit i answers to spot i, unit 3 to all three, and the others to none; and its images."""
    home = tmp_path_factory.mktemp("insight")
    y = np.arange(120) % 3
    x = np.zeros((120, 64), np.float32)
    x[np.arange(120), np.array(SPOTS)[y]] = 0.2 + 0.8 * np.random.default_rng(0).permutation(120) / 120
    np.savez(home / "spots.npz", x=x.reshape(-1, 8, 8, 1), y=y, label_names=np.array(NAMES))
    kernel = np.zeros((64, 8), np.float32)
    kernel[list(SPOTS), [0, 1, 2]] = kernel[list(SPOTS), 3] = 1
    module = models.resolve("mlp", widths=(8,), num_classes=3)
    variables = jax.tree.map(np.asarray, module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    variables["params"]["dense0"] = {"kernel": kernel, "bias": np.full(8, -0.01, np.float32)}
    (home / "own.py").write_text(
        "from treesurgeon import models\n\ndef spots():\n    return models.mlp((8,), num_classes=3)\n"
    )
    ocp.save(str(home / "checkpoint"), variables)
    return home, variables


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def look(home, monkeypatch, *arguments):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    main(["insight", *arguments, "--data", "npz:spots.npz"])


@pytest.fixture(scope="module")
def seen(place, request):
    home, _ = place
    with pytest.MonkeyPatch.context() as patch:
        look(home, patch, "own:spots", "--checkpoint", "checkpoint", "--fitted-split", "none", "--out", "dense")
    return home / "dense"


def test_units_are_told_by_what_they_answer_to(seen):
    rows = table(seen / "units.csv")
    assert [row["unit"] for row in rows] == list(map(str, range(8)))
    assert {row["group"] for row in rows} == {"dense0"}
    assert [row["class"] for row in rows[:3]] == list(NAMES)
    index = [float(row["selectivity"]) for row in rows]
    np.testing.assert_allclose(index[:3], 1)
    assert index[3] < 0.2
    assert index[4:] == [0] * 4
    x, y = np.load(seen.parent / "spots.npz")["x"], np.load(seen.parent / "spots.npz")["y"]
    top = list(map(int, rows[1]["top_images"].split()))
    assert len(top) == 8
    assert (y[top] == 1).all()
    bright = x[top].max((1, 2, 3))
    assert (np.diff(bright) <= 0).all()
    assert rows[5]["top_images"] == ""
    (layer,) = table(seen / "layers.csv")
    assert (layer["units"], layer["inactive"]) == ("8", "4")
    assert 1 < float(layer["participation_ratio"]) < 4


class Pictures(HTMLParser):
    def __init__(self):
        super().__init__()
        self.alts = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.alts.append(dict(attrs)["alt"])
            assert dict(attrs)["src"].startswith("data:image/png;base64,")


def test_the_page_has_pictures_and_escapes_names(seen):
    text = (seen / "insight.html").read_text()
    page = Pictures()
    page.feed(text)
    assert len(page.alts) == 4  # of the six units that are shown two are never active
    assert page.alts[2] == ", ".join(["<middle>"] * 8)
    assert "<middle>" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "8" in (seen / "layers.svg").read_text()


@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_shows_it_without_errors(seen, tmp_path):
    with browser(tmp_path) as page:
        page.open(seen / "insight.html", width=400)
        assert page.errors == []
        assert all(url.startswith(("file:", "data:")) for url in page.requests)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.run("[...document.images].every(image => image.naturalWidth > 8)")


def test_a_selected_model_is_looked_at_as_it_was_cut(place, monkeypatch, capsys):
    home, variables = place
    spec = engine.ModelSpec("own:spots", (8, 8, 1), {})
    module = models.mlp((8,), num_classes=3)
    graph = engine.trace(module.apply, variables, jax.ShapeDtypeStruct((1, 8, 8, 1), "float32"))
    plan = engine.Plan(keep={"dense0": np.array([2, 3])})
    manifest = {
        "data": {"fitted": []}, "seed": 0, "normalisation": {"mean": [0.0], "std": [1.0]}, "labels": list(NAMES)
    }  # fmt: skip
    small = engine.cut(variables, graph, plan)
    engine.save(home / "run/selected", spec, small, plan, manifest=manifest, module=module)
    look(home, monkeypatch, "run/selected", "--allow-import", "--images", "30")
    rows = table(home / "run/insight/units.csv")
    assert rows[0]["class"] == "<middle>"
    assert float(rows[0]["selectivity"]) == 1
    assert "on 24 images of search" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mlp"], "for a model pass --checkpoint"),
        (["nowhere/selected"], "for a selected one the path of its `selected` directory"),
        (["own:spots", "--checkpoint", "checkpoint", "--images", "1"], "--images 1: expected at least 2"),
        (["dense"], "has no manifest.json"),
        (["dense", "--checkpoint", "checkpoint"], "leave --checkpoint out"),
    ],
)
def test_messages(place, seen, arguments, words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        look(place[0], monkeypatch, *arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
