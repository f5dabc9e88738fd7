"""Does `trace` grow linearly with the program? Deep ResNets and language models, beside JAX's own tracing."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from harness import publish, seconds, spread

from treesurgeon import engine, models
from treesurgeon.engine.calling import split_call, trace_call
from treesurgeon.engine.jaxprs import Program
from treesurgeon.models.gpt import ScannedLayer

DEPTHS = (20, 56, 110, 218, 434, 1202)
LAYERS = (12, 24, 48, 96)
REPEATS = 5


class Unrolled(models.GPT):
    """The scanned language model with a module of its own for each layer."""

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Map token numbers `[N, T]` to logits."""
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = embed(tokens) + position[: tokens.shape[1]]
        for i in range(self.depth):
            x, _ = ScannedLayer(self.widths, self.scale, self.dropout, train, name=f"layer{i}")(x, None)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


def resnet(depth: int) -> models.ResNet:
    """The CIFAR ResNet of any depth 6n + 2."""
    inner = tuple((width,) * ((depth - 2) // 6) for width in (16, 32, 64))
    return models.ResNet((16, 32, 64), inner, ((8, 8), (16, 16)), 10)


def subjects() -> dict[str, tuple[nn.Module, Any]]:
    """Every model with an example input."""
    image, tokens = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"), jax.ShapeDtypeStruct((1, 64), "int32")
    out: dict[str, tuple[nn.Module, Any]] = {f"ResNet-{depth}": (resnet(depth), image) for depth in DEPTHS}
    for depth in LAYERS:
        scanned = models.gpt(depth=depth)
        out[f"GPT, {depth} layers, scanned"] = scanned, tokens
    for depth in LAYERS:
        scanned = models.gpt(depth=depth)
        out[f"GPT, {depth} layers, unrolled"] = Unrolled(**_fields(scanned)), tokens
    return out


def _fields(module: nn.Module) -> dict[str, Any]:
    own = set(type(module).__dataclass_fields__) - {"parent", "name"}
    return {name: getattr(module, name) for name in own}


def equations(program: Program) -> int:
    """How many equations the engine sees, those of loops and branches included."""
    return sum(1 + sum(map(equations, eqn.bodies)) for eqn in program.eqns)


def cases(fn: Callable, params: Any, x: Any) -> dict[str, Callable[[], Any]]:
    """What is timed; JAX remembers what it has traced, so each turn starts with its caches cleared."""

    def dense() -> None:
        jax.clear_caches()
        jax.make_jaxpr(lambda *args: fn(*args))(params, x)

    def trace() -> None:
        jax.clear_caches()
        engine.trace(fn, params, x)

    return {"dense": dense, "trace": trace}


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that start so")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    rows = []
    for name, (module, x) in subjects().items():
        if not name.startswith(options.only):
            continue
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        fn, _ = engine.from_linen(module, {})
        size = equations(trace_call(fn, params, split_call((x,), {})).program)
        times = seconds(cases(fn, params, x), options.repeats)
        dense, trace = (statistics.median(times[case]) for case in ("dense", "trace"))
        rows.append(
            [
                name,
                str(size),
                spread(times["dense"], 3),
                spread(times["trace"], 3),
                f"{trace / dense:.2f}",
                f"{1e6 * (trace - dense) / size:.0f}",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    publish(
        "tracing",
        "The time of trace against the size of the program",
        (
            "model",
            "equations",
            "make_jaxpr, s: median (range)",
            "trace, s: median (range)",
            "trace / make_jaxpr",
            "µs an equation beyond make_jaxpr",
        ),
        rows,
        f"Medians of {options.repeats} repeats in turns, JAX's caches cleared before each. `make_jaxpr` is the "
        "function's own tracing, which `trace` includes.",
    )


if __name__ == "__main__":
    main()
