"""`save` and `load`: a pruned model as a directory that downstream code opens in three lines.

    variables/       the cut variables (Orbax)
    manifest.json    format version, model, plan, metrics, versions, a SHA-256 for every other file
    model.stablehlo  `x -> output` with the variables inside (jax.export, any batch size)
    README.md        a card

Loading runs no code from the directory. A model of the zoo is rebuilt by its name; any other is rebuilt only if the
caller passes the module, or allows the import that the manifest names.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from treesurgeon.engine.coupling import trace
from treesurgeon.engine.errors import ArtifactError, TreesurgeonError, first_line
from treesurgeon.engine.export import to_stablehlo
from treesurgeon.engine.flax import from_linen
from treesurgeon.engine.graph import Graph, Plan
from treesurgeon.engine.jaxprs import is_key, named_leaves
from treesurgeon.engine.narrowing import check_leaves, narrow
from treesurgeon.engine.shortened import Shortened

FORMAT = 2  # 2: a model may be cut in depth


@dataclass(frozen=True)
class ModelSpec:
    """How to build the dense module again.

    Attributes:
        model: a zoo name (`resnet56`) or `package.module:factory`.
        kwargs: keyword arguments of the factory, JSON values.
        input_shape: the shape of one input, without the batch axis.
        input_dtype: its dtype.
        at: the point at which the module is cut in depth, if it is, see `Shortened`.
        outputs: of the head that it has there.
        hidden: units of a hidden layer of that head, 0 for none.
    """

    model: str
    input_shape: tuple[int, ...]
    kwargs: Mapping[str, Any]
    input_dtype: str = "float32"
    at: str | None = None
    outputs: int = 0
    hidden: int = 0

    def build(self, allow_import: bool = False) -> nn.Module | Shortened:
        """The dense module."""
        if ":" in self.model and not allow_import:
            raise ArtifactError(
                f"this model is built by {self.model}, which is not part of treesurgeon: pass module=…, or "
                f"allow_import=True if you trust the directory to name what is imported"
            )
        return self.cut(importlib.import_module("treesurgeon.models").resolve(self.model, **self.kwargs))

    def cut(self, module: nn.Module | Shortened) -> nn.Module | Shortened:
        """The module, cut in depth if it is to be and is not yet; one that is cut elsewhere is cut here instead."""
        if not self.at:
            return module
        if not isinstance(module, Shortened):
            return Shortened(module, self.at, self.outputs, self.example, self.hidden)
        if (module.at, module.outputs, module.hidden) == (self.at, self.outputs, self.hidden):
            return module
        return Shortened(module.module, self.at, self.outputs, self.example, self.hidden)

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """One input."""
        return jax.ShapeDtypeStruct((1, *self.input_shape), self.input_dtype)

    def template(self, module: nn.Module | Shortened) -> Any:
        """The dense variables as shapes."""
        return jax.eval_shape(module.init, jax.random.key(0), self.example)


@dataclass(frozen=True, eq=False)
class Model:
    """A pruned model.

    Attributes:
        module: the dense linen module, or one cut in depth.
        variables: the cut variables.
        graph: the dense model's graph.
        plan: what was kept and dropped.
        manifest: the manifest as read.
    """

    module: nn.Module | Shortened
    variables: Any
    graph: Graph
    plan: Plan
    manifest: Mapping[str, Any]

    @cached_property
    def _narrow(self) -> Any:
        return narrow(self.module.apply, self.graph, self.plan)

    @cached_property
    def _infer(self) -> Any:
        return jax.jit(lambda variables, x: self._narrow(variables, x))

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`module.apply` of the pruned model: the same arguments, `mutable`, `rngs` and `train` included."""
        return self._narrow(variables, *args, **kwargs)

    def __call__(self, x: Any) -> Any:
        """Inference on normalised inputs."""
        return self._infer(self.variables, x)


def save(
    path: str | os.PathLike,
    spec: ModelSpec,
    variables: Any,
    plan: Plan,
    *,
    manifest: Mapping[str, Any] | None = None,
    card: str = "",
    module: nn.Module | Shortened | None = None,
) -> Path:
    """Write a pruned model to a new directory, whole or not at all.

    In a program of several processes (`jax.distributed`) all of them call this, with the same arguments; the first one
    writes, and the others may return before it has.

    Args:
        path: the directory to make; it must not exist.
        spec: how to build the dense module.
        variables: the cut variables.
        plan: the plan they were cut by.
        manifest: more entries for the manifest (metrics, data fingerprints), JSON values.
        card: the text of README.md.
        module: the dense module, where `spec` names one outside the zoo.

    Raises:
        ArtifactError: the directory exists.
        StructureError: the variables are not those of the plan.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ArtifactError(f"{path} exists: nothing was written; choose another directory or move it away")
    module = spec.cut(module) if module is not None else spec.build()
    model = _assemble(module, spec, variables, plan, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_count() == 1:
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    else:
        work = path.parent / f".{path.name}.unfinished"  # a name that all of them know
    try:
        _write_variables(work / "variables", variables)
        if jax.process_index():
            return path
        (work / "model.stablehlo").write_bytes(to_stablehlo(lambda x: model(x), spec.input_shape, spec.input_dtype))
        (work / "README.md").write_text(card)
        content = {
            **(manifest or {}),
            "format": FORMAT if spec.at else 1,
            "model": {
                "model": spec.model,
                "kwargs": dict(spec.kwargs),
                "input_shape": list(spec.input_shape),
                "input_dtype": spec.input_dtype,
                **({"at": spec.at, "outputs": spec.outputs, "hidden": spec.hidden} if spec.at else {}),
            },
            "plan": {
                "keep": {name: units.tolist() for name, units in plan.keep.items()},
                "drop": sorted(plan.drop),
            },
            "versions": {name: version(name) for name in ("treesurgeon", "jax", "flax", "orbax-checkpoint")},
            "files": _checksums(work),
        }
        content["digest"] = _digest(content)
        (work / "manifest.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        work.chmod(0o755)
        work.rename(path)
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(work, ignore_errors=True)
    return path


def load(path: str | os.PathLike, module: nn.Module | Shortened | None = None, allow_import: bool = False) -> Model:
    """Open a directory that `save` wrote.

    Args:
        path: the directory.
        module: the dense module, if it is not one of the zoo.
        allow_import: build a module outside the zoo by importing the factory that the manifest names.

    Raises:
        ArtifactError: the directory is missing, damaged, of a newer format, or its model may not be built.
    """
    path = Path(path).absolute()
    manifest = _read_manifest(path)
    try:
        entry = manifest["model"]
        shape = tuple(entry["input_shape"])
        cut = entry.get("at"), int(entry.get("outputs", 0)), int(entry.get("hidden", 0))
        spec = ModelSpec(entry["model"], shape, entry["kwargs"], entry["input_dtype"], *cut)
        keep = {name: np.asarray(units, int) for name, units in manifest["plan"]["keep"].items()}
        plan = Plan(keep, frozenset(manifest["plan"]["drop"]))
        files = dict(manifest["files"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{path}/manifest.json lacks an entry or has one of another kind: {error!r}") from error
    actual = _checksums(path)
    damaged = sorted(name for name in files.keys() | actual.keys() if files.get(name) != actual.get(name))
    if damaged:
        raise ArtifactError(
            f"{path}: {len(damaged)} files are missing, added or changed since it was saved "
            f"({', '.join(damaged[:3])}): copy the directory again"
        )
    if manifest.get("digest", digest := _digest(manifest)) != digest:  # manifests of before the first release have none
        raise ArtifactError(
            f"{path}/manifest.json: its model or plan was changed since it was saved: copy the directory again"
        )
    try:
        module = spec.cut(module) if module is not None else spec.build(allow_import)
        return _assemble(module, spec, ocp.load(str(path / "variables")), plan, manifest)
    except (TreesurgeonError, importlib.import_module("treesurgeon.models").ModelError):
        raise
    except Exception as error:  # a manifest can ask for anything
        raise ArtifactError(
            f"{path}: the model that its manifest describes cannot be made again ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error


def _write_variables(path: Path, variables: Any) -> None:
    for name, leaf in named_leaves(variables).items():
        if hasattr(leaf, "dtype") and is_key(leaf):
            raise ArtifactError(f"{name} is a PRNG key, which cannot be saved: save jax.random.key_data of it")
        if not np.size(leaf):
            raise ArtifactError(
                f"{name} has no elements (its shape is {np.shape(leaf)}), which cannot be saved: leave it out"
            )
    try:
        ocp.save(str(path), jax.tree.map(np.asarray, variables))
    except Exception as error:  # Orbax raises many types for a disk that is full or may not be written
        raise ArtifactError(
            f"{path.parent} cannot be written ({type(error).__name__}: {first_line(error)}): make room, or see to the "
            f"permissions"
        ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory: pass the `selected/` directory of a run")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} has no manifest.json: it is not a saved model, or was copied in part") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path}/manifest.json cannot be read: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise ArtifactError(f"{path}: format {found!r}; this version reads up to {FORMAT}: upgrade treesurgeon")
    return manifest


def _assemble(
    module: nn.Module | Shortened, spec: ModelSpec, variables: Any, plan: Plan, manifest: Mapping[str, Any]
) -> Model:
    fn, template = from_linen(module, spec.template(module))
    graph = trace(fn, template, spec.example)
    check_leaves(variables, graph.shapes(graph.masks(plan)), "narrow")
    return Model(module, variables, graph, plan, manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what the model is made of; kept units that are others of the same number would go unnoticed."""
    parts = {name: manifest[name] for name in ("format", "model", "plan")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _checksums(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p != path / "manifest.json")
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
