"""What a selected model takes in each form that `treesurgeon export` writes: bytes, and time beside the dense model.

Both models are written in every form. StableHLO is run as it was read back, ONNX by onnxruntime on the processor, and
weights by JAX, in the same compiled function whatever file they came from. Calls of the two models take turns, so that
whatever else the machine does falls on both; medians are compared.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.engine import TreesurgeonError
from treesurgeon.engine.errors import first_line
from treesurgeon.search.exporting import WEIGHTS, WRITERS, Export, size

SECONDS = 3.0  # that timing a pair of models may take, roughly
# What other tools raise: translations that are not there, files too large for protobuf, memory.
FAILURES = (TreesurgeonError, ValueError, TypeError, RuntimeError, MemoryError)
REPEATS = (5, 50)  # of both together, at least and at most


@dataclass(frozen=True)
class Form:
    """A model in one form beside the dense one.

    Attributes:
        format: as `treesurgeon export --to` has it.
        bytes, dense_bytes: of the file, or of all files of the directory.
        latency, dense_latency: milliseconds that a batch takes, medians.
        repeats: calls of each model.
        batch: images in a call.
        device: where it ran.
    """

    format: str
    bytes: int
    dense_bytes: int
    latency: float
    dense_latency: float
    repeats: int
    batch: int
    device: str

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model."""
        return self.dense_latency / self.latency


def measure(small: engine.Model, dense: engine.Model, x: np.ndarray, say: Callable[[str], None]) -> list[Form]:
    """Every form that can be written here; `x` is the batch, `[N, ...]`. ONNX only where its extra is installed."""
    out: list[Form] = []
    device = jax.devices()[0]
    name = f"{device.device_kind} ({device.platform})"
    weights = _interleaved([_weights(model, x) for model in (small, dense)])
    with tempfile.TemporaryDirectory() as home:
        for form, write in WRITERS.items():
            if form == "orbax" and jax.process_count() > 1:
                say("orbax is not measured: all processes of a run take part in its saving, and this is done by one")
                continue
            paths = [Path(home) / f"{form}{i}" for i in (0, 1)]
            try:
                for model, path in zip((small, dense), paths, strict=True):
                    write(model, path, Export(path, form, path))
                timed = weights if form in WEIGHTS else _interleaved([RUNNERS[form](path, x) for path in paths])
            except FAILURES as error:  # the run does not end for that
                say(f"{form} is not measured: {first_line(error)}")
                continue
            where = "onnxruntime (cpu)" if form == "onnx" else name
            out.append(Form(form, size(paths[0]), size(paths[1]), *timed, len(x), where))
    return out


def markdown(forms: Sequence[Form]) -> str:
    """The table for a card, with what it means; nothing where nothing was measured."""
    if not forms:
        return ""
    head = ["format", "bytes", "of dense", "ms", "dense, ms", "speed-up", "calls", "on"]
    rows = [head, ["---", *["---:"] * (len(head) - 2), "---"]] + [
        [
            form.format,
            f"{form.bytes:,}",
            f"{form.bytes / form.dense_bytes:.0%}",
            f"{form.latency:.3g}",
            f"{form.dense_latency:.3g}",
            f"{form.speedup:.2f}×",
            str(form.repeats),
            form.device,
        ]
        for form in forms
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""
## In other formats

`treesurgeon export selected --to FORMAT --out PATH` writes it. Milliseconds for {forms[0].batch} images, the median of
calls that took turns with the dense model's; `{"`, `".join(WEIGHTS)}` hold weights, which JAX ran in one
compiled function. Measure again where you will run it.

{table}
"""


def _weights(model: engine.Model, x: np.ndarray) -> Callable[[], Any]:
    variables, batch = jax.device_put((model.variables, x))
    run = jax.jit(lambda variables, x: model.apply(variables, x)).lower(variables, batch).compile()
    return lambda: jax.block_until_ready(run(variables, batch))


def _stablehlo(path: Path, x: np.ndarray) -> Callable[[], Any]:
    batch = jax.device_put(x)
    run = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call).lower(batch).compile()
    return lambda: jax.block_until_ready(run(batch))


def _onnx(path: Path, x: np.ndarray) -> Callable[[], Any]:
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {session.get_inputs()[0].name: x})


RUNNERS: dict[str, Callable[[Path, np.ndarray], Callable[[], Any]]] = {"stablehlo": _stablehlo, "onnx": _onnx}


def _interleaved(calls: Sequence[Callable[[], Any]]) -> tuple[float, float, int]:
    """The median milliseconds of two calls that take turns, and how often each was made."""
    took: list[list[float]] = [[], []]

    def once() -> None:
        for call, times in zip(calls, took, strict=True):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))

    for _ in range(2):
        once()  # the first calls are slower
    both = max(took[0][-1] + took[1][-1], 1e-3)
    repeats = min(max(int(1e3 * SECONDS / both), REPEATS[0]), REPEATS[1])
    for times in took:
        times.clear()
    for _ in range(repeats):
        once()
    return statistics.median(took[0]), statistics.median(took[1]), repeats
