"""`treesurgeon inspect`: what a model could lose, before any data is at hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import numpy as np
import tyro
from flax import nnx

from treesurgeon import engine, models
from treesurgeon.engine import Graph
from treesurgeon.search.config import RunError


@dataclass(frozen=True)
class Inspection:
    """What to look at."""

    model: Annotated[str, tyro.conf.Positional]
    """A model of the zoo (resnet56, vit_tiny, …), or package.module:factory that returns a linen or nnx module."""
    input: tuple[str, ...] = ()
    """Shape and dtype of each input, such as 1,224,224,3 or 1,16:int32. Default: one image of the zoo's size."""
    dot: Path | None = None
    """Write the coupling graph here, in Graphviz's language."""
    svg: Path | None = None
    """Write a picture of the coupling graph here, for a browser."""
    explain: str = ""
    """An axis of a parameter, such as params/conv1/kernel[3]: what goes together with it and why, instead of all."""


def inspect(options: Inspection, say: Callable[[str], None]) -> Graph:
    """Trace a model with parameters that are shapes only, and say what is found."""
    model: Any = nnx_model(options.model) or models.resolve(options.model)
    inputs = [_struct(text) for text in options.input] or [_preset_input(options.model)]
    try:
        if isinstance(model, nnx.Module):
            fn, params = engine.from_nnx(model)
            jax.eval_shape(fn, params, *inputs)
        else:
            fn, params = engine.from_linen(model, jax.eval_shape(model.init, jax.random.key(0), *inputs))
    except Exception as error:
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in inputs)
        raise RunError(f"{options.model} cannot be called with {shapes}: {error}; set --input") from error
    graph = engine.trace(fn, params, *inputs)
    for path, draw in ((options.dot, graph.dot), (options.svg, graph.svg)):
        if path:
            path.write_text(draw() + "\n")
    if options.explain:
        path, _, axis = options.explain.rpartition("[")
        if not path or not axis.rstrip("]").isdigit():
            raise RunError(
                f"--explain takes a leaf and an axis, such as params/conv1/kernel[3], got {options.explain!r}"
            )
        say(graph.explain(path, int(axis.rstrip("]"))))
        return graph
    say(str(graph))
    say("")
    say(costs(graph))
    return graph


def nnx_model(spec: str) -> nnx.Module | None:
    """The nnx model that a spec names, its arrays as shapes and in inference mode; None if it names none.

    A factory that has an argument `rngs` is given one. One that cannot be traced is called as it is.
    """
    factory = models.find(spec)
    if isinstance(factory, nnx.Module):
        factory.eval()
        return factory
    if isinstance(factory, nn.Module) or not callable(factory):
        return None

    def build() -> Any:
        takes = signature(factory.__init__ if isinstance(factory, type) else factory).parameters
        model = factory(rngs=nnx.Rngs(0)) if "rngs" in takes else factory()
        return model if isinstance(model, nnx.Module) else ()

    for call in (nnx.eval_shape, lambda build: build()):
        with suppress(Exception):  # `models.resolve` says what it is
            model = call(build)
            if isinstance(model, nnx.Module):
                model.eval()
                return model
    return None


def costs(graph: Graph) -> str:
    """What one unit of each group, and each block, costs, as a table."""
    dense = graph.masks(engine.Plan())
    names = list(graph.groups)
    units = {name: np.ones((len(names), group.size), bool) for name, group in graph.groups.items()}
    for i, name in enumerate(names):
        units[name][i, 0] = False
    blocks = {name: np.ones(len(names), bool) for name in graph.blocks}
    whole = engine.cost(graph, dense)
    less = engine.cost(graph, {"units": units, "blocks": blocks})
    lines = [f"{whole.params:,} parameters, {whole.macs:,} multiply-accumulates; of these, one unit of a group takes"]
    width = max(map(len, [*names, *graph.blocks]), default=0)
    for i, name in enumerate(names):
        params, macs = whole.params - np.broadcast_to(less.params, len(names))[i], whole.macs - less.macs[i]
        lines.append(f"  {name:{width}}  {params:>12,}  {macs:>14,}   of {graph.groups[name].size}")
    if graph.blocks:
        lines.append("and a block")
    for name in graph.blocks:
        rest = engine.cost(graph, {**dense, "blocks": {**dense["blocks"], name: np.asarray(False)}})
        lines.append(f"  {name:{width}}  {whole.params - rest.params:>12,}  {whole.macs - rest.macs:>14,}")
    return "\n".join(lines)


def _preset_input(model: str) -> jax.ShapeDtypeStruct:
    if model not in models.ZOO:
        raise RunError(f"{model} is not in the zoo: say what it takes, such as --input 1,224,224,3")
    return jax.ShapeDtypeStruct((1, *models.get(model).input_shape), "float32")


def _struct(text: str) -> jax.ShapeDtypeStruct:
    sizes, _, dtype = text.partition(":")
    try:
        return jax.ShapeDtypeStruct(tuple(int(n) for n in sizes.split(",") if n), np.dtype(dtype or "float32"))
    except (TypeError, ValueError) as error:
        raise RunError(f"--input takes sizes and a dtype, such as 1,224,224,3 or 1,16:int32, got {text!r}") from error
