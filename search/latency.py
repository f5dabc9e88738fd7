"""Latency and peak memory on the device at hand: measured on compiled models, predicted inside the search.

What counts is what was measured: `profile` times a narrowed model, and `pick_measured` lets finalists pass by that. A
search cannot compile every candidate, so inside it `Fit.predict` stands in: a sum of costs with weights that are not
negative, fitted to some random plans, whose error on plans it has not seen is part of the result. How wrong it is
depends on the device: read `Fit.errors` before trusting it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import engine
from treesurgeon.engine import Graph, Plan
from treesurgeon.search.space import Space

REPEATS = 20
WARM_UP = 3
MEASURES = ("latency", "memory")

T = TypeVar("T")


class Profile(NamedTuple):
    """What one compiled model takes on this device.

    Attributes:
        latency: milliseconds a call, the median.
        memory: peak bytes of the program: arguments, results and temporaries; 0 where the device does not tell.
    """

    latency: float
    memory: float


def profile(fn: Callable[..., Any], params: Any, x: Any, repeats: int = REPEATS) -> Profile:
    """Compile `fn(params, x)` and measure it on the default device."""
    params, x = jax.device_put((params, x))
    compiled = jax.jit(fn).lower(params, x).compile()
    return Profile(_time(lambda: compiled(params, x), repeats), _peak(compiled))


def _time(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(WARM_UP):
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _peak(compiled: Any) -> float:
    """Arguments that the program overwrites with results count once."""
    found = compiled.memory_analysis()
    if found is None:
        return 0.0
    return float(
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )


def profile_plan(
    fn: Callable[..., Any], graph: Graph, params: Any, plan: Plan, x: Any, repeats: int = REPEATS
) -> Profile:
    """The `Profile` of the narrowed model; `params` are the dense ones."""
    return profile(engine.narrow(fn, graph, plan), engine.cut(params, graph, plan), x, repeats)


def features(graph: Graph, masks: Plan | Mapping[str, Any], dense: Graph | None = None) -> jax.Array:
    """What predictions are made from, `float32[…, 4]`: MACs, activation bytes, live contractions, parameters.

    Each is a share of the dense model's, whose graph is another one where the model is cut in depth. Works inside jit
    and on stacks of masks, as `engine.cost` does.
    """
    most = _amounts(dense or graph, Plan())
    found = _amounts(graph, masks)
    shape = jnp.broadcast_shapes(*(jnp.shape(n) for n in found))
    shares = [jnp.asarray(n / float(max(d, 1)), jnp.float32) for n, d in zip(found, most, strict=True)]
    return jnp.stack([jnp.broadcast_to(share, shape) for share in shares], -1)


def _amounts(graph: Graph, masks: Plan | Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    cost = engine.cost(graph, masks)
    return cost.macs, cost.activation_bytes, engine.contractions(graph, masks), cost.params


@dataclass(frozen=True, eq=False)
class Fit:
    """A prediction of one measure from features, and how far off it was.

    Attributes:
        measure: `latency` or `memory`.
        weights: of the constant, then of the four features; none negative.
        values: what was measured, one for each plan.
        held_out: what was predicted for each plan by a fit to all others.
    """

    measure: str
    weights: np.ndarray
    values: np.ndarray
    held_out: np.ndarray

    def predict(self, features: Any) -> Any:
        """The measure for features `[…, 4]`: milliseconds or bytes; works inside jit."""
        return predict(jnp.asarray(self.weights, jnp.float32), features)

    @property
    def errors(self) -> np.ndarray:
        """Relative errors on held-out plans, one for each plan."""
        return np.abs(self.held_out / self.values - 1)

    def __str__(self) -> str:
        return (
            f"{self.measure} predicted from {len(self.values)} measured plans: on plans not fitted it is off by "
            f"{np.median(self.errors):.1%} (median), {self.errors.max():.1%} (worst)"
        )


def predict(weights: Any, features: Any) -> Any:
    """A measure from its weights `[5]` and features `[…, 4]`."""
    return weights[0] + (features * weights[1:]).sum(-1)


def fit(measure: str, rows: Any, values: Sequence[float]) -> Fit:
    """Fit a measure by non-negative least squares of the relative error.

    C. L. Lawson, R. J. Hanson: "Solving least squares problems", 1974.

    Args:
        measure: what it is, for the report.
        rows: the features of each plan, `[plans, 4]`.
        values: what was measured, above 0.
    """
    from scipy.optimize import nnls  # takes half a second to import

    rows = np.asarray(rows, np.float64)
    target = np.asarray(values, np.float64)
    design = np.concatenate([np.ones((len(rows), 1)), rows], 1)

    def weights(used: np.ndarray) -> np.ndarray:
        return nnls(design[used] / target[used, None], np.ones(used.sum()))[0]

    every = np.ones(len(rows), bool)
    held_out = [design[i] @ weights(np.arange(len(rows)) != i) for i in range(len(rows))]
    return Fit(measure, weights(every), target, np.array(held_out))


def calibrate(
    fn: Callable[..., Any], graph: Graph, params: Any, plans: Sequence[Plan], x: Any, repeats: int = REPEATS
) -> dict[str, Fit]:
    """Measure plans on this device and fit a prediction of each measure that the device tells.

    Args:
        fn: the dense model, `fn(params, x)`.
        graph: the traced graph.
        params: the dense parameters.
        plans: what to measure: some twenty, as different as the candidates will be (`random_plans`).
        x: a batch of inputs of the size that counts.
        repeats: calls that are timed for each plan.
    """
    rows = np.stack([np.asarray(features(graph, plan)) for plan in plans])
    profiles = [profile_plan(fn, graph, params, plan, x, repeats) for plan in plans]
    found = {name: [getattr(p, name) for p in profiles] for name in MEASURES}
    return {name: fit(name, rows, values) for name, values in found.items() if min(values) > 0}


def random_plans(space: Space, count: int, seed: int) -> list[Plan]:
    """The dense plan and random ones of a space: widths around a common share, and as much of the blocks dropped.

    Args:
        space: decides what is left where dropped blocks tie groups.
        count: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    plans = [Plan()]
    while len(plans) < count:
        common, chance = rng.uniform(0.15, 1), rng.uniform(0, 0.6)
        drop = [b for b in space.blocks if rng.random() < chance]
        shares = {g: np.clip(common + rng.normal(0, 0.15), 0.1, 1) for g in space.groups}
        plans.append(space.to_plan(space.encode({g: round(s * space.sizes[g]) for g, s in shares.items()}, drop)))
    return plans


def pick_measured(
    candidates: Iterable[T], profile: Callable[[T], Profile], limits: Mapping[str, float], enough: int
) -> tuple[list[tuple[T, Profile]], list[tuple[T, Profile]]]:
    """Measure candidates in order of merit until enough are within the limits.

    Args:
        candidates: the best first.
        profile: measures one.
        limits: on `latency` (milliseconds) and `memory` (bytes).
        enough: how many that pass are wanted.

    Returns:
        Those that passed and those that failed, with what was measured; candidates behind the last needed one are in
        neither.
    """
    passed: list[tuple[T, Profile]] = []
    failed: list[tuple[T, Profile]] = []
    for candidate in candidates:
        if len(passed) >= enough:
            break
        found = profile(candidate)
        within = all(getattr(found, name) <= limit for name, limit in limits.items())
        (passed if within else failed).append((candidate, found))
    return passed, failed
