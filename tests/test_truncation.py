"""Heads, features and truncation: against what Flax's own modules return, and on functions with odd ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import draw, leaves_of, random_plan
from subjects import MODELS, subject

from treesurgeon import engine
from treesurgeon.engine import Plan, PlanError, StructureError
from treesurgeon.search.exits import counterparts, restricted, within

RNG = np.random.default_rng(0)


def rows(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def opened(name):
    """A model of the zoo: module, function, graph, variables, inputs."""
    it = subject(name, False)
    params, args = draw(it.params, 0, np.float32), draw(it.args, 1, np.float32)
    return MODELS[name][0], it.fn, engine.trace(it.fn, params, *args), params, args


def captured(module, params, args):
    """What every module returned, by path, from Flax itself."""
    _, state = module.apply(params, *args, capture_intermediates=True)
    flat = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
    return {path.removesuffix("/0").removesuffix("/__call__"): x for path, x in named.items()}


def mean(x):
    return np.asarray(x).reshape(len(x), -1, x.shape[-1]).mean(1)


def relu(x):
    return np.maximum(x, 0)


# Model, points in order, and for some of them the module whose output (through what follows it) stands there.
QUICK = ("mlp", "resnet20", "llama-tied")


def some(names):
    """The names, most of them behind the slow marker."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


POINTS = {
    "resnet20": (
        ["before layer1_0", "layer1_0", "layer1_1", "layer1_2", "before layer2_1", "layer2_1", "layer2_2",
         "before layer3_1", "layer3_1", "layer3_2", "before linear"],
        {"before layer1_0": ("bn1", relu), "layer1_2": ("layer1_2", None), "before layer2_1": ("layer2_0", None),
         "layer3_1": ("layer3_1", None), "before linear": ("layer3_2", None)},
    ),
    "vgg11": (
        ["before conv3", "conv3", "before conv4", "conv4", "conv5", "before conv7", "conv7", "before dense0",
         "before dense1", "dense1"],
        {"conv3": ("bn3", relu), "conv5": ("bn5", relu), "before dense1": ("dense0", relu), "dense1": ("dense1", relu)},
    ),
    "vit": (
        ["before layer0/attention+norm1", "layer0/attention+norm1", "layer0/mlp", "layer1/attention+norm1",
         "layer1/mlp", "before linear"],
        {"layer0/mlp": ("layer0", None), "layer1/mlp": ("layer1", None)},
    ),
    "mixer": (
        ["before layer0/tokens", "layer0/tokens", "layer0/channels", "layer1/tokens", "layer1/channels",
         "before linear"],
        {"before layer0/tokens": ("patch", None), "layer0/channels": ("layer0", None), "before linear": ("norm", None)},
    ),
    "bert": (
        ["before layer0/attention", "layer0/attention", "layer0/mlp", "layer1/attention", "layer1/mlp",
         "before pooler", "before linear"],
        {"before layer0/attention": ("norm", None), "layer0/attention": ("layer0/norm1", None),
         "layer0/mlp": ("layer0", None), "layer1/mlp": ("layer1", None), "before linear": ("pooler", np.tanh)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(POINTS))
def test_features_are_what_the_modules_return(name):
    module, fn, graph, params, args = opened(name)
    found = jax.jit(engine.features(fn, graph))(params, *args)
    order, oracle = POINTS[name]
    made = dict(engine.features(fn, graph)(params, *args))
    assert list(made) == list(engine.points(fn, graph, *args)) == order
    outer = {block for block in graph.blocks if graph.blocks[block].parent is None}
    assert outer <= found.keys()
    there = captured(module, params, args)
    for point, (path, then) in oracle.items():
        want = there[path] if then is None else then(np.asarray(there[path]))
        np.testing.assert_allclose(found[point], mean(want), rtol=1e-4, atol=1e-5, err_msg=point)


HEADS = ["mlp", "resnet20", "vgg11", "vit", "mixer", "bert", "mobilenet_v3", "unet", "llama", "llama-tied", "gpt"]


@pytest.mark.parametrize("name", some(HEADS))
def test_head_on_its_features_is_the_function(name):
    _, fn, graph, params, args = opened(name)
    head = engine.find_head(fn, graph, *args)
    leaves = leaves_of(params)
    x = jax.jit(engine.headless(fn, graph))(params, *args)
    kernel = np.asarray(leaves[head.kernel])
    matrix = np.moveaxis(kernel, head.classes, -1).reshape(-1, kernel.shape[head.classes])
    want = x @ matrix + (leaves[head.bias] if head.bias else 0)
    np.testing.assert_allclose(want, fn(params, *args), rtol=1e-4, atol=1e-5)
    assert head.shared == (name in ("llama-tied", "gpt"))
    assert (head.bias is None) == (name in ("llama", "llama-tied", "gpt"))
    last = list(engine.features(fn, graph)(params, *args).values())[-1]
    np.testing.assert_allclose(last, mean(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", some(["resnet20", "vgg11", "bert", "mixer"]))
def test_truncated_functions_need_the_leaves_they_say(name):
    _, fn, graph, params, args = opened(name)
    every = engine.features(fn, graph)(params, *args)
    costs = []
    for point in list(every)[::3]:
        short = engine.truncate(fn, graph, point, *args)
        few = short.take(params)
        assert len(jax.tree.leaves(few)) == len(short.leaves)
        np.testing.assert_allclose(short(few, *args), every[point], rtol=1e-5, atol=1e-6)
        again = engine.trace(short, few, *args)
        assert not any(str(why).endswith("is not used") for why in again.pinned.values())  # so it needs them all
        costs.append(engine.cost(again, Plan()))
    macs = [cost.macs for cost in costs]
    assert macs == sorted(macs)
    assert all(cost.params <= engine.cost(graph, Plan()).params for cost in costs)


def test_a_truncated_function_is_pruned_like_any_other():
    _, fn, graph, params, args = opened("resnet20")
    short = engine.truncate(fn, graph, "layer2_2", *args)
    few = short.take(params)
    again = engine.trace(short, few, *args)
    assert "layer2_1" in again.blocks
    plan = Plan({"layer2_1/conv1": [0, 2]}, {"layer1_1"})
    narrow = engine.narrow(short, again, plan)(engine.cut(few, again, plan), *args)
    gated = engine.gate(short, again)(few, again.masks(plan), *args)
    np.testing.assert_allclose(narrow, gated, rtol=1e-4, atol=1e-5)


P = {"a": rows(3, 6), "b": rows(6, 6), "c": rows(6, 6), "h": rows(4, 6), "bias": rows(4)}
X = rows(5, 3)


def test_a_skip_around_a_block_leaves_it_no_point():
    def fn(p, x):
        x = jax.nn.relu(x @ p["a"])
        y = jax.nn.relu(jax.nn.relu(x @ p["b"]) @ p["c"])
        return jnp.concatenate([x, y], 1) @ jnp.concatenate([p["h"], p["h"]], 1).T

    graph = engine.trace(fn, P, X)
    assert {"b", "c"} & graph.blocks.keys()
    assert not {"b", "c"} & engine.features(fn, graph)(P, X).keys()


def test_channels_are_where_the_units_are():
    kernels = {"a": rows(4, 3, 3, 3), "b": rows(4, 4, 3, 3), "h": rows(4, 2)}
    images = rows(2, 3, 6, 5)

    def fn(p, x):  # [N, C, H, W]
        for name in "ab":
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, p[name], (1, 1), "SAME"))
        return x.mean((2, 3)) @ p["h"]

    found = engine.features(fn, engine.trace(fn, kernels, images))(kernels, images)
    assert {name: x.shape for name, x in found.items()} == {"before b": (2, 4), "b": (2, 4), "before h": (2, 4)}
    np.testing.assert_allclose(found["b"], found["before h"], rtol=1e-5)


def test_a_kernel_may_be_transposed_and_of_several_axes():
    p = {"a": rows(3, 2, 3), "h": rows(4, 2, 3)}

    def fn(p, x):
        return jnp.einsum("nij,kij->nk", jnp.tanh(jnp.einsum("nc,cij->nij", x, p["a"])), p["h"])

    graph = engine.trace(fn, p, X)
    head = engine.find_head(fn, graph, X)
    assert (head.kernel, set(head.inputs), head.classes, head.bias, head.shared) == ("h", {1, 2}, 0, None, False)
    (found,) = engine.features(fn, graph)(p, X).values()
    assert found.shape == (5, 6)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda p, x: (x @ p["a"] @ p["h"].T, x), "2 outputs and 1 such contractions"),
        (lambda p, x: x @ p["a"] @ p["b"] + x @ p["a"] @ p["c"], r"1 outputs and 2 such contractions \(test_trunc"),
        (lambda p, x: (x @ p["a"] @ p["b"]).sum(1), r"b makes 6 outputs .* shape \(5,\)"),
        (lambda p, x: x @ p["a"] @ (p["b"] @ p["c"]), "does not make one axis of classes from one kernel"),
        (lambda p, x: x, "0 such contractions"),
    ],
)
def test_functions_without_a_head(fn, match):
    with pytest.raises(StructureError, match=match):
        engine.find_head(fn, engine.trace(fn, P, X), X)


def test_what_does_not_fit():
    _, fn, graph, params, args = opened("resnet20")
    with pytest.raises(PlanError, match=r"no point 'layer9' to truncate at; this function has before layer1_0, "):
        engine.truncate(fn, graph, "layer9", *args)
    short = engine.truncate(fn, graph, "layer1_0", *args)
    with pytest.raises(StructureError, match=r"params/bn1/bias: expected shape .* got none; pass"):
        short({"batch_stats": params["batch_stats"]}, *args)
    plan = Plan({"layer1_0/conv1": [0]})
    with pytest.raises(StructureError, match=r"got shape .* features of a pruned model are those of"):
        short(engine.cut(params, graph, plan), *args)


POOLS = {"flatten": lambda x: x.reshape(len(x), -1), "mean": lambda x: x.mean((1, 2)), "one": lambda x: x[:, 0, 0]}


def convolved(p, x):
    sides = ("NHWC", "HWIO", "NHWC")
    return jax.nn.relu(jax.lax.conv_general_dilated(x, p["conv"], (2, 2), "SAME", dimension_numbers=sides))


def conv_net(p, x, pool):
    x = POOLS[pool](convolved(p, x))
    for name in ("dense0", "dense1"):
        if name in p:
            x = jax.nn.relu(x @ p[name]["kernel"] + p[name]["bias"])
    return x @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("pool", ["flatten", "mean", "one"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_dense_layers_after_the_last_pool(pool, layers):
    width = 96 if pool == "flatten" else 6
    sizes = [width, *[7, 5][:layers], 3]
    names = [*["dense0", "dense1"][:layers], "head"]
    keys = jax.random.split(jax.random.key(0), 4)
    p = {"conv": jax.random.normal(keys[0], (3, 3, 2, 6))}
    for name, key, a, b in zip(names, keys[1:], sizes, sizes[1:], strict=False):
        p[name] = {"kernel": jax.random.normal(key, (a, b)), "bias": jnp.zeros(b)}
    fn, x = (lambda p, x: conv_net(p, x, pool)), jax.random.normal(keys[3], (5, 8, 8, 2))
    graph = engine.trace(fn, p, x)
    found = engine.dense_stack(fn, graph, x)
    if not layers:
        assert found is None
        return
    assert found == ("before dense0", tuple(f"{name}/kernel" for name in names[:-1]))
    short = engine.truncate(fn, graph, "before dense0", x)
    assert short.leaves == ("conv",)
    maps = convolved(p, x)
    wanted = maps[:, 0, 0] if pool == "one" else maps.mean((1, 2))  # what is flattened is averaged
    np.testing.assert_allclose(short(short.take(p), x), wanted, rtol=1e-5, atol=1e-5)


def test_where_there_is_no_pool_there_is_no_stack():
    """A net of dense layers, and one in which something leads past them."""
    p = {"a": jnp.ones((8, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2)), "d": jnp.ones((4, 4))}
    x = jnp.ones((3, 4, 2))

    def dense(p, x):
        return jax.nn.relu(jax.nn.relu(x.reshape(3, 8) @ p["a"]) @ p["b"]) @ p["c"]

    def past(p, x):
        x = jax.nn.relu(jnp.einsum("nsc,cd->nsd", x, p["d"][:2]))
        low, high = x.mean(1), x.max(1)
        return (jax.nn.relu(low @ p["b"]) + high) @ p["c"]

    for fn in (dense, past):
        assert engine.dense_stack(fn, engine.trace(fn, p, x), x) is None


@pytest.mark.parametrize("name", some(("mlp", "resnet20", "vgg11", "vit", "mixer", "mobilenet_v2", "convnext")))
def test_under_masks_points_hold_what_the_narrowed_part_returns(name):
    """The law of `gate`, at every point: against the model up to there, with a head, narrowed by the same plan."""
    module, fn, graph, params, args = opened(name)
    both = jax.jit(engine.gated_features(fn, graph))
    every = engine.points(fn, graph, *args)
    for seed in range(2):
        plan = random_plan(graph, seed)
        masks = graph.masks(plan)
        closed = {group: np.flatnonzero(mask) for group, mask in masks["units"].items()}  # behind the point as well
        out, table = both(params, masks, *args)
        np.testing.assert_allclose(out, engine.gate(fn, graph)(params, masks, *args), rtol=1e-5, atol=1e-5)
        assert set(table) == set(every)
        for point in every if name == "mlp" else every[seed::7]:
            kernel = rows(table[point].shape[1], 3)
            short = engine.Shortened(module, point, 3, args[0])
            given = short.with_head(short.take(params), kernel, np.zeros(3, np.float32))
            part = engine.trace(short.apply, given, args[0])
            assert len(counterparts(graph, part)[0]) == len(part.groups)
            mine = restricted(Plan(closed, plan.drop), graph, part)
            small = engine.narrow(short.apply, part, mine)(engine.cut(given, part, mine), *args)
            np.testing.assert_allclose(table[point] @ kernel, small, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "at"), [("vit", "layer0/attention+norm1"), ("mixer", "layer0/tokens")])
def test_a_block_is_known_again_where_the_model_ends_behind_it(name, at):
    """The rest of its module is cut off, so that it has another name there."""
    module, fn, graph, params, args = opened(name)
    _, table = jax.jit(engine.gated_features(fn, graph))(params, graph.masks(Plan(drop={at})), *args)
    kernel = rows(table[at].shape[1], 3)
    short = engine.Shortened(module, at, 3, args[0])
    given = short.with_head(short.take(params), kernel, np.zeros(3, np.float32))
    part = engine.trace(short.apply, given, args[0])
    mine = restricted(Plan(drop={at}), graph, part)
    assert len(mine.drop) == 1
    assert at not in part.blocks
    small = engine.narrow(short.apply, part, mine)(engine.cut(given, part, mine), *args)
    np.testing.assert_allclose(table[at] @ kernel, small, rtol=1e-3, atol=1e-4)
    masks = within(graph.masks(Plan(drop={at})), graph, part)
    assert engine.cost(part, masks)._asdict() == engine.cost(part, mine)._asdict()
