"""How does a generation's evaluation scale with devices and processes, and what does orchestration cost?

Strong scaling keeps the population, weak scaling gives each device the same number of candidates. For each batch that
is shown: the time that the host spends beside the compiled program (choosing rows, laying them out, putting scores
together, judging), and the bytes that cross between host and devices. Devices are virtual ones of this machine's CPU,
and processes share it too: beyond the number of its cores nothing can get faster, and what can be read off is what
orchestration adds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

COUNTS = (1, 2, 4, 8)
CHUNK, STRONG, WEAK = 2, 16, 2  # candidates: at once, of the fixed population, for each device


def main() -> None:
    """Print and write the table, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits_cnn")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options, **options.child)), flush=True)
        return
    from harness import publish

    rows, base = [], {}
    for kind in ("devices", "processes"):
        for scaling in ("strong", "weak"):
            for count in options.counts:
                found = measured(options, kind, count, scaling)
                rate = statistics.median(found["rates"])
                one = base.setdefault((kind, scaling), rate)
                rows.append(
                    [
                        f"{scaling}, {count} {kind}",
                        f"{found['population']}",
                        f"{rate:.1f} ({min(found['rates']):.1f} to {max(found['rates']):.1f})",
                        f"{rate / one:.2f}",
                        f"{1e3 * found['beside']:.1f}",
                        f"{found['sent'] / 1024:.0f}",
                        f"{found['fetched'] / 1024:.0f}",
                    ]
                )
    publish(
        "scaling",
        f"Evaluations of {options.model} on {options.images} images, by devices and processes that share one CPU",
        (
            "what",
            "candidates",
            "candidates/s: median (range)",
            "against 1",
            "host beside a step, ms",
            "KiB to devices, a step",
            "KiB from devices, a step",
        ),
        rows,
        f"Random candidates in chunks of {CHUNK}, maps calibrated on 64 images, batches of 128, {options.repeats} "
        f"repeats. All devices are virtual and share {os.cpu_count()} cores, as the processes do: that many is the "
        "most that can be gained. A step shows one batch to one chunk on each device.",
    )


def measured(options: argparse.Namespace, kind: str, count: int, scaling: str) -> dict[str, Any]:
    """What the first of the processes that it takes has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = count if kind == "processes" else 1
    shown = {"count": count, "scaling": scaling, "processes": processes, "port": port}
    devices = count if kind == "devices" else 1
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "--model", options.model, "--images", str(options.images)]
    command += ["--repeats", str(options.repeats)]
    running = [
        subprocess.Popen(
            [*command, "--child", json.dumps({**shown, "number": i})],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
            text=True,
        )
        for i in range(processes)
    ]
    out = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{kind} {count}: a process failed")
    return json.loads(out[0].splitlines()[-1])


def measure(
    options: argparse.Namespace, count: int, scaling: str, processes: int, port: int, number: int
) -> dict[str, Any]:
    """Rates of whole populations, and what a step costs beside its program."""
    from treesurgeon.search import hosts, room

    room.give_virtual_devices_threads()
    if processes > 1:
        hosts.join(f"127.0.0.1:{port}", processes, number)
    import jax
    import numpy as np

    from treesurgeon.search.data import Split
    from treesurgeon.search.evaluate import Evaluator, batches
    from treesurgeon.search.mesh import make_mesh
    from treesurgeon.search.sharding import Layout
    from treesurgeon.search.space import build
    from treesurgeon.search.subject import random_subject

    rng = np.random.default_rng(0)
    subject = random_subject(options.model)
    space = build(subject.graph, {name: rng.random(group.size) for name, group in subject.graph.groups.items()})
    population = STRONG if scaling == "strong" else WEAK * count
    genomes = np.stack([rng.integers(0, space.cardinality) for _ in range(population)]).astype(np.int32)
    images = rng.normal(size=(options.images + 64, *subject.spec.input_shape)).astype(np.float32)
    split = Split(images[64:], np.zeros(options.images, np.int32), np.arange(options.images), ("random",), "")
    masks = jax.tree.map(np.asarray, jax.jit(jax.vmap(space.decode))(genomes))
    one = jax.tree.map(lambda mask: mask[0], masks)
    evaluator = Evaluator(
        subject,
        one,
        jax.numpy.asarray(images[:64]),
        batches(split, 128),
        chunk=CHUNK,
        layout=Layout(make_mesh((count, 1))),
    )
    evaluator(masks)
    inside, steps, sent, fetched = [0.0], [0], [0], [0]
    program = evaluator._score

    def timed(fixed: Any, known: Any, batch: Any, late: Any, factor: Any) -> Any:
        start = time.perf_counter()
        found = jax.block_until_ready(program(fixed, known, batch, late, factor))
        inside[0] += time.perf_counter() - start
        steps[0] += 1
        sent[0] += sum(leaf.nbytes for leaf in jax.tree.leaves((late[0], factor)))
        fetched[0] += sum(leaf.nbytes for leaf in found)
        return found

    evaluator._score = timed
    extra = evaluator.calibrated(masks)
    rates, beside = [], []
    for _ in range(options.repeats):
        evaluator.calibrated = lambda masks: extra  # measured apart: what is left beside the program is orchestration
        inside[0] = steps[0] = sent[0] = fetched[0] = 0
        start = time.perf_counter()
        evaluator(masks, lambda losses: np.ones(population, bool))
        beside.append((time.perf_counter() - start - inside[0]) / steps[0])
        del evaluator.calibrated
        start = time.perf_counter()
        evaluator(masks)
        rates.append(population / (time.perf_counter() - start))
    costs = {"beside": statistics.median(beside), "sent": sent[0] / steps[0], "fetched": fetched[0] / steps[0]}
    return {"rates": rates, "population": population, **costs}


if __name__ == "__main__":
    main()
