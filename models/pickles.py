"""Reads PyTorch's `.pth`, `.pt` and `.th` files without PyTorch, and without running what they hold.

Such a file is a pickle with the arrays beside it: in a zip archive since PyTorch 1.6, behind one another before. A
pickle can name any function for the reader to call; here it can name the few that make up tensors, and nothing else.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from treesurgeon.models.errors import CheckpointError, first_line

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch's magic number, pickled
PROTOCOL = 1001
DTYPES: Mapping[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
HOLDERS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts keep the weights


class _Storage:
    """A flat array that is read when the pickle has been."""

    def __init__(self, dtype: Any, count: int):
        self.dtype, self.count = np.dtype(dtype), count
        self.data: np.ndarray | None = None


class _Tensor:
    """A view of a storage."""

    def __init__(self, storage: Any, offset: int, shape: Any, strides: Any, *_: Any):
        self.storage, self.offset = storage, offset
        self.shape, self.strides = tuple(shape), tuple(strides)

    def array(self) -> np.ndarray:
        data, numbers = self.storage.data, (self.offset, *self.shape, *self.strides)
        if data is None or len(self.shape) != len(self.strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor without its data, or of a shape that makes no sense")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= len(data):
            raise ValueError("a tensor that reaches beyond its data")
        if math.prod(self.shape) > len(data):  # the same numbers many times over
            raise ValueError("a tensor larger than its data")
        steps = [step * data.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, steps).copy()


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in `ALLOWED`; storages come from `self.storage(key, dtype, count)`."""

    def __init__(self, file: Any, storage: Callable[[str, Any, int], _Storage]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"it names {module}.{name}, which is not part of a state dict")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in DTYPES.values() or any(part is not None for part in view):
            raise ValueError(f"a reference to {kind!r}")
        return self.storage(str(key), dtype, int(count))


def _load(file: Any, storage: Callable[[str, Any, int], _Storage]) -> Any:
    """The next pickle of a file. What it holds is numbered; a number that makes no sense would take all memory."""
    start = file.tell()
    for count, (code, number, _) in enumerate(pickletools.genops(file)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(number, int) and number > count:
            raise ValueError(f"object {count} is numbered {number}")
    file.seek(start)
    return _Unpickler(file, storage).load()


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state dict by PyTorch's names, also where a training script keeps it beside other things.

    Raises:
        CheckpointError: it is no such file, is damaged, or holds anything else than tensors, numbers and text.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
            file.seek(0)
            if start == LEGACY:
                saved = _read_legacy(file)
            elif zipfile.is_zipfile(file):
                saved = _read_zip(file)
            else:
                raise CheckpointError("it is none of PyTorch's")
        return _state_dict(saved)
    except CheckpointError as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a damaged pickle raises many types
        raise CheckpointError(
            f"checkpoint {path}: damaged, or not written by torch.save ({type(error).__name__}: {first_line(error)})"
        ) from error


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path}: a pickle can run any code when read, so only state dicts of tensors are read, and {why}. "
        "Save it as safetensors, once, where torch is installed:\n"
        "  import torch; from safetensors.torch import save_file\n"
        f"  saved = torch.load({path.name!r}, map_location='cpu', weights_only=True)\n"
        "  save_file({k: v.contiguous() for k, v in saved.get('state_dict', saved).items()}, "
        f"{path.with_suffix('.safetensors').name!r})"
    )


def _read_zip(file: Any) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        found = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise CheckpointError("it holds no data.pkl")
        root = found[0].removesuffix("data.pkl")
        if any(name.startswith(f"{root}code/") for name in names):
            raise CheckpointError("it is a TorchScript program")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError("its numbers are big-endian")
        storages: dict[str, _Storage] = {}

        def storage(key: str, dtype: Any, count: int) -> _Storage:
            if key not in storages:
                storages[key] = made = _Storage(dtype, count)
                made.data = np.frombuffer(archive.read(f"{root}data/{key}"), made.dtype, count)
            return storages[key]

        return _load(io.BytesIO(archive.read(found[0])), storage)


def _read_legacy(file: Any) -> Any:
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: Any, count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, count))

    def load() -> Any:
        return _load(file, storage)

    _, protocol, system, saved, keys = load(), load(), load(), load(), load()
    if protocol != PROTOCOL or not system.get("little_endian"):
        raise CheckpointError(f"it is of protocol {protocol}, or big-endian")
    for key in keys:
        made = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != made.count:
            raise ValueError(f"storage {key} holds {count} numbers, not {made.count}")
        made.data = np.frombuffer(file.read(count * made.dtype.itemsize), made.dtype, count)
    return saved


def _state_dict(saved: Any) -> dict[str, np.ndarray]:
    for holder in HOLDERS:
        if isinstance(saved, Mapping) and isinstance(saved.get(holder), Mapping):
            saved = saved[holder]
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"it holds a {type(saved).__name__}")
    out = {str(name): value.array() for name, value in saved.items() if isinstance(value, _Tensor)}
    if not out:
        raise CheckpointError(f"it holds no tensors, but {', '.join(map(str, list(saved)[:5])) or 'nothing'}")
    return out
