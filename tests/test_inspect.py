"""What a person is told about a graph: tables, explanations, pictures, and the command that prints them."""

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws import Bench
from zoo import ODD, ZOO

from treesurgeon import engine
from treesurgeon.engine import PlanError, StructureError
from treesurgeon.search.cli import main

P = {"a": np.ones((5, 6), "f"), "b": np.ones((6, 4), "f"), "c": np.ones((5, 6), "f"), "d": np.ones((4, 2), "f")}
X = np.ones((3, 5), "f")


def fn(p, x):
    return jax.nn.relu((x @ p["a"] + x @ p["c"]) @ p["b"]) @ p["d"]


def test_explain_says_what_goes_together_and_where_it_meets():
    text = engine.trace(fn, P, X).explain("a", 1)
    assert text.startswith("a[1], size 6: a\ngroup 'a', 6 units; with it go\n  b[0]\n  c[1]\nbecause they meet at\n")
    assert "`add` (test_inspect.py:" in text
    assert "`dot_general` (test_inspect.py:" in text


def test_explain_says_why_an_axis_is_pinned():
    graph = engine.trace(fn, P, X)
    assert graph.explain("d", 1) == "d[1], size 2, is pinned: an axis of the output"
    assert "an axis of the input args[0]" in graph.explain("c", 0)


def test_explain_shows_segments_and_products():
    def heads(p, x):
        h = jnp.einsum("bihk,bjhk->bhij", *[(x @ p["a"]).reshape(3, 1, 2, 3)] * 2)
        return (h[..., 0] * (x @ p["a"]).reshape(3, 2, 3)).reshape(3, 6) @ p["b"]

    graph = engine.trace(heads, P, X)
    assert graph.explain("a", 1).startswith("a[1], size 6: a[0] × a[1]\ngroup 'a[0]', 2 units; with it go\n  b[0]\n")

    def joined(p, x):
        return jnp.concatenate([x @ p["a"], x @ p["c"]], 1) @ p["w"]

    graph = engine.trace(joined, {**P, "w": np.ones((12, 2), "f")}, X)
    assert graph.explain("w", 0).startswith("w[0], size 12: a | c\n")


@pytest.mark.parametrize(("path", "axis", "match"), [("z", 0, "names the leaf 'z'"), ("a", 2, "has the axes 0 to 1")])
def test_explain_refuses_what_is_not_there(path, axis, match):
    with pytest.raises(PlanError, match=match):
        engine.trace(fn, P, X).explain(path, axis)


def test_dot_names_every_group_and_leaf():
    text = engine.trace(fn, P, X).dot()
    assert text.startswith("graph coupling {")
    assert text.count("{") == text.count("}")
    for line in ('"group a" -- "c" [label=1]', '"b" [label="b 6×4" shape=box]'):
        assert line in text
    nested = Bench(ODD["nested_residuals"].subject).graph.dot()
    assert nested.index('"cluster a"') < nested.index('"cluster b"') < nested.index('"b/w" [') < nested.index("}")


# Pictures, read back as XML.


def picture(graph):
    """By class of <g>: what each tells, its rectangle, and its lines and numbers."""
    root = ET.fromstring(graph.svg())
    out = {}
    for g in root.iter(f"{NS}g"):
        rect = g.find(f"{NS}rect")
        box = [float(rect.get(k)) for k in ("x", "y", "width", "height")]
        lines = [[float(n) for n in re.findall(r"-?[\d.]+", p.get("d"))] for p in g.iter(f"{NS}path")]
        numbers = [t.text for t in g.iter(f"{NS}text") if t.get("class") == "axis"]
        out.setdefault(g.get("class").split()[0], {})[g.find(f"{NS}title").text] = box, lines, numbers
    return out, float(root.get("width")), float(root.get("height"))


NS = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", ["nested_residuals", "free_inputs", "scanned_stack", "conv_grouped", "plain_pytree"])
def test_the_picture_shows_every_group_leaf_and_block(name):
    graph = Bench({**ZOO, **ODD}[name].subject).graph
    drawn, width, height = picture(graph)
    leaves = {title.partition(",")[0]: box for title, (box, _, _) in drawn["leaf"].items()}
    assert leaves.keys() == graph.leaves.keys() | graph.inputs.keys()
    groups = {title.partition(",")[0]: found for title, found in drawn["group"].items()}
    assert list(groups) == [*graph.groups, *graph.steps]
    for group in graph.groups.values():
        box, lines, numbers = groups[group.name]
        n = len(group.members)  # the lines to inputs come before
        for member, line, number in zip(group.members, lines[-n:], numbers[-n:], strict=True):
            x, y, _, h = leaves[member.path]
            assert line[:2] == [box[0] + box[2], box[1] + 10]
            assert line[-2] == x
            assert y <= line[-1] <= y + h
            assert number == str(member.axis)
    boxes = [box for kind in drawn.values() for box, _, _ in kind.values()]
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
    for column in (leaves.values(), (box for box, _, _ in groups.values())):
        ordered = sorted(column, key=lambda box: box[1])
        assert all(a[1] + a[3] <= b[1] + 0.1 for a, b in itertools.pairwise(ordered))
    for title, ((x, y, w, h), _, _) in drawn.get("block", {}).items():
        inside = graph.blocks[title.partition(",")[0].removeprefix("block ")].leaves
        for path, (u, v, _, t) in leaves.items():
            assert (x < u < x + w and y < v and v + t < y + h) == (path in inside)


def test_the_picture_says_what_its_columns_are():
    def heads(name):
        root = ET.fromstring(Bench({**ZOO, **ODD}[name].subject).graph.svg())
        return [text.text for text in root.findall(f"{NS}text")]

    assert heads("scanned_stack")[0] == "groups: units; dashed: stacks of steps"
    assert heads("free_inputs") == ["groups: units", "axis", "leaves and sizes; dashed: inputs; in blocks"]
    assert heads("nested_residuals")[2] == "leaves and sizes; in blocks"


def test_the_picture_says_why_an_axis_is_pinned():
    drawn, _, _ = picture(engine.trace(fn, P, X))
    assert "d, 4×2\naxis 0: b\naxis 1: an axis of the output" in drawn["leaf"]
    assert "@media (prefers-color-scheme: dark)" in engine.trace(fn, P, X).svg()


def test_the_picture_of_parameters_that_are_one_array():
    drawn, _, _ = picture(engine.trace(lambda p, x: jnp.tanh(x @ p) @ p.T, np.ones((5, 6), "f"), np.ones((3, 5), "f")))
    assert any("5×6" in text for text in drawn["leaf"])


def test_the_picture_escapes_names():
    graph = engine.trace(lambda p, x: jnp.tanh(x @ p["<a>&"]).sum(-1), {"<a>&": P["a"]}, X)
    assert list(picture(graph)[0]["group"]) == ["<a>&, 6 units\n<a>&[1]"]


def test_axes_can_be_pinned_by_hand():
    graph = engine.trace(fn, P, X, pin_axes=["b[1]"])
    assert list(graph.groups) == ["a"]
    assert str(graph.pinned["d[0]"]) == "pinned by the caller of trace"
    assert not engine.trace(fn, P, X, pin_axes=["a", "b"]).groups
    with pytest.raises(StructureError, match=r"pin_axes names 'b\[7\]', which is no axis; did you mean 'b\["):
        engine.trace(fn, P, X, pin_axes=["b[7]"])


def test_axes_can_be_coupled_by_hand():
    def apart(p, x):
        return (x @ p["a"]).sum() + (x @ p["c"]).sum()

    assert list(engine.trace(apart, P, X).groups) == ["a", "c"]
    graph = engine.trace(apart, P, X, couple=[("a[1]", "c[1]")])
    assert {m.path for m in graph.groups["a"].members} == {"a", "c"}
    with pytest.raises(StructureError, match=r"a\[1\] has 6 positions and d\[0\] has 4"):
        engine.trace(fn, P, X, couple=[("a[1]", "d[0]")])


def test_free_inputs_are_explained():
    graph = engine.trace(fn, P, X, free_inputs=["args[0]"])
    text = graph.explain("args[0]", 1)
    assert text.startswith("args[0][1], size 5: args[0]\ngroup 'args[0]', 5 units; with it go\n  a[0]\n  c[0]\n")
    assert "  args[0][1]\n" in graph.explain("a", 0)
    assert graph.explain("args[0]", 0) == "args[0][0], size 3, is pinned: an axis of the output"
    assert "args[0][1], a[0], c[0]" in str(graph)


def test_the_share_that_can_go():
    assert str(engine.trace(fn, P, X)).startswith("2 groups; 100.0 % of the parameters lie in leaves they can shrink")
    assert "0 groups; 0.0 %" in str(engine.trace(lambda p, x: x @ p["a"], {"a": P["a"]}, X))


def test_the_command_prints_all_of_it(capsys, tmp_path):
    main(["inspect", "digits_cnn", "--dot", str(tmp_path / "g.dot"), "--svg", str(tmp_path / "g.svg")])
    out = capsys.readouterr().out
    assert "of the parameters lie in leaves they can shrink" in out
    assert "one unit of a group takes" in out
    assert (tmp_path / "g.dot").read_text().startswith("graph coupling {")
    assert ET.parse(tmp_path / "g.svg").getroot().tag == f"{NS}svg"


def test_the_command_explains_one_axis(capsys):
    main(["inspect", "mlp", "--explain", "params/dense0/kernel[0]"])
    assert "is pinned: an axis of the input" in capsys.readouterr().out


class Net(nnx.Module):
    """Noise in inference as well, so that a key is read."""

    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.c = nnx.Linear(6, 2, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        h = self.drop(self.norm(self.a(x)))
        return self.c(h + self.rngs.normal(h.shape))


def read_from_disk():
    """A factory that cannot be traced."""
    net = Net(nnx.Rngs(0))
    np.asarray(net.a.kernel[...])
    return net


NET = Net(nnx.Rngs(0))


@pytest.mark.parametrize("name", ["Net", "read_from_disk", "NET"])
def test_the_command_takes_nnx_models(capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "nets", sys.modules[__name__])
    main(["inspect", f"nets:{name}", "--input", "3,5", "--explain", "params/a/kernel[1]"])
    out = capsys.readouterr().out
    assert out.startswith("params/a/kernel[1], size 6: a\ngroup 'a', 6 units; with it go\n")
    assert "\n  batch_stats/norm/mean[0]\n" in out
    assert "\n  params/c/kernel[0]\n" in out


def test_an_nnx_model_of_shapes_is_traced_and_cut():
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    net.eval()
    fn, shapes = engine.from_nnx(net)
    assert {type(x) for x in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
    graph = engine.trace(fn, shapes, X)
    NET.eval()
    dense, params = engine.from_nnx(NET)
    plan = engine.Plan({"a": [0, 2, 3]})
    small = engine.cut(params, graph, plan)
    assert jax.tree.map(lambda x: x.shape, engine.cut(shapes, graph, plan)) == jax.tree.map(lambda x: x.shape, small)
    want = engine.gate(dense, graph)(params, graph.masks(plan), X)
    np.testing.assert_allclose(engine.narrow(dense, graph, plan)(small, X), want, rtol=1e-5)
    assert not np.allclose(want, dense(params, X), atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["treesurgeon.models.mlp:mlp"], "is not in the zoo: say what it takes"),
        (["treesurgeon.engine.errors:PlanError", "--input", "1"], "expected its factory to return a flax"),
        (["mlp", "--input", "a,b"], "--input takes sizes and a dtype"),
        (["resnet20", "--input", "1,5"], "resnet20 cannot be called with float32[1, 5]"),
        (["mlp", "--explain", "params"], "--explain takes a leaf and an axis"),
        (["mlp", "--explain", "params/x[0]"], "names the leaf 'params/x'"),
    ],
)
def test_the_command_refuses_bad_input(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_nobody_has_to_read_to_the_end():
    command = f"{sys.executable} -m treesurgeon.search.cli inspect resnet20 | true"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert "BrokenPipe" not in found.stderr
    assert found.returncode == 141
