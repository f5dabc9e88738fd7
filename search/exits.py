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
import numpy as np
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
        groups, blocks: of the whole model, those that lie before it.
        answers: what the model up to there, with the linear head, answers to the images that candidates are calibrated
            on, `[N, K]`.
    """

    point: str
    linear: LinearHead
    deep: HiddenHead | None
    groups: frozenset[str]
    blocks: frozenset[str]
    answers: np.ndarray

    def subject(self, whole: Subject, deep: bool = False) -> Subject:
        """The model up to the point, with the linear head or the other one."""
        return truncated(whole, self.point, self.deep if deep and self.deep else self.linear)


def make_exit(whole: Subject, short: Subject, linear: LinearHead, deep: HiddenHead | None, x: np.ndarray) -> Exit:
    """An exit of the model.

    Args:
        whole: the model.
        short: the model up to there with the linear head.
        linear, deep: heads.
        x: images that candidates are calibrated on, `[N, H, W, C]`.
    """
    groups, blocks = counterparts(whole.graph, short.graph)
    answers = np.asarray(jax.jit(short.infer)(short.variables, x)) if len(x) else np.zeros((0, *linear.bias.shape))
    linear, deep = jax.tree.map(np.asarray, (linear, deep))  # they may be sent elsewhere
    return Exit(str(short.spec.at), linear, deep, frozenset(groups.values()), frozenset(blocks.values()), answers)


def counterparts(whole: engine.Graph, part: engine.Graph) -> tuple[dict[str, str], dict[str, str]]:
    """For groups and blocks of a part of a model, what the whole calls them.

    Names go by what else a module holds, so that a part has other ones at times; the parameters are the same. Groups
    whose units other layers number anew are left out.
    """

    def places(group: engine.Group) -> list[Any]:
        return [(member.path, member.axis, member.units.tobytes()) for member in group.members]

    def identity(block: engine.Block) -> Any:
        return block.kernels or block.leaves or block.name, block.turn, block.shape

    there = {place: name for name, group in whole.groups.items() for place in places(group)}
    groups = {}
    for name, group in part.groups.items():
        found = next((there[place] for place in places(group) if place in there), None)
        if found is not None and whole.groups[found].size == group.size:
            groups[name] = found
    known = {identity(block): name for name, block in whole.blocks.items()}
    blocks = {name: known[identity(block)] for name, block in part.blocks.items() if identity(block) in known}
    return groups, blocks


def restricted(plan: engine.Plan, whole: engine.Graph, part: engine.Graph) -> engine.Plan:
    """What a plan for the whole model says about a part of it."""
    groups, blocks = counterparts(whole, part)
    sizes = {name: group.size for name, group in part.groups.items()}
    keep = {name: plan.keep[of] for name, of in groups.items() if of in plan.keep and len(plan.keep[of]) < sizes[name]}
    return engine.Plan(keep, frozenset(name for name, of in blocks.items() if of in plan.drop))


def within(masks: Mapping[str, Any], whole: engine.Graph, part: engine.Graph) -> dict[str, Any]:
    """The same for masks, or stacks of masks."""
    return {
        kind: {name: masks[kind][of] for name, of in names.items() if of in masks.get(kind, {})}
        for kind, names in zip(("units", "blocks"), counterparts(whole, part), strict=True)
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


def moved(subject: Subject, exits: Sequence[Exit], masks: Mapping[str, Any], own: Any, x: Array) -> dict[str, Array]:
    """A candidate's own heads, by `paths`.

    Args:
        subject: the dense model.
        exits: where candidates may end.
        masks: the candidate's, with `maps`.
        own: the candidate's variables.
        x: the images that the exits' `answers` are to, `[N, H, W, C]`.
    """
    _, here = engine.gated_features(subject.infer, subject.graph, finite=True)(own, without_gene(masks), x)
    out = {}
    for each in exits:
        z, kernel = here[each.point], each.linear.kernel
        missing = each.answers - each.linear.bias - z @ kernel
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
