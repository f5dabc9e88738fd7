"""A narrowed model compiles to what the model written by hand at the small widths compiles to, and to nothing more."""

import jax
import pytest
from handwritten import LEFTOVERS, operations, random_plan, small

from treesurgeon import engine, models

MODELS = {
    "resnet20": models.resnet(20, 10, (8, 12, 16)),
    "vit": models.vit(num_classes=10, width=24, layers=((3, 8, 8, 32),) * 3, patch=8),
}
X = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")


@pytest.mark.parametrize("name", MODELS)
def test_narrowed_hlo_has_no_more_than_the_handwritten_one(name):
    dense = MODELS[name]
    params = jax.eval_shape(dense.init, jax.random.key(0), X)
    fn, _ = engine.from_linen(dense, {})
    graph = engine.trace(fn, params, X)
    plan = random_plan(graph, 0, drop=0.3)
    assert plan.drop
    cut = engine.cut(params, graph, plan)
    hand = small(dense, graph, plan)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.shape == b.shape, jax.eval_shape(hand.init, jax.random.key(0), X), cut)
    )

    narrowed, by_hand = operations(engine.narrow(fn, graph, plan), cut, X), operations(hand.apply, cut, X)
    assert {op: n for op, n in narrowed.items() if n > by_hand[op]} == {}
    assert by_hand["convolution"] + by_hand["dot"] > 10  # the text was understood

    gated = operations(engine.gate(fn, graph), params, graph.masks(plan), X)  # masks do show in the counts
    assert any(gated[op] > by_hand[op] for op in LEFTOVERS)
    assert gated["select"] > by_hand["select"]
