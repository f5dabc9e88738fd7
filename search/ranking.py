"""What ranks the units of a group: a criterion, or of several the one that suits the group best.

What a criterion is worth differs from layer to layer. Each group is cut to its better half by each criterion, all else
being dense, and what was removed is made up for as in the search: the criterion stays whose half moves the answers
least. Groups whose units a dropped block may tie together are ranked jointly, so they have one criterion between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.search import sensitivity
from treesurgeon.search.evaluate import batches
from treesurgeon.search.setting import CALIBRATION, Setting
from treesurgeon.search.sharding import Layout, one_device
from treesurgeon.search.space import Space
from treesurgeon.search.sweep import Sweep

FISHER_IMAGES = 64  # each takes a backward pass of its own


def rank(setting: Setting, criterion: str | None = None, layout: Layout | None = None) -> dict[str, np.ndarray]:
    """Score the units of every group, on calibration images where that needs data.

    Args:
        setting: the run's.
        criterion: a name in `engine.CRITERIA`; if None, the configured one.
        layout: how the model lies on the devices; what takes gradients is computed on one all the same.
    """
    over = (layout or one_device()).over
    subject, config = setting.subject, setting.config
    graph, variables = subject.graph, subject.variables
    data = batches(setting.roles.train, CALIBRATION, CALIBRATION)
    x, y = data.images[0], data.labels[0]

    def loss(variables: Any, x: Array, y: Array) -> Array:
        return data.task.losses(subject.infer(variables, x), y).mean()

    select = engine.class_selectivity(subject.infer, graph, subject.num_classes)
    measures: dict[str, Callable[[], Any]] = {
        "grads": lambda: jax.jit(jax.grad(loss, allow_int=True))(variables, x, y),
        "fisher": lambda: jax.jit(engine.fisher_energy(loss, graph))(variables, x[:FISHER_IMAGES], y[:FISHER_IMAGES]),
        "energy": lambda: over(engine.activation_energy(subject.infer, graph), variables, x)(x),
        "zeros": lambda: over(engine.zero_share(subject.infer, graph), variables, x)(x),
        "grams": lambda: over(engine.gram_matrices(subject.infer, graph), variables, x)(x),
        "selectivity": lambda: over(lambda v, shown: select(v, *shown), variables, (x, y))((x, y)),
        "key": lambda: jax.random.key(config.seed),
    }
    name = criterion or config.criterion
    needs = engine.CRITERIA[name].needs if name in engine.CRITERIA else ""  # `importance` refuses other names
    measured = {needs: measures[needs]()} if needs else {}
    scores = engine.importance(name, graph, variables, **measured)
    return {group: np.asarray(score) for group, score in scores.items()}


def moves(spaces: Mapping[str, Space], sweep: Sweep) -> dict[str, np.ndarray]:
    """By searched group, how far the answers move where its better half alone is kept, in nats, `float[criteria]`.

    Args:
        spaces: by criterion, the same space with its units ranked by that.
        sweep: of one of them.
    """
    one = next(iter(spaces.values()))
    dense = one.dense_genome()
    probed = sensitivity.probes(one, dense)
    gene = (probed != dense).argmax(1)
    probed, gene = probed[gene < len(one.groups)], gene[gene < len(one.groups)]
    rows = [one.stacked(dense[None]), *(space.stacked(probed) for space in spaces.values())]
    masks = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    found = sweep.tried(masks, np.tile(gene, len(spaces))).reshape(len(spaces), -1)
    return {one.groups[g]: found[:, k] for k, g in enumerate(gene)}


def choose(moved: Mapping[str, np.ndarray], criteria: tuple[str, ...], space: Space) -> dict[str, str]:
    """The criterion of each searched group; of equals the one that was named first.

    Args:
        moved: what `moves` returned.
        criteria: their names.
        space: any of the spaces.
    """
    tied = set(space.ties.names if space.ties else ()) & moved.keys()
    joint = np.sum([moved[group] for group in sorted(tied)], axis=0)
    each = {group: joint if group in tied else of for group, of in moved.items()}
    return {group: criteria[int(np.nan_to_num(of, nan=np.inf).argmin())] for group, of in each.items()}


def sentence(chosen: Mapping[str, str]) -> str:
    """How many groups are ranked by what, in words."""
    counts = ", ".join(f"{count} by {name}" for name, count in Counter(chosen.values()).most_common())
    return f"units are ranked by what moves the answers least: {counts}"
