"""What makes each architecture itself: who sees whom, and what must not matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import draw
from subjects import MODELS, images, variables_spec

from treesurgeon import models
from treesurgeon.models.llama import rotate
from treesurgeon.models.swin import relative_positions, visible, windows


def compiled(module, inputs):
    """The module's `apply`, and variables for it."""
    return jax.jit(module.apply), draw(variables_spec(module, *inputs(1)), 0, np.float32)


def ready(name, batch=2):
    """A compiled model with its variables, and inputs for it."""
    module, inputs = MODELS[name]
    return *compiled(module, inputs), draw(inputs(batch), 0, np.float32)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt", "gpt-remat"])
def test_a_decoder_sees_the_past_only(name):
    apply, variables, (tokens,) = ready(name)
    changed = tokens.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 7
    a, b = apply(variables, tokens), apply(variables, changed)
    np.testing.assert_allclose(a[:, :2], b[:, :2], rtol=1e-5)
    assert not np.allclose(a[:, 3], b[:, 3], rtol=1e-3)


def test_a_tagger_sees_the_future_through_its_backward_pass():
    apply, variables, (tokens,) = ready("lstm")
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    assert not np.allclose(apply(variables, tokens)[:, 0], apply(variables, changed)[:, 0], rtol=1e-4)
    apply, variables = compiled(models.lstm_tagger(7, 5, ((4, 0),), 3), MODELS["lstm"][1])
    a, b = apply(variables, tokens), apply(variables, changed)
    np.testing.assert_allclose(a[:, :3], b[:, :3], rtol=1e-5)
    assert not np.allclose(a[:, 3], b[:, 3], rtol=1e-4)


def test_an_encoder_does_not_look_at_padding():
    apply, variables, (tokens, types, _) = ready("bert")
    mask = np.array([[1, 1, 1, 0]] * 2)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    np.testing.assert_allclose(
        apply(variables, tokens, types, mask), apply(variables, changed, types, mask), rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(apply(variables, tokens, types), apply(variables, changed, types), rtol=1e-3)
    everywhere = apply(variables, tokens, types, np.ones_like(mask))
    np.testing.assert_allclose(everywhere, apply(variables, tokens, types), rtol=1e-5, atol=1e-6)


def test_a_scanned_stack_is_its_layers_in_turn():
    """Their order matters, each of them counts, and remat changes nothing."""
    apply, variables, (tokens,) = ready("gpt-remat")
    module, inputs = MODELS["gpt-remat"]
    out = apply(variables, tokens)
    plain, _ = compiled(module.clone(remat=False), inputs)
    np.testing.assert_allclose(out, plain(variables, tokens), rtol=1e-5, atol=1e-6)

    def with_layers(change):
        layers = jax.tree.map(change, variables["params"]["layers"])
        return {"params": variables["params"] | {"layers": layers}}

    assert not np.allclose(out, apply(with_layers(lambda x: x[::-1]), tokens), rtol=1e-3)
    one, _ = compiled(module.clone(depth=1), inputs)
    assert not np.allclose(out, one(with_layers(lambda x: x[:1]), tokens), rtol=1e-3)


def test_rotated_units_meet_by_their_distance_only():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 6)).astype(np.float32)
    frequencies = (1.0, 0.3, 0.1)
    q, k = (rotate(jnp.tile(x, (1, 5, 1, 1)), frequencies)[0, :, 0] for x in (query, key))
    scores = np.asarray(q @ k.T)
    for distance in range(-3, 4):
        np.testing.assert_allclose(np.diag(scores, distance), np.diag(scores, distance)[0], rtol=1e-4)
    assert not np.allclose(scores[0, 0], scores[1, 0], rtol=1e-2)
    np.testing.assert_allclose(scores[0, 0], query @ key, rtol=1e-5)


def test_grouped_queries_share_keys_and_values():
    """Two groups of one query, with equal keys and values, are one group of two queries."""
    tokens = np.random.default_rng(0).integers(0, 7, (2, 4))
    apart, shared = (models.llama(7, 6, ((groups, 2 // groups, 3, 0),), key=4) for groups in (2, 1))
    apply, variables = compiled(shared, MODELS["llama"][1])
    params = variables["params"]
    attention = dict(params["layer0"]["attention"])
    for name in ("key", "value"):
        attention[name] = {"kernel": jnp.repeat(attention[name]["kernel"], 2, axis=1)}
    attention["query"] = {"kernel": attention["query"]["kernel"].swapaxes(1, 2)}
    attention["out"] = {"kernel": attention["out"]["kernel"].swapaxes(0, 1)}
    wide = params | {"layer0": params["layer0"] | {"attention": attention}}
    np.testing.assert_allclose(
        jax.jit(apart.apply)({"params": wide}, tokens), apply(variables, tokens), rtol=1e-5, atol=1e-6
    )


def test_relative_positions_number_the_offsets():
    side = 3
    numbers = relative_positions(side)
    offsets = {}
    for a in range(side * side):
        for b in range(side * side):
            offset = (a // side - b // side, a % side - b % side)
            assert offsets.setdefault(offset, numbers[a, b]) == numbers[a, b]
    assert sorted(offsets.values()) == list(range((2 * side - 1) ** 2))


@pytest.mark.parametrize(("height", "width", "side", "shift"), [(4, 6, 2, 1), (8, 12, 4, 2)])
def test_shifted_windows_show_neighbours_only(height, width, side, shift):
    """Two positions that a shift brought together see each other if they are as near before it."""
    rows, columns = np.indices((height, width))
    where = windows(np.roll(np.stack([rows, columns], -1), (-shift, -shift), (0, 1))[None], side)[0]
    near = (np.abs(where[:, :, None] - where[:, None, :]) < side).all(-1)
    np.testing.assert_array_equal(visible(height, width, side, shift), near)


def test_a_window_is_what_a_layer_sees():
    """In the first layer of a Swin no window reads another; the second, shifted, reads across."""
    inputs = images(8, 8, 3)
    (x,) = draw(inputs(1), 0, np.float32)
    changed = x.copy()
    changed[0, 0, 0] += 1
    for depth in (1, 2):
        module = models.swin("tiny", 3, (4,), (((2, 3, 0),) * depth,), 1, 4)
        _, variables = compiled(module, inputs)
        last = {"capture_intermediates": lambda module, _: module.name == "norm"}
        maps = [jax.jit(partial(module.apply, **last))(variables, image)[1] for image in (x, changed)]
        a, b = (np.asarray(leaf) for one in maps for leaf in jax.tree.leaves(one))
        touched = np.abs(a - b).max(-1)[0] > 1e-7
        assert touched[:4, :4].all()
        assert touched[4:].any() == touched[:, 4:].any() == (depth == 2)


def test_a_unet_returns_a_map_as_large_as_its_image():
    apply, variables, (x,) = ready("unet")
    assert apply(variables, x).shape == (*x.shape[:3], 2)


def test_a_mixer_mixes_patches_and_channels():
    apply, variables, (x,) = ready("mixer")
    a = apply(variables, x)
    assert not np.allclose(a, apply(variables, x[:, ::-1]), rtol=1e-3)  # the place of a patch matters
    apply, variables = compiled(models.mixer("s", 3, 5, ((0, 6), (0, 7)), 2), MODELS["mixer"][1])
    flipped = x.reshape(2, 2, 2, 4, 3)[:, ::-1].reshape(x.shape)  # without mixing, it does not
    np.testing.assert_allclose(apply(variables, x), apply(variables, flipped), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_training_drops_units_and_moves_statistics(name):
    """Where a model has dropout, two keys give two results; inference takes no key."""
    module, _ = MODELS[name]
    apply, variables, xs = ready(name, 4)
    runs = [
        jax.jit(lambda v, xs, key: module.apply(v, *xs, train=True, mutable=["batch_stats"], rngs={"dropout": key}))(
            variables, xs, jax.random.key(seed)
        )
        for seed in (0, 1)
    ]
    has_dropout = name not in ("resnet20", "resnet18", "resnet50", "llama-tied")
    assert np.allclose(runs[0][0], runs[1][0]) != has_dropout
    moved = jax.tree.map(np.allclose, runs[0][1].get("batch_stats", {}), variables.get("batch_stats", {}))
    assert not any(jax.tree.leaves(moved))
    assert np.shape(apply(variables, *xs)) == np.shape(runs[0][0])
