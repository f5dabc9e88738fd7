"""A linen module cut in depth, with a head of its own: a module like any other to whatever inits and applies it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map_with_path

from treesurgeon.engine.coupling import trace
from treesurgeon.engine.flax import Appliable, from_linen
from treesurgeon.engine.graph import Graph
from treesurgeon.engine.jaxprs import path_name
from treesurgeon.engine.truncation import Truncated, truncate

HEAD = "shortened_head"


class Shortened:
    """A module up to a point (see `truncate`), and a dense layer on the pooled features that stand there.

    Its variables are those of the module's that are needed to get there, and `params/shortened_head` with `kernel`
    `[C, outputs]` and `bias` `[outputs]`.

    Attributes:
        module: the linen module.
        at: the point, as `engine.points` names them.
        outputs: how many the head has.
    """

    def __init__(self, module: Appliable, at: str, outputs: int, x: Any):
        """Nothing is computed before it is asked for.

        Args:
            module: maps inputs to logits; what else it is called with may change its mode, as `train=True` does.
            at: the point.
            outputs: of the new head.
            x: an example input, a `jax.ShapeDtypeStruct` does.
        """
        self.module, self.at, self.outputs, self._x = module, at, outputs, x

    @cached_property
    def _template(self) -> Any:
        return jax.eval_shape(self.module.init, jax.random.key(0), self._x)

    @cached_property
    def _graph(self) -> Graph:
        fn, template = from_linen(self.module, self._template)
        return trace(fn, template, self._x)

    @cached_property
    def _until(self) -> Truncated:
        return truncate(self.module.apply, self._graph, self.at, self._x)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Random variables; as `module.init`, and for the head LeCun normal values and zeros."""
        key = rngs["params"] if isinstance(rngs, dict) else rngs
        short = self.take(self.module.init(rngs, *args, **kwargs))
        features = jax.eval_shape(self._until, short, *args, **kwargs)
        shape = (features.shape[-1], self.outputs)
        return self.with_head(short, jax.nn.initializers.lecun_normal()(key, shape), jnp.zeros(self.outputs))

    def take(self, variables: Any) -> Any:
        """What is needed of the module's variables."""
        return self._until.take(variables)

    def with_head(self, short: Mapping[str, Any], kernel: Any, bias: Any) -> dict[str, Any]:
        """The variables with this head.

        Args:
            short: what is needed of the module's variables, see `take`.
            kernel: `[C, outputs]`.
            bias: `[outputs]`.
        """
        return {**short, "params": {**short["params"], HEAD: {"kernel": kernel, "bias": bias}}}

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """As `module.apply`: logits `[N, outputs]`, and with `mutable` the new values of these collections."""
        rest = {name: leaf for name, leaf in variables["params"].items() if name != HEAD}
        head, short = variables["params"][HEAD], {**variables, "params": rest}
        if not mutable:
            return self._until(short, *args, **kwargs) @ head["kernel"] + head["bias"]
        z, new = self._until.with_updates(short, *args, mutable=mutable, **kwargs)
        names = [mutable] if isinstance(mutable, str) else list(short) if mutable is True else mutable
        held = {name: variables[name] for name in names if name in variables}
        updated = tree_map_with_path(lambda path, leaf: new.get(path_name(path), leaf), held)
        return z @ head["kernel"] + head["bias"], updated
