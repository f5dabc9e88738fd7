"""The models of `treesurgeon.models` as subjects of the laws: narrow widths, small images, both passes."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from laws import A, Subject, arr

from treesurgeon import engine, models

MODELS = {
    "mlp": (models.mlp((7, 6, 6), 3, activation="gelu", dropout=0.3), (2, 2, 3)),
    "digits_cnn": (models.digits_cnn(4, ((4, 4), (6,), (6, 6)), (0, 5, 4), 9, 0.2), (8, 8, 1)),
    "vgg11": (models.vgg(11, 3, ((4,), (5,), (6, 6), (6, 6), (7, 7)), (8, 8), 0.3), (32, 32, 3)),
    "resnet20": (models.resnet(20, 3, (4, 6, 8)), (8, 8, 3)),
}


def variables_spec(module: nn.Module, shape: tuple[int, ...]) -> Any:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), "float32"))
    flat = {
        path: arr(*leaf.shape, kind="p" if path[-1] in ("var", "scale") else "f")
        for path, leaf in flatten_dict(shapes).items()
    }
    return unflatten_dict(flat)


def subject(name: str, train: bool) -> Subject:
    module, shape = MODELS[name]
    spec = variables_spec(module, shape)
    fn, _ = engine.from_linen(module, {})
    x = arr(4 if train else 2, *shape)
    if not train:
        return Subject(name, fn, spec, (x,))

    def step(variables, x, key):
        return fn(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    return Subject(f"{name}-train", step, spec, (x, A((), "key")))


def subjects() -> dict[str, Subject]:
    out = [subject(name, train) for name in MODELS for train in (False, True)]
    return {s.name: s for s in out}
