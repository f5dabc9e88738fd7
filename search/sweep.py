"""A sweep: how far single changes of one candidate move its answers, each computed from where it begins.

Compared is with the candidate itself and not with the dense model: what a single change does is small, and next to how
far the candidate is off already it would be lost in noise. As everywhere, scale does not count (see tasks.py).

A change deep in the network leaves all before it as it is, whatever is fitted there included. So the changes are sorted
by how much depends on them and put into a few parts; what comes before the first of a part is computed once for all of
it (`engine.Split.later`). Each part is one program, compiled once, and vmapped over its changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from treesurgeon import engine
from treesurgeon.search.chunking import chunks, fitting_chunk
from treesurgeon.search.evaluate import Batches, Reconstruct, calibrate, with_leaves
from treesurgeon.search.mesh import EVERY, P, groups, put, whole
from treesurgeon.search.sharding import Layout, one_device
from treesurgeon.search.space import Space
from treesurgeon.search.subject import Subject
from treesurgeon.search.tasks import Task

PARTS = 2  # each takes its time to compile


@dataclass(frozen=True, eq=False)
class Part:
    """The changes of some genes.

    Attributes:
        genes: their numbers.
        leaves: the leaves of the masks that they may change.
        parts: the program, split before what depends on these leaves.
        chunk: changes that run as one batch.
    """

    genes: frozenset[int]
    leaves: tuple[int, ...]
    once: Any
    early: Any
    late: Any
    chunk: int


class Sweep:
    """Finds how far single changes of a candidate move its answers.

    Attributes:
        parts: how its changes are divided.
        compiled: how many parts were compiled; each is once.
    """

    def __init__(
        self,
        subject: Subject,
        space: Space,
        calibration: Array | None,
        data: Batches,
        *,
        chunk: int | None = None,
        reconstruct: Reconstruct = "maps",
        parts: int = PARTS,
        layout: Layout | None = None,
    ):
        """Of `data` the first batch is used; the other arguments are those of `Evaluator`."""
        self.space, self.compiled, self._task = space, 0, data.task
        self._before: Any = None  # what was computed last of what comes before a part, and for which masks
        layout = layout or one_device()
        self.mesh = layout.mesh
        x = data.images[0]
        self._variables, self._labels, self._weights = layout.put(subject.variables), data.labels[0], data.weights[0]
        self._data = put(self.mesh, (x, x[:0] if calibration is None else calibration))

        def answer(variables: Any, data: Any, masks: Any) -> Array:
            x, calibration = data
            stats, maps = (
                calibrate(subject, masks, variables, calibration, reconstruct) if len(calibration) else ({}, {})
            )
            gated = engine.gate(subject.infer, subject.graph, gradients=False, finite=True)
            return gated(with_leaves(variables, stats), {**masks, "maps": maps}, x)

        one = jax.tree.map(lambda leaf: leaf[0], space.stacked(space.dense_genome()[None]))
        whole = engine.split(answer, self._variables.shapes, self._data, one)
        touched = touches(space, one)
        reach = whole.reach()
        work = np.array([max(reach[leaf] for leaf in leaves) for leaves in touched], float)
        self.parts: list[Part] = []
        for genes in partition(work, parts):
            leaves = tuple(sorted(frozenset().union(*(touched[i] for i in genes))))
            cut = whole.later(leaves)
            size = chunk or (1 if reconstruct == "kernels" else fitting_chunk(subject, len(x), 2 * len(genes)))

            def late(fixed: Any, known: Any, masks: Any, cut: engine.Split = cut) -> Array:
                self.compiled += 1  # runs once for each compilation
                return jax.vmap(partial(cut.late, fixed, known))(masks)

            shapes = self._variables.shapes
            fixed = jax.eval_shape(cut.once, shapes)
            early = layout.program(cut.early, fixed, (P(),), P())
            compiled = layout.once(cut, shapes), early, layout.program(late, fixed, (P(), P(EVERY)), P(EVERY))
            self.parts.append(Part(frozenset(genes), leaves, *compiled, size))

    def __call__(self, start: np.ndarray, changed: np.ndarray) -> np.ndarray:
        """The divergence of the answers of each of `changed` from those of `start`, in nats, `float[K]`.

        Args:
            start: a genome, `int[G]`.
            changed: genomes that differ from it in one gene each, `int[K, G]`.
        """
        differs = changed != start
        if not (differs.sum(1) == 1).all():
            raise ValueError("expected genomes that differ from the start in one gene each")
        return self.tried(self.space.stacked(np.concatenate([start[None], changed])), differs.argmax(1))

    def tried(self, masks: Any, gene: np.ndarray) -> np.ndarray:
        """The same for masks, whatever ranked their units.

        Args:
            masks: stacked; the first row is what the others are changes of.
            gene: of each of the others the gene that is changed, `int[K]`.
        """
        leaves = jax.tree.leaves(masks)
        out = np.full(len(gene), np.nan)
        for part in self.parts:
            mine = np.flatnonzero([g in part.genes for g in gene])
            if not len(mine):
                continue
            rows = np.concatenate([[0], mine + 1])  # the start itself, for comparison
            logits = np.concatenate(self.answers(part, leaves, list(chunks(rows, part.chunk))))[: len(rows)]
            out[mine] = [moved(self._task, logits[0], each, self._labels, self._weights) for each in logits[1:]]
        return out

    def answers(self, part: Part, leaves: list[np.ndarray], pieces: list[np.ndarray]) -> list[np.ndarray]:
        """The logits of pieces of candidates, `[chunk, b, classes]` each.

        Args:
            part: the one whose leaves may differ between them.
            leaves: of the masks of all candidates; what they have in common is read off the first.
            pieces: `part.chunk` rows of the leaves each.
        """
        rest = [leaf[0] for i, leaf in enumerate(leaves) if i not in part.leaves]
        if self._before is None or self._before[0] is not part or not _alike(self._before[1], rest):
            fixed = part.once(self._variables)
            self._before = part, rest, fixed, part.early(fixed, (self._data, rest))
        _, _, fixed, known = self._before
        found = []
        for rows in groups(pieces, self.mesh.size):
            masks = put(self.mesh, [leaves[i][rows] for i in part.leaves], P(EVERY))
            found += np.split(whole(part.late(fixed, known, masks)), self.mesh.size)
        return found[: len(pieces)]


def _alike(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


@partial(jax.jit, static_argnums=0)
def moved(task: Task, start: Array, logits: Array, labels: Array, weights: Array) -> Array:
    """The mean divergence of answers from others at the scale that suits best, the others being at their sharpest."""
    target = start * task.sharpness(start, task.wanted(labels, start.shape[-1]), weights)
    near = logits * task.sharpness(logits, task.expected(target.astype(jnp.float32)), weights)
    return (task.divergence(target, near) * weights).sum() / weights.sum()


def touches(space: Space, masks: Any) -> list[frozenset[int]]:
    """For each gene the leaves of the masks that it may change.

    Where dropped blocks tie groups, a gene of any of them may change them all.
    """
    number = {
        tuple(entry.key for entry in path): i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(masks))
    }
    tied = frozenset(
        number[key] for key in (("units", g) for g in (space.ties.names if space.ties else ())) if key in number
    )
    own = [number[("units", g)] for g in space.groups] + [number[("blocks", b)] for b in space.blocks]
    ties = set(space.ties.names) if space.ties else set()
    out = []
    for i, leaf in enumerate(own):
        joins = i >= len(space.groups) or space.groups[i] in ties
        out.append(frozenset([leaf]) | tied if joins else frozenset([leaf]))
    return out


def partition(work: np.ndarray, count: int) -> list[list[int]]:
    """Items in at most `count` parts, so that the sum of each part's largest work times its size is least.

    Items in the order of their work are cut into intervals, by dynamic programming.
    """
    order = np.argsort(-work, kind="stable")
    sorted_work, n = work[order], len(work)
    best = np.full((count + 1, n + 1), np.inf)
    best[:, 0] = 0
    cut = np.zeros((count + 1, n + 1), int)
    for k in range(1, count + 1):
        for end in range(1, n + 1):
            costs = [best[k - 1, begin] + sorted_work[begin] * (end - begin) for begin in range(end)]
            cut[k, end] = int(np.argmin(costs))
            best[k, end] = costs[cut[k, end]]
    out, end = [], n
    for k in range(count, 0, -1):
        begin = cut[k, end]
        if end > begin:
            out.append(order[begin:end].tolist())
        end = begin
    return out[::-1]
