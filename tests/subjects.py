"""The models of `treesurgeon.models` as subjects of the laws: narrow widths, small inputs, both passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from laws import A, Subject, arr

from treesurgeon import engine, models

Inputs = Callable[[int], tuple[A, ...]]


def images(*shape: int) -> Inputs:
    return lambda batch: (arr(batch, *shape),)


def tokens(length: int, vocabulary: int, *more: int) -> Inputs:
    """Token numbers, and further integer tables of that shape below the numbers in `more` (types, a mask)."""
    return lambda batch: tuple(arr(batch, length, kind=f"i:{n}") for n in (vocabulary, *more))


V2_ROWS = [
    (3, 1, 4, 0, 5, "relu6", False, False),
    (3, 1, 7, 0, 5, "relu6", True, True),
    (3, 2, 6, 0, 4, "relu6", True, False),
]
V3_ROWS = [(3, 2, 4, 3, 5, "relu", False, False), (5, 1, 6, 4, 5, "hard_swish", True, True)]
B0_ROWS = [(3, 1, 4, 2, 5, "silu", False, False), (5, 1, 6, 3, 5, "silu", True, True)]

MODELS: dict[str, tuple[nn.Module, Inputs]] = {
    "mlp": (models.mlp((7, 6, 6), 3, activation="gelu", dropout=0.3), images(2, 2, 3)),
    "digits_cnn": (models.digits_cnn(4, ((4, 4), (6,), (6, 6)), (0, 5, 4), 9, 0.2), images(8, 8, 1)),
    "vgg11": (models.vgg(11, 3, ((4,), (5,), (6, 6), (6, 6), (7, 7)), (8, 8), 0.3), images(32, 32, 3)),
    "resnet20": (models.resnet(20, 3, (4, 6, 8)), images(8, 8, 3)),
    "vit": (
        models.vit(num_classes=3, width=6, layers=((2, 3, 4, 5), (3, 2, 2, 6)), patch=2, scale=0.7, dropout=0.2),
        images(4, 4, 3),
    ),
    "resnet18": (
        models.imagenet_resnet(18, 3, 4, (4, 5, 4, 6), ([[4], [5]], [[4], []], [[3], []], [[4], []])),
        images(16, 16, 3),
    ),
    "resnet50": (
        models.imagenet_resnet(
            50, 3, 4, (6, 5, 4, 6), ([[4, 3], [5, 2], []], [[4, 5], [], [], []], [[3, 4], *[[]] * 5], [[2, 4], [], []])
        ),
        images(16, 16, 3),
    ),
    "mobilenet_v2": (models.mobilenet("v2", 3, 4, V2_ROWS, 6), images(8, 8, 3)),
    "mobilenet_v3": (models.mobilenet("v3_small", 3, 4, V3_ROWS, 6, 5), images(8, 8, 3)),
    "densenet": (
        models.densenet(121, 3, 4, (((3, 2), (4, 3)), ((3, 2), (4, 2))), (5,), dropout=0.2),
        images(16, 16, 3),
    ),
    "convnext": (models.convnext("tiny", 3, (4, 5), ((6, 7), (6,)), 2, 0.2, 0.2), images(8, 8, 3)),
    "unet": (models.unet(2, ((3, 4), (5, 4), (4, 6)), ((3, 5, 4), (4, 3, 5)), 0.2), images(8, 8, 3)),
    "efficientnet": (models.efficientnet(0, 3, 4, B0_ROWS, 6, drop_path=0.4), images(8, 8, 3)),
    "mixer": (models.mixer("s", 3, 5, ((4, 6), (5, 7)), 2, 0.2), images(4, 4, 3)),
    "lstm": (models.lstm_tagger(7, 5, ((4, 3), (5, 0)), 3, 0.2), tokens(4, 7)),
    "swin": (
        models.swin("tiny", 3, (4, 6), (((2, 3, 5), (3, 2, 4)), ((2, 2, 5),)), 2, 2, 0.7, 0.2, 0.2),
        images(8, 8, 3),
    ),
    "llama": (models.llama(7, 6, ((2, 2, 3, 5), (1, 3, 2, 6)), key=4, theta=10, dropout=0.2), tokens(4, 7)),
    "gpt": (models.gpt(7, 5, 6, 2, (2, 3, 4, 5), 0.7, dropout=0.2), tokens(4, 7)),
    "gpt-remat": (models.gpt(7, 4, 6, 2, (2, 3, 4, 5), 0.7, remat=True, dropout=0.2), tokens(4, 7)),
    "bert": (
        models.bert(3, 7, 5, 2, 6, ((2, 3, 4, 5), (3, 2, 2, 6)), 5, scale=0.7, dropout=0.2),
        tokens(4, 7, 2, 2),
    ),
    "llama-tied": (models.llama(7, 6, ((2, 1, 3, 5),), key=6, theta=10, tied=True), tokens(4, 7)),
}
# Those whose laws take the default suite too long: `test_rebuild.py` puts one plan of each to laws 2 and 8.
SLOW = MODELS.keys() - {"mlp", "digits_cnn", "vgg11", "resnet20"}


def variables_spec(module: nn.Module, *inputs: Any) -> Any:
    """The variables of a module as a pytree of `A`; `inputs` are arrays, or `A` of one batch."""
    template = [jax.ShapeDtypeStruct(x.shape, "int32" if x.kind.startswith("i:") else "float32") for x in inputs]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *template)
    flat = {
        path: arr(*leaf.shape, kind="p" if path[-1] in ("var", "scale") else "f")
        for path, leaf in flatten_dict(shapes).items()
    }
    return unflatten_dict(flat)


@cache
def subject(name: str, train: bool) -> Subject:
    module, inputs = MODELS[name]
    spec = variables_spec(module, *inputs(1))
    fn, _ = engine.from_linen(module, {})
    if not train:
        return Subject(name, fn, spec, inputs(2))

    def step(variables, *args):
        *xs, key = args
        return fn(variables, *xs, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    return Subject(f"{name}-train", step, spec, (*inputs(4), A((), "key")))


class Subjects(Mapping[str, Subject]):
    """All of them by name, with `-train` for the training pass; each is made when it is asked for."""

    def __getitem__(self, name: str) -> Subject:
        return subject(name.removesuffix("-train"), name.endswith("-train"))

    def __iter__(self) -> Iterator[str]:
        return (name + mode for name in MODELS for mode in ("", "-train"))

    def __len__(self) -> int:
        return 2 * len(MODELS)


SUBJECTS = Subjects()
