"""Which criterion ranks the units of which group, where several are to choose from.

What a criterion is worth differs from layer to layer. Each group is cut to its better half by each criterion, all else
being dense, and what was removed is made up for as in the search: the criterion stays whose half moves the answers
least. Groups whose units a dropped block may tie together are ranked jointly, so they have one criterion between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np

from treesurgeon.search import sensitivity
from treesurgeon.search.space import Space
from treesurgeon.search.sweep import Sweep


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
