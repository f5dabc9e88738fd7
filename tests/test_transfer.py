"""Labels that are not the checkpoint's: heads replaced, rows carried over, depth measured, models saved and loaded."""

import csv
import html
import json
import pickle
import xml.etree.ElementTree as ET

import fewer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from laws import leaves_of
from orbax.checkpoint import v1 as ocp

from treesurgeon import engine, models
from treesurgeon.engine.shortened import ENTRY
from treesurgeon.search import Config, DataError, hidden, open_source, run
from treesurgeon.search.charts import document
from treesurgeon.search.cli import main
from treesurgeon.search.data import Roles, Split
from treesurgeon.search.depth_chart import depths
from treesurgeon.search.heads import LinearHead
from treesurgeon.search.setting import fingerprint, prepare
from treesurgeon.search.shortening import truncated
from treesurgeon.search.sources import Source
from treesurgeon.search.subject import Subject, SubjectError, open_subject
from treesurgeon.search.transfer import Labels, adapted, count_argument, match_labels, replaceable, with_new_head

fewer_layers = fewer.fewer_layers
RNG = np.random.default_rng(0)
SMALL = {"population": 4, "generations": 1, "search_images": 32, "calibration_images": 8, "refit_images": 32,
         "finalists": 1, "epochs": 1, "certify": False, "reconstruct": "none", "formats": False,
         "pictures": False}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A zoo model's checkpoint and images in which the classes are easy to tell, under several label lists."""
    home = tmp_path_factory.mktemp("transfer")
    module = models.resolve("digits_cnn")
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
    variables = models.resolve("mlp").init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    ocp.save(str(home / "mlp"), jax.tree.map(np.asarray, variables))
    kinds = RNG.random((4, 8, 8, 1))
    y = np.arange(400) % 4
    x = (kinds[y] + 0.15 * RNG.normal(size=(400, 8, 8, 1))).astype(np.float32)
    arrays = {"x_train": x[:200], "y_train": y[:200], "x_test": x[200:], "y_test": y[200:]}
    np.savez(home / "names.npz", **arrays, label_names=np.array(["seven", "3", "box", "9"]))
    np.savez(home / "counted.npz", **arrays)
    np.savez(home / "gap.npz", **{**arrays, "label_names": np.array(["a", "b", "c", "d", "e"])})
    np.savez(home / "twice.npz", **arrays, label_names=np.array(["a", "a", "c", "d"]))
    return home


def config(place, data, **changes):
    given = {"model": "digits_cnn", "checkpoint": str(place / "checkpoint"), "data": f"npz:{place / data}.npz",
             "out": str(place / "out" / data)}  # fmt: skip
    return Config(**{**given, **changes})


def test_a_new_head_stands_on_the_statistics_that_variants_will_have(place):
    for images, changed in ((8, True), (0, False)):
        setting = prepare(config(place, "counted", calibration_images=images))
        assert setting.original is not None
        old, new = (leaves_of(subject.variables) for subject in (setting.original, setting.subject))
        assert setting.subject.momenta
        assert all(np.array_equal(old[path], new[path]) != changed for path in setting.subject.momenta)
        fresh = engine.reestimate(setting.subject.train, setting.subject.momenta)
        x = setting.roles.train.images[: setting.config.refit_images]
        again = leaves_of(jax.jit(fresh)(setting.subject.variables, x, jax.random.key(0)))
        assert all(np.allclose(again[path], new[path], atol=1e-5) == changed for path in setting.subject.momenta)
        logits = np.asarray(jax.jit(setting.subject.infer)(setting.subject.variables, setting.roles.train.images))
        assert (logits.argmax(1) == setting.roles.train.labels).mean() > 0.9


def source(names, named=True):
    return Source("plain", {"all": 0}, tuple(names), lambda split: np.zeros(0, int), lambda s, i: i, named)


ABC = ("a", "b", "c")


@pytest.mark.parametrize(
    ("ours", "named", "theirs", "head", "want"),
    [
        ("abc", True, ABC, "auto", (False, {})),
        ("cab", True, ABC, "auto", (True, {0: 2, 1: 0, 2: 1})),
        ("bx", True, ABC, "auto", (True, {0: 1})),
        ("xyz", True, ABC, "auto", (True, {})),
        ("xyz", True, None, "auto", (False, {})),  # nobody knows the checkpoint's names
        ("xyz", False, ABC, "auto", (False, {})),  # nobody named the data's
        ("ab", False, ABC, "auto", (True, {})),
        ("ab", True, None, "auto", (True, {})),
        ("bx", True, ABC, "keep", (False, {})),
        ("abc", True, ABC, "fit", (True, {})),
    ],
)
def test_labels_are_matched(ours, named, theirs, head, want):
    found = match_labels(source(ours, named), 3, theirs, head)
    assert (found.replaced, dict(found.carried)) == want
    assert found.names == tuple(ours)


def test_zoo_labels_are_as_many_as_the_classes():
    for preset in models.ZOO.values():
        assert preset.labels is None or len(set(preset.labels)) == preset.num_classes


def test_rows_of_named_classes_are_carried_over_and_the_others_fitted(place):
    before = open_subject("digits_cnn", str(place / "checkpoint"), (8, 8, 1))
    setting = prepare(config(place, "names", calibration_images=0))
    subject, head = setting.subject, setting.head
    assert (head.carried, head.fitted) == (("3", "9"), ("seven", "box"))
    assert head.dropped == ()  # two labels are the checkpoint's
    assert subject.num_classes == 4
    assert subject.spec.kwargs == {"num_classes": 4}
    old, new = before.variables["params"]["linear"], subject.variables["params"]["linear"]
    np.testing.assert_array_equal(new["kernel"][:, [1, 3]], old["kernel"][:, [3, 9]])
    np.testing.assert_array_equal(new["bias"][jnp.array([1, 3])], old["bias"][jnp.array([3, 9])])
    for path, leaf in leaves_of(subject.variables).items():
        if "linear" not in path:
            np.testing.assert_array_equal(leaf, leaves_of(before.variables)[path])
    logits = np.asarray(subject.infer(subject.variables, setting.roles.train.images))
    right = (logits.argmax(1) == setting.roles.train.labels).mean()
    assert right == pytest.approx(head.train_accuracy)
    fitted = np.isin(setting.roles.train.labels, [0, 2])
    assert (logits.argmax(1) == setting.roles.train.labels)[fitted].mean() > 0.9  # random features, easy classes
    assert prepare(config(place, "names", head="fit")).head.carried == ()


def test_with_no_label_in_common_the_dense_layers_after_the_pool_go(place, monkeypatch):
    plain = {"head_widths": (0,)}
    whole, short = (prepare(config(place, "counted", head=head, **plain)) for head in ("fit", "auto"))
    assert whole.head.dropped == ()
    assert any("dense0" in path for path in leaves_of(whole.subject.variables))
    assert short.head.dropped == ("params/dense0/kernel",)
    assert short.head.hidden == 0
    assert (short.head.carried, short.head.fitted) == ((), ("0", "1", "2", "3"))
    subject, roles = short.subject, short.roles
    assert not any("dense0" in path for path in leaves_of(subject.variables))
    assert (subject.num_classes, short.head.features) == (4, 48)
    assert (
        "its dense layers after the last pool go (params/dense0/kernel; --head fit keeps them)" in short.head.sentence
    )
    logits = np.asarray(subject.infer(subject.variables, roles.train.images))
    assert (logits.argmax(1) == roles.train.labels).mean() == pytest.approx(short.head.train_accuracy)
    assert short.head.train_accuracy > 0.9
    sent = pickle.loads(pickle.dumps(subject.module))  # as workers get it, after it was used
    np.testing.assert_array_equal(sent.apply(subject.variables, roles.train.images), logits)
    for path in subject.momenta:  # statistics as variants will have them
        np.testing.assert_allclose(leaves_of(subject.variables)[path], leaves_of(whole.subject.variables)[path], 1e-4)
    monkeypatch.setattr(hidden, "choose", lambda linear, heads, x, y, task: heads[1])
    deep = prepare(config(place, "counted"))
    assert deep.head.hidden == deep.subject.spec.hidden == 64
    assert "on 48 features, with a hidden layer of 64; fitted to" in deep.head.sentence


@pytest.mark.slow
@pytest.mark.parametrize("width", [0, 16])
def test_a_search_from_there_is_saved_and_loaded(place, tmp_path, monkeypatch, width):
    """Truncated once more among the finalists, its hidden layer searched like any other."""
    if width:
        monkeypatch.setattr(hidden, "choose", lambda linear, heads, x, y, task: heads[0])
    changes = {"params": 0.7, "truncations": 1, "head_widths": (width,), "baselines": False, **SMALL}
    given = config(place, "counted", out=str(tmp_path / "out"), **changes)
    outcome = run(given, lambda line: None)
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    assert manifest["head"]["dropped"] == ["params/dense0/kernel"]
    assert {"v1", "t1"} <= manifest["metrics"].keys()
    model, setting = engine.load(outcome.path), prepare(given)
    test, subject = setting.roles.test, setting.subject
    right = (np.asarray(model(test.images)).argmax(1) == test.labels).mean()
    assert right == pytest.approx(manifest["metrics"][manifest["selected"]]["test_accuracy"])
    with (tmp_path / "out" / "groups.csv").open() as file:
        groups = [row["group"] for row in csv.DictReader(file)]
    assert any("shortened_hidden" in name for name in groups) == bool(width)
    main(["verify", str(outcome.path), "--data", given.data])
    # Cut once more, and opened with the module of the search.
    x = test.images[:4]
    points = engine.points(subject.infer, subject.graph, subject.spec.example)
    assert (points[-2] == ENTRY) == bool(width)
    for point in (points[0], points[-2]):
        classes = subject.num_classes
        features = jax.eval_shape(engine.truncate(subject.infer, subject.graph, point, x), subject.variables, x)
        head = LinearHead(RNG.normal(size=(features.shape[-1], classes)), np.zeros(classes), np.float32(0))
        short = truncated(subject, point, head)
        engine.save(tmp_path / point, short.spec, short.variables, engine.Plan(), module=short.module)
        loaded = engine.load(tmp_path / point, module=subject.module)
        np.testing.assert_allclose(loaded(x), short.infer(short.variables, x), rtol=1e-4, atol=1e-5)
        find = engine.features(subject.infer, subject.graph)(subject.variables, x)[point]
        np.testing.assert_allclose(loaded(x), head(find), rtol=1e-4, atol=1e-4)


def test_labels_that_were_counted_carry_nothing(place):
    head = prepare(config(place, "counted")).head
    assert head.carried == ()
    assert head.train_accuracy > 0.9
    assert "fitted in closed form to 200 images of train: 0, 1, 2, 3; " in head.sentence


def test_factories_say_how_many_classes_they_make():
    assert count_argument("resnet20") == "num_classes"
    with pytest.raises(SubjectError, match="give its factory an argument `num_classes`"):
        count_argument("treesurgeon.models.vit:Layer")


def test_where_every_class_is_known_nothing_is_fitted(place):
    setting = prepare(config(place, "names", source_labels=("seven", "3", "box", "9", *"uvwxyz")))
    assert set(setting.head.carried) == {"seven", "3", "box", "9"}
    assert setting.head.penalty is None


@pytest.mark.parametrize(
    ("data", "changes", "match"),
    [
        ("gap", {}, r"class 'e' has no image in train.*--head keep"),
        ("twice", {}, "expected label_names that differ"),
        ("names", {"source_labels": ("a", "b")}, r"10 classes and 2 names .*--source-labels"),
        ("names", {"mean": (float("nan"),)}, "--mean"),
    ],
)
def test_what_cannot_be_transferred(place, data, changes, match):
    with pytest.raises((SubjectError, DataError), match=match):
        prepare(config(place, data, **changes))


class Odd(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        if self.kind == "window":
            return nn.Conv(3, (8, 8), padding="VALID", name="head")(x)[:, 0, 0]
        if self.kind == "no bias":
            return nn.Dense(3, use_bias=False, name="head")(x.mean((1, 2)))
        logits = nn.Dense(3, name="head")(x.mean((1, 2)))
        return nn.softmax(logits) if self.kind == "softmax" else logits / 2


@pytest.mark.parametrize(("kind", "match"), [("window", "a window of 8×8"), ("no bias", "it has no bias of its own")])
def test_heads_that_cannot_be_replaced(kind, match):
    module = Odd(kind)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    subject = Subject(engine.ModelSpec("mine:odd", (8, 8, 1), {}), module, variables, 3)
    with pytest.raises(SubjectError, match=match):
        replaceable(subject)


@pytest.mark.parametrize("kind", ["softmax", "temperature"])
def test_what_follows_the_head_is_refused(kind):
    module, x = Odd(kind), RNG.random((6, 8, 8, 1)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    subject = Subject(engine.ModelSpec("mine:odd", (8, 8, 1), {}), module, variables, 3)
    split = Split(x, np.arange(6, dtype=np.int32) % 3, np.arange(6), ("all",), "")
    roles = Roles(split, split, split, split, True, ABC)
    with pytest.raises(SubjectError, match=r"its head params/head/kernel .* something follows it, such as a softmax"):
        with_new_head(subject, Labels(ABC, True), roles)


class Killed(Exception):
    """What stops a run at a line that it says."""


def until(words):
    def say(line):
        if line.startswith(words):
            raise Killed

    return say


def files_of(directory):
    """What a run left as text; the checksums of binary files aside."""
    names = ("candidates.csv", "front.csv", "results.csv", "curves.csv", "shift.json", "selected/README.md")
    manifest = json.loads((directory / "selected/manifest.json").read_text())
    manifest.pop("files")
    return {name: (directory / name).read_text() for name in names} | {"manifest": manifest}


@pytest.mark.slow
def test_a_killed_search_on_other_labels_goes_on_bit_for_bit(place):
    changes = {**SMALL, "generations": 2, "epsilon": 0.5, "eta": 0.9, "augment": "flip-crop", "freeze": ("1",),
               "layer_decay": 0.5, "distill": 0.5, "model": "mlp", "checkpoint": str(place / "mlp")}  # fmt: skip
    whole, killed = (config(place, "names", out=str(place / name), **changes) for name in ("whole", "killed"))
    run(whole, lambda _: None)
    for words in ("generation   1/2", "trained dense from scratch"):
        with pytest.raises(Killed):
            run(killed, until(words))
        assert not (killed.directory / "selected").exists()
    said: list = []
    run(killed, said.append)
    assert any(line.startswith("resumed after generation 2") for line in said)
    one, two = (ocp.load(str(each.directory / "selected/variables")) for each in (whole, killed))
    assert fingerprint(one) == fingerprint(two)
    assert files_of(whole.directory) == files_of(killed.directory)


@pytest.mark.slow
def test_a_search_on_other_labels_saves_a_model_that_loads(place):
    said = []
    settings = {**SMALL, "epsilon": 0.5, "eta": 0.9, "formats": True, "pictures": True, "truncations": 0}
    outcome = run(config(place, "names", out=str(place / "run"), **settings), said.append)
    assert said[0].startswith("the labels are not the checkpoint's: new head params/linear/kernel on 128 features; ")
    model = engine.load(outcome.path)
    roles = prepare(config(place, "names")).roles
    logits = np.asarray(model(roles.test.images))
    assert logits.shape == (len(roles.test), 4)
    claimed = model.manifest["metrics"][model.manifest["selected"]]["test_accuracy"]
    assert (logits.argmax(1) == roles.test.labels).mean() == pytest.approx(claimed)
    assert model.manifest["labels"] == ["seven", "3", "box", "9"]
    assert model.manifest["head"]["carried"] == ["3", "9"]
    card = (outcome.path / "README.md").read_text()
    assert "new head" in card
    assert '<img class="strip" alt="Unit ' in (outcome.path.parent / "report.html").read_text()
    with (outcome.path.parent / "formats.csv").open() as file:
        for row in csv.DictReader(file):
            assert f"| {row['format']} | {int(row['bytes']):,} | " in card
    names = ["dense", "v1", "dense fine-tuned", "dense from scratch", "linear probe"]
    if model.manifest["selected"] == "v1":
        names.append("v1 from scratch")
    assert [line.variant for line in outcome.lines] == names
    assert set(model.manifest["baselines"]["found"]) == set(names[2:])
    assert outcome.baselines.startswith("On test ")
    assert outcome.baselines in card
    directory = outcome.path.parent
    with (directory / "results.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [line.variant for line in outcome.lines]
    with (directory / "curves.csv").open() as file:
        assert {row["variant"] for row in csv.DictReader(file)} == set(names) - {"dense", "linear probe"}
    assert outcome.baselines in html.unescape((directory / "report.html").read_text())
    assert sum(line.startswith("domain shift: ") for line in said) == 1
    again = []
    found = run(config(place, "names", out=str(place / "run"), **settings), again.append)
    assert any("this run is complete" in line for line in again)
    assert (found.lines, found.baselines) == (outcome.lines, outcome.baselines)


def test_depth_by_the_command_line(place, capsys):
    main(["depth", "--model", "digits_cnn", "--checkpoint", str(place / "checkpoint"),
          "--data", f"npz:{place / 'names.npz'}", "--out", str(place / "depth")])  # fmt: skip
    out = capsys.readouterr().out
    assert "4 classes, train 200 and search 80 images" in out
    with (place / "depth/depth.csv").open() as file:
        rows = {row["point"]: row for row in csv.DictReader(file)}
    subject = open_subject("digits_cnn", str(place / "checkpoint"), (8, 8, 1))
    assert list(rows) == list(engine.points(subject.infer, subject.graph, jax.ShapeDtypeStruct((1, 8, 8, 1), "f")))
    whole = rows["before linear"]
    dense = engine.cost(prepare(config(place, "names")).subject.graph, engine.Plan())
    assert (int(whole["params"]), int(whole["macs"])) == (dense.params, dense.macs)
    macs = [int(row["macs"]) for row in rows.values()]
    assert macs == sorted(macs)
    for row in rows.values():
        assert float(row["gap"]) == pytest.approx(float(row["train_accuracy"]) - float(row["search_accuracy"]))
    assert float(whole["search_accuracy"]) > 0.9
    root = ET.fromstring((place / "depth/depth.svg").read_text())
    texts = [node.text for node in root.iter() if node.text]
    assert [text for text in texts if text in rows] == list(rows)
    assert sum(node.tag.endswith("circle") for node in root.iter()) == 2 * len(rows)


def test_depth_shows_the_own_head_where_labels_are_the_checkpoints(place, capsys):
    names = np.array([str(k) for k in range(10)])
    with np.load(place / "counted.npz") as arrays:
        np.savez(place / "known.npz", **arrays, label_names=names)
    main(["depth", "--model", "digits_cnn", "--checkpoint", str(place / "checkpoint"),
          "--data", f"npz:{place / 'known.npz'}", "--out", str(place / "own")])  # fmt: skip
    assert "the whole model, with its own head, " in capsys.readouterr().out
    with (place / "own/depth.csv").open() as file:
        *cuts, own = csv.DictReader(file)
    assert all(cut["features"] and cut["penalty"] for cut in cuts)
    assert (own["point"], own["features"], own["penalty"]) == ("its own head", "", "")
    assert (own["params"], own["macs"]) == (cuts[-1]["params"], cuts[-1]["macs"])
    setting = prepare(config(place, "known"))
    subject = adapted(setting.subject, setting.roles.train.images)
    answers = np.asarray(subject.infer(subject.variables, setting.roles.search.images)).argmax(1)
    assert float(own["search_accuracy"]) == pytest.approx((answers == setting.roles.search.labels).mean())
    assert "its own head" in (place / "own/depth.svg").read_text()


def test_depths_stand_where_their_values_are():
    chart = depths("a < b", ["p", "q"], {"train": [0.5, 0.5], "search": [0.25, 0.75]})
    root = ET.fromstring(document([chart]))
    heights = [float(node.get("cy")) for node in root.iter() if node.tag.endswith("circle")]
    assert heights[0] > heights[2] == heights[3] > heights[1]  # the one that ends higher comes first
    assert heights[0] - heights[2] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert "on search: p 25.0%, q 75.0%" in chart.label
    with pytest.raises(ValueError, match="a value for each of 2 places"):
        depths("t", ["p", "q"], {"search": [0.5]})


def test_npz_names_are_read(place):
    assert open_source(f"npz:{place / 'names.npz'}").label_names == ("seven", "3", "box", "9")
    assert open_source(f"npz:{place / 'names.npz'}").named
    assert not open_source(f"npz:{place / 'counted.npz'}").named
