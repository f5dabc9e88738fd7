"""Reads checkpoints into the variables of a linen module: Orbax, safetensors, msgpack and PyTorch's files.

Every format becomes one flat mapping from names to numpy arrays. A `Layout` (torch_names.py) says under which name and
in which order of axes a file keeps each leaf of the model. So one comparison serves all formats: what is missing, what
is unexpected, what has another shape, all of it in one error, before anything runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import serialization
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError
from safetensors.numpy import load_file

from treesurgeon.models.errors import CheckpointError, first_line
from treesurgeon.models.pickles import read_torch
from treesurgeon.models.presets import Preset
from treesurgeon.models.torch_names import FAMILIES, LAYOUTS, Arrays, Entry, Layout

PICKLES = frozenset({".th", ".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"})
MSGPACK = frozenset({".msgpack", ".flax"})
# What a training loop saves beside the variables; not the model's, so passed over.
TRAINING_STATE = frozenset({"step", "opt_state", "tx", "rng", "rngs", "key", "epoch"})
ROWS = 6  # listed per kind of misfit, so that the message stays on one screen


def load_checkpoint(
    path: str | Path,
    model: Preset | nn.Module,
    template: Mapping[str, Any],
    input_shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into the variables of a linen module.

    Args:
        path: an Orbax directory or a `.msgpack` file (`flax.serialization`) holding `{"params": …, "batch_stats": …}`,
            a train state with these, or the state of an nnx model whose layers have the same names; a `.safetensors`
            file with either flat names (`params/conv1/kernel`, flax's axes) or, for the zoo's families, torchvision's
            or timm's names and axes; or a `.pth`, `.pt` or `.th` file of a state dict with such names, read without
            PyTorch and without running what it holds.
        model: the zoo's preset, or the module itself; it names the PyTorch layout.
        template: the variables the module expects, as arrays or as `jax.ShapeDtypeStruct`
            (`jax.eval_shape(module.init, key, x)`).
        input_shape: `(H, W, C)`; by default the preset's. Only an MLP in PyTorch's layout needs it.

    Returns:
        Nested dicts as in `template`, of NumPy arrays with the template's dtypes.

    Raises:
        CheckpointError: absent, unreadable, of a format that is not read, of another architecture (every key
            and shape that does not fit is listed, expected beside got), or holding NaN or infinity.
    """
    path = Path(path).expanduser().absolute()
    leaves = flatten(nn.meta.unbox(template))
    arrays = _read(path)
    if isinstance(model, Preset) and input_shape is None:
        input_shape = model.input_shape
    arrays, entries = _entries(path, arrays, model, leaves, input_shape)
    _compare(path, arrays, entries)

    values = {}
    for name, entry in entries.items():
        with np.errstate(over="ignore"):  # a value too large for the dtype becomes infinite and is named below
            values[entry.leaf] = entry.to_flax(arrays[name]).astype(leaves[entry.leaf].dtype)
    _refuse_non_finite(path, values)
    return unflatten_dict({leaf: values[leaf] for leaf in leaves}, sep="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by their path, `params/conv1/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _read(path: Path) -> Arrays:
    """Every array of the checkpoint by its name in the file."""
    if not path.exists():
        raise CheckpointError(f"checkpoint {path}: no such file or directory{_near(path)}")
    if path.is_dir():
        return _read_orbax(path)
    if path.suffix == ".safetensors":
        return _without_wrapper(_read_safetensors(path))
    if path.suffix in PICKLES:
        return _without_wrapper(read_torch(path))
    if path.suffix in MSGPACK:
        return _read_msgpack(path)
    raise CheckpointError(
        f"checkpoint {path}: expected an Orbax directory or a .safetensors, .msgpack or .pth file, got a "
        f"{path.suffix or 'plain'} file"
    )


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} is not there either"
    there = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    return f"; {path.parent} holds {', '.join(there[:8]) or 'nothing'}{_more(there, 8)}"


def _more(rows: Sequence[Any], shown: int) -> str:
    return f", … and {len(rows) - shown} more" if len(rows) > shown else ""


def _read_safetensors(path: Path) -> Arrays:
    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read as safetensors: {error}") from error


def _without_wrapper(arrays: Arrays) -> Arrays:
    if arrays and all(name.startswith("module.") for name in arrays):  # saved from torch's DataParallel
        arrays = {name.removeprefix("module."): value for name, value in arrays.items()}
    return {name: value for name, value in arrays.items() if not name.endswith("num_batches_tracked")}


def _read_orbax(path: Path) -> Arrays:
    try:
        saved = ocp.metadata(str(path)).metadata
        # Numpy templates of the saved shapes: read on the host, whatever devices it was saved from.
        template = jax.tree.map(lambda m: np.empty(m.shape, m.dtype) if hasattr(m, "shape") else m, saved)
        tree = ocp.load(str(path), template)
    except Exception as error:  # a damaged directory raises many types, bare Exception among them
        steps = sorted((int(p.name) for p in path.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)
        fix = f". It holds steps: pass one of them, for instance {path / str(steps[0])}" if steps else ""
        raise CheckpointError(
            f"checkpoint {path}: cannot be read as an Orbax directory{fix} ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    return _of_tree(tree)


def _read_msgpack(path: Path) -> Arrays:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        if not isinstance(tree, Mapping):
            raise TypeError(f"it holds a {type(tree).__name__}")
        return _of_tree(tree)
    except Exception as error:  # damaged bytes raise many types
        raise CheckpointError(
            f"checkpoint {path}: cannot be read as msgpack, as flax.serialization writes it "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _of_tree(tree: Any) -> Arrays:
    """The arrays of a tree by their path; what belongs to training and to random streams is left out."""
    if isinstance(tree, Mapping):
        tree = {name: value for name, value in tree.items() if name not in TRAINING_STATE}
    flat = {name: np.asarray(value) for name, value in flatten(tree).items()}
    return {name: value for name, value in flat.items() if "rngs" not in name.split("/")}


def _by_collection(arrays: Arrays, leaves: Mapping[str, Any]) -> Arrays:
    """Names with their collection, for trees without any: bare parameters, or the state of an nnx model."""
    collections = {leaf.partition("/")[0] for leaf in leaves}
    if any(name.partition("/")[0] in collections for name in arrays):
        return arrays
    whole = {leaf.partition("/")[2]: leaf for leaf in leaves}
    out = {}
    for name, value in arrays.items():
        bare = name.removesuffix("/value").removesuffix("/raw_value")
        out[whole.get(bare, name)] = value
    return out


def _entries(
    path: Path,
    arrays: Arrays,
    model: Preset | nn.Module,
    leaves: Mapping[str, Any],
    input_shape: Sequence[int] | None,
) -> tuple[Arrays, dict[str, Entry]]:
    """The file's arrays, and what it should hold for this model, both by the file's names."""
    shapes = {leaf: tuple(value.shape) for leaf, value in leaves.items()}
    if path.is_dir() or path.suffix in MSGPACK or any("/" in name for name in arrays):
        entries = {leaf: Entry(leaf, shape, lambda x: x) for leaf, shape in shapes.items()}
        return _by_collection(arrays, leaves), entries
    family = model.checkpoint_layout if isinstance(model, Preset) else FAMILIES.get(type(model))
    if family is None:
        name = repr(model.name) if isinstance(model, Preset) else f"a {type(model).__name__}"
        raise CheckpointError(
            f"checkpoint {path}: no table of PyTorch's names for {name}; expected flat "
            f"names, as in {next(iter(shapes))!r}, got {next(iter(arrays), 'no arrays at all')!r}. "
            "Rename them, or save with Orbax"
        )

    def under(layout: Layout) -> tuple[Arrays, dict[str, Entry | None]]:
        return layout.split(arrays), dict(layout.entry(leaf, shapes, input_shape) for leaf in shapes)

    arrays, found = max(map(under, LAYOUTS[family]), key=lambda pair: len(pair[0].keys() & pair[1].keys()))
    for name, entry in found.items():
        if entry is None:
            raise CheckpointError(
                f"checkpoint {path}: {name} follows a flattening of [C, H, W] and needs the images' "
                "channels; pass input_shape=(H, W, C)"
            )
    return arrays, {name: entry for name, entry in found.items() if entry is not None}


def _compare(path: Path, arrays: Arrays, entries: Mapping[str, Entry]) -> None:
    """Raise one error that lists everything in which the file and the model differ."""
    missing = [f"{n}: expected {list(e.shape)}" for n, e in entries.items() if n not in arrays]
    unexpected = [f"{n}: got {list(a.shape)}" for n, a in arrays.items() if n not in entries]
    shapes, kinds = [], []
    for name in entries.keys() & arrays.keys():
        expected, got = entries[name].shape, arrays[name]
        if got.shape != expected:
            shapes.append(f"{name}: expected {list(expected)}, got {list(got.shape)}")
        elif not jax.numpy.issubdtype(got.dtype, jax.numpy.floating):
            kinds.append(f"{name}: expected floating point, got {got.dtype}")
    sections = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "of another type": kinds,
    }
    if not any(sections.values()):
        return
    lines = [f"checkpoint {path} does not fit the model, which has {len(entries)} arrays"]
    for title, rows in sections.items():
        if rows:
            lines += [f"  {title} ({len(rows)}):", *(f"    {row}" for row in sorted(rows)[:ROWS])]
            lines += [f"    … and {len(rows) - ROWS} more"] if len(rows) > ROWS else []
    lines.append("  fix: name the architecture, widths and num_classes that this checkpoint was saved from")
    raise CheckpointError("\n".join(lines))


def _refuse_non_finite(path: Path, values: Arrays) -> None:
    bad = [
        f"{leaf} ({count} of {value.size})"
        for leaf, value in values.items()
        if (count := int(np.sum(~np.isfinite(value.astype(np.float64)))))
    ]
    if bad:
        raise CheckpointError(
            f"checkpoint {path}: expected finite weights, got NaN or infinity in {', '.join(bad[:ROWS])}"
            f"{_more(bad, ROWS)}; its training diverged, or the file is damaged"
        )
