"""What variants may cost: limits on exact costs, and on what is measured on the device at hand.

A search cannot compile every candidate, so latency and peak memory are predicted inside it (see latency.py) from some
variants of the space that are measured first. What counts is the measurement: finalists pass by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.engine import Graph
from treesurgeon.search import latency, sensitivity
from treesurgeon.search.config import RunError
from treesurgeon.search.exits import GENE, restricted, within, without_gene
from treesurgeon.search.selection import limits
from treesurgeon.search.setting import Setting
from treesurgeon.search.space import Space
from treesurgeon.search.state import States

PLANS = 16  # that predictions are fitted to


@dataclass(frozen=True, eq=False)
class Budget:
    """Limits, and the costs that they are on.

    Attributes:
        graph: the traced graph.
        limits: absolute, by the name of the cost.
        dense: the dense model's costs, those that are predicted as the prediction has them.
        weights: of the predictions, by the name of what is predicted.
        ends: graphs of the model up to each of the points at which candidates may end.
    """

    graph: Graph
    limits: Mapping[str, float]
    dense: Mapping[str, float]
    weights: Mapping[str, np.ndarray]
    ends: Sequence[Graph] = ()

    @property
    def measure(self) -> str:
        """The cost that the search trades against loss."""
        return next(iter(self.limits), "params")

    @property
    def share(self) -> float:
        """The limit on it, relative to the dense model; 0 without one."""
        return self.limits[self.measure] / self.dense[self.measure] if self.limits else 0.0

    @property
    def measured(self) -> dict[str, float]:
        """The limits that finalists have to meet by measurement."""
        return {name: limit for name, limit in self.limits.items() if name in self.weights}

    def costs(self, masks: Any) -> dict[str, Array]:
        """All costs under masks, or stacks of masks; works inside jit.

        What ends early costs what the model up to there does.
        """
        whole = _costs(self.graph, self.weights, without_gene(masks))
        if GENE not in masks:
            return whole
        each = [whole, *(_costs(end, self.weights, within(masks, self.graph, end), self.graph) for end in self.ends)]
        at = jnp.asarray(masks[GENE])[None]

        def chosen(*values: Array) -> Array:
            return jnp.take_along_axis(
                jnp.stack([jnp.broadcast_to(jnp.asarray(v, values[0].dtype), at.shape[1:]) for v in values]), at, 0
            )[0]

        return jax.tree.map(chosen, *each)

    def over(self, costs: Mapping[str, Any]) -> Any:
        """By how much costs exceed the limits, as the sum of shares; 0 where they are within all."""
        parts = (np.maximum(np.asarray(costs[name]) / limit - 1, 0) for name, limit in self.limits.items())
        return sum(parts, np.zeros(np.shape(next(iter(costs.values())))))


def make_budget(setting: Setting, space: Space, states: States, say: Callable[[str], None]) -> Budget:
    """The budget of a run; measures where it has to, once in a run.

    Raises:
        RunError: no smallest variant, of the whole depth or up to a point, meets it.
    """
    graph, given = setting.subject.graph, dict(setting.budget)
    weights: dict[str, np.ndarray] = {}
    if setting.config.measured:
        found = states.arrays("profile", lambda: measure(setting, space, say))
        weights = {name: found[name] for name in setting.config.measured}
        given |= limits(setting.config.measured, {name: float(found[f"dense {name}"]) for name in weights})
    dense = {name: float(value) for name, value in _costs(graph, weights, engine.Plan()).items()}
    smallest = space.to_plan(sensitivity.smallest(space))
    ends = [end.subject(setting.subject).graph for end in setting.exits]
    early = [_costs(end, weights, restricted(smallest, graph, end), graph) for end in ends]
    refuse(given, [_costs(graph, weights, smallest), *early])
    return Budget(graph, given, dense, weights, ends)


def met(limits: Mapping[str, float], costs: Mapping[str, Any]) -> bool:
    """Whether costs are within the limits that are on them."""
    return all(float(costs[name]) <= limit for name, limit in limits.items() if name in costs)


def refuse(limits: Mapping[str, float], least: Sequence[Mapping[str, Any]]) -> None:
    """Raise RunError where no smallest variant, of the whole depth or up to a point, is within all limits."""
    if any(met(limits, costs) for costs in least):
        return
    nearest = min(least, key=lambda costs: sum(max(float(costs[k]) / v - 1, 0) for k, v in limits.items()))
    name = next(name for name, limit in limits.items() if float(nearest[name]) > limit)
    raise RunError(
        f"--{name.replace('_', '-')}: the budget of {limits[name]:,.6g} cannot be met, the smallest variant of the "
        f"space has {float(nearest[name]):,.6g}; raise it, protect less (--protect none), or let models end early "
        f"(--truncations)"
    )


def measure(setting: Setting, space: Space, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """The weights of each prediction, and `dense NAME`, what was measured of the dense model."""
    subject, config = setting.subject, setting.config
    say(f"measuring {PLANS} variants on {config.latency_batch} images at a time")
    plans = latency.random_plans(space, PLANS, config.seed)
    x = example(setting)
    fits = latency.calibrate(subject.infer, subject.graph, subject.variables, plans, x)
    out: dict[str, np.ndarray] = {}
    for name in config.measured:
        if name not in fits:
            raise RunError(f"--{name}: this device does not tell")
        say(str(fits[name]))
        out |= {name: fits[name].weights, f"dense {name}": fits[name].values[0]}
    return out


def measured_dense(setting: Setting, budget: Budget) -> dict[str, float]:
    """What is measured of the dense model, for the limits that are on measurements."""
    if not budget.measured:
        return {}
    found = latency.profile(setting.subject.infer, setting.subject.variables, example(setting))
    return {name: getattr(found, name) for name in budget.measured}


def example(setting: Setting) -> np.ndarray:
    """The batch that is timed: `[N, H, W, C]`."""
    images = setting.roles.train.images
    return images[np.arange(setting.config.latency_batch) % len(images)]


def _costs(graph: Graph, weights: Mapping[str, np.ndarray], masks: Any, dense: Graph | None = None) -> dict[str, Any]:
    found = engine.cost(graph, masks)._asdict()
    if weights:
        rows = latency.features(graph, masks, dense)
        found |= {name: latency.predict(jnp.asarray(w, jnp.float32), rows) for name, w in weights.items()}
    return found
