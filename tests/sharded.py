"""What a deep model takes on each of eight devices, in a process of its own: XLA_FLAGS settle how many it has.

`python sharded.py PRECISION` prints, for copies and for a model that is split, the bytes of what scoring keeps of the
model on one device, and for every program that reads the model those of its temporary values.
"""

import json
import sys

import jax
import numpy as np

from treesurgeon import engine, models
from treesurgeon.search import sensitivity
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import Evaluator, batches
from treesurgeon.search.mesh import make_mesh
from treesurgeon.search.room import give_virtual_devices_threads, size_of
from treesurgeon.search.sharding import Layout, Program
from treesurgeon.search.space import build
from treesurgeon.search.subject import Subject
from treesurgeon.search.sweep import Sweep

WIDTHS, IMAGES, CALIBRATION = (96,) * 16, 16, 16


class Weighed(Program):
    """A program that notes what it needs before it runs."""

    def __call__(self, values, *rest):
        """As `Program`."""
        if size_of(values.shapes) > 2**16:
            needs = self.compiled.lower(values.arrays, *rest).compile().memory_analysis()
            TEMPORARY.append(needs.temp_size_in_bytes)
        return super().__call__(values, *rest)


TEMPORARY: list[int] = []


class Weighing(Layout):
    """A layout whose programs are weighed."""

    def program(self, *given):
        """As `Layout.program`."""
        return Weighed(**vars(super().program(*given)))


def main(precision: str) -> None:
    """Print one JSON object for copies, and one for what is split."""
    give_virtual_devices_threads()
    rng = np.random.default_rng(0)
    module = models.mlp(WIDTHS)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    subject = Subject(engine.ModelSpec("mlp", (8, 8, 1), {"widths": WIDTHS}), module, variables, 10)
    space = build(subject.graph, {name: rng.random(group.size) for name, group in subject.graph.groups.items()})
    images = rng.normal(size=(IMAGES, 8, 8, 1)).astype(np.float32)
    split = Split(images, rng.integers(0, 10, IMAGES).astype(np.int32), np.arange(IMAGES), ("x",), "")
    masks = jax.jit(jax.vmap(space.decode))(np.stack([space.dense_genome()] * 2))
    one = jax.tree.map(lambda leaf: leaf[0], masks)
    for parted in (False, True):
        TEMPORARY.clear()
        layout, data = Weighing(make_mesh((4, 2)), parted), batches(split, 8)
        evaluator = Evaluator(subject, one, None, data, chunk=1, reconstruct="none", precision=precision, layout=layout)
        evaluator(masks)
        sweep = Sweep(subject, space, None, data, chunk=1, reconstruct="none", parts=1, layout=layout)
        sweep(space.dense_genome(), sensitivity.probes(space, space.dense_genome())[:3])
        device = jax.devices()[0]
        kept = [part.data.nbytes for leaf in evaluator._fixed.arrays for part in leaf.addressable_shards
                if part.device == device]  # fmt: skip
        found = {"model": size_of(subject.variables), "kept": sum(kept), "temporary": TEMPORARY}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
