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

HEAD, HIDDEN = "shortened_head", "shortened_hidden"
ENTRY = f"before {HIDDEN}"  # what `points` of such a module calls the point at which it is cut


class Shortened:
    """A module up to a point (see `truncate`), and a head on the pooled features that stand there.

    Its variables are those of the module's that are needed to get there, and `params/shortened_head` with `kernel`
    `[C, outputs]` and `bias` `[outputs]`. With a hidden layer, `params/shortened_hidden` has `kernel` `[C, hidden]` and
    `bias` `[hidden]`, a relu follows, and the head's kernel is `[hidden, outputs]`.

    Attributes:
        module: the linen module.
        at: the point, as `engine.points` names them.
        outputs: how many the head has.
        hidden: units of a hidden layer before it, 0 for none.
    """

    def __init__(self, module: Appliable, at: str, outputs: int, x: Any, hidden: int = 0):
        """Nothing is computed before it is asked for.

        Args:
            module: maps inputs to logits; what else it is called with may change its mode, as `train=True` does.
            at: the point.
            outputs: of the new head.
            x: an example input, a `jax.ShapeDtypeStruct` does.
            hidden: units of a hidden layer, 0 for none.
        """
        self.module, self.at, self.outputs, self.hidden, self._x = module, at, outputs, hidden, x

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of, to be sent elsewhere: what was found out since is found out there again."""
        return {name: getattr(self, name) for name in ("module", "at", "outputs", "hidden", "_x")}

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
        """Random variables; as `module.init`, and for the new layers LeCun normal values and zeros."""
        key = rngs["params"] if isinstance(rngs, dict) else rngs
        short = self.take(self.module.init(rngs, *args, **kwargs))
        features = jax.eval_shape(self._until, short, *args, **kwargs)
        draw, sizes = jax.nn.initializers.lecun_normal(), (features.shape[-1], self.hidden or features.shape[-1])
        inner = (draw(jax.random.fold_in(key, 1), sizes), jnp.zeros(self.hidden)) if self.hidden else None
        return self.with_head(short, draw(key, (sizes[1], self.outputs)), jnp.zeros(self.outputs), inner)

    def take(self, variables: Any) -> Any:
        """What is needed of the module's variables."""
        return self._until.take(variables)

    def with_head(
        self, short: Mapping[str, Any], kernel: Any, bias: Any, hidden: tuple[Any, Any] | None = None
    ) -> dict[str, Any]:
        """The variables with this head.

        Args:
            short: what is needed of the module's variables, see `take`.
            kernel: `[C, outputs]`, or `[hidden, outputs]`.
            bias: `[outputs]`.
            hidden: kernel `[C, hidden]` and bias `[hidden]` of the hidden layer, where there is one.
        """
        new = {HEAD: {"kernel": kernel, "bias": bias}}
        if hidden:
            new[HIDDEN] = dict(zip(("kernel", "bias"), hidden, strict=True))
        return {**short, "params": {**short["params"], **new}}

    def _head(self, params: Mapping[str, Any], z: Any) -> Any:
        if self.hidden:
            z = jax.nn.relu(z @ params[HIDDEN]["kernel"] + params[HIDDEN]["bias"])
        return z @ params[HEAD]["kernel"] + params[HEAD]["bias"]

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """As `module.apply`: logits `[N, outputs]`, and with `mutable` the new values of these collections."""
        params = variables["params"]
        short = {**variables, "params": {name: leaf for name, leaf in params.items() if name not in (HEAD, HIDDEN)}}
        if mutable is False:
            return self._head(params, self._until(short, *args, **kwargs))
        every = [name for name in self._template if name != "params"]  # behind the point as well, where nothing is left
        z, new = self._until.with_updates(short, *args, mutable=every, **kwargs)
        names = [mutable] if isinstance(mutable, str) else list(short) if mutable is True else mutable
        held = {name: variables[name] for name in names if name in variables}
        updated = tree_map_with_path(lambda path, leaf: new.get(path_name(path), leaf), held)
        return self._head(params, z), updated
