"""Does a device wait for images that stay on disk, and does memory grow with how many there are?

JPEGs of ImageNet's shape, synthetic, prepared by TFDS as `array_record` files, score a population of a small network:
once held in memory, once read from disk as they are needed. Each case is a process of its own, so that its peak memory
is its own. Here the device is the CPU that decodes as well, so that what is measured is the worst case: on an
accelerator decoding takes nothing away from it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COUNTS = (100, 1000)  # images that score a candidate
SIDE, CLASSES, DISTINCT = 224, 10, 64
POPULATION, CHUNK, BATCH = 8, 8, 50


def main() -> None:
    """Print and write the table, or be one of its cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**options.child)), flush=True)
        return
    from harness import publish

    rows, digests = [], {}
    with tempfile.TemporaryDirectory() as home:
        for count in options.counts:
            where = make(Path(home) / str(count), count)
            for held in (True, False):
                child = json.dumps({"path": str(where), "count": count, "held": held})
                done = subprocess.run(
                    [sys.executable, __file__, "--child", child], stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                digests.setdefault(count, set()).add(found["digest"])
                rows.append(
                    [
                        f"{count:,} images, {'in memory' if held else 'on disk'}",
                        f"{count * SIDE * SIDE * 3 * 4 / 2**20:,.0f}",
                        f"{found['peak']:,.0f}",
                        f"{found['readers']:,.0f}",
                        f"{found['seconds']:.1f}",
                        f"{found['waited']:.2f} ({found['waited'] / found['seconds']:.1%})",
                        f"{found['rate']:.0f}" if found["rate"] else "",
                    ]
                )
    if any(len(each) > 1 for each in digests.values()):
        raise SystemExit("scores differ between images in memory and images on disk")
    publish(
        "streaming",
        f"A population of {POPULATION} scored on images of {SIDE} x {SIDE} pixels, in memory and on disk",
        (
            "what",
            "images as float32, MiB",
            "peak memory, MiB",
            "of all readers, MiB",
            "a generation, s",
            "of it waiting for images, s",
            "images/s decoded, nothing else going on",
        ),
        rows,
        f"JPEGs in TFDS `array_record` files, batches of {BATCH}, candidates in chunks of {CHUNK}; the second of two "
        "generations, nothing cached. Scores are the same bit for bit. Peak memory is the searching process's, which "
        "holds JAX, its programs and a few batches besides.",
    )


def make(home: Path, count: int) -> Path:
    """Prepare a dataset with so many images to score candidates, and a few to spare for the other roles."""
    import numpy as np
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core import registered

    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(DISTINCT):
        file = io.BytesIO()
        rough = Image.fromarray(rng.integers(0, 256, (14, 14, 3), np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(rough, np.int16) + rng.integers(-20, 20, (SIDE, SIDE, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())

    with registered.skip_registration():  # it is made for each count

        class Synthetic(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            code_path = None

            def _info(self) -> tfds.core.DatasetInfo:
                features = {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                # `search` is 0.4 of what the checkpoint has not seen.
                return {"train": self._generate_examples(100), "test": self._generate_examples(round(count / 0.4))}

            def _generate_examples(self, total: int) -> Any:
                for i in range(total):
                    yield i, {"image": io.BytesIO(jpegs[i % DISTINCT]), "label": i % CLASSES}

    builder = Synthetic(data_dir=home, file_format="array_record")
    skip = tfds.download.ComputeStatsMode.SKIP
    tfds.disable_progress_bar()
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(compute_stats=skip, try_download_gcs=False)
    )
    return Path(builder.data_dir)


def measure(path: str, count: int, held: bool) -> dict[str, Any]:
    """One generation, and what it took."""
    import hashlib

    import jax
    import numpy as np
    from flax import linen as nn

    from treesurgeon import engine
    from treesurgeon.search.data import open_source, split_roles
    from treesurgeon.search.evaluate import Evaluator, batches
    from treesurgeon.search.space import build
    from treesurgeon.search.streaming import Feed
    from treesurgeon.search.subject import Subject

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            x = nn.relu(nn.Conv(32, (7, 7), (4, 4), name="stem")(x))
            x = nn.relu(nn.Conv(64, (3, 3), (2, 2), name="deep")(x))
            return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))

    shape, rng = (SIDE, SIDE, 3), np.random.default_rng(0)
    caps = {"certify": CLASSES, "test": CLASSES}  # only `search` is looked at
    hold = count * SIDE**2 * 12 if held else 0
    roles = split_roles(open_source(f"tfds-dir:{path}"), ("train",), input_shape=shape, caps=caps, hold=hold)
    module = Net()
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, *shape), np.float32))
    subject = Subject(engine.ModelSpec("net", shape, {}), module, variables, CLASSES)
    space = build(subject.graph, {name: rng.random(group.size) for name, group in subject.graph.groups.items()})
    genomes = np.stack([rng.integers(0, space.cardinality) for _ in range(POPULATION)]).astype(np.int32)
    masks = jax.tree.map(np.asarray, jax.jit(jax.vmap(space.decode))(genomes))
    one = jax.tree.map(lambda mask: mask[0], masks)
    data = batches(roles.search, BATCH)
    evaluator = Evaluator(subject, one, None, data, chunk=CHUNK, reconstruct="none", cache_bytes=0)
    evaluator(masks)
    evaluator._images.waited = 0.0
    start = time.perf_counter()
    scores = evaluator(masks)
    seconds, waited = time.perf_counter() - start, evaluator._images.waited
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = 0.0
    if isinstance(data.images, Feed):
        start = time.perf_counter()
        rate = sum(len(x) for x in data.images) / (time.perf_counter() - start)
    readers = sum(highest(child.pid) for child in multiprocessing.active_children() if child.pid)
    digest = hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in scores)).hexdigest()
    return {"seconds": seconds, "waited": waited, "peak": peak, "readers": readers, "rate": rate, "digest": digest}


def highest(process: int) -> float:
    """Peak memory of a process that runs, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
