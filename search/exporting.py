"""`treesurgeon export`: a selected model in the form that somebody else's tools read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from flax import serialization
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp
from safetensors.flax import save_file

from treesurgeon import engine
from treesurgeon.engine.export import to_stablehlo
from treesurgeon.engine.onnx import require, to_onnx
from treesurgeon.search.config import RunError

Format = Literal["stablehlo", "safetensors", "msgpack", "orbax", "onnx"]
# Of the manifest, what a file of weights says about itself.
ESSENTIALS = ("format", "model", "plan", "labels", "normalisation", "metric", "selected", "verdict", "versions")


@dataclass(frozen=True)
class Export:
    """What to write, and where."""

    selected: Annotated[Path, tyro.conf.Positional]
    """The `selected` directory of a run, wherever it was copied."""
    to: Format
    """stablehlo: the function, weights inside, any batch, for cpu, cuda and tpu (jax.export). onnx: the same for ONNX
    runtimes, checked with onnxruntime (needs treesurgeon[onnx]). safetensors, msgpack (flax.serialization), orbax: the
    weights, which models.rebuild's module or load(…).apply takes."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """The file to write; a directory for orbax. It must not exist."""
    gradient: bool = False
    """stablehlo: with the derivative, so that jax.grad goes through the exported function."""
    allow_import: bool = False
    """Import a model outside the zoo, by the package.module:factory that the directory names."""


def export(options: Export, say: Callable[[str], None] = print) -> Path:
    """Write a selected model in another format, whole or not at all; returns where.

    Raises:
        ArtifactError: the directory is damaged, the model has no translation, or an extra is not installed.
        RunError: the place is taken.
    """
    out = options.out.expanduser().absolute()
    if out.exists():
        raise RunError(f"--out {out} exists: nothing was written; choose another, or move it away")
    if options.gradient and options.to != "stablehlo":
        raise RunError(f"--gradient goes with --to stablehlo; {options.to} holds no derivative")
    if options.to == "onnx":
        require()
    model = engine.load(options.selected, allow_import=options.allow_import)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        WRITERS[options.to](model, work / "it", options)
        os.replace(work / "it", out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"wrote {out}: {size(out):,} bytes")
    return out


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def essentials(model: engine.Model) -> dict[str, Any]:
    """What the manifest says of the model itself, and the metrics of the one selected."""
    manifest = model.manifest
    found = {name: manifest[name] for name in ESSENTIALS if name in manifest}
    metrics = manifest.get("metrics", {}).get(manifest.get("selected"))
    return found | ({"metrics": metrics} if metrics else {})


def _input(model: engine.Model) -> tuple[tuple[int, ...], str]:
    spec = model.manifest["model"]
    return tuple(spec["input_shape"]), spec["input_dtype"]


def _stablehlo(model: engine.Model, path: Path, options: Export) -> None:
    path.write_bytes(to_stablehlo(lambda x: model(x), *_input(model), gradient=options.gradient))


def _onnx(model: engine.Model, path: Path, options: Export) -> None:
    path.write_bytes(to_onnx(lambda x: model.apply(model.variables, x), *_input(model)))


def _safetensors(model: engine.Model, path: Path, options: Export) -> None:
    metadata = {"format": "flax", "treesurgeon": json.dumps(essentials(model), sort_keys=True)}
    arrays: dict[str, Any] = flatten_dict(model.variables, sep="/")  # pyright: ignore[reportAssignmentType]
    save_file(arrays, path, metadata=metadata)


def _msgpack(model: engine.Model, path: Path, options: Export) -> None:
    path.write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, model.variables)))


def _orbax(model: engine.Model, path: Path, options: Export) -> None:
    ocp.save(str(path), jax.tree.map(np.asarray, model.variables), custom_metadata=essentials(model))


WEIGHTS = ("safetensors", "msgpack", "orbax")  # hold no function
WRITERS: Mapping[Format, Callable[[engine.Model, Path, Export], None]] = {
    "stablehlo": _stablehlo,
    "safetensors": _safetensors,
    "msgpack": _msgpack,
    "orbax": _orbax,
    "onnx": _onnx,
}
