"""Truncation as a gene of the search: a candidate answers at the end, or earlier, by a head of its own.

A candidate is evaluated in one forward pass of the whole model under its masks; what stands at a few points
(`engine.gated_features`) makes an answer for each of them, and the gene says which counts. So depth, dropped blocks
and widths are searched at once, on the same images. The heads at the points are fitted to `train` in closed form (see
shortening.py); a candidate with fewer or other units has them moved, by ridge regression on the images that it is
calibrated on, towards what they answer to the dense model's features. What lies behind its point costs it nothing.

Exits within a network: S. Teerapittayanon, B. McDanel, H. T. Kung: "BranchyNet: fast inference via early exiting from
deep neural networks", ICPR 2016; here one exit is chosen for good, and what follows is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from treesurgeon import engine
from treesurgeon.search.heads import LinearHead
from treesurgeon.search.hidden import HiddenHead
from treesurgeon.search.shortening import truncated
from treesurgeon.search.subject import Subject

GENE = "exit"  # what masks call it
PENALTY = 0.1  # of a head's move, in mean squares of the features


@dataclass(frozen=True, eq=False)
class Exit:
    """A point at which candidates may end.

    Attributes:
        point: see `engine.points`.
        linear: a linear head on what stands there, which scores candidates.
        deep: one with a hidden layer, where that is better on `search`.
    """

    point: str
    linear: LinearHead
    deep: HiddenHead | None = None

    def subject(self, whole: Subject, deep: bool = False) -> Subject:
        """The model up to the point, with the linear head or the other one."""
        return truncated(whole, self.point, self.deep if deep and self.deep else self.linear)


def restricted(plan: engine.Plan, graph: engine.Graph) -> engine.Plan:
    """What a plan for the whole model says about a part of it; groups that other layers joined are left out."""
    keep = {
        name: kept
        for name, kept in plan.keep.items()
        if name in graph.groups and len(kept) < graph.groups[name].size and kept[-1] < graph.groups[name].size
    }
    return engine.Plan(keep, plan.drop & graph.blocks.keys())


def within(masks: Mapping[str, Any], graph: engine.Graph) -> dict[str, Any]:
    """The same for masks, or stacks of masks."""
    units, blocks = masks.get("units", {}), masks.get("blocks", {})
    sizes = {name: group.size for name, group in graph.groups.items()}
    return {
        "units": {name: mask for name, mask in units.items() if sizes.get(name) == mask.shape[-1]},
        "blocks": {name: mask for name, mask in blocks.items() if name in graph.blocks},
    }


def without_gene(masks: Mapping[str, Any]) -> dict[str, Any]:
    """The masks alone."""
    return {name: each for name, each in masks.items() if name != GENE}


def paths(exit_: Exit) -> tuple[str, str]:
    """What a candidate's own leaves call the kernel and the bias of its head at this exit."""
    return f"{GENE}/{exit_.point}/kernel", f"{GENE}/{exit_.point}/bias"


def ending(subject: Subject, exits: Sequence[Exit]) -> Callable[..., Array]:
    """`answer(variables, masks, own, x)`: logits `[N, K]` of a candidate where its gene says.

    `masks` may hold `maps` besides; `own` the candidate's own heads, by `paths`.
    """
    gated = engine.gated_features(subject.infer, subject.graph, finite=True)

    def answer(variables: Any, masks: Mapping[str, Any], own: Mapping[str, Any], x: Array) -> Array:
        last, table = gated(variables, without_gene(masks), x)
        answers = [last]
        for each in exits:
            kernel, bias = paths(each)
            z = table[each.point]
            made = z @ own.get(kernel, each.linear.kernel) + own.get(bias, each.linear.bias)
            answers.append(made.astype(last.dtype))
        return jnp.stack(answers)[masks[GENE]]

    return answer


def moved(
    subject: Subject, exits: Sequence[Exit], variables: Any, masks: Mapping[str, Any], own: Any, x: Array
) -> dict[str, Array]:
    """A candidate's own heads, by `paths`.

    Args:
        subject: the dense model.
        exits: where candidates may end.
        variables: the dense ones.
        masks: the candidate's, with `maps`.
        own: the candidate's variables.
        x: images, `[N, H, W, C]`.
    """
    there = engine.features(subject.infer, subject.graph)(variables, x)
    _, here = engine.gated_features(subject.infer, subject.graph, finite=True)(own, without_gene(masks), x)
    out = {}
    for each in exits:
        z, kernel = here[each.point], each.linear.kernel
        missing = (there[each.point] - z) @ kernel
        centre, mean = z.mean(0), missing.mean(0)
        z = z - centre
        gram = z @ z.T  # of the images: there are fewer of them than features, or not many more
        size = jnp.trace(gram) / len(z)
        weights = jax.scipy.linalg.solve(
            gram + (PENALTY * size + 1e-9) * jnp.eye(len(z)), missing - mean, assume_a="pos"
        )
        move = z.T @ weights
        at = paths(each)
        out |= {at[0]: kernel + move, at[1]: each.linear.bias + mean - centre @ move}
    return out
