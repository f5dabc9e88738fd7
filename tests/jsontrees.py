"""JSON trees with something else in them than was meant."""

import random
from typing import Any

OTHERS = (
    None, -1, 0, 2**70, 0.5, True, float("nan"), "", "x", "mlp", "digits_cnn", "\x00", [], [[]], [-1], ["a"], [0, 1],
    {}, {"a": 1},
)  # fmt: skip


def replaced(tree: Any, draw: random.Random) -> Any:
    """The tree with something else somewhere in it, or something left out."""
    if draw.random() < 0.2 or not tree or not isinstance(tree, dict | list):
        return draw.choice(OTHERS)
    if isinstance(tree, dict):
        key = draw.choice(list(tree))
        if draw.random() < 0.2:
            return {name: value for name, value in tree.items() if name != key}
        return {**tree, key: replaced(tree[key], draw)}
    at = draw.randrange(len(tree))
    return [replaced(entry, draw) if i == at else entry for i, entry in enumerate(tree)]
