"""Heads with a hidden layer: where they are needed, how wide, and what they are on features as they come."""

import jax
import numpy as np
import pytest

from treesurgeon.search.heads import HeadError, best_logistic
from treesurgeon.search.hidden import choose, hidden

RNG = np.random.default_rng(0)


def task(count, bent):
    """Two of five features matter: their signs together (which no linear head tells), or one of them alone."""
    x = RNG.normal(size=(count, 5)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0 if bent else x[:, 0] > 0).astype(np.int32)
    far = x * [1, 50, 1, 1, 0] + [0, 1000, 0, -3, 7]  # scales of their own; the last one never changes
    return far.astype(np.float32), y


def right(head, x, y):
    return (np.asarray(head(x)).argmax(1) == y).mean()


def test_a_bent_task_gets_a_hidden_layer_and_a_straight_one_none():
    for bent in (True, False):
        x, y = task(900, bent)
        linear = best_logistic(x[:500], y[:500], 2)
        heads = hidden(x[:500], y[:500], 2, (8, 32))
        assert [head.width for head in heads] == [8, 32]
        found = choose(linear, heads, x[500:], y[500:])
        if bent:
            assert right(linear, x[500:], y[500:]) < 0.65
            assert right(found, x[500:], y[500:]) > 0.9
        else:
            assert found is None
            assert right(linear, x[500:], y[500:]) > 0.95


def test_features_that_never_change_are_not_read():
    x, y = task(200, True)
    (head,) = hidden(x, y, 2, (6,))
    assert head.inner.shape == (5, 6)
    assert not np.asarray(head.inner[-1]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(head))
    again = hidden(x, y, 2, (6,))[0]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(head), jax.tree.leaves(again), strict=True))


class Fixed:
    """A head that is right where it is told."""

    def __init__(self, share):
        self.right = np.arange(100) < 100 * share

    def __call__(self, x):
        return np.eye(2)[np.where(self.right, 1, 0)]


@pytest.mark.parametrize(
    ("linear", "shares", "want"),
    [
        (0.90, (0.95, 0.99), 1),  # nine images apart are three standard errors, four are two
        (0.99, (0.95, 0.99), None),
        (0.50, (0.95, 0.95), 0),
        (0.99, (0.50, 1.00), None),  # one image apart is one standard error
        (0.50, (0.60, 1.00), 1),
    ],
)
def test_the_narrowest_that_is_enough(linear, shares, want):
    heads = [Fixed(share) for share in shares]
    found = choose(Fixed(linear), heads, np.zeros((100, 1)), np.ones(100, int))
    assert found is (None if want is None else heads[want])


def test_features_that_cannot_serve():
    with pytest.raises(HeadError, match="NaN or infinity"):
        hidden(np.full((4, 2), np.nan), np.zeros(4, int), 2, (3,))
