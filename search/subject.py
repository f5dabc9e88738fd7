"""The model that is searched: a module, its checkpoint, and the pure functions that the engine transforms."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from treesurgeon import engine, models
from treesurgeon.engine import TreesurgeonError
from treesurgeon.engine.errors import first_line
from treesurgeon.search.room import roomy

TRAINING_FLAGS = {"train": True, "training": True, "is_training": True, "deterministic": False, "eval": False}


class SubjectError(TreesurgeonError, ValueError):
    """A model that the search cannot work on."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A dense model with its checkpoint.

    Attributes:
        spec: how to build the module again.
        module: the linen module, or one cut in depth.
        variables: the checkpoint, nested dicts of arrays; on the host, as they are read.
        num_classes: length of the logits.
        momenta: for each running average (by path): the share of its old value that one training step keeps.
    """

    spec: engine.ModelSpec
    module: nn.Module | engine.Shortened
    variables: dict[str, Any]
    num_classes: int
    momenta: Mapping[str, float] = field(default_factory=dict)

    @property
    def _flag(self) -> tuple[str, bool] | None:
        return training_flag(self.module)

    def infer(self, variables: Any, x: Any) -> Any:
        """Logits `[N, classes]` in inference mode."""
        flag: dict[str, Any] = {self._flag[0]: not self._flag[1]} if self._flag else {}
        return self.module.apply(variables, x, **flag)

    def train(self, variables: Any, x: Any, key: Any) -> tuple[Any, Any]:
        """Logits in training mode and the new values of the collections that are not parameters."""
        flag: dict[str, Any] = {self._flag[0]: self._flag[1]} if self._flag else {}
        mutable = [name for name in self.variables if name != "params"]
        return self.module.apply(variables, x, mutable=mutable, rngs={"dropout": key}, **flag)

    def still(self, variables: Any, x: Any, key: Any) -> tuple[Any, Any]:
        """`infer` with the signature of `train`: what models without running averages are fitted in."""
        del key
        return self.infer(variables, x), {}

    @cached_property
    def graph(self) -> engine.Graph:
        """Groups and blocks of inference on one image, so that costs are those of one image."""
        x = jax.ShapeDtypeStruct((1, *self.spec.input_shape), self.spec.input_dtype)
        return engine.trace(self.infer, self.variables, x)


def training_flag(module: nn.Module | engine.Shortened) -> tuple[str, bool] | None:
    """The name of the argument that switches training mode, and its value in training."""
    called = type(module.module if isinstance(module, engine.Shortened) else module)
    parameters = inspect.signature(called.__call__).parameters
    return next(((name, value) for name, value in TRAINING_FLAGS.items() if name in parameters), None)


def open_subject(
    model: str, checkpoint: str, input_shape: Sequence[int], kwargs: Mapping[str, Any] | None = None
) -> Subject:
    """Build a model and read its checkpoint.

    Args:
        model: a zoo name or `package.module:factory`.
        checkpoint: an Orbax directory or a safetensors file.
        input_shape: `(H, W, C)` of one image.
        kwargs: arguments of the factory.

    Raises:
        ModelError: the model or the checkpoint is not there or does not fit.
        SubjectError: the model does not map images to logits.
    """
    spec = engine.ModelSpec(model, tuple(input_shape), dict(kwargs or {}))
    module = models.resolve(model, **spec.kwargs)
    (count,) = export.symbolic_shape("n")  # any number of images, as it will be exported
    try:
        template = spec.template(module)
        variables_out, _ = jax.eval_shape(
            lambda v, x: (module.apply(v, x), 0),
            template,
            jax.ShapeDtypeStruct((count, *input_shape), np.float32),
        )
    except Exception as error:
        raise SubjectError(
            f"model {model!r} does not take images of shape {list(input_shape)} in any number, called as module(x): "
            f"{type(error).__name__}: {first_line(error)}; where it needs their number, expected x.shape[0] "
            f"or -1, not len(x) or a constant"
        ) from error
    if getattr(variables_out, "ndim", None) != 2 or variables_out.shape[0] != count:
        shape = getattr(variables_out, "shape", type(variables_out).__name__)
        raise SubjectError(f"model {model!r}: expected logits [N, classes] for N images, got {shape}")
    known = models.get(model) if ":" not in model else module
    variables = models.load_checkpoint(checkpoint, known, template, tuple(input_shape))
    with roomy(variables):
        return with_momenta(Subject(spec, module, variables, variables_out.shape[1]))


def random_subject(model: str, **kwargs: Any) -> Subject:
    """A model of the zoo with random variables: for measuring speed, and for tests."""
    spec = engine.ModelSpec(model, tuple(models.get(model).input_shape), kwargs)
    module = models.resolve(model, **kwargs)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *spec.input_shape)))
    classes = jax.eval_shape(module.apply, variables, spec.example)
    return with_momenta(Subject(spec, module, variables, classes.shape[-1]))


def on_host(subject: Subject) -> Subject:
    """The subject with its variables in the memory of the host, so that they take none of a device's."""
    return with_fields(subject, variables=jax.tree.map(np.asarray, subject.variables))


def on_device(subject: Subject) -> Subject:
    """The subject with its variables on the first device, or where `roomy` says."""
    return with_fields(subject, variables=jax.tree.map(jnp.asarray, subject.variables))


def with_momenta(subject: Subject) -> Subject:
    """The subject with the momenta of its running averages, read off one training step."""
    x = jax.random.normal(jax.random.key(0), (8, *subject.spec.input_shape), subject.spec.input_dtype)
    return with_fields(subject, momenta=engine.momenta(subject.train, subject.variables, x, jax.random.key(0)))
