"""Scores of one population on several meshes, in a process of its own: XLA_FLAGS settle how many devices it has.

`python devices.py MODEL RECONSTRUCT SHAPE…` prints, for each shape, what `Evaluator` and `Sweep` found, as digests;
where it ends in `s` the model is split over the devices.
"""

import hashlib
import json
import sys

import jax
import numpy as np

from treesurgeon import engine, models
from treesurgeon.search import racing, sensitivity, sharding
from treesurgeon.search.data import Split
from treesurgeon.search.evaluate import Evaluator, batches
from treesurgeon.search.mesh import make_mesh, parse_shape
from treesurgeon.search.room import give_virtual_devices_threads
from treesurgeon.search.sharding import Layout
from treesurgeon.search.space import build
from treesurgeon.search.subject import Subject, random_subject
from treesurgeon.search.sweep import Sweep

CANDIDATES, IMAGES = 11, 72
sharding.SMALL = 2**4  # so that leaves of this model are split


def mlp():
    """A subject without norms."""
    module = models.mlp((12, 8))
    variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    return Subject(engine.ModelSpec("mlp", (8, 8, 1), {"widths": (12, 8)}), module, variables, 10)


def setup(model):
    """A subject, its space, genomes, calibration images and data, the same in every process."""
    rng = np.random.default_rng(0)
    subject = mlp() if model == "mlp" else random_subject(model, stages=((24, 24), (32,)), residual=(0, 24), hidden=48)
    space = build(subject.graph, {name: rng.random(group.size) for name, group in subject.graph.groups.items()})
    drawn = [rng.integers(0, space.cardinality) for _ in range(CANDIDATES - 1)]
    genomes = np.stack([space.dense_genome(), *drawn]).astype(np.int32)
    images = rng.normal(size=(IMAGES + 16, 8, 8, 1)).astype(np.float32)
    labels = np.array(subject.infer(subject.variables, images).argmax(-1), np.int32)
    labels[::4] = rng.integers(0, 10, len(labels[::4]))
    split = Split(images[:IMAGES], labels[:IMAGES], np.arange(IMAGES), ("x",), "")
    return subject, space, genomes, images[IMAGES:], batches(split, 16)


def digest(*arrays) -> str:
    """Of the bits."""
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()[:16]


def main(model: str, reconstruct: str, *shapes: str) -> None:
    """Print one JSON object for each shape."""
    give_virtual_devices_threads()
    subject, space, genomes, calibration, data = setup(model)
    masks = jax.jit(jax.vmap(space.decode))(genomes)
    one = jax.tree.map(lambda leaf: leaf[0], masks)
    size = np.ones(CANDIDATES)
    probed = sensitivity.probes(space, space.dense_genome())[:9]
    for shape in shapes:
        layout = Layout(make_mesh(parse_shape(shape.rstrip("s"))), shape.endswith("s"))
        evaluator = Evaluator(subject, one, calibration, data, chunk=2, reconstruct=reconstruct, layout=layout)

        def judge(losses):
            return racing.judge(size, losses, racing.References.empty(4, IMAGES), looks=5, alpha=0.5)

        scored = evaluator(masks)
        raced = evaluator(masks, judge)
        found = {"shape": shape, "compiled": evaluator.compiled, "scored": digest(*scored), "raced": digest(*raced)}
        found["seen"] = (~np.isnan(raced[0])).sum(1).tolist()
        sweep = Sweep(subject, space, calibration, data, chunk=2, reconstruct=reconstruct, parts=1, layout=layout)
        found |= {"swept": digest(sweep(space.dense_genome(), probed)), "sweep compiled": sweep.compiled}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
