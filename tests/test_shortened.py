"""Modules cut in depth: against the features of the whole module, in training mode too; pruned, saved and loaded."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from laws import leaves_of, random_plan

from treesurgeon import engine, models
from treesurgeon.engine import ModelSpec, Plan, PlanError
from treesurgeon.engine.shortened import HEAD, HIDDEN, Shortened

SPEC = ModelSpec("digits_cnn", (8, 8, 1), {}, at="stage2_res", outputs=3)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def whole():
    """The whole module, its variables, and what stands at every point in the mode that is asked for."""
    module = models.resolve("digits_cnn")
    variables = module.init(jax.random.key(1), X)
    fn, variables = engine.from_linen(module, variables)
    graph = engine.trace(fn, variables, X)
    return module, variables, graph


def shortened(at="stage2_res"):
    return dataclasses.replace(SPEC, at=at).build()


def with_head(module, variables):
    short = module.take(variables)
    width = jax.eval_shape(module._until, short, X).shape[-1]
    kernel, bias = RNG.normal(size=(width, 3)), RNG.normal(size=3)
    return module.with_head(short, jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32))


def test_it_is_a_head_on_the_features_of_the_whole(whole):
    module, variables, graph = whole
    for at in engine.points(module.apply, graph, X)[1::3]:
        short = shortened(at)
        mine = with_head(short, variables)
        head = mine["params"][HEAD]
        expected = engine.features(module.apply, graph)(variables, X)[at] @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(short.apply(mine, X), expected, rtol=1e-5, atol=1e-5)
        assert leaves_of(mine).keys() - leaves_of(variables).keys() == {
            f"params/{HEAD}/{k}" for k in ("bias", "kernel")
        }


def test_training_updates_the_statistics_that_it_has(whole):
    module, variables, _ = whole
    short = shortened()
    mine = with_head(short, variables)
    mode = {"train": True, "mutable": ["batch_stats"]}
    _, theirs = module.apply(variables, X, **mode)
    logits, ours = jax.jit(lambda v, x: short.apply(v, x, **mode))(mine, X)
    known = leaves_of(theirs)
    assert 0 < len(leaves_of(ours)) < len(known)
    for path, leaf in leaves_of(ours).items():
        np.testing.assert_allclose(leaf, known[path], rtol=1e-5, atol=1e-6)
        assert np.abs(leaf - leaves_of(variables)[path]).max() > 0
    assert np.abs(logits - short.apply(mine, X)).max() > 1e-3
    grads = jax.grad(lambda p: short.apply({**mine, "params": p}, X, **mode)[0].std())(mine["params"])
    assert all(np.abs(g).max() > 0 for path, g in leaves_of(grads).items() if path.endswith("kernel"))


class Late(nn.Module):
    """Statistics come late: what is cut before has none, and its module cannot train without them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(8, name="early")(x.reshape(len(x), -1)))
        x = x + nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, use_bias=False, name="res")(x))
        return nn.Dense(3, name="head")(nn.relu(x))


def test_training_before_the_first_statistics():
    module = Late()
    variables = module.init(jax.random.key(0), X)
    at, *_ = engine.points(module.apply, engine.trace(module.apply, variables, X), X)
    short = Shortened(module, at, 3, X)
    mine = with_head(short, variables)
    assert "batch_stats" not in mine
    for mutable in ([], ["batch_stats"]):
        logits, updates = short.apply(mine, X, train=True, mutable=mutable)
        assert updates == {}
        np.testing.assert_allclose(logits, short.apply(mine, X), rtol=1e-6)


class Dropped(nn.Module):
    """Dropout stands between a map that is flattened and the dense layer that reads it."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3), name="conv")(x)), (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(self.width, name="hidden")(x)))


@pytest.mark.parametrize("width", [24, 128])  # 128 as the flattened map has: then the layer is a block
def test_a_flattened_map_is_averaged_where_dropout_follows(width):
    module = Dropped(width)
    variables = module.init(jax.random.key(0), X)
    graph = engine.trace(module.apply, variables, X)
    at, kernels = engine.dense_stack(module.apply, graph, X)
    assert (at, kernels) == ("before hidden", ("params/hidden/kernel",))
    short = Shortened(module, at, 3, X)
    mine = with_head(short, variables)
    assert mine["params"][HEAD]["kernel"].shape == (8, 3)
    conv = variables["params"]["conv"]
    maps = nn.relu(
        jax.lax.conv_general_dilated(X, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + conv["bias"]
    )
    features = nn.max_pool(maps, (2, 2), (2, 2)).mean((1, 2))
    expected = features @ mine["params"][HEAD]["kernel"] + mine["params"][HEAD]["bias"]
    np.testing.assert_allclose(short.apply(mine, X), expected, rtol=1e-5, atol=1e-5)
    trained = short.apply(mine, X, train=True, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-5)


def test_half_precision(whole):
    short = shortened()
    mine = with_head(short, whole[1])
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), mine)
    np.testing.assert_allclose(short.apply(half, X).astype(np.float32), short.apply(mine, X), rtol=0.1, atol=0.1)


def test_random_variables_have_its_shapes():
    short = shortened()
    made = short.init(jax.random.key(0), X)
    shapes = jax.tree.map(lambda leaf: leaf.shape, SPEC.template(short))
    assert jax.tree.map(jnp.shape, made) == shapes
    assert short.apply(made, X).shape == (6, 3)
    assert np.ptp(made["params"][HEAD]["kernel"]) > 0


def test_it_is_pruned_saved_and_loaded_as_any_other(tmp_path, whole):
    short = shortened()
    mine = with_head(short, whole[1])
    fn, mine = engine.from_linen(short, mine)
    graph = engine.trace(fn, mine, X[:1])
    plan = random_plan(graph, 3)
    assert plan.keep
    small = engine.cut(mine, graph, plan)
    path = engine.save(tmp_path / "short", SPEC, small, plan)
    model = engine.load(path)
    np.testing.assert_array_equal(engine.load(path, module=whole[0])(X), model(X))  # the whole module does
    np.testing.assert_allclose(model(X), jax.jit(engine.narrow(fn, graph, plan))(small, X), rtol=1e-6)
    masked = jax.jit(engine.gate(fn, graph))(mine, graph.masks(plan), X)
    np.testing.assert_allclose(model(X), masked, rtol=1e-4, atol=1e-4)
    out, new = jax.eval_shape(lambda v: model.apply(v, X, train=True, mutable=["batch_stats"]), model.variables)
    assert out.shape == (6, 3)
    assert new["batch_stats"].keys() == model.variables["batch_stats"].keys()
    exported = jax.export.deserialize(bytearray((path / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(exported.call(X), model(X), rtol=1e-4, atol=1e-5)
    assert json.loads((path / "manifest.json").read_text())["format"] == 2


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"at": "block9"}, "there is no point 'block9' to truncate at; this function has"),
        ({"outputs": 4}, r"shortened_head"),
        ({"outputs": "many"}, "lacks an entry or has one of another kind"),
        ({"at": 3}, "there is no point 3"),
        ({"model": "package.module:factory"}, "not part of treesurgeon"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, whole, entry, match):
    short = shortened()
    path = engine.save(tmp_path / "short", SPEC, with_head(short, whole[1]), Plan())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model"] |= entry
    manifest.pop("digest")  # it would be told that something was changed, and not what
    Path(path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(engine.TreesurgeonError, match=match):
        engine.load(path)


def test_the_point_has_to_be_there():
    with pytest.raises(PlanError, match="there is no point 'block7'"):
        shortened("block7").apply({"params": {HEAD: {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}, X)


def test_a_hidden_layer(tmp_path, whole):
    spec = dataclasses.replace(SPEC, hidden=5)
    short = spec.build()
    made = short.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda leaf: leaf.shape, spec.template(short))
    linear = with_head(shortened(), whole[1])["params"][HEAD]
    inner = linear["kernel"], linear["bias"]
    kernel = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)
    short = dataclasses.replace(SPEC, hidden=3).build()
    mine = short.with_head(short.take(whole[1]), kernel, jnp.ones(3), inner)
    z = engine.features(whole[0].apply, whole[2])(whole[1], X)["stage2_res"]
    np.testing.assert_allclose(
        short.apply(mine, X), np.maximum(z @ inner[0] + inner[1], 0) @ kernel + 1, rtol=1e-4, atol=1e-4
    )
    fn, mine = engine.from_linen(short, mine)
    graph = engine.trace(fn, mine, X[:1])
    (name,) = (n for n, g in graph.groups.items() if any(HIDDEN in member.path for member in g.members if member.makes))
    assert graph.groups[name].size == 3
    plan = Plan({name: [0, 2]})
    path = engine.save(tmp_path / "short", dataclasses.replace(SPEC, hidden=3), engine.cut(mine, graph, plan), plan)
    model = engine.load(path)
    assert model.variables["params"][HIDDEN]["kernel"].shape[1] == 2
    np.testing.assert_allclose(
        model(X), jax.jit(engine.gate(fn, graph))(mine, graph.masks(plan), X), rtol=1e-4, atol=1e-4
    )
