"""Reads checkpoints into the variables of a linen module: Orbax directories and safetensors files.

Every format becomes one flat mapping from names to numpy arrays. A `Layout` says under which name and in
which order of axes the file keeps each leaf of the model. So one comparison serves all formats: what is
missing, what is unexpected, what has another shape, all of it in one error, before anything runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError, safe_open

from treesurgeon.models.digits_cnn import DigitsCNN
from treesurgeon.models.errors import CheckpointError
from treesurgeon.models.imagenet_resnet import ImageNetResNet
from treesurgeon.models.mlp import MLP
from treesurgeon.models.presets import Preset
from treesurgeon.models.resnet import ResNet
from treesurgeon.models.vgg import STAGES, VGG

PICKLES = frozenset({".th", ".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"})
# What a training loop saves beside the variables; not the model's, so passed over.
TRAINING_STATE = frozenset({"step", "opt_state", "tx", "rng", "rngs", "key", "epoch"})
# Flax's name of a leaf -> PyTorch's; a convolution's or a dense layer's "weight" also has other axes.
LEAF_NAMES = MappingProxyType(
    {
        "kernel": "weight",
        "bias": "bias",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }
)
ROWS = 6  # listed per kind of misfit, so that the message stays on one screen

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """How PyTorch checkpoints of a family name and lay out the model's leaves.

    Attributes:
        rename: `(path of a linen submodule, shapes of the model's leaves) -> PyTorch's name of it`.
        flattened: the first dense layer after flattening, or None. PyTorch flattens [C, H, W], flax
            [H, W, C], so the rows of its kernel are in another order.
        channels: `(shapes, input shape) -> C` where it flattens; None if it cannot be known.
    """

    rename: Callable[[str, Shapes], str]
    flattened: str | None = None
    channels: Callable[[Shapes, Sequence[int] | None], int | None] = lambda shapes, input_shape: None


def _dotted(module: str, shapes: Shapes) -> str:
    return module.replace("/", ".")


def _resnet_name(module: str, shapes: Shapes) -> str:
    """`layer1_0/conv1` -> `layer1.0.conv1`, as in torchvision and in github.com/akamaster/pytorch_resnet_cifar10."""
    return module.replace("_", ".").replace("/", ".")


def _vgg_name(module: str, shapes: Shapes) -> str:
    """`conv1` -> `features.3`, as in torchvision: a conv is 3 entries of `features`, a pool 1, a dense 3.

    The pools are not in `shapes`; they follow from the number of convolutions, which names the VGG.
    """
    convs = 1 + max(int(path.split("/")[1][4:]) for path in shapes if path.startswith("params/conv"))
    stages = {sum(map(len, stages)): stages for stages in STAGES.values()}.get(convs)
    if stages is None:
        return module
    kind, number = module.rstrip("0123456789"), module[len(module.rstrip("0123456789")) :]
    if kind == "linear":
        return "classifier.6"
    if kind == "dense":
        return f"classifier.{3 * int(number)}"
    ends = np.cumsum([len(stage) for stage in stages])
    first = 3 * int(number) + int(np.sum(ends <= int(number)))
    return f"features.{first if kind == 'conv' else first + 1}"


def _last_conv_channels(shapes: Shapes, input_shape: Sequence[int] | None) -> int | None:
    return [shape for shape in shapes.values() if len(shape) == 4][-1][-1]


def _input_channels(shapes: Shapes, input_shape: Sequence[int] | None) -> int | None:
    return None if input_shape is None else input_shape[-1]


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "resnet": Layout(_resnet_name),
        "vgg": Layout(_vgg_name, "dense0", _last_conv_channels),
        "mlp": Layout(_dotted, "dense0", _input_channels),
        "digits_cnn": Layout(_dotted, "dense0", _last_conv_channels),
    }
)
FAMILIES: Mapping[type[nn.Module], str] = MappingProxyType(
    {ResNet: "resnet", ImageNetResNet: "resnet", VGG: "vgg", MLP: "mlp", DigitsCNN: "digits_cnn"}
)


@dataclass(frozen=True)
class _Entry:
    """Where the file keeps one leaf of the model, with which shape, and how it becomes the leaf."""

    leaf: str
    shape: tuple[int, ...]
    to_flax: Callable[[np.ndarray], np.ndarray]


def load_checkpoint(
    path: str | Path,
    model: Preset | nn.Module,
    template: Mapping[str, Any],
    input_shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into the variables of a linen module.

    Args:
        path: an Orbax directory holding `{"params": …, "batch_stats": …}`, or a `.safetensors` file with
            either flat names (`params/conv1/kernel`, flax's axes) or, for the zoo's families, PyTorch's names
            and axes.
        model: the zoo's preset, or the module itself; it names the PyTorch layout.
        template: the variables the module expects, as arrays or as `jax.ShapeDtypeStruct`
            (`jax.eval_shape(module.init, key, x)`).
        input_shape: `(H, W, C)`; by default the preset's. Only an MLP in PyTorch's layout needs it.

    Returns:
        Nested dicts as in `template`, of arrays with the template's dtypes.

    Raises:
        CheckpointError: absent, unreadable, of a format that is not read, of another architecture (every key
            and shape that does not fit is listed, expected beside got), or holding NaN or infinity.
    """
    path = Path(path).expanduser().absolute()
    leaves = _flatten(nn.meta.unbox(template))
    arrays = _read(path)
    if isinstance(model, Preset) and input_shape is None:
        input_shape = model.input_shape
    entries = _entries(path, arrays, model, leaves, input_shape)
    _compare(path, arrays, entries)

    values = {}
    for name, entry in entries.items():
        with np.errstate(over="ignore"):  # a value too large for the dtype becomes infinite and is named below
            values[entry.leaf] = entry.to_flax(arrays[name]).astype(leaves[entry.leaf].dtype)
    _refuse_non_finite(path, values)
    return unflatten_dict({leaf: jax.numpy.asarray(values[leaf]) for leaf in leaves}, sep="/")


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by their path, `params/conv1/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _read(path: Path) -> Arrays:
    """Every array of the checkpoint by its name in the file."""
    if path.suffix in PICKLES:
        there = "" if path.exists() else " (and there is no such file)"
        raise CheckpointError(
            f"checkpoint {path}{there}: a pickle can run any code when read, so {path.suffix} files are not "
            "read. Save it as safetensors, once, where torch is installed:\n"
            "  import torch; from safetensors.torch import save_file\n"
            f"  saved = torch.load({path.name!r}, map_location='cpu', weights_only=True)\n"
            "  save_file({k: v.contiguous() for k, v in saved.get('state_dict', saved).items()}, "
            f"{path.with_suffix('.safetensors').name!r})"
        )
    if not path.exists():
        raise CheckpointError(f"checkpoint {path}: no such file or directory{_near(path)}")
    if path.is_dir():
        return _read_orbax(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise CheckpointError(
        f"checkpoint {path}: expected an Orbax directory or a .safetensors file, got a {path.suffix or 'plain'} file"
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
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read as safetensors: {error}") from error
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
        text = str(error).strip().split("\n")[0][:300]
        raise CheckpointError(
            f"checkpoint {path}: cannot be read as an Orbax directory{fix} ({type(error).__name__}: {text})"
        ) from error
    if isinstance(tree, Mapping):
        tree = {name: value for name, value in tree.items() if name not in TRAINING_STATE}
    return {name: np.asarray(value) for name, value in _flatten(tree).items()}


def _entries(
    path: Path,
    arrays: Arrays,
    model: Preset | nn.Module,
    leaves: Mapping[str, Any],
    input_shape: Sequence[int] | None,
) -> dict[str, _Entry]:
    """What the file should hold for this model, by the file's names."""
    shapes = {leaf: tuple(value.shape) for leaf, value in leaves.items()}
    if path.is_dir() or any("/" in name for name in arrays):
        return {leaf: _Entry(leaf, shape, lambda x: x) for leaf, shape in shapes.items()}
    family = model.checkpoint_layout if isinstance(model, Preset) else FAMILIES.get(type(model))
    if family is None:
        name = repr(model.name) if isinstance(model, Preset) else f"a {type(model).__name__}"
        raise CheckpointError(
            f"checkpoint {path}: no table of PyTorch's names for {name}; expected flat "
            f"names, as in {next(iter(shapes))!r}, got {next(iter(arrays), 'no arrays at all')!r}. "
            "Rename them, or save with Orbax"
        )
    layout = LAYOUTS[family]
    return dict(_torch_entry(path, leaf, shapes, layout, input_shape) for leaf in shapes)


def _torch_entry(
    path: Path, leaf: str, shapes: Shapes, layout: Layout, input_shape: Sequence[int] | None
) -> tuple[str, _Entry]:
    """PyTorch's name of a leaf, and its entry: OIHW -> HWIO, [out, in] -> [in, out], the rest as it is."""
    module, _, kind = leaf.partition("/")[2].rpartition("/")
    name, shape = f"{layout.rename(module, shapes)}.{LEAF_NAMES[kind]}", shapes[leaf]
    if kind == "kernel" and len(shape) == 4:
        h, w, i, o = shape
        return name, _Entry(leaf, (o, i, h, w), lambda x: x.transpose(2, 3, 1, 0))
    if kind == "kernel" and module == layout.flattened:
        channels = layout.channels(shapes, input_shape)
        if channels is None:
            raise CheckpointError(
                f"checkpoint {path}: {name} follows a flattening of [C, H, W] and needs the images' "
                "channels; pass input_shape=(H, W, C)"
            )
        return name, _Entry(leaf, shape[::-1], lambda x: _from_chw(x, channels))
    if kind == "kernel":
        return name, _Entry(leaf, shape[::-1], lambda x: x.T)
    return name, _Entry(leaf, shape, lambda x: x)


def _from_chw(weight: np.ndarray, channels: int) -> np.ndarray:
    """`[out, C·H·W]` -> `[H·W·C, out]`."""
    out = weight.shape[0]
    return weight.reshape(out, channels, -1).transpose(2, 1, 0).reshape(-1, out)


def _compare(path: Path, arrays: Arrays, entries: Mapping[str, _Entry]) -> None:
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
